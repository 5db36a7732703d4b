"""Where constants stand, and a search for better ones on functions whose best is known."""

import math
from dataclasses import replace

import pytest

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.constants import constants, fill, filled
from autoprune.algorithms.language import parse

SDSA = Allocation("sdsa", {"tau": 1.0, "m": 0.6, "depth": 0.5})
BARE = "def score(W, x_norm):\n    return W.abs() ** 1.5 * (x_norm + 0.001) ** 0.5 / (2.0 * x_norm.amax() + 1e-06)"
MARKED = "def score(W, x_norm):\n    return W.abs() ** tune(1, 0.5, 2) * (x_norm + 3.0 * tune(-1, -2, 0))"


def test_factors_and_exponents_are_constants_and_guards_are_not():
    found = constants(Algorithm(BARE))
    assert sorted(c.value for c in found) == [0.5, 1.5, 2.0]
    assert all((c.low, c.high) == (c.value / 4, c.value * 4) for c in found)


def test_what_is_marked_is_all_there_is_in_that_function():
    found = constants(Algorithm(MARKED, allocation=SDSA))
    assert {(c.place[0], c.value, c.low, c.high) for c in found[:2]} == {("score", 1, 0.5, 2), ("score", -1, -2, 0)}
    assert [c.place[1] for c in found[2:]] == ["tau", "m", "depth"]
    with_gradients = constants(Algorithm(MARKED, allocation=SDSA), statistics=("x_norm", "g_rms"))
    assert [(c.place[1], c.value, c.low, c.high) for c in with_gradients[5:]] == [("taylor", 0, 0, 1)]
    moved = filled(Algorithm(MARKED, allocation=SDSA), with_gradients[5:], (0.25,))
    assert moved.allocation.parameters == SDSA.parameters | {"taylor": 0.25}
    assert filled(moved, with_gradients[5:], (0.0,)).allocation == SDSA
    assert constants(Algorithm("def score(W):\n    return W.abs()")) == []
    written = Allocation("written", source="def allocate(profile, sparsity):\n    return profile.depth * 0.5 + 2")
    assert [c.value for c in constants(Algorithm("def score(W):\n    return W.abs()", allocation=written))] == [2, 0.5]


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(BARE, allocation=SDSA),
        Algorithm(MARKED),
        Algorithm(MARKED, "matrix", replace(SDSA, per="layer")),
    ],
)
def test_values_land_where_their_constants_stand(algorithm):
    places = constants(algorithm)
    values = tuple((c.low + c.high) / 2 for c in places)
    changed = filled(algorithm, places, values)
    assert [c.value for c in constants(changed)] == pytest.approx(values)
    assert parse(changed.score).reads == parse(algorithm.score).reads
    again = filled(algorithm, places, tuple(c.value for c in places))
    assert again == replace(algorithm, score=parse(algorithm.score).source)


def bowl(algorithms):
    """Least where the exponent of W is 1.1 and depth 0.2."""
    found = []
    for algorithm in algorithms:
        values = {c.place: c.value for c in constants(algorithm)}
        exponent = next(v for (name, _), v in values.items() if name == "score")
        found.append(math.log(exponent / 1.1) ** 2 + (values["sdsa", "depth"] - 0.2) ** 2)
    return found


def test_the_least_point_is_found_within_the_budget():
    algorithm = Algorithm("def score(W):\n    return W.abs() ** 3.0 * W.abs()", allocation=SDSA)
    asked = []

    def measure(algorithms):
        asked.extend(algorithms)
        return bowl(algorithms)

    best, value = fill(algorithm, measure, bowl([algorithm])[0], 40)
    assert len(asked) == len({a.key for a in asked}) <= 40 and algorithm not in asked
    assert value == min(bowl(asked)) and value == bowl([best])[0] < 0.02 < bowl([algorithm])[0]
    again, _ = fill(algorithm, bowl, bowl([algorithm])[0], 40)
    assert again == best


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_no_more_is_measured_than_was_granted(budget):
    asked = []

    def measure(algorithms):
        asked.extend(algorithms)
        return [math.nan] * len(algorithms)

    algorithm = Algorithm(BARE, allocation=SDSA)
    best, value = fill(algorithm, measure, 1.0, budget)
    assert len(asked) == budget
    assert value == 1.0 and best.allocation == SDSA, "what cannot be measured is never better"
    for tried in asked:
        for constant, own in zip(constants(algorithm), constants(tried), strict=True):
            assert constant.low <= own.value <= constant.high


def test_nothing_to_fill_is_said():
    with pytest.raises(ValueError, match="no constants"):
        fill(Algorithm("def score(W):\n    return W.abs()"), bowl, 0.0, 4)
