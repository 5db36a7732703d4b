"""AutoPrune: a language model designs, measures and improves the algorithm that prunes a language model."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the floors (pipeline/, actors/, …) stand beside this package; in a wheel they are inside it.
if not (Path(__file__).parent / "pipeline").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
