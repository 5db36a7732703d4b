"""Tuning an allocation: a few rounds of measurements that narrow around the best of a rule's parameters so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.allocation import AllocationError, check_allocation
from autoprune.algorithms.rules import ATP_SPREAD, DEFAULTS, RANGES, atp_beta

# Beyond this, neighbours of the best would differ in decimals that no measurement can tell apart.
MOST_EVALUATIONS = 64
# Of the points, so that they can be read, and are the same when they are read back.
DECIMALS = 6
# Rounds after the first.
LINE_ROUNDS, PATTERN_ROUNDS = 2, 3

# Rules of one parameter: its name, and the range that is searched. Its lower end is the uniform allocation. ATP's is
# searched as the spread beta·(blocks − 1), which means the same for every model.
LINES: dict[str, tuple[str, float, float]] = {
    "owl": ("lam", 0.0, 0.2),
    "dlp": ("alpha", 0.0, 0.4),
    "dsa": ("lam", 0.0, 0.2),
    "alphapruning": ("epsilon", 0.0, 0.6),
    "atp": ("beta", 0.0, 0.5),
}
# SDSA's first round after the default, as (tau, m, depth): skewness alone, depth alone (m = 0), with which SDSA follows
# a schedule that only rises with depth, and variations of each parameter.
SDSA_DESIGN = (
    (0.5, 0.3, 0.0),
    (1.0, 0.0, 0.5),
    (0.5, 0.5, 0.5),
    (0.5, 0.3, 0.5),
    (0.5, 0.6, 1.0),
    (1.0, 0.0, 1.0),
    (1.0, 0.9, 0.5),
    (0.25, 0.5, 0.5),
)
# The range that is searched; and one step of the first round after that: tau times or over 2, the others ± a number.
SDSA_RANGE = ((0.1, 4.0), (0.0, 1.0), (0.0, 2.0))
SDSA_STEPS = (2.0, 0.25, 0.4)
# The same of `taylor`, where it is tuned, too; and by how much the first round moves it.
TAYLOR_RANGE, TAYLOR_STEP = RANGES["sdsa"]["taylor"], 0.25

SDSA_NAMES = ("tau", "m", "depth", "taylor")

Point = tuple[float, ...]


@dataclass(frozen=True)
class Tuning:
    """allocation: the best that was measured. trace: every allocation with its measurement, in the order asked."""

    allocation: Allocation
    trace: list[tuple[Allocation, float]]


def tune(
    name: str,
    measure: Callable[[list[Allocation]], list[float]],
    evaluations: int = 16,
    per: str = "block",
    blocks: int | None = None,
    taylor: float = 0.0,
) -> Tuning:
    """The parameters of the rule `name` with which `measure` is least, among `evaluations` different ones.

    measure: a round of allocations, whose order and number of measurements at a time are free, to one number each,
    lower is better (nats per token on the fitness split); NaN and infinity are the worst. per: of the allocations.
    blocks: number of decoder blocks of the model, which `atp` needs. taylor: where it is not 0, `sdsa` starts with
    that, and it is tuned with the others.
    Exactly `evaluations` allocations are asked for, all different and all parameters written out, the first of them
    the rule's default. A rule of one parameter has a first round over its whole range (LINES), about half of all, and
    LINE_ROUNDS more between the neighbours of the best so far. `sdsa` has `_design`, and PATTERN_ROUNDS more: in each
    the least points of parabolas (see `_vertex`), then steps from the best so far (see `_directions`), half as long in
    each round. Where m = 0, tau does nothing and is its default. The same measurements lead to the same questions; of
    equals the first asked is the best.
    Raises AllocationError for an unknown rule, one without parameters, evaluations outside 1..MOST_EVALUATIONS, and
    `atp` without blocks; ValueError where `measure` does not return one number per allocation.
    """
    if name in RANGES and not RANGES[name]:
        raise AllocationError(f"the allocation {name!r} has no parameter to tune")
    check_allocation(Allocation(name, per=per))
    if not 1 <= evaluations <= MOST_EVALUATIONS:
        raise AllocationError(f"evaluations must be within 1..{MOST_EVALUATIONS}, got {evaluations!r}")
    if name == "atp" and blocks is None:
        raise AllocationError("to tune 'atp' takes the number of blocks")

    sdsa = name == "sdsa"
    first = min(evaluations, len(_design(taylor)) if sdsa else max((evaluations + 1) // 2, 3))
    seen: dict[Point, float] = {}
    trace: list[tuple[Allocation, float]] = []
    for index, count in enumerate(_sizes(first, evaluations, PATTERN_ROUNDS if sdsa else LINE_ROUNDS)):
        points = _pattern(seen, count, index, taylor) if sdsa else _line(seen, count, name)
        allocations = [Allocation(name, _parameters(name, point, blocks), per) for point in points]
        for point, allocation, value in zip(points, allocations, measure(allocations), strict=True):
            seen[point] = math.inf if math.isnan(value) else value
            trace.append((allocation, value))
    best = list(seen).index(_best(seen))
    return Tuning(trace[best][0], trace)


def _sizes(first: int, evaluations: int, later: int) -> list[int]:
    """Measurements in each round: `first`, then what is left over `later` rounds, the earlier ones the larger."""
    left = evaluations - first
    return [first] + [size for index in range(later) if (size := (left + later - 1 - index) // later)]


def _best(seen: dict[Point, float]) -> Point:
    return min(seen, key=seen.__getitem__)  # of equals the first


def _parameters(name: str, point: Point, blocks: int | None) -> dict[str, float]:
    if name == "sdsa":
        return {key: value for key, value in zip(SDSA_NAMES, point, strict=False) if value or key != "taylor"}
    if name == "atp":
        return {"beta": atp_beta(point[0], blocks)}
    return {LINES[name][0]: point[0]}


def _line(seen: dict[Point, float], count: int, name: str) -> list[Point]:
    """The next points of a rule of one parameter: middles of the widest gaps, those nearest the best first.

    The gaps are those of the whole range in the first round, later the two beside the best.
    """
    parameter, low, high = LINES[name]
    if seen:
        best = _best(seen)[0]
        values = sorted(value for (value,) in seen)
        place = values.index(best)
        values, points = values[max(place - 1, 0) : place + 2], []
    else:
        best = ATP_SPREAD if name == "atp" else DEFAULTS[name][parameter]
        values, points = sorted((low, best, high)), [best, low, high][:count]

    def rank(place: int) -> tuple[float, float]:
        a, b = values[place], values[place + 1]
        return -round(b - a, DECIMALS), abs(a + b - 2 * best)

    while len(points) < count:
        place = min(range(len(values) - 1), key=rank)
        middle = round((values[place] + values[place + 1]) / 2, DECIMALS)
        values.insert(place + 1, middle)
        points.append(middle)
    return [(point,) for point in points]


def _design(taylor: float) -> list[Point]:
    """SDSA's first round: its default, then variations."""
    default = DEFAULTS["sdsa"]
    points = [(default["tau"], default["m"], default["depth"]), *SDSA_DESIGN]
    if not taylor:
        return points
    low, high = TAYLOR_RANGE
    others = (value for value in (low, min(taylor + 2 * TAYLOR_STEP, high)) if value != taylor)
    return [(*point, taylor) for point in points] + [(*points[0], value) for value in others]


