"""A run copied to another filesystem goes on from there, to the same end, whatever was lost and whenever it stopped."""

import json
import shutil

import pytest
from local import LocalEvaluator, SilentProgress, local_search, small_config, without_clock

from autoprune.actors.storage import Storage, below
from autoprune.models.errors import InputError, Lost, TakenOver
from autoprune.pipeline.checkpoint import journal_line
from autoprune.pipeline.mirror import Mirror, fetch
from autoprune.pipeline.search import Search


@pytest.fixture(params=["local", "objects"])
def storage(request, tmp_path) -> Storage:
    """A folder, or what behaves as an object store does: pyarrow's own file system in memory."""
    return Storage(str(tmp_path / "copy") if request.param == "local" else "mock:///bucket/copy")


def mirrored(folder, evaluator, storage):
    search = local_search(folder, evaluator)
    parts = search.config, search.folder, search.generator, search.evaluator, search.tracker, search.progress
    return Search(*parts, mirror=Mirror(storage, search.progress.say, search.folder))


def test_a_run_goes_on_from_its_copy(tmp_path, tiny_model, storage):
    whole = local_search(tmp_path / "whole", LocalEvaluator(tiny_model, 0.5))
    whole.run()
    measured = len(whole.evaluator.measured)
    evaluator = LocalEvaluator(tiny_model, 0.5)
    for stop in range(1, measured, 5):
        evaluator.die_after = stop
        with pytest.raises(KeyboardInterrupt):
            mirrored(tmp_path / "runs", evaluator, storage).run()
        shutil.rmtree(tmp_path / "runs")
        assert fetch(storage, small_config(tmp_path / "runs").folder)
    evaluator.die_after = None
    search = mirrored(tmp_path / "runs", evaluator, storage)
    search.run()
    assert without_clock(search.lineage) == without_clock(whole.lineage)
    assert len(evaluator.measured) == measured, "nothing was measured twice"
    joined = storage.names("journal")
    assert len(joined) <= 5, "a checkpoint makes one file of the records since the one before"
    assert len({name.split("/")[1] for name in storage.names("checkpoint")}) == 3 + 1, "and the parts"
    assert not fetch(storage, search.folder), "the folder has everything"


def test_a_search_that_begins_again_leaves_no_checkpoint_that_it_cannot_go_on_from(tmp_path, fresh, storage):
    mirrored(tmp_path, fresh, storage).run()
    checkpoints = tmp_path / "run" / "checkpoint"
    for path in checkpoints.glob("generation-*/spent.json"):
        path.write_text("damaged")
    fresh.die_after = len(fresh.measured)
    search = mirrored(tmp_path, fresh, storage)
    saved = []
    search.tracker.generation = lambda index, _: saved.append(sorted(p.name[-1] for p in checkpoints.glob("gen*")))
    search.run()
    assert saved == [[], ["0"], ["0", "1"], ["0", "1", "2"]], "each is there when the next one is due"
    assert not [line for line in search.progress.said if "storage" in line]


def test_a_checkpoint_in_a_storage_that_is_newer_than_the_one_that_is_saved_goes(tmp_path, storage):
    mirror = Mirror(storage, print, tmp_path)
    mirror.begin(b"config", [{"a": 1}])
    for generation in (9_999, 10_000, 2):
        folder = tmp_path / "checkpoint" / f"generation-{generation:04d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        mirror.saved(folder.name, [{"a": 1}])
        left = {name.split("/")[1] for name in storage.names("checkpoint")}
        assert folder.name in left and len(left) == (2 if generation == 10_000 else 1)


def test_of_two_searches_on_one_storage_the_first_stops(tmp_path, storage):
    said = SilentProgress()
    first, second = (Mirror(storage, said.say, tmp_path / name) for name in ("a", "b"))
    for name in ("a", "b"):
        (tmp_path / name / "checkpoint" / "generation-0001").mkdir(parents=True)
    records = [{"n": 0}]
    first.begin(b"config", records)
    first.saved("generation-0001", records)
    second.begin(b"config", records)
    before = {name: storage.read(name) for name in storage.names()}
    with pytest.raises(TakenOver, match="another search has taken over this run in .*: this one stops"):
        first.appended([*records, {"n": 1}])
    with pytest.raises(TakenOver):
        first.saved("generation-0001", [*records, {"n": 1}])
    first.close([*records, {"n": 1}])  # what ends must end
    assert {name: storage.read(name) for name in storage.names()} == before
    second.saved("generation-0001", records)
    assert not said.said


