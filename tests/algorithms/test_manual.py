"""The reference page says what the tables say."""

from pathlib import Path

from autoprune.algorithms import manual
from autoprune.algorithms.operations import OPERATIONS
from autoprune.algorithms.vocabulary import STATISTICS

PAGE = Path(manual.__file__).resolve().parent.parent / "docs" / "language.md"


def test_the_page_is_what_make_docs_would_write():
    assert PAGE.read_text() == manual.page(), "run: make docs"


def test_every_name_has_its_line():
    lines = PAGE.read_text().splitlines()
    for name in [*STATISTICS, *(o.name for o in OPERATIONS if o.form != "operator")]:
        assert any(line.startswith("|") and f"{name}(" in line or f"`{name}`" in line for line in lines), name
