"""Several cases as one evaluator: an algorithm that is to transfer is measured on every model and at every sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from autoprune.actors.aside import Aside
from autoprune.actors.messages import Evaluation, Probe, split_places
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.pipeline.config import FREE_GROUP
from autoprune.pipeline.ledger import FULL, REPORT

AT_A_TIME = 8  # algorithms that go through all cases together, at least


class Pool(Protocol):
    """An evaluator that measures at any sparsity. room: so many algorithms are measured at a time."""

    dense: dict[str, Evaluation]
    room: int

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]: ...

    def evaluate(
        self, jobs: Sequence[Algorithm], split: str = FULL, sparsity: float | None = None
    ) -> Iterator[tuple[int, Evaluation]]: ...


@dataclass(frozen=True)
class Case:
    """A model, whose pool this is, pruned to a sparsity. name: for people. group: an n:m of its own, or FREE_GROUP."""

    pool: Pool
    sparsity: float
    name: str
    group: str = FREE_GROUP

    def evaluate(self, jobs: Sequence[Algorithm], split: str) -> Iterator[tuple[int, Evaluation]]:
        """As the pool, of the algorithms as they prune here: n:m leaves no room for another group, or an allocation."""
        if self.group != FREE_GROUP:
            jobs = [replace(job, group=self.group, allocation=Allocation()) for job in jobs]
        return self.pool.evaluate(jobs, split, self.sparsity)

    def excess(self, evaluation: Evaluation, split: str) -> Evaluation:
        """The measurement in nats above the dense model's, window by window."""
        base, places = split_places(split)
        if base not in self.pool.dense or not evaluation.window_nlls:
            return evaluation
        dense = self.pool.dense[base].window_nlls
        if places is not None:
            dense = [dense[place] for place in places]
        above = tuple(own - other for own, other in zip(evaluation.window_nlls, dense, strict=True))
        return replace(evaluation, nll=sum(above) / len(above), window_nlls=above)


def combine(evaluations: Sequence[Evaluation], worst: bool) -> Evaluation:
    """One measurement of several cases', each in nats above its dense model: in every window the worst case, or the
    cases' mean. So windows can be compared one by one, and any of them stand for all as they do with one case.

    Where texts have different numbers of windows, as they do with different tokenizers, those that all have count. What
    is said of blocks is the first case's, but for the last block's error, which is combined, too.
    """
    broken = next((e for e in evaluations if e.error is not None), None)
    seconds = sum(e.seconds for e in evaluations)
    if broken is not None:
        return replace(broken, seconds=seconds)

    def join(values: Sequence[float]) -> float:
        return max(values) if worst else sum(values) / len(values)

    windows = tuple(map(join, zip(*(e.window_nlls for e in evaluations), strict=False)))
    errors = [e.block_errors[-1] for e in evaluations if e.block_errors]
    return replace(
        evaluations[0],
        nll=sum(windows) / len(windows),
        tokens=sum(e.tokens for e in evaluations),
        window_nlls=windows,
        block_errors=evaluations[0].block_errors[:-1] + ((join(errors),) if errors else ()),
        seconds=seconds,
    )


class Cases:
    """The Evaluator of a search over several cases. Fitness is nats above the dense model (see `combine`). A split with
    a number behind it, such as "report@1", is that case's alone, in nats as such."""

    def __init__(self, cases: Sequence[Case], worst: bool) -> None:
        self.cases, self._worst = list(cases), worst
        self.dense = {
            split: combine([case.excess(case.pool.dense[split], split) for case in self.cases], worst)
            for split in (FULL, REPORT)
        }
        pools: dict[int, list[int]] = {}
        for number, case in enumerate(self.cases):
            pools.setdefault(id(case.pool), []).append(number)
        self._of_pools = list(pools.values())  # numbers of the cases that one pool measures

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]:
        return self.cases[0].pool.probe(algorithms)

    def evaluate(self, jobs: Sequence[Algorithm], split: str = FULL) -> Iterator[tuple[int, Evaluation]]:
        base, at, number = split.partition("@")
        if at:
            case = self.cases[int(number)]
            yield from case.evaluate(jobs, base)
            return
        # A few at a time, so that what a killed search has measured of all cases is in its journal; enough for no
        # evaluator to wait long for the last one of a case.
        step = max(AT_A_TIME, *(2 * case.pool.room for case in self.cases))
        for first in range(0, len(jobs), step):
            some = jobs[first : first + step]
            others = [Aside(partial(self._measure, numbers, some, split)) for numbers in self._of_pools[1:]]
            found = self._measure(self._of_pools[0], some, split)
            for other in others:
                found |= other.wait()
            for index in range(len(some)):
                own = [found[number, index] for number in range(len(self.cases)) if (number, index) in found]
                yield first + index, combine(own, self._worst)

    def _measure(
        self, numbers: Sequence[int], jobs: Sequence[Algorithm], split: str
    ) -> dict[tuple[int, int], Evaluation]:
        """By case and job, of the cases of one pool, one after the other; without what has failed in an earlier one."""
        found: dict[tuple[int, int], Evaluation] = {}
        left = list(range(len(jobs)))
        for number in numbers:
            case = self.cases[number]
            for place, evaluation in case.evaluate([jobs[index] for index in left], split):
                usable = evaluation.error is None
                found[number, left[place]] = case.excess(evaluation, split) if usable else evaluation
            left = [index for index in left if found[number, index].error is None]
        return found
