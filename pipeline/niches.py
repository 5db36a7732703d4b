"""Niches: kinds of algorithms, each with its incumbent, so that a search does not keep one idea in many dresses."""

from __future__ import annotations

import functools

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.language import parse, parse_allocation
from autoprune.pipeline.lineage import Candidate, Lineage, mask_distance

# Nats by which who holds a niche may be worse than the best (a perplexity a quarter higher), and still be a parent and
# a rival: what is worse will not catch up within a search, and beating it proves nothing.
REACH = 0.25


@functools.cache
def reads(algorithm_score: str, allocation_source: str = "") -> frozenset[str]:
    """The statistics that a score reads and, as profile.NAME, the summaries that a written allocation reads."""
    own = frozenset(parse(algorithm_score).reads)
    if allocation_source:
        own |= {f"profile.{name}" for name in parse_allocation(allocation_source).reads}
    return own


def _reads(algorithm: Algorithm) -> frozenset[str]:
    return reads(algorithm.score, algorithm.allocation.source)


def niche(candidate: Candidate, lineage: Lineage, radius: float) -> str:
    """The niche of a candidate that was probed: the id of the first measured candidate that founded one, reads the same
    and whose masks on the probe differ in less than `radius`; its own id where there is none yet."""
    own = _reads(candidate.algorithm)
    for founder in lineage:
        near = founder.niche == founder.id and mask_distance(founder.mask, candidate.mask) < radius
        if near and _reads(founder.algorithm) == own:
            return founder.id
    return candidate.id


def incumbents(lineage: Lineage) -> dict[str, Candidate]:
    """The best measured candidate of each niche, the best niche first."""
    best: dict[str, Candidate] = {}
    for candidate in lineage.evaluated():
        best.setdefault(candidate.niche, candidate)
    return best


def within_reach(candidate: Candidate, lineage: Lineage) -> bool:
    return candidate.fitness <= lineage.evaluated()[0].fitness + REACH


def elites(lineage: Lineage, count: int, diverse: bool = True) -> list[Candidate]:
    """The best candidates, best first. diverse: of each niche one, as long as that is within REACH of the best; then
    the best of the others."""
    measured = lineage.evaluated()
    if not diverse:
        return measured[:count]
    holders = [c for c in incumbents(lineage).values() if within_reach(c, lineage)][:count]
    others = [c for c in measured if c not in holders]
    return sorted(holders + others[: count - len(holders)], key=lambda c: c.fitness)
