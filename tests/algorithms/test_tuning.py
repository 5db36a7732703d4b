"""Tuning: as many different questions as asked for, the default first, answers near the optimum of known functions."""

import math

import pytest

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.allocation import AllocationError, allocate, check_allocation
from autoprune.algorithms.profiles import BlockProfile, Profile
from autoprune.algorithms.rules import ATP_SPREAD, DEFAULTS, atp_beta
from autoprune.algorithms.tuning import LINES, MOST_EVALUATIONS, SDSA_RANGE, tune

BLOCKS = 30
NAMES = ["sdsa", *LINES]


class Recorder:
    """A measure that remembers its rounds; `function` takes the parameters by name."""

    def __init__(self, function):
        self.function, self.rounds = function, []

    def __call__(self, allocations):
        self.rounds.append(list(allocations))
        return [self.function(**allocation.parameters) for allocation in allocations]


def bowl(name):
    """A quadratic with its optimum inside the searched range, and that optimum."""
    if name == "sdsa":
        optimum = {"tau": 0.7, "m": 0.7, "depth": 0.8}
    else:
        parameter, low, high = LINES[name]
        optimum = {parameter: low + 0.63 * (high - low)}
        if name == "atp":
            optimum = {parameter: atp_beta(optimum[parameter], BLOCKS)}

    def function(**parameters):
        parts = [
            math.log2(value / optimum[key]) / 5 if key == "tau" else (value - optimum[key]) / scale(name, key)
            for key, value in parameters.items()
        ]
        return sum(part**2 for part in parts)

    return function, optimum


def scale(name, parameter):
    """Width of the searched range of a parameter."""
    if name == "sdsa":
        return {"m": 1.0, "depth": 2.0}[parameter]
    _, low, high = LINES[name]
    return (high - low) / (BLOCKS - 1 if name == "atp" else 1)


def texts(allocations):
    return [tuple(sorted(allocation.parameters.items())) for allocation in allocations]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 9, 16, 40, MOST_EVALUATIONS])
@pytest.mark.parametrize("shape", ["bowl", "flat", "rising", "falling"])
def test_every_question_is_another_one_within_range(name, evaluations, shape):
    functions = {
        "bowl": bowl(name)[0],
        "flat": lambda **_: 1.0,
        "rising": lambda **parameters: sum(parameters.values()),
        "falling": lambda **parameters: -sum(parameters.values()),
    }
    measure = Recorder(functions[shape])
    tuning = tune(name, measure, evaluations, "layer", BLOCKS)
    asked = [allocation for batch in measure.rounds for allocation in batch]
    assert asked == [allocation for allocation, _ in tuning.trace]
    assert len(asked) == len(set(texts(asked))) == len(set(map(str, asked))) == evaluations
    assert 1 <= len(measure.rounds) <= 4 and all(measure.rounds)
    default = {"beta": atp_beta(ATP_SPREAD, BLOCKS)} if name == "atp" else DEFAULTS[name]
    assert asked[0] == Allocation(name, default, "layer")
    for allocation in asked:
        check_allocation(allocation)
        assert allocation.per == "layer" and allocation.parameters.keys() == default.keys()
        if name == "sdsa":
            for value, (low, high) in zip(allocation.parameters.values(), SDSA_RANGE, strict=True):
                assert low <= value <= high
        else:
            (value,) = allocation.parameters.values()
            assert LINES[name][1] <= value * (BLOCKS - 1 if name == "atp" else 1) <= LINES[name][2] + 1e-9
    values = [value for _, value in tuning.trace]
    assert tuning.allocation == asked[values.index(min(values))]


@pytest.mark.parametrize("evaluations", [1, 9, 11, 16, 40, MOST_EVALUATIONS])
@pytest.mark.parametrize("start", [0.5, 2.0, 0.125])
def test_taylor_is_tuned_with_the_others_where_it_is_given(evaluations, start):
    optimum = {"tau": 0.7, "m": 0.7, "depth": 0.8, "taylor": 0.3}

    def function(taylor=0.0, **parameters):
        return bowl("sdsa")[0](**parameters) + (taylor - optimum["taylor"]) ** 2

    measure = Recorder(function)
    tuning = tune("sdsa", measure, evaluations, taylor=start)
    asked = [allocation for batch in measure.rounds for allocation in batch]
    assert len(set(texts(asked))) == len(set(map(str, asked))) == evaluations and len(measure.rounds) <= 4
    assert asked[0] == Allocation("sdsa", DEFAULTS["sdsa"] | {"taylor": start})
    for allocation in asked:
        check_allocation(allocation)
        assert "taylor" not in allocation.parameters or 0 < allocation.parameters["taylor"] <= 2
    assert tuning.allocation == min(tuning.trace, key=lambda pair: pair[1])[0]
    if evaluations >= 40 and start < 2:
        assert abs(tuning.allocation.parameters.get("taylor", 0.0) - optimum["taylor"]) < 0.1
        assert min(value for _, value in tuning.trace) < 0.02


@pytest.mark.parametrize("name", LINES)
def test_one_parameter_is_found_to_a_fiftieth_of_its_range(name):
    function, optimum = bowl(name)
    found = tune(name, Recorder(function), blocks=BLOCKS).allocation.parameters
    (parameter,) = optimum
    assert abs(found[parameter] - optimum[parameter]) <= scale(name, parameter) / 50


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("end", [1, 2])
def test_an_optimum_at_the_end_of_a_range_is_found_exactly(name, end):
    unit = BLOCKS - 1 if name == "atp" else 1
    target = LINES[name][end] / unit
    measure = Recorder(lambda **parameters: abs(sum(parameters.values()) - target))
    tuning = tune(name, measure, blocks=BLOCKS)
    assert sum(tuning.allocation.parameters.values()) == pytest.approx(target, abs=1e-12)


