"""Checkpoints and journal under every kind of damage that a kill or a disk can do."""

import json
import os
import signal
import subprocess
import sys

import pytest

from autoprune.models.errors import InputError
from autoprune.pipeline.checkpoint import (
    Journal,
    load_checkpoint,
    save_checkpoint,
    save_part,
    write_atomic,
)

RECORDS = [
    {"answer": "line\nbreak \u2028 é \ud800"},
    {"tuple": (1, 2.5, None)},
    {"nan": float("inf")},
]
READ_BACK = [RECORDS[0], {"tuple": [1, 2.5, None]}, RECORDS[2]]


def journal_with_records(path):
    journal = Journal(path)
    for record in RECORDS:
        journal.append(record)
    return journal


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_write_atomic_keeps_the_old_bytes_when_writing_fails(tmp_path):
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_journal_gives_back_what_was_appended(tmp_path):
    journal = journal_with_records(tmp_path / "journal.jsonl")
    assert list(journal) == READ_BACK
    assert list(Journal(journal.path)) == READ_BACK and journal[1:] == READ_BACK[1:] and journal[-1] == READ_BACK[-1]
    lines = journal.path.read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == READ_BACK  # plain JSON lines for any other reader


def test_journal_cut_anywhere_keeps_the_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    data = journal_with_records(path).path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        journal = Journal(path)
        assert list(journal) == READ_BACK[:whole]
        journal.append({"after": size})
        assert list(Journal(path)) == [*READ_BACK[:whole], {"after": size}]


def test_any_flipped_byte_in_a_whole_line_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    data = journal_with_records(path).path.read_bytes()
    for position in range(len(data) - 1):
        if data[position : position + 1] == b"\n":
            continue  # joins two lines: covered by the line before
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x81]) + data[position + 1 :])
        number = data[:position].count(b"\n") + 1
        with pytest.raises(InputError, match=rf"journal\.jsonl: line {number} is damaged"):
            Journal(path)


def test_a_failed_append_leaves_no_trace(tmp_path):
    journal = journal_with_records(tmp_path / "journal.jsonl")
    with pytest.raises(TypeError):
        journal.append({"no": object()})
    with open(journal.path, "ab") as file:
        file.write(b'{"sha256":"half a line of an append that the disk had no room for')
    journal.append({"next": 1})
    assert list(Journal(journal.path)) == [*READ_BACK, {"next": 1}]


def test_everything_appended_before_a_kill_is_there(tmp_path):
    """A child appends and reports each record only when append has returned; it is killed with SIGKILL."""
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys; from pathlib import Path; from autoprune.pipeline.checkpoint import Journal\n"
        "j, i = Journal(Path(sys.argv[1])), 0\n"
        "while True:\n  j.append({'i': i}); print(i, flush=True); i += 1\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    reported = [int(child.stdout.readline()) for _ in range(20)]
    child.send_signal(signal.SIGKILL)
    reported += [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    records = list(Journal(path))
    assert [r["i"] for r in records[: len(reported)]] == reported
    assert len(records) - len(reported) in (
        0,
        1,
    )  # one may be whole and not yet reported


def save(folder, generation):
    files = {"spent.json": b'{"generation": %d}' % generation, "state.json": b"{}"}
    parts = {f"{n}.json": save_part(folder, f"{n}.json", b"part %d" % n) for n in range(generation - 1, generation + 1)}
    return save_checkpoint(folder, generation, files, parts)


def test_checkpoints_round_trip_and_only_three_are_kept(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoints") is None
    for generation in range(9_998, 10_003):  # sorted as numbers, not as text
        path = save(tmp_path / "checkpoints", generation)
    loaded = load_checkpoint(tmp_path / "checkpoints")
    assert path.name == "generation-10002" and (loaded.generation, loaded.damaged) == (10_002, [])
    assert loaded.files == {"spent.json": b'{"generation": 10002}', "state.json": b"{}"}
    assert loaded.parts == {"10001.json": b"part 10001", "10002.json": b"part 10002"}
    names = {"generation-10000", "generation-10001", "generation-10002", "parts"}
    assert set(os.listdir(tmp_path / "checkpoints")) == names


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


DAMAGES = {
    "flipped byte": (lambda p: flip(p / "state.json"), "state.json does not match"),
    "cut file": (
        lambda p: os.truncate(p / "spent.json", 3),
        "spent.json does not match",
    ),
    "flipped byte of a part": (lambda p: flip(p.parent / "parts" / "2.json"), "2.json does not match"),
    "missing part": (lambda p: (p.parent / "parts" / "2.json").unlink(), "2.json is missing"),
    "missing file": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (
        lambda p: (p / "manifest.json").unlink(),
        "manifest.json is missing",
    ),
    "manifest not JSON": (lambda p: flip(p / "manifest.json"), "generation-0002: "),
    "other schema": (lambda p: edit_manifest(p, schema_version=1), "schema version 5"),
    "other generation": (
        lambda p: edit_manifest(p, generation=3),
        "does not describe generation 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, damage):
    hurt, message = DAMAGES[damage]
    save(tmp_path, 1)
    hurt(save(tmp_path, 2))
    loaded = load_checkpoint(tmp_path)
    assert loaded.generation == 1
    assert len(loaded.damaged) == 1 and "generation-0002" in loaded.damaged[0] and message in loaded.damaged[0]
    save(tmp_path, 2)  # the resumed search does that generation again
    assert load_checkpoint(tmp_path).generation == 2


def test_a_checkpoint_cut_anywhere_in_its_manifest_is_passed_over(tmp_path):
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    whole = manifest.read_bytes()
    for size in range(len(whole)):
        manifest.write_bytes(whole[:size])
        assert load_checkpoint(tmp_path).generation == 1
    manifest.write_bytes(whole)
    assert load_checkpoint(tmp_path).generation == 2


def test_where_no_checkpoint_is_valid_it_is_said_of_each(tmp_path):
    for generation in (1, 2):
        flip(save(tmp_path, generation) / "state.json")
    loaded = load_checkpoint(tmp_path)
    assert (loaded.generation, loaded.files, loaded.parts) == (-1, {}, {})
    assert [line.partition(":")[0] for line in loaded.damaged] == ["generation-0002", "generation-0001"]


def test_a_kill_while_saving_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "state.json").write_bytes(b"half")
    assert load_checkpoint(tmp_path).generation == 1
    save(tmp_path, 2)
    assert set(os.listdir(tmp_path)) == {"generation-0001", "generation-0002", "parts"}
