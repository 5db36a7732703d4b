"""The k-th lowest of very many keys: a sample says about where it lies, counting where exactly, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

# Of counts below and inside of low < key ≤ high: and, unless there are too many, a function of a rank among those
# inside, from 0: the key there, how many inside are lower, how many equal it.
Count = Callable[[int, int], tuple[int, int, Callable[[int], tuple[int, int, int]] | None]]


def bracket(sample: Sequence[int] | Tensor, share: float, lowest: int, highest: int) -> tuple[int, int]:
    """low, high, between which the key probably lies that has this share of all keys below it: above the one, not above
    the other. sample: sorted; lowest, highest: what is so for certain."""
    size = len(sample)
    margin = 3 * math.sqrt(size * share * (1 - share)) + 1  # three standard deviations of a rank
    first, last = int(share * size - margin), int(share * size + margin)
    low = lowest if first < 0 else max(lowest, int(sample[first]) - 1)
    high = highest if last >= size else min(highest, int(sample[last]))
    return low, max(high, low + 1)


def find(k: int, lowest: int, highest: int, low: int, high: int, count: Count) -> tuple[int, int, int]:
    """The k-th lowest key, how many keys are lower, and how many equal it. 0 < k ≤ number of keys.

    Fewer than k keys do not exceed `lowest`, at least k do not exceed `highest`. low, high: where to look first; where
    that was wrong, or too many lie there, the rest, or half of it, is next.
    """
    while True:
        below, inside, pick = count(low, high)
        if below >= k:
            low, high, highest = lowest, low, low
        elif below + inside < k:
            low, high, lowest = high, highest, high
        elif pick is not None:
            key, lower, equal = pick(k - below - 1)
            return key, below + lower, equal
        elif low + 1 == high:  # all of them are equal
            return high, below, inside
        else:
            lowest, highest, high = low, high, (low + high) // 2
