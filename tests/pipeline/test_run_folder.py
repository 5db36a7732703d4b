"""What a killed process leaves in a run's folder is cleared by whoever goes on with it, and by nobody else."""

from contextlib import ExitStack

import pytest
from local import small_config

from autoprune.models.errors import InputError
from autoprune.pipeline.run_folder import open_folder


def test_what_a_killed_export_left_goes_when_the_run_is_resumed_and_not_under_a_running_search(tmp_path):
    config = small_config(tmp_path)
    rest = config.folder / ".model-abcd"
    with ExitStack() as held:
        open_folder(config.folder, config, False, held)
        rest.mkdir()
        (rest / "model.safetensors").write_bytes(b"x")
        with ExitStack() as other, pytest.raises(InputError, match="another process is searching"):
            open_folder(config.folder, config, True, other)
        assert rest.exists()
    with ExitStack() as held:
        open_folder(config.folder, config, True, held)
        assert not rest.exists()
