"""The lineage of a search as one HTML page that needs nothing else, neither network nor other files.

The page shows what a language model wrote, so its words are hostile until shown otherwise: they are data in a block of
JSON, never markup; controls that would reorder or hide text are spelled out; and the page's policy runs only the one
script, and applies only the one style, whose hashes it names. It works from file:// and in a frame that may do no more
than run scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from autoprune.models.perplexity import standard_error
from autoprune.pipeline.lineage import Candidate, Lineage

PAGES = Path(__file__).parent / "pages"
SCRIPTS = tuple(
    f"lineage{part}.js" for part in ("_parts", "_plot", "_view", "_graph", "_panel", "")
)  # the last starts the page
LONGEST = 4_000  # characters of one text; the rest is in lineage.json
EDGE = {  # of an edge's data: what the page calls them
    "verdict": "verdict",
    "effect": "effect",
    "effect_error": "effect_error",
    "mask_distance": "mask",
    "most_improved_block": "better",
    "most_worsened_block": "worse",
}


def lineage_html(lineage: Lineage, best: str, title: str, dense: float | None = None) -> str:
    """The page, ready to be written as UTF-8.

    best: id of a candidate of the lineage; KeyError where there is none of that name. dense: mean negative
    log-likelihood per token (nats) of the unpruned model on the fitness split; 0 where fitness is in nats above it,
    which makes perplexities multiples of the dense model's.
    """
    data = page_data(lineage, best, title, dense)
    template = (PAGES / "lineage.html").read_text(encoding="utf-8")
    sources = "\n".join((PAGES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{sources}}})();\n'
    (style,) = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    parts = {
        "title": html.escape(visible(title)),
        "policy": f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; "
        f"script-src {_hash(script)}",
        "data": embedded(data),
        "script": script,
    }
    # In one pass, so that no placeholder is looked for in what was put in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def page_data(lineage: Lineage, best: str, title: str, dense: float | None = None) -> dict:
    """What the page knows, as plain data whose numbers are finite or None.

    texts: every longer text once. candidates: in proposal order, known by their place in it; of each, what is empty is
    left out. Texts in candidates are places in `texts`; parents, `repeats` and `rival` are places in `candidates`.
    """
    places = {candidate.id: place for place, candidate in enumerate(lineage)}
    texts = _Texts()
    candidates = [_candidate(lineage, candidate, places, texts) for candidate in lineage]
    return {
        "title": visible(title),
        "best": places[best],
        "dense": _number(dense),
        "candidates": candidates,
        "texts": texts.all,
    }


def visible(text: str) -> str:
    """The text with all that would hide or reorder text, or is no character at all, spelled out, as in ⟨U+202E⟩."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(line if line.isprintable() else "".join(map(_spelled, line)) for line in lines)


def cut(text: str) -> str:
    """The text as the page shows it: visible, and not longer than LONGEST (see above)."""
    rest = len(text) - LONGEST
    return visible(text[:LONGEST]) + (f"… ({rest:,} more characters in lineage.json)" if rest > 0 else "")


def embedded(data: dict) -> str:
    """JSON, in ASCII, that nothing in an HTML page can take for markup. ValueError where a number is not finite."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _spelled(character: str) -> str:
    return character if character.isprintable() or character == "\t" else f"⟨U+{ord(character):04X}⟩"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _number(value: float | None, digits: int = 6) -> float | None:
    """To so many significant digits; None where it is not finite, since JSON has no such number."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value, 4) for value in values]


class _Texts:
    """Long texts, each kept once: siblings share much of their code."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, text: str | None) -> int | None:
        return self._places.setdefault(cut(text), len(self._places)) if text else None

    @property
    def all(self) -> list[str]:
        return list(self._places)


def _candidate(lineage: Lineage, candidate: Candidate, places: dict[str, int], texts: _Texts) -> dict:
    parents = list(dict.fromkeys(candidate.parents))
    data = {
        "id": visible(candidate.id),
        "generation": candidate.generation,
        "operator": visible(candidate.operator),
        "status": visible(candidate.status),
        "parents": [places[parent] for parent in parents],
        "against": [_edge(lineage.edge(parent, candidate.id)) for parent in parents],
        "diagnosis": texts.place(candidate.diagnosis),
        "hypothesis": texts.place(candidate.hypothesis),
        "error": texts.place(candidate.error),
        "repeats": places.get(candidate.repeats or ""),
        "rival": places.get(candidate.rival or ""),
        "rungs": {visible(name): _number(value) for name, value in candidate.rungs.items()},
        "salvaged": [visible(what) for what in candidate.salvaged],
        "regrouped": candidate.regrouped,
        "trials": candidate.trials,
    }
    algorithm, measured = candidate.algorithm, candidate.evaluation
    if algorithm is None:
        data["answer"] = texts.place(candidate.answer)
    else:
        data |= {
            "group": visible(algorithm.group),
            "allocation": "" if algorithm.allocation.source else cut(str(algorithm.allocation)),
            "update": visible(algorithm.update) if algorithm.update != "none" else None,
            "score": texts.place(algorithm.score),
            "allocate": texts.place(algorithm.allocation.source),
        }
    if measured is not None and candidate.status == "evaluated":
        data |= {
            "nll": _number(measured.nll),
            "nll_error": _number(standard_error(list(measured.window_nlls))),
            "windows": len(measured.window_nlls),
            "sparsity": _number(measured.sparsity),
            "sparsities": _numbers(measured.block_sparsities),
            "errors": _numbers(measured.block_errors),
        }
    if candidate.fresh is not None:
        data |= {
            "fresh": _number(candidate.fresh.nll),
            "fresh_error": _number(standard_error(list(candidate.fresh.window_nlls))),
            "fresh_windows": len(candidate.fresh.window_nlls),
        }
    return _without_empty(data)


def _edge(edge: dict) -> dict:
    known = {name: edge.get(key) for key, name in EDGE.items()}
    numbers = {name: _number(value) if isinstance(value, float) else value for name, value in known.items()}
    return _without_empty(numbers)


def _without_empty(data: dict) -> dict:
    return {name: value for name, value in data.items() if value is not None and value is not False and value != []}
