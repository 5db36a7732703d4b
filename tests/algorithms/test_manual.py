"""The reference page says what the tables say."""

import re
from pathlib import Path

import pytest
import torch

from autoprune.algorithms import manual
from autoprune.algorithms.language import parse
from autoprune.algorithms.operations import OPERATIONS
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.vocabulary import STATISTICS

PAGE = Path(manual.__file__).resolve().parent.parent / "docs" / "language.md"


def test_the_page_is_what_make_docs_would_write():
    assert PAGE.read_text() == manual.page(), "run: make docs"


def test_every_name_has_its_line():
    lines = PAGE.read_text().splitlines()
    for name in [*STATISTICS, *(o.name for o in OPERATIONS if o.form != "operator")]:
        assert any(line.startswith("|") and f"{name}(" in line or f"`{name}`" in line for line in lines), name


def test_prompts_for_servers_without_a_grammar_name_every_operation_and_no_other():
    text = manual.brief(allocates=True)
    assert len(text) < 1500
    for operation in OPERATIONS:
        sign = f" {operation.name} " if operation.form == "operator" else f".{operation.name}("
        assert sign in text.replace(",", " "), operation.name
    named = set(re.findall(r"\.(\w+)\(", text))
    assert named == {operation.name for operation in OPERATIONS if operation.form != "operator"}
    assert "allocate" in text and "allocate" not in manual.brief(allocates=False)


def test_what_the_table_lists_is_what_is_accepted():
    """Of torch and its tensors, no other method or function passes; and every listed call does."""
    listed = {operation.name for operation in OPERATIONS if operation.form != "operator"}
    for name in sorted(set(dir(torch)) | set(dir(torch.Tensor))):
        if name.isidentifier() and name not in listed:
            for call in (f"W.{name}()", f"torch.{name}(W)"):
                with pytest.raises(LanguageError):
                    parse(f"def score(W):\n    return {call}\n")
    for operation in OPERATIONS:
        for text, _ in manual.calls(operation):
            parse(f"def score(W, x_norm):\n    x = x_norm\n    return W * {text}\n")
