"""The house: imports point down the floors only, and a wheel and a bare checkout can be imported."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "algorithms", "models", "actors", "pipeline")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_no_file_imports_from_a_floor_above(floor):
    above = tuple(f"autoprune.{other}" for other in FLOORS[FLOORS.index(floor) + 1 :])
    for file in (ROOT / floor).glob("*.py"):
        wrong = {name for name in imported(file) if name.startswith(above)} if above else set()
        assert not wrong, f"{file.name} imports {wrong}"
        assert file.name != "__init__.py", "a regular package called kernels would hide Hugging Face's"


def test_heavy_libraries_stay_on_their_floors():
    allowed = {"ray": {"actors", "pipeline"}, "vllm": {"actors"}, "mlflow": {"pipeline"}, "transformers": {"models"}}
    for library, floors in allowed.items():
        for floor in set(FLOORS) - floors:
            for file in (ROOT / floor).glob("*.py"):
                assert library not in {name.partition(".")[0] for name in imported(file)}, f"{file} imports {library}"
    search = imported(ROOT / "pipeline" / "search.py")
    assert not {name for name in search if name.partition(".")[0] in ("ray", "vllm", "mlflow")}


IMPORTS = "import autoprune.pipeline.config as c, autoprune.kernels.masks as m; print(c.__file__, m.__file__)"


def where(path: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_bare_checkout_and_a_wheel_can_be_imported(tmp_path):
    checkout = tmp_path / "checkout"
    command = ["git", "clone", "--quiet", str(ROOT), str(checkout)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("not a git checkout")
    assert all(file.startswith(str(checkout)) for file in where(checkout))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    assert all(file.startswith(str(tmp_path / "wheel")) for file in where(tmp_path / "wheel"))
