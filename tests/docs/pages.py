"""The pages of the project as readers have them: links, headings, words set as code, and the commands in blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
EXECUTED = ("README.md", *(f"docs/{name}.md" for name in ("using", "running", "changing", "results")))
PAGES = sorted({*EXECUTED, "CHANGELOG.md", "bench/README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))})
COMMAND = re.compile(r"((\w+=\S+ )*(\.venv/bin/)?(autoprune|make|ray|python)\b|--set ).*")
FILTER = re.compile(r"(tags|metrics)\..*")  # of runs, as MLflow takes it


def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def inline(page: str, kind: str) -> list[Token]:
    """Tokens of this kind inside paragraphs, cells and headings."""
    return [child for token in tokens(page) for child in token.children or () if child.type == kind]


def spans(page: str) -> list[str]:
    """What is set as code within a line."""
    return [token.content for token in inline(page, "code_inline")]


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    found: list[str] = []
    for token, content in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(child.content for child in content.children)
            found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    again = [found[:place].count(name) for place, name in enumerate(found)]
    return {f"{name}-{count}" if count else name for name, count in zip(found, again, strict=True)}


@dataclass(frozen=True)
class Block:
    """Of code. language: "sh", "python", "yaml" or "text"; line: of its first line in the page, from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """Indented ones are of Python where they begin as it does, and of the shell otherwise; fences say what they are."""
    for token in tokens(page):
        if token.type == "fence":
            yield Block(page, token.map[0] + 2, token.info or "text", token.content)
        elif token.type == "code_block":
            python = re.match(r"# \w+\.py$|def |from |import ", token.content, re.MULTILINE)
            yield Block(page, token.map[0] + 1, "python" if python else "sh", token.content)


@dataclass(frozen=True)
class Command:
    """One command, on one line. needs: what its mark says that it needs, or ""."""

    page: str
    line: int
    text: str

    @property
    def needs(self) -> str:
        marked = re.search(r"# needs (a GPU|a cluster|the hub)$", self.text)
        return marked[1] if marked else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.text.split())[:60]}"


def commands(page: str) -> Iterator[Command]:
    """Of the page's shell blocks; lines that end in a backslash are joined."""
    for block in (block for block in blocks(page) if block.language == "sh"):
        text, first = "", block.line
        for number, line in enumerate(block.text.splitlines(), start=block.line):
            text, first = (text, first) if text else ("", number)
            text += line.removesuffix("\\")
            if not line.endswith("\\") and text.strip():
                yield Command(page, first, text.strip())
                text = ""
