"""State on disk that survives a kill at any moment: atomic files, a journal, checkpoints. JSON only, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from autoprune.actors.storage import sync_folder, write_atomic
from autoprune.models.errors import InputError

SCHEMA_VERSION = 4
KEPT = 3  # checkpoints: the newest, and two to fall back on when a disk damages it
MANIFEST = "manifest.json"


def journal_line(record: dict) -> bytes:
    """A record as it stands in the journal."""
    return _line(json.dumps(record))  # ASCII: no character can split a line


def _line(record: str) -> bytes:
    """One line of the journal; the checksum is over the record's exact text."""
    checksum = hashlib.sha256(record.encode()).hexdigest()[:16]
    return f'{{"sha256":"{checksum}","record":{record}}}\n'.encode()


_RECORD_START = len(_line("")) - len("}\n")


class Journal:
    """Append-only JSON lines `{"sha256": …, "record": {…}}`; what was appended is on disk when `append` returns.

    Opening an existing journal reads it. A last line without its newline was being written when the driver died:
    nobody has used it, so it is cut off. Any other line that does not match its checksum raises InputError.

    records: what the journal holds, in order, as JSON gives it back (tuples have become lists).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict] = []
        if not path.exists():
            write_atomic(path, b"")
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            self.records.append(self._read(line, number))
        self._size = len(whole)
        if len(whole) < len(data):
            os.truncate(path, self._size)

    def _read(self, line: bytes, number: int) -> dict:
        try:
            record = line[_RECORD_START:-2].decode("ascii")
            if line == _line(record):
                return json.loads(record)
        except ValueError:
            pass  # not ASCII, or not JSON: damaged like any other
        raise InputError(
            f"{self.path}: line {number} is damaged (its checksum does not match); "
            f"restore the file from a copy, or start a new run"
        )

    def append(self, record: dict) -> None:
        line = journal_line(record)
        with open(self.path, "r+b") as file:
            # Written after the last whole line, not at the end: an append that failed half-way leaves no trace.
            file.seek(self._size)
            file.write(line)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self.records.append(self._read(line, len(self.records) + 1))


@dataclass(frozen=True)
class Loaded:
    """A valid checkpoint. damaged: one line for each newer one that had to be passed over."""

    path: Path
    generation: int
    files: dict[str, bytes]
    damaged: list[str]


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Generation and path of every checkpoint folder, oldest first."""
    found = [(re.fullmatch(r"generation-(\d+)", path.name), path) for path in folder.glob("generation-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def checkpoint_name(generation: int) -> str:
    return f"generation-{generation:04d}"


def with_manifest(generation: int, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a checkpoint and, last, the manifest that vouches for them."""
    hashes = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    manifest = {"schema_version": SCHEMA_VERSION, "generation": generation, "files": hashes}
    return {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}


def save_checkpoint(folder: Path, generation: int, files: dict[str, bytes]) -> Path:
    """Write `folder/generation-0003/` with the files and, last, their manifest; keep the last three.

    files: name (no subfolders) → content. The folder gets its name only when it is complete, so a kill in the middle
    leaves at most `.writing`, which the next save clears away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / ".writing"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for name, data in with_manifest(generation, files).items():
        write_atomic(writing / name, data)
    path = folder / checkpoint_name(generation)
    if path.exists():  # a resumed search does a generation again
        shutil.rmtree(path)
    os.replace(writing, path)
    sync_folder(folder)
    for _, old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return path


def _read_checkpoint(path: Path, generation: int) -> dict[str, bytes]:
    """The files of one checkpoint; ValueError or OSError says what is wrong with it."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{MANIFEST} is not of schema version {SCHEMA_VERSION}")
    if manifest.get("generation") != generation or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} does not describe generation {generation}")
    files = {}
    for name, expected in manifest["files"].items():
        data = (path / name).read_bytes()
        if {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} != expected:
            raise ValueError(f"{name} does not match its hash in {MANIFEST}")
        files[name] = data
    return files


def load_checkpoint(folder: Path) -> Loaded | None:
    """The newest checkpoint whose manifest and every hash are right; None when there never was one.

    Raises InputError when there are checkpoints and none is valid.
    """
    damaged = []
    for generation, path in reversed(_checkpoints(folder)):
        try:
            return Loaded(path, generation, _read_checkpoint(path, generation), damaged)
        except FileNotFoundError as error:
            damaged.append(f"{path.name}: {Path(error.filename).name} is missing")
        except (OSError, ValueError) as error:
            damaged.append(f"{path.name}: {error}")
    if damaged:
        raise InputError(
            f"{folder}: no valid checkpoint ({'; '.join(damaged)}); restore one from a copy, or start a new run"
        )
    return None
