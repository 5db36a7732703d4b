"""Hamming distance and digest of packed masks.

    python bench/kernels/bench_distance.py [--device cpu|cuda] [--threads N]

The rival compares the masks before they are packed.
"""

import sys

from timing import Case, compare, options, random, shapes

from autoprune.kernels import masks
from autoprune.kernels.distance import digest, distance


def cases(shape, device):
    first, second = (random(*shape, device=device, seed=seed) > 0 for seed in (0, 1))
    bits = masks.pack(first), masks.pack(second)

    def right():
        assert distance(*bits) == int((first != second).sum())
        assert digest(bits[0]) == digest(bits[0].cpu()) != digest(bits[1])

    name = f"{shape[0]}×{shape[1]}"
    bools = {"bools": lambda: int((first != second).sum())}
    return [
        Case(f"distance {name}", lambda: distance(*bits), right, first.numel() // 4, bools),
        Case(f"digest {name}", lambda: digest(bits[0]), right, first.numel() // 8),
    ]


def main() -> int:
    device = options(__doc__).device
    compare("distance, digest", [case for shape in shapes(device)[-2:] for case in cases(shape, device)], device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
