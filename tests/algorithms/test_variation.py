"""Variation without a model: what comes out is in the language, typed, and nearly always worth measuring."""

import ast
import random

import pytest
import torch

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.probe import probe, probe_allocation
from autoprune.algorithms.scores import BASELINES
from autoprune.algorithms.variation import (
    MAX_NODES,
    NoVariationError,
    crossed,
    expression,
    function_text,
    mutated,
    part_rules,
    parts_of,
    type_of,
)
from autoprune.algorithms.vocabulary import STATISTICS
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS

RULES = part_rules(tuple(STATISTICS))


@pytest.mark.parametrize("name", BASELINES)
def test_one_expression_yields_what_the_lines_yield(name):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 9, generator=generator)
    statistics = {n: torch.rand(one.shape(6, 9), generator=generator) + 0.1 for n, one in STATISTICS.items()}
    whole = parse(function_text("score", expression(BASELINES[name].source, "score")))
    assert torch.equal(whole(W, statistics), parse(BASELINES[name].source)(W, statistics))


@pytest.mark.parametrize(
    "text, kind",
    [
        ("W", "m"),
        ("x_norm * 2", "r"),
        ("W.mean(dim=1, keepdim=True)", "c"),
        ("W.sum()", "s"),
        ("profile.skewness", "u"),
        ("sparsity", "s"),
        ("profile", None),
        ("torch", None),
        ("W > 0", None),
        ("W @ W", None),
        ("W.mean(dim=1)", None),
    ],
)
def test_types_are_told_by_shapes(text, kind):
    assert type_of(ast.parse(text, mode="eval").body) == kind


def test_scores_stay_scores_over_many_variations():
    """Each a parent of the next ones, so what varies is what variation made."""
    rng, population, usable = random.Random(7), [b.source for b in BASELINES.values()], 0
    for _ in range(150):
        one, other = rng.choice(population), rng.choice(population)
        try:
            new = mutated(one, "score", rng, RULES) if rng.random() < 0.6 else crossed(one, other, "score", rng)
            probe(Algorithm(new), 0.6)
        except (NoVariationError, LanguageError):
            continue
        usable += 1
        population.append(new)
        assert parse(new).source == new, "the text is canonical"
        assert sum(1 for _ in ast.walk(expression(new, "score"))) <= 3 * MAX_NODES
    assert usable > 120 and len(set(population)) > 100


def test_allocations_vary_too():
    rng, population, usable = random.Random(3), list(WRITTEN_ALLOCATIONS.values()), 0
    for _ in range(60):
        try:
            new = mutated(rng.choice(population), "allocate", rng, RULES)
            probe_allocation(new)
        except (NoVariationError, LanguageError):
            continue
        usable += 1
        population.append(new)
    assert usable > 30


def test_the_same_seed_gives_the_same_variation():
    source = BASELINES["ria"].source
    texts = {mutated(source, "score", random.Random(5), RULES) for _ in range(3)}
    assert len(texts) == 1


def test_a_crossover_puts_a_part_of_the_other_in_the_place_of_one_of_its_type():
    for trial in range(20):
        child = crossed("def score(W):\n    return W.abs()", BASELINES["ria"].source, "score", random.Random(trial))
        assert parse(child).reads in ((), ("x_norm",))
        kinds = {kind for kind, *_ in parts_of(ast.Expression(expression(child, "score")))}
        assert "m" in kinds


def test_loops_are_not_varied():
    source = "def score(W):\n    m0 = W.abs()\n    for _ in range(3):\n        m0 = m0.sqrt()\n    return m0"
    with pytest.raises(NoVariationError, match="loop"):
        mutated(source, "score", random.Random(0), RULES)
