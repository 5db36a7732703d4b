"""Which operator comes next: a bandit that rewards improvement per token, and explores when the search stands still."""

from __future__ import annotations

import bisect
import itertools
import random

from autoprune.pipeline.lineage import Candidate, Lineage

# What each operator is taken to have gained and cost before it was tried: one small success.
PRIOR_GAIN, PRIOR_COST = 0.02, 1_000.0
# What a measurement on the cheap fidelity, of which `tune` takes many and asks no model, counts in tokens; and what any
# candidate counts at least, also of a generator that reads and writes no tokens.
TRIAL_TOKENS, LEAST_TOKENS = 50, 100
# Share of the choice that goes by the configured frequencies, whatever was learned; more by each generation without a
# new best, up to the most.
FREE, FREE_STEP, FREE_MOST = 0.2, 0.2, 0.8


def cost(candidate: Candidate) -> float:
    """Tokens that an answer took, and what its trials count as."""
    return max(LEAST_TOKENS, candidate.tokens + TRIAL_TOKENS * candidate.trials)


def gain(candidate: Candidate, lineage: Lineage) -> float:
    """Nats by which a candidate is better than the best of its parents; 0 where it is not, or was not measured."""
    if candidate.status != "evaluated" or not candidate.parents:
        return 0.0
    return max(0.0, min(lineage[parent].fitness for parent in candidate.parents) - candidate.fitness)


def stagnation(lineage: Lineage, generation: int) -> int:
    """How many whole generations before this one brought no new best."""
    measured = lineage.evaluated()
    return max(0, generation - 1 - measured[0].generation) if measured else 0


def weights(plan: dict[str, float], lineage: Lineage, generation: int) -> dict[str, float]:
    """Frequencies of the operators in a generation, 1 in sum. plan: those that were configured."""
    wanted = {name: weight for name, weight in sorted(plan.items()) if weight > 0}
    base = {name: weight / sum(wanted.values()) for name, weight in wanted.items()}
    gains, costs = dict.fromkeys(base, PRIOR_GAIN), dict.fromkeys(base, PRIOR_COST)
    for candidate in lineage:
        # A repair is on the account of the operator whose answer was broken.
        operator = lineage[candidate.parents[-1]].operator if candidate.operator == "repair" else candidate.operator
        if operator in base:
            gains[operator] += gain(candidate, lineage)
            costs[operator] += cost(candidate)
    rates = {name: base[name] * gains[name] / costs[name] for name in base}
    still = stagnation(lineage, generation)
    free = min(FREE_MOST, FREE + FREE_STEP * still)
    drawn = dict(base)
    if "explore" in drawn:  # not only less of what was learned, but more of what is new
        drawn["explore"] *= 1 + still
    drawn = {name: weight / sum(drawn.values()) for name, weight in drawn.items()}
    total = sum(rates.values())
    return {name: free * drawn[name] + (1 - free) * rates[name] / total for name in base}


def choose(rng: random.Random, frequencies: dict[str, float], count: int) -> list[str]:
    """Operators for `count` prompts, in proportion to their frequencies as nearly as so many allow.

    One random offset decides all (systematic sampling), so a generation is not of one kind by chance.
    """
    names = sorted(name for name in frequencies if frequencies[name] > 0)
    edges = list(itertools.accumulate(frequencies[name] for name in names))
    offset = rng.random()
    positions = ((index + offset) / count * edges[-1] for index in range(count))
    return [names[min(bisect.bisect(edges, position), len(names) - 1)] for position in positions]
