"""Prompts say what the graph says: ancestors in order, contrast, verdicts; and who is chosen as parent."""

import random
from collections import Counter

import pytest

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.pipeline.gcot import KNOWN_LIMIT, PATH_LIMIT, build_prompt
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.population import choose_operators, choose_parents, seed


def measured(
    name: str, nll: float, parents: tuple[str, ...] = (), mask: str = "ff00", noise: float = 0.01
) -> Candidate:
    windows = tuple(nll + noise * (-1) ** index for index in range(4))
    return Candidate(
        name,
        len(parents),
        "mutate" if parents else "seed",
        parents,
        Algorithm(f"def score(W):\n    return W.abs() * {nll}\n", "row", Allocation("sdsa", {"tau": 0.5})),
        hypothesis=f"claim of {name}",
        status="evaluated",
        mask=mask,
        mask_hash=name,
        evaluation=Evaluation(nll, 40, windows, (0.5,) * 3, (0.1, 0.2, 0.9 + nll / 100), 0.5),
    )


@pytest.fixture
def lineage() -> Lineage:
    graph = Lineage()
    graph.add(measured("root", 4.0))
    graph.add(measured("other", 5.0, mask="00ff"))
    graph.add(measured("good", 3.5, ("root",)))
    graph.add(measured("bad", 6.0, ("root",)))
    graph.add(measured("middling", 4.2, ("root",)))
    graph.add(Candidate("broken", 1, "mutate", ("root",), status="invalid", error="no such name"))
    graph.add(measured("focal", 3.4, ("good",)))
    return graph


def test_the_prompt_walks_ancestors_with_best_and_worst_contrast(lineage):
    (_, system), (_, user) = build_prompt(lineage, "mutate score", ("focal",), 2.5, 0.6, 20_000)
    assert "Diagnosis:" in system and "def score" in system
    steps = user.partition("How we got here:")[2]
    places = [steps.index(f"claim of {name}") for name in ("root", "good", "bad", "focal")]
    assert places == sorted(places), "not in topological order"
    assert "claim of middling" not in steps, "neither ancestor, nor best or worst child"
    assert "claim of other" not in steps
    assert "4. (mutate of 2) Claim: claim of focal" in steps
    assert "of step 4" in steps.partition("Task")[2]
    assert "the dense model has 2.500" in user and "60% of the weights" in user


def test_evidence_and_conclusion_follow_the_measurements(lineage):
    user = build_prompt(lineage, "mutate score", ("focal",), 2.5, 0.6, 20_000)[1][1]
    bad = user.partition("claim of bad")[2].partition("claim of")[0]
    assert "fitness 6.000, +2.000" in bad and "the claim is refuted" in bad
    good = user.partition("claim of good")[2].partition("claim of")[0]
    assert "-0.500" in good and "the claim is confirmed" in good
    assert "the error grows most in blocks 2 (+0.7" in good


def test_a_difference_within_the_noise_is_inconclusive():
    graph = Lineage()
    graph.add(measured("root", 4.0))
    child = measured("child", 4.0001, ("root",))
    windows = tuple(4.0001 + 0.5 * (-1) ** index for index in range(4))
    child.evaluation = Evaluation(4.0001, 40, windows, (), (), 0.5)
    graph.add(child)
    assert graph.edge("root", "child")["verdict"] == "inconclusive"


def test_a_crossover_names_both_parents(lineage):
    user = build_prompt(lineage, "crossover", ("focal", "other"), 2.5, 0.6, 20_000)[1][1]
    assert "claim of other" in user.partition("How we got here:")[2]
    assert "works in step 5 with what works in step 2" in user


def test_prompts_stay_bounded_however_deep_the_lineage(lineage):
    for index in range(30):
        lineage.add(measured(f"deep-{index}", 3.3 - index / 100, (f"deep-{index - 1}" if index else "focal",)))
    user = build_prompt(lineage, "mutate score", ("deep-29",), 2.5, 0.6, 20_000)[1][1]
    assert user.count("Claim:") <= 3 * PATH_LIMIT
    assert sum(line.startswith("- ") for line in user.splitlines()) == KNOWN_LIMIT
    assert "claim of deep-29" in user


def test_operators_come_in_proportion():
    weights = {"explore": 1.0, "mutate": 2.0, "crossover": 1.0, "never": 0.0}
    for trial in range(50):
        chosen = Counter(choose_operators(random.Random(trial), weights, 8))
        assert chosen == {"explore": 2, "mutate": 4, "crossover": 2}
    mixed = Counter(name for trial in range(400) for name in choose_operators(random.Random(trial), weights, 3))
    assert mixed["mutate"] / 1200 == pytest.approx(0.5, abs=0.05)
    assert mixed["explore"] / 1200 == pytest.approx(0.25, abs=0.05)


def test_parents_are_elites_and_the_partner_is_far(lineage):
    for trial in range(30):
        focal, partner = choose_parents(random.Random(trial), "crossover", lineage, 6)
        assert focal != partner
        if focal != "other":
            assert partner == "other", "the only one with different masks"
    assert {choose_parents(random.Random(t), "mutate", lineage, 2)[0] for t in range(30)} == {"focal", "good"}


def test_seeds_write_their_defaults_out():
    algorithm = seed("wanda+sdsa").algorithm
    assert algorithm.allocation.parameters == {"tau": 0.5, "m": 0.3, "depth": 0.0}
    assert algorithm.group == "row" and seed("ria").algorithm.group == "matrix"


def test_a_long_chain_loses_its_oldest_evidence_first(lineage):
    whole = build_prompt(lineage, "crossover", ("focal", "other"), 2.5, 0.6, 20_000)
    size = sum(len(text) for _, text in whole)
    user = build_prompt(lineage, "crossover", ("focal", "other"), 2.5, 0.6, size - 1)[1][1]
    steps = user.partition("How we got here:")[2]
    assert "claim of root" not in steps, "the oldest that is no parent"
    assert "claim of good" in steps and "claim of focal" in steps and "claim of other" in steps
    assert "works in step 4 with what works in step 1" in user
    shortest = build_prompt(lineage, "crossover", ("focal", "other"), 2.5, 0.6, 10)[1][1]
    assert shortest.count("Claim:") == 2
