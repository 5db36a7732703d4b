"""Fidelities: which windows stand for all, what noise is, and who is stopped before a full measurement."""

import itertools
import math
import random

import pytest
from scipy.stats import spearmanr

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.config import SearchPlan
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.niches import elites, incumbents, niche
from autoprune.pipeline.screening import PRIOR_NOISE, Screen, choose_windows, noise, rank_correlation, subset_nll


def evaluation(nlls, error=0.5):
    return Evaluation(sum(nlls) / len(nlls), 10 * len(nlls), tuple(nlls), (), (0.1, error))


def test_chosen_windows_keep_the_differences_between_algorithms():
    """Window 1 and 3 say exactly what all say; the others are each off in a way of their own."""
    source = random.Random(0)
    found = []
    for level in (3.0, 3.2, 3.9, 4.5):
        noise_ = source.uniform(-0.5, 0.5)
        found.append(evaluation([level + noise_, level - 0.3, level - noise_ + 1, level + 0.3, level]))
    windows = choose_windows(found, 2)
    means = [e.nll - subset_nll(e, windows) for e in found]
    best = min(
        sum((m - sum(ms) / 4) ** 2 for m in ms)
        for ms in ([e.nll - subset_nll(e, pair) for e in found] for pair in itertools.combinations(range(5), 2))
    )
    assert sum((m - sum(means) / 4) ** 2 for m in means) == pytest.approx(best, abs=1e-12)


def test_many_windows_are_chosen_one_by_one():
    source = random.Random(1)
    found = [evaluation([3 + index + source.gauss(0, 0.3) for _ in range(40)]) for index in range(5)]
    chosen = choose_windows(found, 6)
    assert len(set(chosen)) == 6 and list(chosen) == sorted(chosen)
    gaps = [e.nll - subset_nll(e, chosen) for e in found]
    first = [e.nll - subset_nll(e, range(6)) for e in found]

    def spread(values):
        return sum((v - sum(values) / len(values)) ** 2 for v in values)

    assert spread(gaps) < spread(first)


def test_rank_correlation_is_spearmans():
    source = random.Random(2)
    for _ in range(20):
        pairs = [(source.randrange(6), source.randrange(6)) for _ in range(source.randrange(5, 30))]
        assert rank_correlation(pairs) == pytest.approx(spearmanr(pairs).statistic, nan_ok=True)
    assert math.isnan(rank_correlation([(1, 2), (2, 1)]))


def test_noise_starts_as_the_prior_and_follows_the_data():
    assert noise([]) == PRIOR_NOISE
    assert noise([(0.0, 0.3)] * 400) == pytest.approx(0.3, rel=0.02)
    assert noise([(0.1, 0.1)] * 400) < 0.01


SCORES = {
    "wanda": "def score(W, x_norm):\n    return W.abs() * x_norm",
    "std": "def score(W, x_std):\n    return W.abs() * x_std",
}


def candidate(name, score, nll, mask, status="evaluated", error=0.5):
    measured = evaluation([nll - 0.1, nll, nll + 0.1, nll], error) if status == "evaluated" else None
    return Candidate(
        name, 0, "seed", (), Algorithm(SCORES[score]), mask=mask, mask_hash=name, status=status, evaluation=measured
    )


@pytest.fixture
def lineage():
    """Two niches of what reads the same, by masks, and one of what reads another statistic."""
    graph = Lineage()
    plan = SearchPlan(elites=2, niche_radius=0.2)
    screen = Screen(plan, graph, lambda algorithms, split: [evaluation([9.0]) for _ in algorithms])
    for one in (
        candidate("a", "wanda", 3.9, "ffff"),
        candidate("b", "wanda", 3.8, "fffe"),
        candidate("c", "wanda", 4.0, "ff00"),
        candidate("d", "std", 4.6, "ffff"),
    ):
        graph.add(one)
    screen.learn(list(graph))
    return graph


