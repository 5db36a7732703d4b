"""2:4, 4:8 and 16:32 in rows: weights pruned by fused scores.

    python bench/kernels/bench_nm_select.py [--device cpu|cuda] [--threads N]

Rivals work on scores that are there already, as rows of m. Exit code 1 where, on CUDA, 2:4 takes more than 1.3 times a
copy's time.
"""

import sys

from bench_row_select import pruning
from timing import compare, missed, options, shapes

from autoprune.kernels import masks, reference


def case(shape, n, m, device):
    of_rows = lambda scores: scores.reshape(-1, m)  # noqa: E731
    return pruning(f"{m - n}:{m} of", shape, (n, m), of_rows, device, masks.prune_nm, reference.nm_mask)


def main() -> int:
    device = options(__doc__).device
    chosen = shapes(device) if device == "cuda" else shapes(device)[2::2]
    found = compare("prune_nm", [case(shape, 2, 4, device) for shape in chosen], device)
    for n, m in ((4, 8), (16, 32)):
        compare("prune_nm", [case(shape, n, m, device) for shape in chosen[-1:]], device)
    return missed(found, copy=1 / 1.3) if device == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
