"""Constants of an algorithm: where they stand, and a search for better ones that needs no derivative.

A constant is what `tune(value, low, high)` marks; where a function marks none, every number in its arithmetic; and
SDSA's parameters, where SDSA is the allocation.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.answers import sdsa_bounds
from autoprune.algorithms.reader import canonical
from autoprune.algorithms.rules import written_out
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS

LEAST = 0.01  # a smaller number is a guard against a division by zero
MOST = 1e6  # as does a larger one, in its way
SPAN = 4.0  # an unmarked constant may be so many times as small or as large
DIGITS = 4  # significant ones of what is found: more than any measurement can tell apart
FIRST_STEP = 0.25  # of a constant's range, which is halved when no step helps
LAST_STEP = 0.02
EVERY = ("score", "allocate", "allocation")  # the parts of an algorithm that have constants

Point = tuple[float, ...]


@dataclass(frozen=True)
class Constant:
    """A number of an algorithm. place: "score" or "allocate" and which of that function's numbers, or "sdsa" and which
    parameter. Between low and high, both above 0, it is searched by its logarithm."""

    place: tuple[str, int | str]
    value: float
    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        return self.low > 0

    def moved(self, value: float, step: float) -> float:
        """The value after a step of so many of its range, within the range."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        start = math.log(value) if self.logarithmic else value
        moved = min(max(start + step * (high - low), low), high)
        rounded = float(f"{math.exp(moved) if self.logarithmic else moved:.{DIGITS}g}")
        return min(max(rounded, self.low), self.high)


def _marks(tree: ast.AST) -> list[ast.Call]:
    return [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "tune"
    ]


def _number(node: ast.expr) -> float:
    return -node.operand.value if isinstance(node, ast.UnaryOp) else node.value


def _bare(tree: ast.AST) -> list[ast.Constant]:
    """Factors, exponents and summands of a function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div, ast.Pow, ast.Add, ast.Sub)):
            sides = (node.left, node.right)
            found += [
                s for s in sides if isinstance(s, ast.Constant) and type(s.value) is float and LEAST <= s.value <= MOST
            ]
    return found


def constants(
    algorithm: Algorithm, parts: Collection[str] = EVERY, statistics: Collection[str] = DEFAULT_STATISTICS
) -> list[Constant]:
    """Those of the score, of a written allocation, then SDSA's; marked ones alone where a function marks any.

    parts: of the algorithm, that may be changed. statistics: that are offered, on which SDSA's parameters depend.
    """
    found: list[Constant] = []
    for name, source in (("score", algorithm.score), ("allocate", algorithm.allocation.source)):
        if not source or name not in parts:
            continue
        tree = ast.parse(canonical(source)[name].text)
        marks = _marks(tree)
        for index, mark in enumerate(marks):
            value, low, high = map(_number, mark.args)
            found.append(Constant((name, index), value, low, high))
        for index, node in enumerate([] if marks else _bare(tree)):
            found.append(Constant((name, index), node.value, node.value / SPAN, node.value * SPAN))
    if algorithm.allocation.name == "sdsa" and {"allocation", "allocate"} & set(parts):
        for key, (low, high) in sdsa_bounds(statistics).items():
            value = algorithm.allocation.parameters.get(key, 0.0)
            found.append(Constant(("sdsa", key), value, min(low, value), max(high, value)))
    return found


def filled(algorithm: Algorithm, places: Sequence[Constant], values: Point) -> Algorithm:
    """The algorithm with these values in the places of its constants; marks stay."""
    chosen = {constant.place: value for constant, value in zip(places, values, strict=True)}
    allocation = algorithm.allocation
    sources = {"score": algorithm.score, "allocate": allocation.source}
    for name in {name for name, _ in chosen} & sources.keys():
        tree = ast.parse(canonical(sources[name])[name].text)
        marks = _marks(tree)
        if marks:
            for index, mark in enumerate(marks):
                value = chosen[name, index]
                mark.args[0] = ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)
        else:
            for index, node in enumerate(_bare(tree)):
                node.value = chosen[name, index]
        sources[name] = canonical(ast.unparse(ast.fix_missing_locations(tree)))[name].text
    own = {key: value for (name, key), value in chosen.items() if name == "sdsa"}
    if own:
        allocation = replace(allocation, parameters=written_out("sdsa", allocation.parameters | own))
    allocation = replace(allocation, source=sources["allocate"])
    return replace(algorithm, score=sources["score"], allocation=allocation)


def fill(
    algorithm: Algorithm,
    measure: Callable[[list[Algorithm]], list[float]],
    start: float,
    evaluations: int,
    parts: Collection[str] = EVERY,
    statistics: Collection[str] = DEFAULT_STATISTICS,
) -> tuple[Algorithm, float]:
    """The algorithm with the best constants that a pattern search finds, and its measurement.

    measure: of a round of algorithms, lower is better, NaN and infinity the worst. start: of the algorithm as it is, a
    number. parts, statistics: see `constants`.
    evaluations: how many others may be measured, all different. From the best so far, each constant in turn is moved
    both ways by a step of its range, and what helped is kept at once; a turn over all constants without gain halves the
    step, down to LAST_STEP. The same measurements lead to the same questions.
    Raises ValueError for an algorithm without constants.
    """
    places = constants(algorithm, parts, statistics)
    if not places:
        raise ValueError("the algorithm has no constants to fill")
    best, lowest = tuple(constant.value for constant in places), start
    seen: set[Point] = {best}
    step, left = FIRST_STEP, evaluations
    while left > 0 and step >= LAST_STEP:
        gained = False
        for index, constant in enumerate(places):
            moves = [constant.moved(best[index], way * step) for way in (1, -1)]
            points = dict.fromkeys((*best[:index], value, *best[index + 1 :]) for value in moves)
            fresh = [point for point in points if point not in seen][:left]
            if not fresh:
                continue
            left -= len(fresh)
            seen.update(fresh)
            measured = measure([filled(algorithm, places, point) for point in fresh])
            for point, value in zip(fresh, measured, strict=True):
                if value < lowest:
                    best, lowest, gained = point, value, True
            if left <= 0:
                break
        if not gained:
            step /= 2
    return filled(algorithm, places, best), lowest
