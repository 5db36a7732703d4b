"""State on disk that survives a kill at any moment: atomic files, a journal, checkpoints. JSON only, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoprune.actors.storage import sync_folder, write_atomic
from autoprune.models.errors import InputError

SCHEMA_VERSION = 5
KEPT = 3  # checkpoints: the newest, and two to fall back on when a disk damages it
MANIFEST = "manifest.json"
PARTS = "parts"  # folder of files that many checkpoints rest on, beside theirs


def journal_line(record: dict) -> bytes:
    """A record as it stands in the journal."""
    return _line(json.dumps(record))  # ASCII: no character can split a line


def _line(record: str) -> bytes:
    """One line of the journal; the checksum is over the record's exact text."""
    checksum = hashlib.sha256(record.encode()).hexdigest()[:16]
    return f'{{"sha256":"{checksum}","record":{record}}}\n'.encode()


_RECORD_START = len(_line("")) - len("}\n")


class Journal(Sequence):
    """Append-only JSON lines `{"sha256": …, "record": {…}}`; what was appended is on disk when `append` returns.

    A sequence of the records, as JSON gives them back (tuples have become lists), each read when it is asked for: a
    long search has more of them than memory. Opening an existing journal reads it once. A last line without its newline
    was being written when the driver died: nobody has used it, so it is cut off. Any other line that does not match its
    checksum raises InputError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("q")  # of each line, in bytes
        self._size = 0
        if not path.exists():
            write_atomic(path, b"")
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                _record(self.path, line, len(self._starts) + 1)
                self._starts.append(self._size)
                self._size += len(line)
        if self._size < path.stat().st_size:
            os.truncate(path, self._size)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        with open(self.path, "rb") as file:
            file.seek(self._starts[place])
            return _record(self.path, file.readline(), place + 1)

    def append(self, record: dict) -> None:
        line = journal_line(record)
        with open(self.path, "r+b") as file:
            # Written after the last whole line, not at the end: an append that failed half-way leaves no trace.
            file.seek(self._size)
            file.write(line)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._starts.append(self._size)
        self._size += len(line)


def is_whole(line: bytes) -> bool:
    """Whether a line of a journal matches its checksum."""
    try:
        return line == _line(line[_RECORD_START:-2].decode("ascii"))
    except ValueError:
        return False  # not ASCII: damaged like any other


def _record(path: Path, line: bytes, number: int) -> dict:
    try:
        if is_whole(line):
            return json.loads(line[_RECORD_START:-2])
    except ValueError:
        pass  # not JSON: damaged like any other
    raise InputError(
        f"{path}: line {number} is damaged (its checksum does not match); "
        f"restore the file from a copy, or start a new run"
    )


Entry = Mapping[str, object]  # of a file in a manifest: its sha256 and size


@dataclass(frozen=True)
class Loaded:
    """A valid checkpoint, or where none of those that are there is valid an empty one, of generation −1.

    files: its own, by name. parts: those that it shares with others, in the order of its manifest; entries: what the
    manifest says of these. damaged: one line for each newer checkpoint that had to be passed over.
    """

    generation: int
    files: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Generation and path of every checkpoint folder, oldest first."""
    found = [(re.fullmatch(r"generation-(\d+)", path.name), path) for path in folder.glob("generation-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoint_name(generation: int) -> str:
    return f"generation-{generation:04d}"


def _entry(data: bytes) -> Entry:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def save_part(folder: Path, name: str, data: bytes) -> Entry:
    """Write a file that this checkpoint and later ones rest on, before the checkpoint; returns its entry for them."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / PARTS / name, data)
    return _entry(data)


def _with_manifest(generation: int, files: Mapping[str, bytes], parts: Mapping[str, Entry]) -> dict[str, bytes]:
    """The files of a checkpoint and, last, the manifest that vouches for them and for its parts."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "generation": generation,
        "files": {name: _entry(data) for name, data in files.items()},
        "parts": dict(parts),
    }
    return {**files, MANIFEST: json.dumps(manifest).encode()}


def save_checkpoint(
    folder: Path, generation: int, files: Mapping[str, bytes], parts: Mapping[str, Entry] | None = None
) -> Path:
    """Write `folder/generation-0003/` with the files and, last, their manifest; keep the last three.

    files: name (no subfolders) → content. parts: what was written by `save_part`, now or for earlier ones: what a
    search adds to is so written once, and not anew with every checkpoint. The folder gets its name only when it is
    complete, so a kill in the middle leaves at most `.writing`, which the next save clears away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / ".writing"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for name, data in _with_manifest(generation, files, parts or {}).items():
        write_atomic(writing / name, data)
    path = folder / checkpoint_name(generation)
    if path.exists():  # a resumed search does a generation again
        shutil.rmtree(path)
    os.replace(writing, path)
    sync_folder(folder)
    for _, old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return path


def drop_newer(folder: Path, generation: int) -> None:
    """Remove the checkpoints after a generation, which a search could not go on from: those that it writes now would be
    taken for older ones than these."""
    for number, path in _checkpoints(folder):
        if number > generation:
            shutil.rmtree(path)


def _read_checkpoint(path: Path, generation: int) -> Loaded:
    """One checkpoint; ValueError or OSError says what is wrong with it."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{MANIFEST} is not of schema version {SCHEMA_VERSION}")
    listed = manifest.get("files"), manifest.get("parts")
    if manifest.get("generation") != generation or not all(isinstance(entries, dict) for entries in listed):
        raise ValueError(f"{MANIFEST} does not describe generation {generation}")
    files, parts = listed
    return Loaded(generation, _read_all(path, files), _read_all(path.parent / PARTS, parts), parts)


def _read_all(folder: Path, entries: Mapping[str, Entry]) -> dict[str, bytes]:
    found = {}
    for name, expected in entries.items():
        data = (folder / name).read_bytes()
        if _entry(data) != expected:
            raise ValueError(f"{name} does not match its hash in {MANIFEST}")
        found[name] = data
    return found


def load_checkpoint(folder: Path) -> Loaded | None:
    """The newest checkpoint whose manifest and every hash are right; None when there never was one."""
    damaged = []
    for generation, path in reversed(_checkpoints(folder)):
        try:
            return replace(_read_checkpoint(path, generation), damaged=damaged)
        except FileNotFoundError as error:
            damaged.append(f"{path.name}: {Path(error.filename).name} is missing")
        except (OSError, ValueError) as error:
            damaged.append(f"{path.name}: {error}")
    return Loaded(-1, damaged=damaged) if damaged else None
