"""What the whole graph says of kinds of changes, such as reading a statistic: their median effect, and the best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.niches import reads

LEAST = 2  # measurements that a lesson rests on
MOST = 8  # lessons that are told, those with the largest effects


def changes(parent: Algorithm, child: Algorithm) -> Iterator[str]:
    """The kinds of change between two algorithms, as a prompt names them."""
    before, after = (reads(a.score, a.allocation.source) for a in (parent, child))
    yield from (f"reading {name}" for name in sorted(after - before))
    yield from (f"no longer reading {name}" for name in sorted(before - after))
    if parent.group != child.group:
        yield f"group {child.group} instead of {parent.group}"
    old, new = parent.allocation.parameters, child.allocation.parameters
    if parent.allocation.name == child.allocation.name:
        for name in sorted(old.keys() | new.keys()):
            before, after = old.get(name, 0.0), new.get(name, 0.0)  # SDSA's taylor is 0 where it is not there
            if before != after:
                yield f"{'more' if after > before else 'less'} {name}"


def lessons(lineage: Lineage, effect: Callable[[Candidate, Candidate], float | None]) -> list[str]:
    """One line per kind of change, the most helpful first.

    effect: of a child against its first parent, in nats, or None where it was not measured.
    """
    found: dict[str, list[float]] = {}
    for child in lineage:
        parent = lineage[child.parents[0]] if child.parents and child.algorithm is not None else None
        value = effect(parent, child) if parent is not None and parent.status == "evaluated" else None
        if value is not None:
            for change in changes(parent.algorithm, child.algorithm):
                found.setdefault(change, []).append(value)
    medians = {change: statistics.median(values) for change, values in found.items() if len(values) >= LEAST}
    told = sorted(medians, key=lambda change: -abs(medians[change]))[:MOST]
    return [
        f"- {change}: {medians[change]:+.3f} in the median of {len(found[change])}, {min(found[change]):+.3f} at best"
        for change in sorted(told, key=lambda change: medians[change])
    ]
