"""What the pages point at is there: files, headings, keys, names in the sources, and messages as they are printed."""

import ast
import dataclasses
import functools
import re
import typing
from pathlib import Path
from urllib.parse import unquote

import pytest
from pages import PAGES, ROOT, anchors, inline, spans, tokens

from autoprune.pipeline.comparison import Comparison
from autoprune.pipeline.config import Config

FLOORS = ("kernels", "algorithms", "models", "actors", "pipeline")
FOLDERS = (*FLOORS, "autoprune", "bench", "configs", "deploy", "docs", "tests")
OURS = [page for page in PAGES if not page.startswith("bench/")]  # those that speak of the whole project


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    targets = [token.attrs["href"] for token in inline(page, "link_open")]
    targets += [token.attrs["src"] for token in inline(page, "image")]
    for target in (target for target in targets if not re.match(r"https?:", target)):
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page} links to {target}"


@pytest.mark.parametrize("page", OURS)
def test_every_file_and_name_of_the_sources_is_there(page):
    for span in spans(page):
        match = re.fullmatch(r"((?:[\w.-]+/)*[\w.-]+\.\w+|(?:[\w.-]+/)+)(?:::([\w.]+))?", span)
        if match is None or not (match[2] or match[1].split("/")[0] in FOLDERS and "NAME" not in span):
            continue
        file = ROOT / match[1]
        assert file.exists(), f"{page} names {span}"
        if match[2]:
            assert match[2] in defined(file), f"{page} names {span}"


@functools.cache
def defined(file: Path) -> set[str]:
    """Names at the top of a module, and of what its classes hold, as CLASS.NAME."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                names = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = [part for name in names for part in ast.walk(name) if isinstance(part, ast.Name)]
                found.update(prefix + part.id for part in parts)

    walk(ast.parse(file.read_text()).body, "")
    return found


def keys(cls: type, prefix: str = "") -> set[str]:
    """All keys of a configuration, those of its sections behind their names."""
    found = set()
    for name, hint in typing.get_type_hints(cls).items():
        found.add(prefix + name)
        if dataclasses.is_dataclass(hint):
            found |= keys(hint, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("page", OURS)
def test_every_key_of_a_configuration_exists(page):
    sections = {name for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    known = keys(Config) | keys(Comparison)
    texts = spans(page) + [token.content for token in tokens(page) if token.type in ("fence", "code_block")]
    for text in texts:
        for section, key in re.findall(r"(?<![\w/.`])(\w+)\.([a-z]\w*)", text):
            if section in sections and key not in ("py", "md", "yaml", "json"):
                assert f"{section}.{key}" in known, f"{page} names {section}.{key}"


def messages(page: str) -> list[str]:
    """What stands in the first column of tables whose head says that it is printed."""
    found, printed, first = [], False, False
    for token in tokens(page):
        if token.type == "table_open":
            printed = None
        elif token.type == "tr_open":
            first = True
        elif token.type == "inline" and first:
            first = False
            if printed is None:
                printed = token.content == "printed"
            elif printed:
                found += [child.content for child in token.children if child.type == "code_inline"]
    return found


@functools.cache
def texts() -> list[str]:
    """All texts of the sources, with `…` where something is filled in."""
    found = []
    for floor in FLOORS:
        for file in sorted((ROOT / floor).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.mark.parametrize("message", messages("docs/using.md"))
def test_every_message_that_is_explained_is_printed_somewhere(message):
    fixed = message.split("…")
    assert len("".join(fixed).strip()) >= 8, "too little of it to be found again"
    pattern = re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), f"no source has {message!r}"


def test_messages_are_found():
    assert len(messages("docs/using.md")) > 40


@pytest.mark.parametrize("page", OURS)
def test_every_target_of_make_exists(page):
    targets = set(re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text()))
    for span in spans(page):
        for name in re.findall(r"^make (\w+)", span):
            assert name in targets, f"{page} names make {name}"