@cache
def _directions(axes: int) -> list[tuple[int, ...]]:
    """One parameter up or down first, then two at a time, then all: enough that even a corner of the range has
    neighbours."""
    return sorted(product((1, -1, 0), repeat=axes), key=lambda direction: axes - direction.count(0))[1:]


def _pattern(seen: dict[Point, float], count: int, index: int, taylor: float) -> list[Point]:
    """SDSA's next points: the design in round 0, then steps from the best so far, shorter ones where those are known.

    Rounds begin with m, depth, tau, taylor in turn, so that rounds of two or three points do not all try the same
    parameter.
    """
    if not seen:
        return _design(taylor)[:count]
    best = _best(seen)
    turn = (1, 2, 0, 3)[: len(best)]
    order = [turn[(index - 1 + shift) % len(turn)] for shift in range(len(turn))]
    scale, points = 0.5 ** (index - 1), []
    for axis in order:
        point = _vertex(seen, best, axis)
        if point is not None and point not in seen and point not in points and len(points) < count:
            points.append(point)
    while len(points) < count:
        for direction in _directions(len(best)):
            steps = dict(zip(order, direction, strict=True))
            point = _stepped(best, [scale * steps[axis] for axis in range(len(best))])
            if point not in seen and point not in points and len(points) < count:
                points.append(point)
        scale /= 2
    return points


def _vertex(seen: dict[Point, float], best: Point, axis: int) -> Point | None:
    """Where the parabola through the best and its nearest neighbours on an axis is least, if it has one on each side.

    That is worth more than another step: where two parameters do nothing it is what a search along one line would ask.
    tau counts by its logarithm, as its steps do.
    """

    def place(point: Point) -> float:
        return math.log(point[axis]) if axis == 0 else point[axis]

    line = [
        point
        for point, value in seen.items()
        if math.isfinite(value) and all(point[other] == best[other] for other in range(len(best)) if other != axis)
    ]
    left = max((point for point in line if point[axis] < best[axis]), key=place, default=None)
    right = min((point for point in line if point[axis] > best[axis]), key=place, default=None)
    if left is None or right is None:
        return None
    a, b = place(best) - place(left), place(right) - place(best)
    rise, fall = seen[left] - seen[best], seen[right] - seen[best]  # neither is negative
    if not a * fall + b * rise:
        return None
    moved = place(best) + (b * b * rise - a * a * fall) / (2 * (a * fall + b * rise))
    value = round(math.exp(moved) if axis == 0 else moved, DECIMALS)
    return best[:axis] + (value,) + best[axis + 1 :]


def _stepped(point: Point, steps: list[float]) -> Point:
    """The point after so many steps in tau, m, depth and taylor, within SDSA_RANGE and TAYLOR_RANGE."""
    moved = [value + step * size for value, step, size in zip(point, steps, (*SDSA_STEPS, TAYLOR_STEP), strict=False)]
    moved[0] = point[0] * SDSA_STEPS[0] ** steps[0]
    tau, m, *others = (
        round(min(max(value, low), high), DECIMALS)
        for value, (low, high) in zip(moved, (*SDSA_RANGE, TAYLOR_RANGE), strict=False)
    )
    return (tau if m else DEFAULTS["sdsa"]["tau"], m, *others)
