"""Lessons: medians over every measured change of a kind."""

import pytest

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.pipeline.lessons import changes, lessons
from autoprune.pipeline.lineage import Candidate, Lineage

WANDA = "def score(W, x_norm):\n    return W.abs() * x_norm"
GRADIENT = "def score(W, g_rms):\n    return W.abs() * g_rms"
BOTH = "def score(W, x_norm, g_rms):\n    return W.abs() * x_norm * g_rms"
SDSA = Allocation("sdsa", {"tau": 1.0, "m": 0.6, "depth": 0.5})


@pytest.mark.parametrize(
    "child, expected",
    [
        (Algorithm(WANDA, "row", SDSA), []),
        (Algorithm(BOTH, "matrix", SDSA), ["reading g_rms", "group matrix instead of row"]),
        (Algorithm(GRADIENT, "row", SDSA), ["reading g_rms", "no longer reading x_norm"]),
        (Algorithm(WANDA, "row", Allocation("sdsa", {"tau": 0.5, "m": 0.9, "depth": 0.5})), ["more m", "less tau"]),
        (Algorithm(WANDA, "row", Allocation("sdsa", SDSA.parameters | {"taylor": 0.5})), ["more taylor"]),
        (Algorithm(WANDA, "row", Allocation()), []),
        (
            Algorithm(
                WANDA,
                allocation=Allocation("written", source="def allocate(profile, sparsity):\n return profile.depth"),
            ),
            ["reading profile.depth"],
        ),
    ],
)
def test_kinds_of_change_are_told_apart(child, expected):
    assert list(changes(Algorithm(WANDA, "row", SDSA), child)) == expected


def test_medians_over_what_was_measured_at_least_twice():
    graph = Lineage()

    def add(name, algorithm, nll, parents=("root",)):
        evaluation = Evaluation(nll, 10, (nll, nll))
        graph.add(Candidate(name, 0, "mutate", parents, algorithm, status="evaluated", mask="f", evaluation=evaluation))

    add("root", Algorithm(WANDA), 4.0, ())
    for index, nll in enumerate((3.9, 3.8, 9.0)):
        add(f"both-{index}", Algorithm(BOTH), nll)
    add("once", Algorithm(GRADIENT, "matrix"), 5.0)
    graph.add(Candidate("broken", 1, "mutate", ("root",), status="invalid"))
    graph.add(Candidate("unmeasured", 1, "mutate", ("root",), Algorithm(GRADIENT, "matrix"), status="surplus"))

    def effect(parent, child):
        return child.fitness - parent.fitness if child.status == "evaluated" else None

    # g_rms four times: −0.1, −0.2, +5 and +1; the group and the loss of x_norm once, which says nothing.
    assert lessons(graph, effect) == ["- reading g_rms: +0.450 in the median of 4, -0.200 at best"]
