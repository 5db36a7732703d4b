"""The folder of a run: made once, resumed with the same configuration, written by one process at a time."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from autoprune.actors.storage import Storage
from autoprune.models.errors import InputError, Lost
from autoprune.pipeline.checkpoint import Journal, write_atomic
from autoprune.pipeline.config import FREE, Config, difference, load_config
from autoprune.pipeline.ledger import JOURNAL
from autoprune.pipeline.mirror import CHECKPOINT, CONFIG_FILE, fetch
from autoprune.pipeline.preparation import place_of
from autoprune.pipeline.status import LOCK

MODEL = "model"  # the folder in it that holds the pruned model
LOOK = 1.0  # seconds for which a lock may be held by who only looks whether a search runs


def begun(config: Config) -> bool:
    """Whether the run of this configuration exists, here or in its storage."""
    if (config.folder / CONFIG_FILE).exists():
        return True
    return bool(config.storage) and _held(Storage(place_of(config)))


def _held(storage: Storage) -> bool:
    """Whether a storage has a run."""
    with _reaching(storage):
        return bool(storage.read(CONFIG_FILE))


@contextmanager
def _reaching(storage: Storage) -> Iterator[None]:
    """Raises Lost where a storage does not answer: it may be there again when the search is resumed."""
    try:
        yield
    except OSError as error:
        raise Lost(f"cannot get the run from storage {storage.uri}: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """This process is the only one that searches in a folder. Raises InputError where another does: two writers would
    spoil the journal, as when a job is tried again while the first one is still there."""
    with open(folder / LOCK, "a") as file:
        if not _lock(file):
            raise InputError(f"another process is searching in {folder}: wait for its end, or stop it")
        yield


def _check_same(stored: Config, config: Config, place: Path | str) -> None:
    """Raises InputError where a run that lies there cannot go on with this configuration."""
    changed = difference(stored, config)
    if changed:
        free = ", ".join(f"{section}.{name}".strip(".") for section, names in FREE.items() for name in names)
        raise InputError(
            f"the configuration of {place} was changed ({'; '.join(changed)}): start another run; what a run may "
            f"be resumed with other values of is {free}"
        )


def _lock(file: IO) -> bool:
    """Whether the file could be locked, or lies on a filesystem without locks."""
    end = time.monotonic() + LOOK
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        except OSError:
            return True
        else:
            return True


def open_folder(folder: Path, config: Config, resume: bool, held: ExitStack) -> None:
    """Make the run folder, or check that the one to resume has the same configuration; `held` keeps its lock."""
    stored = folder / CONFIG_FILE
    storage = Storage(place_of(config)) if config.storage else None
    if storage is not None and resume:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder))
        with _reaching(storage):
            if theirs := storage.read(CONFIG_FILE):
                with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
                    Path(file.name).write_bytes(theirs)
                    _check_same(load_config(Path(file.name)), config, storage.uri)
            fetch(storage, folder)
    if resume:
        if not stored.exists():
            raise InputError(f"no run to resume in {folder}: expected {CONFIG_FILE} there")
        _check_same(load_config(stored), config, folder)
        if storage is None:
            held.enter_context(locked(folder))
        for rest in folder.glob(f".{MODEL}-*"):  # of an export that was killed
            shutil.rmtree(rest, ignore_errors=True)
        # Damage is told now, not after minutes of loading models.
        if not Journal(folder / JOURNAL) and any((folder / CHECKPOINT).glob("generation-*")):
            raise InputError(
                f"{folder / JOURNAL} is empty, and there are checkpoints: restore it, or start another run"
            )
        write_atomic(stored, config.to_yaml().encode())
        return
    if storage is not None and _held(storage):
        raise InputError(f"{storage.uri} holds a run: add --resume {config.name} to go on, or choose another name")
    # What a kill in its first moment leaves: the lock, and part of the configuration.
    rest = (entry.name for entry in folder.iterdir() if entry.suffix != ".tmp") if folder.exists() else ()
    if any(name != LOCK for name in rest):
        raise InputError(f"run folder {folder} exists: add --resume {config.name} to go on, or choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder))
        write_atomic(stored, config.to_yaml().encode())
    except OSError as error:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --set runs=…"
        ) from None