def test_niches_are_by_what_is_read_and_by_masks(lineage):
    assert {c.id: c.niche for c in lineage} == {"a": "a", "b": "a", "c": "c", "d": "d"}
    assert {k: v.id for k, v in incumbents(lineage).items()} == {"a": "b", "c": "c", "d": "d"}
    assert [c.id for c in elites(lineage, 2)] == ["b", "c"]
    # d is out of the best one's reach, so a runner-up takes its place.
    assert [c.id for c in elites(lineage, 3)] == ["b", "a", "c"]
    assert [c.id for c in elites(lineage, 3, diverse=False)] == ["b", "a", "c"]
    assert niche(candidate("e", "std", 0, "fff0"), lineage, 0.2) == "e"
    assert niche(candidate("e", "std", 0, "fff0"), lineage, 0.3) == "d"


def fresh_screen(lineage, cheap, error=0.5, **plan):
    asked = []

    def measure(algorithms, split):
        asked.append((split, len(algorithms)))
        return [evaluation([cheap if split != "probe" else 9.0], error) for _ in algorithms]

    screen = Screen(SearchPlan(elites=2, niche_radius=0.2, **plan), lineage, measure)
    screen.learn(list(lineage))
    return screen, asked


@pytest.mark.parametrize(
    "mask, cheap, passes, rival",
    [
        ("ffff", 3.80, True, "b"),
        ("ffff", 3.84, True, "b"),  # within the noise
        ("ffff", 3.95, False, "b"),
        ("ff00", 4.02, True, "c"),  # against its own niche
        ("ff00", 4.08, False, "c"),
        ("0000", 3.92, True, "b"),  # a new niche: against the best, with some slack
        ("0000", 3.98, False, "b"),
    ],
)
def test_who_is_worse_than_its_rival_is_stopped(lineage, mask, cheap, passes, rival):
    screen, _ = fresh_screen(lineage, cheap)
    new = candidate("new", "wanda", 0, mask, status="proposed")
    # Windows differ in level: the rival's own mean over the cheap ones is what counts.
    offset = subset_nll(lineage[rival].evaluation, screen.windows) - lineage[rival].fitness
    screen, asked = fresh_screen(lineage, cheap + offset)
    assert (screen.passed([new]) == [new]) == passes
    assert new.rival == rival and new.status == ("proposed" if passes else "screened")
    assert asked[0][0] == "probe" and any(split.startswith("fitness[") for split, _ in asked)


def test_a_broken_algorithm_never_reaches_the_second_fidelity(lineage):
    rungs = []

    def measure(algorithms, split):
        rungs.append(split)
        return [evaluation([3.3 if "std" in a.score else 3.0], 0.5) for a in algorithms]

    screen = Screen(SearchPlan(elites=2, niche_radius=0.2), lineage, measure)
    screen.learn(list(lineage))
    new = candidate("new", "std", 0, "0000", status="proposed")
    assert screen.passed([new]) == [] and new.status == "screened" and set(new.rungs) == {"probe"}
    assert all(split == "probe" for split in rungs)


def test_what_cannot_be_measured_is_stopped_with_a_reason(lineage):
    for poison in (False, True):
        broken = Evaluation(None, 0, error="out of memory", poison=poison)
        screen = Screen(SearchPlan(), lineage, lambda a, split, broken=broken: [broken] * len(a))
        screen.learn(list(lineage))
        new = candidate("new", "std", 0, "0000", status="proposed")
        assert screen.passed([new]) == [] and new.status == ("poison" if poison else "failed")
        assert new.error == "out of memory"


def test_the_most_promising_goes_first(lineage):
    values = {"one": 3.7, "two": 3.5, "three": 3.6}

    def measure(algorithms, split):
        return [evaluation([values.get(a.group, 3.8)]) for a in algorithms]

    screen = Screen(SearchPlan(elites=2, niche_radius=0.2), lineage, measure)
    screen.learn(list(lineage))
    new = [candidate(name, "wanda", 0, "ffff", status="proposed") for name in values]
    for one in new:
        one.algorithm = Algorithm(SCORES["wanda"], one.id)
    assert [c.id for c in screen.passed(new)] == ["two", "three", "one"]
