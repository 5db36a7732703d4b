"""2:4, 4:8 and 16:32 in rows: weights pruned by fused scores.

    python bench/kernels/bench_nm_select.py [--device cpu|cuda] [--threads N]

Rivals work on scores that are there already, as rows of m. Exit code 1 where, on CUDA, 2:4 takes more than 1.3 times a
copy's time.
"""

import sys

import torch
from bench_row_select import rivals
from timing import Case, compare, dtype_of, missed, norms, options, random, shapes

from autoprune.kernels import masks, reference


def pruning(shape, n, m, device):
    weight, factors = random(*shape, device=device, dtype=dtype_of(device)), norms(shape[1], device)
    out = torch.empty_like(weight)
    scores = weight.float().abs() * factors

    def right():
        kept = reference.nm_mask(scores.cpu(), n, m)
        bits = masks.prune_nm(weight, factors, n, m, out)
        assert torch.equal(masks.unpack(bits, shape).cpu(), kept)
        assert torch.equal(out.cpu(), weight.cpu().masked_fill(~kept, 0))

    moved = weight.numel() * (2 * weight.element_size()) + weight.numel() // 8
    run = lambda: masks.prune_nm(weight, factors, n, m, out)  # noqa: E731
    return Case(f"{m - n}:{m} of {shape[0]}×{shape[1]}", run, right, moved, rivals(scores.reshape(-1, m), n))


def main() -> int:
    device = options(__doc__).device
    chosen = shapes(device) if device == "cuda" else shapes(device)[2::2]
    found = compare("prune_nm", [pruning(shape, 2, 4, device) for shape in chosen], device)
    for n, m in ((4, 8), (16, 32)):
        compare("prune_nm", [pruning(shape, n, m, device) for shape in chosen[-1:]], device)
    return missed(found, copy=1 / 1.3) if device == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
