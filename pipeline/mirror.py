"""A copy of a run on another filesystem, so that a search goes on where its machine did not: `storage` in the
configuration, a folder that pyarrow.fs knows.

Files are written whole, and a checkpoint's manifest after what it vouches for: what an object store shows is always
something to go on from. Of the journal there is an object for each record since the last checkpoint, and before it one
for the records between two checkpoints.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autoprune.actors.storage import Storage
from autoprune.models.errors import InputError, Lost, TakenOver
from autoprune.pipeline.checkpoint import KEPT, MANIFEST, PARTS, is_whole, journal_line, write_atomic

CONFIG_FILE, JOURNAL, CHECKPOINT = "config.yaml", "journal", "checkpoint"
MEMORY = "mlflow.json"  # of the run folder: which MLflow run this is
WRITER = "writer"  # holds a token of the search that writes there now
PART = re.compile(r"journal/(\d+)-(\d+)\.jsonl")  # of the records first … last
LOST = "journal.jsonl.lost"  # of the run folder: what another machine's way on has taken the place of
HUNG = 2.0  # seconds: a write that took longer when a signal ended it was of a storage that does not answer
PAUSE = 30.0  # seconds for which a storage that failed is left alone: each try may take a time-out


class Mirror:
    """Copies what a run writes. A storage that fails is told of, and gets what it missed with a later record."""

    def __init__(self, storage: Storage, say: Callable[[str], None], folder: Path) -> None:
        """folder: of the run."""
        self._storage, self._say, self._folder = storage, say, folder
        self._sent = self._joined = 0  # records: that are there, and that are in objects of a checkpoint
        self._parts: set[str] = set()  # of checkpoints, that are there
        self._owed = ""  # a checkpoint that is not there yet
        self._failing, self._failed = False, 0.0
        self._token = secrets.token_hex(8).encode()

    def begin(self, config: bytes, records: Sequence[dict]) -> None:
        """The run goes on from here: its configuration, and what its journal holds already. Raises InputError where
        nothing can be written; Lost where the journal there is longer. Whoever wrote there until now is to find out
        (see `_own`)."""
        try:
            self._storage.write(WRITER, self._token)
            if len(_journal(self._storage)) > len(records):
                raise Lost(f"another search went on with this run in {self._storage.uri} while this one started")
            self._storage.write(CONFIG_FILE, config)
            if (self._folder / MEMORY).exists():
                self._storage.write(MEMORY, (self._folder / MEMORY).read_bytes())
            self._join(records)
        except OSError as error:
            raise InputError(f"cannot write to storage {self._storage.uri}: {error}; check it and its rights") from None

    def appended(self, records: Sequence[dict]) -> None:
        """Copy the records of the journal that are not there yet, and a checkpoint that could not be written."""
        owed = self._owed
        self._try(lambda: self._save(owed, records) if owed else self._append(records))

    def saved(self, checkpoint: str, records: Sequence[dict]) -> None:
        """Copy a checkpoint of this name, and make one object of the journal's records since the one before."""
        self._owed = checkpoint
        self._try(lambda: self._save(checkpoint, records))

    def close(self, records: Sequence[dict], hurry: bool = False) -> None:
        """The search ends: whatever the storage lacks is tried once more, and told of if it stays so. hurry: it is not
        tried where the storage failed before, since that may take minutes."""
        try:
            if not (hurry and self._failing):
                self._failed = 0.0
                self.appended(records)
        except TakenOver:  # it was raised before, or the search is over in any case
            return
        if self._failing:
            self._say(
                f"storage {self._storage.uri} lacks {len(records) - self._sent} records: the run's folder has them"
            )

    def concluded(self, files: Sequence[Path]) -> None:
        """Copy what the search ended with: files of the run's folder, in this order. They take the place of
        those of an earlier end."""
        names = [file.relative_to(self._folder).as_posix() for file in files]
        folders = sorted({name.partition("/")[0] for name in names if "/" in name})
        try:
            for folder in folders:
                self._storage.delete(*(name for name in self._storage.names(folder) if name not in names))
            for file, name in zip(files, names, strict=True):
                self._storage.take(file, name)
        except OSError as error:
            self._say(f"storage {self._storage.uri} lacks what the search ended with ({error}): {self._folder} has it")

    def _own(self) -> None:
        """Raises TakenOver where another search has begun there since: a lock of the run's folder, which each machine
        has for itself, keeps no two of them apart."""
        there = self._storage.read(WRITER)
        if there is not None and there != self._token:
            raise TakenOver(f"another search has taken over this run in {self._storage.uri}: this one stops")

    def _append(self, records: Sequence[dict]) -> None:
        if self._sent < len(records):
            self._own()
            self._write_journal(self._sent, records)

    def _write_journal(self, first: int, records: Sequence[dict]) -> None:
        name = f"{JOURNAL}/{first:08d}-{len(records) - 1:08d}.jsonl"
        self._storage.write(name, b"".join(journal_line(record) for record in records[first:]))
        self._sent = len(records)

    def _join(self, records: Sequence[dict]) -> None:
        self._own()
        old = [part[0] for part in _parts(self._storage) if int(part[1]) >= self._joined]
        if self._joined < len(records):
            self._write_journal(self._joined, records)
        whole = f"{JOURNAL}/{self._joined:08d}-{len(records) - 1:08d}.jsonl"
        self._storage.delete(*(name for name in old if name != whole))
        self._joined = len(records)

    def _save(self, checkpoint: str, records: Sequence[dict]) -> None:
        self._own()
        self._append(records)  # a checkpoint speaks of records: they come first
        here = self._folder / CHECKPOINT
        for path in sorted((here / PARTS).glob("*")):
            if path.name not in self._parts:
                self._storage.write(f"{CHECKPOINT}/{PARTS}/{path.name}", path.read_bytes())
                self._parts.add(path.name)
        self._storage.delete(f"{CHECKPOINT}/{checkpoint}/{MANIFEST}")
        for path in sorted((here / checkpoint).iterdir(), key=lambda path: path.name == MANIFEST):
            self._storage.write(f"{CHECKPOINT}/{checkpoint}/{path.name}", path.read_bytes())
        there = [name for name in self._storage.names(CHECKPOINT) if Path(name).parent.name != PARTS]
        # Newer ones than this are what the search could not go on from.
        names = {Path(name).parent.name for name in there}
        kept = sorted((name for name in names if _number(name) <= _number(checkpoint)), key=_number)[-KEPT:]
        gone = [name for name in there if Path(name).parent.name not in kept]
        # The manifest first: without it the rest is no checkpoint.
        self._storage.delete(*sorted(gone, key=lambda name: Path(name).name != MANIFEST))
        self._join(records)
        self._owed = ""

    def _try(self, write: Callable[[], None]) -> None:
        if self._failing and time.monotonic() - self._failed < PAUSE:
            return
        began = time.monotonic()
        try:
            write()
        except KeyboardInterrupt:
            self._failing = self._failing or time.monotonic() - began > HUNG
            raise
        except OSError as error:
            self._failed = time.monotonic()
            if not self._failing:
                self._say(f"storage {self._storage.uri} cannot be written ({error}): it gets the rest when it can")
            self._failing = True
        else:
            if self._failing:
                self._say(f"storage {self._storage.uri} has everything again")
            self._failing = False


