"""Variation of programs without a language model: the moves of genetic programming, typed, over the same language.

A function is taken as one expression (its locals are put where they are read). A part of it may give way to another of
the same type: one drawn from the decoding grammar, one of another parent, or one of its own parts. So what comes out
has the shapes that it must have, and means something as often as not; the probe says which.
"""

from __future__ import annotations

import ast
import copy
import functools
import random
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from autoprune.algorithms.derivation import derive
from autoprune.algorithms.grammar import PARTS, WRITTEN_PARTS, Rules, answer_rules
from autoprune.algorithms.language import FUNCTIONS
from autoprune.algorithms.reader import canonical
from autoprune.algorithms.vocabulary import STATISTICS, SUMMARIES

MAX_NODES = 150  # of an expression's syntax tree: larger ones grow without getting better
ROWS, COLUMNS, UNITS = 5, 7, 6  # different numbers, so that a shape tells a type
SHAPES = {(ROWS, COLUMNS): "m", (COLUMNS,): "r", (ROWS, 1): "c", (): "s", (UNITS,): "u"}
FACTORS = (0.5, 0.75, 1.33, 2.0)  # by which a constant is moved
# A whole line of the grammar, or an operand of one: what a new part is drawn from, by type.
DRAWN = {
    "score": {"m": ("line-m000m", "m000"), "r": ("r000",), "c": ("c000",), "s": ("s000",)},
    "allocate": {"u": ("line-u0", "u0"), "s": ("s0",)},
}
JOINED = {"m": "mrc", "r": "r", "c": "c", "u": "u"}  # types that a part of this type may be multiplied with


class NoVariationError(ValueError):
    """This program cannot be varied in this way."""


def expression(source: str, name: str) -> ast.expr:
    """The one expression that a canonical function returns, with its locals put where they are read.

    Raises NoVariationError for functions with loops, and for expressions of more than MAX_NODES nodes.
    """
    known: dict[str, ast.expr] = {}

    class Inlined(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return copy.deepcopy(known[node.id]) if node.id in known else node

    function = ast.parse(canonical(source)[name].text).body[0]
    for statement in function.body:
        if isinstance(statement, ast.For):
            raise NoVariationError("a loop is not one expression")
        value = Inlined().visit(statement.value)
        if sum(1 for _ in ast.walk(value)) > MAX_NODES:
            raise NoVariationError(f"more than {MAX_NODES} nodes")
        if isinstance(statement, ast.Assign):
            known[statement.targets[0].id] = value
    return value


def function_text(name: str, value: ast.expr) -> str:
    """Canonical text of the function that returns the expression. Raises LanguageError where it is outside of the
    language."""
    parameters = "profile, sparsity" if name == "allocate" else ", ".join(("W", *STATISTICS))
    text = ast.unparse(ast.fix_missing_locations(ast.Expression(value)))
    return canonical(f"def {name}({parameters}):\n    return {text}\n")[name].text


def parts_of(value: ast.expr) -> Iterator[tuple[str, ast.AST, str, int | None]]:
    """(type, parent, field, place in it) of every part below the expression that has a type: where it can be put."""
    for parent in ast.walk(value):
        for field, child in ast.iter_fields(parent):
            places = [(i, item) for i, item in enumerate(child)] if isinstance(child, list) else [(None, child)]
            for place, item in places:
                if isinstance(item, ast.expr) and not isinstance(item, ast.Constant) and (kind := type_of(item)):
                    yield kind, parent, field, place


def type_of(value: ast.expr) -> str | None:
    """m, r, c, s or u, by the shape that it has on tensors without data; None for anything else."""
    match value:  # what looks like an expression and is none of its own
        case ast.Name(id="torch" | "profile") | ast.Slice() | ast.Tuple():
            return None
    meta = {"device": "meta"}
    names: dict = {"W": torch.empty(ROWS, COLUMNS, **meta), "torch": FUNCTIONS, "sparsity": torch.empty((), **meta)}
    names |= {name: torch.empty(one.shape(ROWS, COLUMNS), **meta) for name, one in STATISTICS.items()}
    names["profile"] = SimpleNamespace(**{name: torch.empty(UNITS, **meta) for name in SUMMARIES})
    names |= {"__builtins__": {}, "tune": lambda value, low, high: value}
    try:
        result = eval(compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(value))), "<part>", "eval"), names)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError):
        return None
    return SHAPES.get(tuple(result.shape)) if isinstance(result, torch.Tensor) and result.dtype != torch.bool else None


