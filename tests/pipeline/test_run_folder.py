"""What a killed process leaves in a run's folder is cleared by whoever goes on with it, and by nobody else."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
from local import small_config

from autoprune.actors.storage import Storage
from autoprune.models.errors import InputError, Lost
from autoprune.pipeline.mirror import Mirror
from autoprune.pipeline.preparation import place_of
from autoprune.pipeline.run_folder import begun, open_folder


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


def test_what_a_kill_in_the_first_moment_leaves_is_no_run(tmp_path):
    config = small_config(tmp_path)
    config.folder.mkdir()
    for name in ("lock", ".config.yaml.77.tmp"):
        (config.folder / name).touch()
    assert not begun(config)
    with ExitStack() as held:
        open_folder(config.folder, config, False, held)
    assert begun(config)
    with ExitStack() as held, pytest.raises(InputError, match="exists: add --resume"):
        open_folder(config.folder, config, False, held)


def test_a_storage_that_is_away_is_one_clear_line_that_says_where(tmp_path, monkeypatch):
    config = replace(small_config(tmp_path), storage=str(tmp_path / "copy"))

    def away(*_):
        raise OSError("no network")

    monkeypatch.setattr(Storage, "read", away)
    for action in (
        lambda held: begun(config),
        lambda held: open_folder(config.folder, config, False, held),
        lambda held: open_folder(config.folder, config, True, held),
    ):
        with ExitStack() as held, pytest.raises(Lost, match=f"cannot get the run from storage {tmp_path}.*no network"):
            action(held)


def test_a_storage_of_another_configuration_takes_the_place_of_nothing(tmp_path):
    config = replace(small_config(tmp_path / "runs"), storage=str(tmp_path / "copies"))
    theirs = replace(config, seed=config.seed + 1)
    Mirror(Storage(place_of(config)), print, tmp_path).begin(theirs.to_yaml().encode(), [{"n": 0}, {"n": 1}])
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_bytes(config.to_yaml().encode())
    with ExitStack() as held, pytest.raises(InputError, match="configuration of .*copies.* was changed .*seed"):
        open_folder(config.folder, config, True, held)
    assert not (config.folder / "journal.jsonl").exists()
    assert (config.folder / "config.yaml").read_bytes() == config.to_yaml().encode()
