"""The house: imports point down the floors only, and at nothing that is not required."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions
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


def names(requirements: str) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements.split("\n") if line}


def test_every_library_that_is_imported_is_required():
    """And not only there because another one requires it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    required = names(setup["options"]["install_requires"]).union(*(names(extra) for extra in extras.values()))
    known = packages_distributions()
    for floor in FLOORS:
        for file in (ROOT / floor).rglob("*.py"):
            for library in (
                {name.partition(".")[0] for name in imported(file)} - sys.stdlib_module_names - {"autoprune"}
            ):
                distributions = {name.lower().replace("_", "-") for name in known.get(library, [library])}
                assert distributions & required, f"{file} imports {library}, which setup.cfg does not require"


def test_nothing_of_ours_is_pickled():
    for floor in (*FLOORS, "autoprune"):
        for file in (ROOT / floor).rglob("*.py"):
            libraries = {name.partition(".")[0] for name in imported(file) if name}
            assert not libraries & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, file
            assert not re.search(r"\btorch\.(save|load)\(|allow_pickle=True", file.read_text()), file