def mutated(source: str, name: str, rng: random.Random, rules: Rules, simpler: bool = False) -> str:
    """A function with one part changed: drawn anew, multiplied, given up for a part of its own, or a constant moved.

    rules: of the grammar that parts are drawn from. simpler: a part is given up for one of its own.
    Raises NoVariationError or LanguageError where nothing comes of it.
    """
    value = ast.Expression(expression(source, name))
    kind, parent, field, place = rng.choice(list(parts_of(value)))
    old = _get(parent, field, place)
    move = "hoist" if simpler else rng.choice(("draw", "join", "hoist", "constant"))
    if move == "hoist":
        own = [_get(*where) for other, *where in parts_of(old) if other == kind]
        if own:
            _put(parent, field, place, rng.choice(own))
            return function_text(name, value.body)
        if simpler:
            raise NoVariationError("the part has none of its own type")
        move = "draw"
    if move == "constant":
        numbers = [node for node in ast.walk(value) if _is_number(node)]
        if numbers:
            node = rng.choice(numbers)
            node.value = float(f"{node.value * rng.choice(FACTORS):.3g}")
            return function_text(name, value.body)
        move = "draw"
    if move == "join" and kind in JOINED:
        other = rng.choice(JOINED[kind])
        drawn = _drawn(name, other, rng, rules)
        if drawn is not None:
            operator = ast.Mult() if other != kind or rng.random() < 0.5 else ast.Add()
            _put(parent, field, place, ast.BinOp(old, operator, drawn))
            return function_text(name, value.body)
    drawn = _drawn(name, kind, rng, rules)
    if drawn is None:
        raise NoVariationError(f"the grammar has nothing of type {kind}")
    _put(parent, field, place, drawn)
    return function_text(name, value.body)


def crossed(source: str, other: str, name: str, rng: random.Random) -> str:
    """A function with one part replaced by one of the same type of another function.

    Raises NoVariationError or LanguageError where nothing comes of it.
    """
    value = ast.Expression(expression(source, name))
    donors: dict[str, list[ast.expr]] = {}
    for kind, *where in parts_of(ast.Expression(expression(other, name))):
        donors.setdefault(kind, []).append(_get(*where))
    places = [(kind, *where) for kind, *where in parts_of(value) if kind in donors]
    if not places:
        raise NoVariationError("the two have no part of the same type")
    kind, parent, field, place = rng.choice(places)
    _put(parent, field, place, copy.deepcopy(rng.choice(donors[kind])))
    return function_text(name, value.body)


@functools.cache
def part_rules(statistics: tuple[str, ...]) -> Rules:
    """What `mutated` draws from: the grammar of scores that read these statistics, and of allocations."""
    return answer_rules(parts=WRITTEN_PARTS, statistics=statistics) | answer_rules(parts=PARTS, statistics=statistics)


def _drawn(function: str, kind: str, rng: random.Random, rules: Rules) -> ast.expr | None:
    names = [name for name in DRAWN[function].get(kind, ()) if name in rules]
    if not names:
        return None
    return ast.parse(derive(rules, rng, lambda _: "", rng.choice(names)), mode="eval").body


def _is_number(node: ast.AST) -> bool:
    """A constant that says how much; not a small guard, nor a dimension."""
    return isinstance(node, ast.Constant) and type(node.value) is float and abs(node.value) >= 0.01


def _get(parent: ast.AST, field: str, place: int | None) -> ast.expr:
    child = getattr(parent, field)
    return child if place is None else child[place]


def _put(parent: ast.AST, field: str, place: int | None, value: ast.expr) -> None:
    if place is None:
        setattr(parent, field, value)
    else:
        getattr(parent, field)[place] = value