def test_what_another_search_wrote_while_this_one_started_is_not_lost(tmp_path, storage):
    """It had fetched before: its models took minutes to load."""
    first, second = (Mirror(storage, print, tmp_path / name) for name in ("a", "b"))
    records = [{"n": 0}]
    first.begin(b"config", records)
    fetched = list(records)
    first.appended([*records, {"n": 1}])
    with pytest.raises(Lost, match="another search went on with this run in .* while this one started"):
        second.begin(b"config", fetched)
    with pytest.raises(TakenOver):
        first.appended([*records, {"n": 1}, {"n": 2}])
    assert fetch(storage, tmp_path / "third")
    lines = (tmp_path / "third" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == [*records, {"n": 1}]


def test_the_mlflow_run_goes_with_the_copy_and_a_fetch_that_was_cut_off_is_done_again(tmp_path, storage):
    run, records = tmp_path / "run", [{"n": 0}]
    run.mkdir()
    (run / "mlflow.json").write_text("memory")
    Mirror(storage, print, run).begin(b"config", records)
    other = tmp_path / "other"
    assert fetch(storage, other) and (other / "mlflow.json").read_text() == "memory"
    (other / "config.yaml").unlink()  # the last thing that it writes
    assert fetch(storage, other) and (other / "config.yaml").read_bytes() == b"config"
    assert not fetch(storage, other)


def test_of_two_ways_on_the_longer_one_counts_and_none_is_lost(tmp_path, storage):
    Mirror(storage, print, tmp_path).begin(b"theirs", [{"n": number} for number in range(3)])
    folder = tmp_path / "mine"
    folder.mkdir()
    mine = [journal_line({"n": 0}), *(journal_line({"mine": number}) for number in range(1, 5))]
    (folder / "config.yaml").write_bytes(b"mine")
    journal = folder / "journal.jsonl"
    journal.write_bytes(b"".join(mine))
    with pytest.raises(InputError, match=r"holds another run than .*, or one that went another way at record 2: give"):
        fetch(storage, folder)
    assert journal.read_bytes() == b"".join(mine) and (folder / "config.yaml").read_bytes() == b"mine"
    journal.write_bytes(b"".join(mine[:2]))
    assert fetch(storage, folder) and (folder / "config.yaml").read_bytes() == b"theirs"
    assert journal.read_bytes().count(b"\n") == 3
    assert (folder / "journal.jsonl.lost").read_bytes() == b"".join(mine[:2])
    (folder / "journal.jsonl.lost").unlink()
    journal.write_bytes(mine[0] + mine[1].replace(b"mine", b"mind"))  # a damaged line is no way on
    assert fetch(storage, folder) and not (folder / "journal.jsonl.lost").exists()


class Broken:
    """A storage that fails for a while."""

    uri, failing, tried = "s3://broken", False, 0

    def __init__(self, storage):
        self._storage = storage

    def write(self, name, data):
        self.tried += 1
        if self.failing:
            raise OSError("no network")
        self._storage.write(name, data)

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_a_storage_that_is_away_gets_everything_later(storage, tmp_path, monkeypatch):
    monkeypatch.setattr("autoprune.pipeline.mirror.PAUSE", 0.0)
    broken, said = Broken(storage), SilentProgress()
    mirror, records = Mirror(broken, said.say, tmp_path), [{"a": 1}]
    mirror.begin(b"config", records)
    broken.failing = True
    for number in range(3):
        records.append({"n": number})
        mirror.appended(records)
    assert len(said.said) == 1 and "no network" in said.said[0]
    assert fetch(storage, tmp_path / "early") and (tmp_path / "early" / "journal.jsonl").read_text().count("\n") == 1
    broken.failing = False
    records.append({"last": True})
    mirror.appended(records)
    assert "everything again" in said.said[1]
    assert fetch(storage, tmp_path / "late")
    lines = (tmp_path / "late" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == records
    broken.failing = True
    with pytest.raises(InputError, match="cannot write to storage s3://broken: no network"):
        Mirror(broken, said.say, tmp_path).begin(b"config", records)


def test_a_storage_that_is_away_is_left_alone_for_a_while_and_tried_once_more_at_the_end(storage, tmp_path):
    broken, said = Broken(storage), SilentProgress()
    mirror, records = Mirror(broken, said.say, tmp_path), []
    mirror.begin(b"config", records)
    broken.failing, broken.tried = True, 0
    for number in range(5):
        records.append({"n": number})
        mirror.appended(records)
        mirror.saved("generation-0001", records)
    assert broken.tried == 1, "each try may take a time-out"
    mirror.close(records, hurry=True)
    assert broken.tried == 1 and said.said[-1].startswith("storage s3://broken lacks 5 records")
    mirror.close(records)
    assert broken.tried == 2 and said.said[-1].startswith("storage s3://broken lacks 5 records")
    broken.failing = False
    mirror.close(records)
    assert fetch(storage, tmp_path / "run")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes().count(b"\n") == 5


def test_an_upload_that_was_cut_off_leaves_a_run_that_goes_on(storage, tmp_path):
    """Object stores show the file empty then."""
    records = [{"n": 0}, {"n": 1}]
    mirror = Mirror(storage, print, tmp_path)
    mirror.begin(b"config", records[:1])
    mirror.appended(records)
    for name in ("config.yaml", "journal/00000002-00000002.jsonl"):
        storage.write(name, b"")
    assert not fetch(storage, tmp_path / "elsewhere"), "no configuration, no run"
    Mirror(storage, print, tmp_path).begin(b"config", records)
    assert fetch(storage, tmp_path / "run")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes().count(b"\n") == 2


def test_what_a_search_ended_with_replaces_an_earlier_end(storage, tmp_path):
    run, said = tmp_path / "run", []
    (run / "model").mkdir(parents=True)
    for name in ("report.html", "model/part-1", "model/part-2", "model/autoprune.json"):
        (run / name).write_text(f"first {name}")
    mirror = Mirror(storage, said.append, run)
    mirror.concluded([run / "report.html", *sorted((run / "model").iterdir())])
    (run / "model" / "part-2").unlink()
    (run / "model" / "part-1").write_text("second")
    mirror.concluded([run / "report.html", *sorted((run / "model").iterdir())])
    assert storage.names("model") == ["model/autoprune.json", "model/part-1"]
    assert storage.read("model/part-1") == b"second" and storage.read("report.html") == b"first report.html"
    assert not said
    mirror.concluded([run / "report.html", run / "model" / "part-2"])  # it cannot be read
    assert len(said) == 1 and "lacks what the search ended with" in said[0] and str(run) in said[0]


def test_what_a_kill_leaves_of_a_journal_that_was_being_joined_is_whole(storage, tmp_path):
    records = [{"n": number} for number in range(4)]
    mirror = Mirror(storage, print, tmp_path)
    mirror.begin(b"config", records[:2])
    mirror.appended(records[:3])
    mirror._write_journal(0, records)  # and then nothing: the old parts are still there
    assert fetch(storage, tmp_path / "run")
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == records
    storage.delete("journal/00000000-00000003.jsonl", "journal/00000000-00000001.jsonl")
    with pytest.raises(InputError, match="lacks record 0"):
        fetch(storage, tmp_path / "other")


def test_a_storage_that_does_not_exist_is_refused_in_a_line():
    with pytest.raises(InputError, match="nonsense://x is no folder that pyarrow.fs can open"):
        Storage("nonsense://x")


def test_a_folder_of_a_storage_is_read_and_written_as_files(storage):
    with storage.writing("state", last="facts") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "facts").write_text("f")
        (folder / "big").write_bytes(b"b" * 1000)
    assert storage.names("state") == ["state/big", "state/facts"]
    with storage.reading("state") as folder:
        assert (folder / "big").read_bytes() == b"b" * 1000
    with storage.reading("nothing") as folder:
        assert not (folder / "facts").exists()
    storage.delete("state/big", "state/never")
    assert storage.names() == ["state/facts"] and storage.read("state/big") is None


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "modèle", "m#1", "a?b", "60%", "[x]/actors/y"])
def test_any_name_is_a_folder_of_a_uri(tmp_path, name):
    assert Storage(below(tmp_path.as_uri(), name)).local == tmp_path / name
    assert below("s3://bucket/a/?region=x", "b") == "s3://bucket/a/b?region=x"
    assert below(str(tmp_path), name) == str(tmp_path / name)


@pytest.mark.parametrize("uri, key", [("s3://bucket/model@main", "mine"), ("s3://its:secret@bucket/a", "its")])
def test_keys_of_the_environment_are_kept_where_the_uri_has_none(monkeypatch, uri, key):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    opened = Storage(f"{uri}?region=x")
    monkeypatch.undo()
    _, (options,) = opened._fs.__reduce__()
    assert options["access_key"] == key
