"""Several cases as one evaluator: an algorithm that is to transfer is measured on every model and at every sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from autoprune.actors.messages import Evaluation, Probe
from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.ledger import FULL

REPORT = "report"


class Pool(Protocol):
    """An evaluator that measures at any sparsity."""

    dense: dict[str, Evaluation]

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]: ...

    def evaluate(
        self, jobs: Sequence[Algorithm], split: str = FULL, sparsity: float | None = None
    ) -> Iterator[tuple[int, Evaluation]]: ...


@dataclass(frozen=True)
class Case:
    """A model, whose pool this is, pruned to a sparsity. name: for people."""

    pool: Pool
    sparsity: float
    name: str

    def excess(self, evaluation: Evaluation, split: str) -> Evaluation:
        """The measurement in nats above the dense model's on the same text (on fresh text: on the fitness split)."""
        dense = self.pool.dense[split if split in self.pool.dense else FULL]
        windows = dense.window_nlls
        _, bracket, rest = split.partition("[")
        if bracket:
            windows = [windows[int(place)] for place in rest.rstrip("]").split(",")]
        level = sum(windows) / len(windows)
        return replace(
            evaluation,
            nll=evaluation.nll - level,
            window_nlls=tuple(nll - level for nll in evaluation.window_nlls),
        )


def combine(evaluations: Sequence[Evaluation], worst: bool) -> Evaluation:
    """One measurement of several cases', each in nats above its dense model: of the worst case, or their mean, window
    by window. What is said of blocks is the first case's, but for the last block's error, which is combined, too."""
    broken = next((e for e in evaluations if e.error is not None), None)
    seconds = sum(e.seconds for e in evaluations)
    if broken is not None:
        return replace(broken, seconds=seconds)
    first, count = evaluations[0], len(evaluations)
    errors = [e.block_errors[-1] for e in evaluations if e.block_errors]
    if worst:
        chosen = max(evaluations, key=lambda e: e.nll)
        nll, windows = chosen.nll, chosen.window_nlls
    else:
        nll = sum(e.nll for e in evaluations) / count
        windows = tuple(sum(own) / count for own in zip(*(e.window_nlls for e in evaluations), strict=True))
    last = (max(errors) if worst else sum(errors) / len(errors),) if errors else ()
    tokens = sum(e.tokens for e in evaluations)
    return replace(
        first,
        nll=nll,
        tokens=tokens,
        window_nlls=windows,
        block_errors=first.block_errors[:-1] + last,
        seconds=seconds,
    )


class Cases:
    """The Evaluator of a search over several cases. Fitness is nats above the dense model, in the worst case or on the
    mean. A split with a number behind it, such as "report@1", is that case's alone, in nats as such."""

    def __init__(self, cases: Sequence[Case], worst: bool) -> None:
        self.cases, self._worst = list(cases), worst
        self.dense = {
            split: combine([case.excess(case.pool.dense[split], split) for case in self.cases], worst)
            for split in (FULL, REPORT)
        }

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]:
        return self.cases[0].pool.probe(algorithms)

    def evaluate(self, jobs: Sequence[Algorithm], split: str = FULL) -> Iterator[tuple[int, Evaluation]]:
        base, at, number = split.partition("@")
        if at:
            case = self.cases[int(number)]
            yield from case.pool.evaluate(jobs, base, case.sparsity)
            return
        found: list[list[Evaluation]] = [[] for _ in jobs]
        for case in self.cases:
            for index, evaluation in case.pool.evaluate(jobs, split, case.sparsity):
                usable = evaluation.error is None
                found[index].append(case.excess(evaluation, split) if usable else evaluation)
                if len(found[index]) == len(self.cases):
                    yield index, combine(found[index], self._worst)
