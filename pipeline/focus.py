"""Which statistics a new score may read: a small language model that is offered all of them writes of the one that it
knows, so the graph chooses few, and those that were hardly tried come first."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.lineage import Lineage
from autoprune.pipeline.niches import reads

EXPLORED = 2  # statistics that an exploration is offered
WARMTH = 0.05  # nats by which a trial must be better for its statistic to be offered e times as often
LIMIT = 0.5  # nats beyond which it does not matter how much better or worse


def tried(lineage: Lineage) -> Counter[str]:
    """In how many different masks each statistic has had a part."""
    counts: Counter[str] = Counter()
    for score in {c.mask_hash: c.algorithm.score for c in lineage if c.mask_hash and c.status != "repeat"}.values():
        counts.update(reads(score))
    return counts


def focus(
    rng: random.Random,
    lineage: Lineage,
    operator: str,
    parents: Sequence[Algorithm],
    offered: Sequence[str],
    promise: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """The statistics, of those that are offered, that an answer may read: what the parents read, and to mutate one
    more; to cross two algorithms that read the same, too. To explore, EXPLORED, whatever the parents read. New ones are
    drawn, each with a chance that falls with the number of times that it was tried, and rises with what it promises
    (see `trials`; nats, negative where it is better)."""
    own = frozenset().union(*(reads(parent.score) for parent in parents)) & frozenset(offered)
    own, more = (frozenset(), EXPLORED) if operator == "explore" else (own, 1)
    same = len({reads(parent.score) for parent in parents}) == 1
    if operator == "simplify" or (operator == "crossover" and not same):
        more = 0
    counts, left = tried(lineage), [name for name in offered if name not in own]
    for _ in range(min(more, len(left))):
        chances = [math.exp(-_held((promise or {}).get(name, 0.0)) / WARMTH) / (1 + counts[name]) for name in left]
        (drawn,) = rng.choices(left, chances)
        own |= {drawn}
        left.remove(drawn)
    return tuple(name for name in offered if name in own)


def _held(effect: float) -> float:
    return max(-LIMIT, min(LIMIT, effect))
