"""Mean and powers of deviations of |W|, and of |W|·norm, row by row in fp64.

    python bench/kernels/bench_moments.py [--device cpu|cuda] [--threads N]

The rival is torch in fp64, in two passes. Exit code 1 where, on CUDA, a pass takes more than 1.3 times the time of a
copy of the weight.
"""

import sys

import torch
from timing import Case, compare, dtype_of, missed, norms, options, random, shapes

from autoprune.kernels import reference
from autoprune.kernels.moments import row_moments


def case(shape, weighted, device):
    weight = random(*shape, device=device, dtype=dtype_of(device))
    factors = norms(shape[1], device) if weighted else None

    def right():
        found, expected = row_moments(weight, factors), reference.row_moments(weight, factors)
        assert torch.allclose(found, expected, rtol=1e-9)

    # A copy reads and writes the weight: the bar is its time.
    moved = 2 * weight.numel() * weight.element_size()
    label = f"|W|{'·norm' if weighted else ''} {shape[0]}×{shape[1]}"
    rivals = {"torch": lambda: reference.row_moments(weight, factors)}
    return Case(label, lambda: row_moments(weight, factors), right, moved, rivals)


def main() -> int:
    device = options(__doc__).device
    cases = [case(shape, weighted, device) for shape in shapes(device)[-2:] for weighted in (False, True)]
    found = compare("row_moments", cases, device)
    return missed(found, copy=1 / 1.3) if device == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
