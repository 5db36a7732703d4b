"""What is released: the same bytes wherever it is built, what it holds, and three ways to have it, each in a clean
environment beside Hugging Face's `kernels`, whose name is that of a folder of ours."""

import email
import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

import autoprune

ROOT = Path(__file__).parents[1]
PACKAGES = {"autoprune": "autoprune"} | {
    folder: f"autoprune/{folder}" for folder in ("pipeline", "actors", "models", "algorithms", "kernels")
}
EPOCH = 1_700_000_000
# One that the locked transformers uses where it is there. It is in no lock, since nothing of ours needs it.
KERNELS = "kernels==0.17.2 --hash=sha256:f4be3337070e6979bb419e513d9a51ddfbfe61a707afd6aa7f3cb6a61764a46a"
INSTALLED = Path(sysconfig.get_path("purelib"))


@functools.cache
def sources() -> list[str]:
    """Files of this checkout that are committed, or would be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return sorted(name for name in set(done.stdout.split("\0")) if name and (ROOT / name).is_file())


def checkout(folder: Path, moment: int, umask: int) -> Path:
    """A clone made at that moment by someone with that umask, in which something was run already."""
    for name in [*sources(), "kernels/__pycache__/masks.cpython-311.pyc", "tests/__pycache__/tiny.cpython-311.pyc"]:
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes() if (ROOT / name).is_file() else b"compiled")
        copy.chmod(0o666 & ~umask)
        os.utime(copy, (moment, moment))
    return folder


BUILD = "import sys; from setuptools.build_meta import *; to = sys.argv[1]; build_sdist(to); build_wheel(to)"
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
BUILT_AT = CLEAN | {"SOURCE_DATE_EPOCH": str(EPOCH)}


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> list[tuple[Path, Path]]:
    """(wheel, sdist) of each of two clones that differ in all that must not matter."""
    running = []
    for name, moment, umask in (("autoprune", 1_600_000_000, 0o022), ("another-clone", 1_650_000_001, 0o077)):
        folder = checkout(tmp_path_factory.mktemp("clone") / name, moment, umask)
        target = tmp_path_factory.mktemp("dist")
        command = [sys.executable, "-c", BUILD, str(target)]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        running.append((target, subprocess.Popen(command, cwd=folder, env=BUILT_AT, umask=umask, **options)))
    for _, process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
    return [(next(target.glob("*.whl")), next(target.glob("*.tar.gz"))) for target, _ in running]


@pytest.fixture(scope="module")
def wheel(builds) -> Path:
    return builds[0][0]


@pytest.fixture(scope="module")
def sdist(builds) -> Path:
    return builds[0][1]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_two_clones_give_the_same_bytes(builds):
    for first, second in zip(*builds, strict=True):
        assert first.name == second.name
        assert digest(first) == digest(second), f"compare {first} and {second}"


def test_a_wheel_of_the_sdist_is_the_wheel_of_the_checkout(wheel, sdist, tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True, env=BUILT_AT)
    assert digest(tmp_path / wheel.name) == digest(wheel)


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {}
    for name in sources():
        folder, _, rest = name.partition("/")
        if folder in PACKAGES:
            expected[f"{PACKAGES[folder]}/{rest}"] = (ROOT / name).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        ours = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        assert ours.keys() == expected.keys()
        assert ours == expected
        assert {member.date_time for member in archive.infolist()} == {time.gmtime(EPOCH)[:6]}


def test_an_sdist_holds_the_checkout_without_what_concerns_git(sdist):
    expected = {name for name in sources() if name != ".gitignore" and not name.startswith(".ci/")}
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    generated = {"PKG-INFO"} | {name for name in files if name.startswith("autoprune.egg-info/")}
    assert files - generated == expected | {"setup.cfg"}
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(EPOCH, 0, 0, "")}


def test_metadata_is_that_of_one_package_with_its_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        kept = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = email.message_from_string(kept["METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("autoprune", autoprune.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Provides-Extra") == ["cpu", "gpu", "eval", "dev"]
    assert kept["top_level.txt"].split() == ["autoprune"]
    assert "autoprune = autoprune.pipeline.cli:main" in kept["entry_points.txt"]


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """What this environment has, without autoprune, and with Hugging Face's `kernels`, from the index that pip uses."""
    folder = tmp_path_factory.mktemp("dependencies")
    pins = tmp_path_factory.mktemp("pins") / "kernels.txt"
    pins.write_text(KERNELS)
    options = ["--no-deps", "--require-hashes", "--no-compile", "--quiet", "--target", str(folder), "-r", str(pins)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options], env=CLEAN, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {KERNELS.split()[0]}: {done.stderr.strip().splitlines()[-1]}")
    for entry in INSTALLED.iterdir():
        if "autoprune" not in entry.name and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    return folder


