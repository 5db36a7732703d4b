"""Selection in whole matrices at 60%: masks of scores, and weights pruned by fused scores.

    python bench/kernels/bench_matrix_select.py [--device cpu|cuda] [--threads N]

Rivals as those of rows, over the matrix as one row.
"""

import sys

import torch
from bench_row_select import rivals
from timing import SPARSITY, Case, compare, dtype_of, norms, options, random, shapes

from autoprune.kernels import masks, reference


def masking(shape, device):
    scores = (random(*shape, device=device).abs() * norms(shape[1], device)).to(dtype_of(device))
    k = int(SPARSITY * scores.numel())

    def right():
        assert torch.equal(masks.matrix_mask(scores, k).cpu(), reference.matrix_mask(scores.cpu(), k))

    moved = scores.numel() * (scores.element_size() + 1)
    run = lambda: masks.matrix_mask(scores, k)  # noqa: E731
    return Case(f"mask {shape[0]}×{shape[1]}", run, right, moved, rivals(scores.reshape(1, -1), k))


def pruning(shape, device):
    weight, factors = random(*shape, device=device, dtype=dtype_of(device)), norms(shape[1], device)
    out = torch.empty_like(weight)
    k = int(SPARSITY * weight.numel())
    scores = weight.float().abs() * factors

    def right():
        kept = reference.matrix_mask(scores.cpu(), k)
        bits = masks.prune_matrix(weight, factors, k, out)
        assert torch.equal(masks.unpack(bits, shape).cpu(), kept)
        assert torch.equal(out.cpu(), weight.cpu().masked_fill(~kept, 0))

    moved = weight.numel() * (2 * weight.element_size()) + weight.numel() // 8
    run = lambda: masks.prune_matrix(weight, factors, k, out)  # noqa: E731
    return Case(f"prune {shape[0]}×{shape[1]}", run, right, moved, rivals(scores.reshape(1, -1), k))


def main() -> int:
    device = options(__doc__).device
    compare("matrix_mask", [masking(shape, device) for shape in shapes(device)], device)
    compare("prune_matrix", [pruning(shape, device) for shape in shapes(device)], device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