def fetch(storage: Storage, folder: Path) -> bool:
    """Make a run's folder from its copy, where the copy has more than the folder. Whether that was so.

    Where two machines went on with a run, neither journal goes on from the other: the longer one counts. Here the other
    is set aside; in the storage it is not, which raises InputError, as does a gap in the copy's journal.
    """
    config = storage.read(CONFIG_FILE)
    if not config:
        return False
    lines = _journal(storage)
    journal = folder / "journal.jsonl"
    mine = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    mine = [line for line in mine if line.endswith(b"\n")]  # the last one may have been cut off by a kill
    pairs = enumerate(zip(mine, lines, strict=False), start=1)
    parted = next((n for n, (one, other) in pairs if one != other and is_whole(one) and is_whole(other)), None)
    if parted and len(lines) <= len(mine):
        raise InputError(
            f"{storage.uri} holds another run than {folder}, or one that went another way at record {parted}: give "
            "another storage, or move the folder away to go on with what is there"
        )
    if parted:
        os.replace(journal, journal.with_name(LOST))
    if len(lines) <= len(mine) and journal.exists() and (folder / CONFIG_FILE).exists():  # it is written last
        return False
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)  # it may be of another way on from the same journal
    names = storage.names(CHECKPOINT)
    whole = {f"{CHECKPOINT}/{PARTS}", *(str(Path(name).parent) for name in names if Path(name).name == MANIFEST)}
    for name in (name for name in names if str(Path(name).parent) in whole):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, storage.read(name))
    memory = storage.read(MEMORY)
    if memory is not None:
        write_atomic(folder / MEMORY, memory)
    write_atomic(journal, b"".join(lines))
    write_atomic(folder / CONFIG_FILE, config)
    return True


def _number(checkpoint: str) -> int:
    """The generation of a checkpoint's name."""
    return int(checkpoint.rpartition("-")[2])


def _parts(storage: Storage) -> list[re.Match]:
    return list(filter(None, map(PART.fullmatch, storage.names(JOURNAL))))


def _journal(storage: Storage) -> list[bytes]:
    """Its lines, in order, from whatever files there are: one may hold what others hold, too."""
    lines: list[bytes] = []
    parts = sorted((int(part[1]), -int(part[2]), part[0]) for part in _parts(storage))
    for first, _, name in parts:
        if first > len(lines):
            raise InputError(f"{storage.uri}: the journal lacks record {len(lines)}: restore it from a copy")
        lines += (storage.read(name) or b"").splitlines(keepends=True)[len(lines) - first :]
    return lines