def environment(folder: Path, dependencies: Path | None, *installed: str) -> Path:
    """A new virtual environment's interpreter."""
    venv.create(folder, symlinks=True)
    if dependencies is not None:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    python = folder / "bin" / "python"
    if installed:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--no-build-isolation", "--no-compile", *installed], check=True, env=CLEAN)
    return python


PROBE = """
import importlib.util, json, sys
import transformers, kernels, autoprune
import autoprune.kernels.masks, autoprune.pipeline.config
from transformers.integrations import hub_kernels
assert hub_kernels.CUDAProperties is kernels.CUDAProperties, "transformers does without Hugging Face's kernels"
places = [importlib.util.find_spec(name) for name in ("pipeline", "actors", "models", "algorithms")]
files = [module.__file__ for module in (autoprune, autoprune.kernels.masks, autoprune.pipeline.config)]
print(json.dumps([kernels.__file__, files, [place is not None for place in places]]))
"""


def probe(python: Path, cwd: Path | str = "/") -> tuple[Path, list[Path], list[bool]]:
    """Where `kernels` is, where three modules of ours are, and whether the other folders' names can be imported."""
    done = subprocess.run([python, "-c", PROBE], cwd=cwd, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, ours, found = json.loads(done.stdout)
    return Path(theirs), [Path(file) for file in ours], found


def test_a_checkout_works_beside_kernels(tmp_path, dependencies):
    """From its top, where a folder called kernels lies and comes first on the path."""
    folder = checkout(tmp_path / "checkout", EPOCH, 0o022)
    theirs, ours, _ = probe(environment(tmp_path / "environment", dependencies), folder)
    assert theirs.is_relative_to(dependencies)
    assert ours == [folder / name for name in ("autoprune/__init__.py", "kernels/masks.py", "pipeline/config.py")]


def test_a_wheel_works_beside_kernels(tmp_path, dependencies, wheel):
    theirs, ours, found = probe(environment(tmp_path / "environment", dependencies, str(wheel)))
    assert theirs.is_relative_to(dependencies)
    assert all(file.is_relative_to(tmp_path / "environment") for file in ours)
    assert not any(found)


def test_an_editable_install_works_beside_kernels(tmp_path, dependencies):
    folder = checkout(tmp_path / "checkout", EPOCH, 0o022)
    theirs, ours, found = probe(environment(tmp_path / "environment", dependencies, "--editable", str(folder)))
    assert theirs.is_relative_to(dependencies)
    assert ours == [folder / name for name in ("autoprune/__init__.py", "kernels/masks.py", "pipeline/config.py")]
    assert not any(found)


def test_help_needs_no_library_and_starts_at_once(tmp_path, wheel):
    """In an environment that has the wheel and none of what it requires."""
    command = environment(tmp_path / "environment", None, str(wheel)).with_name("autoprune")
    for arguments, expected in (("--help", "search"), ("search --help", "--resume"), ("--version", "autoprune ")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([command, *arguments.split()], cwd="/", env=CLEAN, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 1, f"{arguments} takes {seconds:.1f} s of CPU"