def test_later_rounds_narrow_around_the_best():
    measure = Recorder(bowl("owl")[0])
    tune("owl", measure, 16)
    widths = [max(values) - min(values) for values in ([a.parameters["lam"] for a in r] for r in measure.rounds)]
    assert len(widths) == 3 and widths[0] == pytest.approx(0.2)
    assert widths[1] < widths[0] / 3 and widths[2] < widths[1] / 1.5


def test_between_gaps_of_equal_width_those_beside_the_best_come_first():
    """About 0.14, whose neighbours of the first round are 0.11 and 0.17: the middles, then those next to the best."""
    measure = Recorder(lambda lam: abs(lam - 0.14))
    tune("owl", measure, 16)
    assert sorted(a.parameters["lam"] for a in measure.rounds[1]) == [0.125, 0.1325, 0.1475, 0.155]


@pytest.mark.parametrize("evaluations, tolerance", [(16, 0.03), (40, 0.004)])
def test_sdsa_comes_near_the_bottom_of_a_bowl(evaluations, tolerance):
    function, optimum = bowl("sdsa")
    tuning = tune("sdsa", Recorder(function), evaluations)
    first = [value for _, value in tuning.trace[:9]]
    best = min(value for _, value in tuning.trace)
    assert best < min(first) and best <= tolerance
    assert function(**tuning.allocation.parameters) == best


def test_sdsa_can_imitate_a_schedule_that_knows_only_depth():
    """Where the loss is the distance to a schedule of depth alone, the answer is m = 0 with about the right depth."""
    layers = (Profile(100, 1.0, 1.0, 1.0),)
    profiles = [BlockProfile(100, 1 + (b * 7 % 10) / 5, 1.0, 1.0, layers=layers) for b in range(BLOCKS)]
    wanted = allocate(Allocation("sdsa", {"tau": 0.5, "m": 0.0, "depth": 0.75}), profiles, 0.6)

    def loss(**parameters):
        got = allocate(Allocation("sdsa", parameters), profiles, 0.6)
        return math.sqrt(sum((g[0] - w[0]) ** 2 for g, w in zip(got, wanted, strict=True)) / BLOCKS)

    tuning = tune("sdsa", Recorder(loss))
    assert tuning.allocation.parameters["m"] == 0.0
    assert loss(**tuning.allocation.parameters) < 0.006 < loss(**DEFAULTS["sdsa"])
    alone = {a.parameters["depth"] for a, _ in tuning.trace if a.parameters["m"] == 0}
    assert alone >= {0.5, 1.0}
    assert all(a.parameters["tau"] == DEFAULTS["sdsa"]["tau"] for a, _ in tuning.trace if a.parameters["m"] == 0)


@pytest.mark.parametrize("depth", [0.2, 0.41, 0.46, 0.63, 1.2])
def test_where_only_depth_helps_it_is_found_as_on_a_line(depth):
    """Skewness does harm here: with m = 0 ATP's schedules are left, and ATP's own tuning is to find nothing better."""
    tuning = tune("sdsa", Recorder(lambda tau, m, depth_=depth, **p: 1 + 3 * m + (p["depth"] - depth_) ** 2))
    assert tuning.allocation.parameters["m"] == 0
    assert abs(tuning.allocation.parameters["depth"] - depth) < 0.011


@pytest.mark.parametrize("name", NAMES)
def test_it_depends_on_nothing_but_the_measurements(name):
    function = bowl(name)[0]
    first = tune(name, Recorder(function), 20, blocks=BLOCKS)
    again = tune(name, Recorder(lambda **parameters: 7 + 3 * function(**parameters)), 20, blocks=BLOCKS)
    assert texts(a for a, _ in first.trace) == texts(a for a, _ in again.trace)
    assert first.allocation == again.allocation


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["default", "best"])
def test_measurements_that_failed_are_the_worst(name, bad, which):
    """One fails, the first that is asked or the one that would have been the best: the best of the others is found."""
    function = bowl(name)[0]
    plain = tune(name, Recorder(function), blocks=BLOCKS)
    spoiled = texts([plain.trace[0][0] if which == "default" else plain.allocation])[0]

    def failing(**parameters):
        return bad if tuple(sorted(parameters.items())) == spoiled else function(**parameters)

    tuning = tune(name, Recorder(failing), blocks=BLOCKS)
    finite = [(value, allocation) for allocation, value in tuning.trace if math.isfinite(value)]
    assert len(tuning.trace) == 16 and len(finite) == 15
    assert tuning.allocation == min(finite, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("name", NAMES)
def test_where_everything_failed_the_default_stays(name):
    tuning = tune(name, lambda allocations: [math.nan] * len(allocations), blocks=BLOCKS)
    assert tuning.allocation == tuning.trace[0][0] and len(tuning.trace) == 16
    assert all(math.isnan(value) for _, value in tuning.trace)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="uniform"), "'uniform' has no parameter"),
        (dict(name="explicit"), "'explicit' has no parameter"),
        (dict(name="olw"), "unknown allocation 'olw'"),
        (dict(name="owl", per="row"), "per block or layer, got 'row'"),
        (dict(name="owl", evaluations=0), "within 1..64, got 0"),
        (dict(name="owl", evaluations=65), "within 1..64, got 65"),
        (dict(name="atp"), "takes the number of blocks"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_measured(arguments, message):
    with pytest.raises(AllocationError, match=message):
        tune(measure=lambda _: pytest.fail("measured"), **arguments)


def test_a_measure_must_answer_every_question():
    with pytest.raises(ValueError):
        tune("owl", lambda allocations: [1.0])
