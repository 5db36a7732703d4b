"""Fidelities: cheap measurements that decide who is worth a dear one.

A candidate climbs from the probe, a short text, to a few windows of the fitness split, and on to all of it, as long as
it is not worse than who holds its niche by more than the noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.config import SearchPlan
from autoprune.pipeline.ledger import FULL, PROBE
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.niches import elites, incumbents, niche, within_reach

# So many nats above the incumbent on the probe stop a candidate. It is a coarse measure, and here only to keep what is
# clearly broken from being measured at all. How far the hidden states of the probe drift would say nothing: over 83
# candidates of one search its rank correlation with the cheap windows was −0.02, after the last block or over all, and
# that of the likelihood 0.69. The largest features drown the others in it, and those are not what is read in the end.
PROBE_MARGIN = 0.25
# Standard deviation of what a cheap difference (nats) says wrongly of a full one, until enough pairs tell it.
PRIOR_NOISE = 0.05
PRIOR_PAIRS = 4  # so many pairs' weight has the prior
# Nats by which a new kind of algorithm may be worse than the best (a perplexity a tenth higher): children may mend it.
NEW_SLACK = 0.1
MOST_SUBSETS = 5_000  # of windows that are tried all; beyond, windows are chosen one by one


def choose_windows(evaluations: Sequence[Evaluation], count: int) -> tuple[int, ...]:
    """The `count` windows of a split on which these algorithms differ most as they do on all windows: those with the
    least squares of (their mean on the subset − their mean on all), each less its mean over the algorithms.

    evaluations: of the whole split, such as the seeds'. Of equals the first in order.
    """
    nlls = np.array([e.window_nlls for e in evaluations])  # [algorithms, windows]
    offsets = nlls - nlls.mean(axis=1, keepdims=True)
    offsets -= offsets.mean(axis=0, keepdims=True)

    def miss(subset: tuple[int, ...]) -> float:
        return float(np.square(offsets[:, list(subset)].mean(axis=1)).sum())

    windows = range(nlls.shape[1])
    if math.comb(len(windows), count) <= MOST_SUBSETS:
        return min(itertools.combinations(windows, count), key=miss)
    chosen: tuple[int, ...] = ()
    while len(chosen) < count:
        chosen += (min((w for w in windows if w not in chosen), key=lambda w: miss((*chosen, w))),)
    return tuple(sorted(chosen))


def subset_nll(evaluation: Evaluation, windows: Sequence[int]) -> float:
    """Mean NLL (nats per token) of a whole split's measurement over some of its windows."""
    return sum(evaluation.window_nlls[w] for w in windows) / len(windows)


def noise(pairs: Sequence[tuple[float, float]]) -> float:
    """Standard deviation (nats) of full difference − cheap difference, over candidates that have both."""
    squares = sum((full - cheap) ** 2 for cheap, full in pairs) + PRIOR_PAIRS * PRIOR_NOISE**2
    return math.sqrt(squares / (len(pairs) + PRIOR_PAIRS))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's: of the ranks of two measurements, equal ones sharing theirs; NaN for fewer than 3 pairs."""
    if len(pairs) < 3:
        return math.nan
    ranks = pandas.DataFrame(pairs).rank()
    return float(ranks[0].corr(ranks[1]))


def reading(evaluation: Evaluation) -> float | None:
    """What is read off a measurement on any fidelity's text: nats per token, or None where there are none."""
    return evaluation.nll if evaluation.error is None and math.isfinite(evaluation.nll) else None


