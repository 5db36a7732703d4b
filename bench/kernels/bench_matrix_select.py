"""Selection in whole matrices at 60%: masks of scores, and weights pruned by fused scores.

    python bench/kernels/bench_matrix_select.py [--device cpu|cuda] [--threads N]

Rivals as those of rows, over the matrix as one row.
"""

import math
import sys

from bench_row_select import cases
from timing import compare, options

from autoprune.kernels import masks, reference


def main() -> int:
    device = options(__doc__).device
    masking, pruning = cases(
        device,
        masks.matrix_mask,
        masks.prune_matrix,
        reference.matrix_mask,
        lambda scores: scores.reshape(1, -1),
        math.prod,
    )
    compare("matrix_mask", masking, device)
    compare("prune_matrix", pruning, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
