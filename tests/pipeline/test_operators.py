"""The bandit: improvement per token is rewarded, standing still explores, and nothing is ever given up for good."""

import pytest

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.operators import FREE, FREE_MOST, TRIAL_TOKENS, cost, gain, stagnation, weights

PLAN = {"explore": 1.0, "mutate": 2.0, "crossover": 1.0, "tune": 0.0}


def child(name, operator, nll, generation=1, tokens=100.0, trials=0, status="evaluated"):
    evaluation = Evaluation(nll, 40, (nll,) * 4) if status == "evaluated" else None
    algorithm = Algorithm(f"def score(W):\n    return W.abs() * {nll}")
    parents = ("root",) if operator != "seed" else ()
    return Candidate(
        name, generation, operator, parents, algorithm,
        tokens=tokens, trials=trials, status=status, mask="f0", evaluation=evaluation,
    )  # fmt: skip


@pytest.fixture
def lineage():
    graph = Lineage()
    graph.add(child("root", "seed", 4.0, generation=0))
    return graph


def test_nothing_known_leaves_what_was_configured(lineage):
    found = weights(PLAN, lineage, 1)
    assert sum(found.values()) == pytest.approx(1)
    assert found == pytest.approx({"explore": 0.25, "mutate": 0.5, "crossover": 0.25})


def test_improvement_per_token_is_rewarded(lineage):
    lineage.add(child("a", "crossover", 3.5))
    lineage.add(child("b", "mutate", 3.5, tokens=5_000))
    lineage.add(child("c", "explore", 4.5))
    found = weights(PLAN, lineage, 2)
    assert found["crossover"] > found["mutate"] > found["explore"] * 2 / 2
    assert found["crossover"] > 0.5
    assert min(found.values()) >= FREE * 0.25, "every operator keeps a share of its configured frequency"


def test_only_what_was_measured_and_better_is_a_gain(lineage):
    for name, nll, status, expected in (
        ("better", 3.5, "evaluated", 0.5),
        ("worse", 4.5, "evaluated", 0.0),
        ("stopped", 3.0, "screened", 0.0),
    ):
        lineage.add(child(name, "mutate", nll, status=status))
        assert gain(lineage[name], lineage) == expected
    assert cost(child("t", "tune", 3.0, tokens=0.0, trials=4)) == 4 * TRIAL_TOKENS


def test_standing_still_explores_more(lineage):
    lineage.add(child("a", "mutate", 3.5, generation=1))
    found = [weights(PLAN, lineage, generation) for generation in range(2, 9)]
    assert [stagnation(lineage, generation) for generation in range(2, 6)] == [0, 1, 2, 3]
    shares = [share["explore"] for share in found]
    assert shares == sorted(shares) and shares[-1] > 2 * shares[0]
    assert all(sum(share.values()) == pytest.approx(1) for share in found)
    assert found[-1]["mutate"] >= (1 - FREE_MOST) * 0.5, "what was learned still counts"