class Screen:
    """The fidelities of one search. `learn` of what was committed before asking `passed`.

    measure: of algorithms on a split (see `ledger.Evaluator`).
    """

    def __init__(
        self, plan: SearchPlan, lineage: Lineage, measure: Callable[[Sequence[Algorithm], str], list[Evaluation]]
    ) -> None:
        self._plan, self._lineage, self._measure = plan, lineage, measure
        self.windows: tuple[int, ...] = ()

    def learn(self, candidates: Sequence[Candidate]) -> None:
        """Give every measured candidate its niche; the seeds decide which windows are the cheap ones."""
        for candidate in candidates:
            if candidate.status == "evaluated" and not candidate.niche:
                candidate.niche = niche(candidate, self._lineage, self._plan.niche_radius)
        if not self.windows:
            seeds = [c.evaluation for c in self._lineage.evaluated() if c.operator == "seed"]
            if seeds and "cheap" in self._plan.fidelities:
                self.windows = choose_windows(seeds, self._plan.cheap_windows)

    def measure(self, rung: str, algorithms: Sequence[Algorithm]) -> list[Evaluation]:
        """On a fidelity's text: "probe", or "cheap", some windows of the fitness split."""
        split = PROBE if rung == "probe" else f"{FULL}[{','.join(map(str, self.windows))}]"
        return self._measure(algorithms, split)

    def passed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that no fidelity stops, the most promising first. The others become "screened", or "failed" or "poison"
        with the reason where they could not be measured."""
        left = list(candidates)
        rivals = {c.id: self.rival(c) for c in left}
        error = noise(self.differences())
        for rung in self._plan.fidelities:
            if not left:
                break
            for candidate, evaluation in zip(left, self.measure(rung, [c.algorithm for c in left]), strict=True):
                value = reading(evaluation)
                if value is None:
                    candidate.fail(evaluation, f"its likelihood on the {rung} text is not finite")
                else:
                    candidate.rungs[rung] = value
            for candidate in (c for c in left if c.status == "proposed"):
                candidate.rival = rivals[candidate.id].id
                if self.stops(rung, candidate, rivals[candidate.id], error):
                    candidate.status = "screened"
            left = [c for c in left if c.status == "proposed"]
        if self._plan.fidelities:
            last = self._plan.fidelities[-1]
            left.sort(key=lambda c: c.rungs[last])
        return left

    def rival(self, candidate: Candidate) -> Candidate:
        """Who is to be beaten: who holds the candidate's niche; where that is new, or out of the best one's reach, the
        best of all, which a new kind may miss by NEW_SLACK. Without niches the least of the elites."""
        plan = self._plan
        if not plan.diversity:
            return elites(self._lineage, plan.elites, diverse=False)[-1]
        holder = incumbents(self._lineage).get(niche(candidate, self._lineage, plan.niche_radius))
        return holder if holder and within_reach(holder, self._lineage) else self._lineage.evaluated()[0]

    def stops(self, rung: str, candidate: Candidate, rival: Candidate, error: float) -> bool:
        """Whether a fidelity, which has measured the candidate, finds it worse than its rival. error: see `noise`."""
        value = candidate.rungs[rung]
        if rung == "cheap":
            place = niche(candidate, self._lineage, self._plan.niche_radius)
            slack = 0.0 if place == rival.niche or not self._plan.diversity else NEW_SLACK
            return value - subset_nll(rival.evaluation, self.windows) > error + slack
        own = reading(*self.measure(rung, [rival.algorithm]))
        return own is not None and value > own + PROBE_MARGIN

    def effect(self, parent: Candidate, child: Candidate) -> float | None:
        """Nats by which a child differs from a measured parent, on the best fidelity that the child reached; None where
        it reached neither text."""
        if child.status == "evaluated":
            return child.fitness - parent.fitness
        return child.rungs["cheap"] - subset_nll(parent.evaluation, self.windows) if "cheap" in child.rungs else None

    def differences(self) -> list[tuple[float, float]]:
        """Cheap and full difference (nats) to its rival, of every candidate that has both. Those that were tuned on the
        cheap windows say nothing of the others."""
        return [
            (
                c.rungs["cheap"] - subset_nll(self._lineage[c.rival].evaluation, self.windows),
                c.fitness - self._lineage[c.rival].fitness,
            )
            for c in self._lineage.evaluated()
            if "cheap" in c.rungs and c.operator != "tune"
        ]

    def correlations(self) -> dict[str, float]:
        """Rank correlation of each fidelity with the full measurement, over the candidates that have both; of those
        that were tuned see `differences`."""
        measured = [c for c in self._lineage.evaluated() if c.operator != "tune"]
        found = {}
        for rung in self._plan.fidelities:
            pairs = [(c.rungs[rung], c.fitness) for c in measured if rung in c.rungs]
            if len(pairs) >= 3:
                found[rung] = rank_correlation(pairs)
        return found
