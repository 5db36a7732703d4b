"""Who are the parents: seeds, elites, and the choice of operator and parents for a prompt."""

from __future__ import annotations

import bisect
import difflib
import itertools
import random
from pathlib import Path

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.allocation import DEFAULTS, AllocationError, check_allocation
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.scores import BASELINES
from autoprune.models.errors import InputError
from autoprune.pipeline.lineage import Candidate, Lineage, mask_distance

# What the baselines claim, so that the first prompts have a claim to set against the evidence.
CLAIMS = {
    "magnitude": "large weights matter most",
    "wanda": "a weight matters as much as the signal that it carries: its size times the norm of its input",
    "ria": "a weight matters by its share of its row and of its column, so that no channel is lost as a whole",
    "uniform": "every block can spare the same share",
    "owl": "blocks with more outlier scores must keep more",
    "sdsa": "blocks whose weights are more skewed hold outliers and must keep more",
    "atp": "errors of early blocks add up, so early blocks must keep more",
}


def baseline(text: str) -> Algorithm:
    """The algorithm that `score` or `score+allocation` names. Raises InputError for an unknown name."""
    score, _, allocation = text.partition("+")
    if score not in BASELINES:
        near = difflib.get_close_matches(score, BASELINES, n=1)
        raise InputError(
            f"unknown score {score!r}: expected {', '.join(BASELINES)}" + (f"; {near[0]}?" if near else "")
        )
    return Algorithm(
        parse(BASELINES[score].source).source, BASELINES[score].group, _allocation(allocation or "uniform")
    )


def _allocation(name: str) -> Allocation:
    """An allocation with its defaults written out, so that equal allocations have equal texts."""
    try:
        check_allocation(Allocation(name))
    except AllocationError as error:
        raise InputError(str(error)) from None
    return Allocation(name, dict(DEFAULTS[name]))


def read_score(file: Path, allocation: str) -> Algorithm:
    """A score function of one's own from a file in the algorithm language, compared by row."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', 'it is not text')}") from None
    try:
        program = parse(text)
    except LanguageError as error:
        raise InputError(f"{file}: {error}") from None
    return Algorithm(program.source, "row", _allocation(allocation))


def seed(text: str) -> Candidate:
    """A baseline as a candidate of generation 0."""
    algorithm = baseline(text)
    claims = [CLAIMS[text.partition("+")[0]], CLAIMS.get(algorithm.allocation.name, "")]
    hypothesis = "; ".join(claim for claim in claims if claim)
    return Candidate(f"seed-{text}", 0, "seed", algorithm=algorithm, hypothesis=hypothesis)


def elites(lineage: Lineage, count: int) -> list[Candidate]:
    """The best candidates, best first."""
    return lineage.evaluated()[:count]


def choose_operators(rng: random.Random, weights: dict[str, float], count: int) -> list[str]:
    """Operators for `count` prompts, in proportion to their weights as nearly as so many allow.

    One random offset decides all (systematic sampling), so a generation is not of one kind by chance.
    """
    names = sorted(name for name in weights if weights[name] > 0)
    edges = list(itertools.accumulate(weights[name] for name in names))
    offset = rng.random()
    positions = ((index + offset) / count * edges[-1] for index in range(count))
    return [names[min(bisect.bisect(edges, position), len(names) - 1)] for position in positions]


def choose_parents(rng: random.Random, operator: str, lineage: Lineage, count: int) -> tuple[str, ...]:
    """The focal candidate and, for crossover, the elite whose masks are farthest from its masks.

    The focal candidate is drawn among the `count` elites, the better with more weight (linear in rank).
    """
    best = elites(lineage, count)
    focal = rng.choices(best, [len(best) - rank for rank in range(len(best))])[0]
    if operator != "crossover" or len(best) < 2:
        return (focal.id,)
    others = [candidate for candidate in best if candidate.id != focal.id]
    partner = max(others, key=lambda other: mask_distance(focal.mask, other.mask))
    return (focal.id, partner.id)
