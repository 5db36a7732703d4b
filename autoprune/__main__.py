import sys

from autoprune.pipeline.cli import main

sys.exit(main())
