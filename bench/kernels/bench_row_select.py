"""Selection in rows at 60%: masks of scores, and weights pruned by fused scores.

    python bench/kernels/bench_row_select.py [--device cpu|cuda] [--threads N]

Rivals: stable sort and scatter, topk without order and scatter, kthvalue and a comparison; on a CPU also
numpy.partition in one thread, which finds thresholds and no mask. For fused scores they work on scores that are there.
Exit code 1 where a bar is missed: on a CPU 20 times faster than the sort and no slower than partition, on CUDA at most
twice a copy's time and 15 times faster than the sort.
"""

import sys

import numpy as np
import torch
from timing import SPARSITY, Case, compare, dtype_of, missed, norms, options, random, shapes

from autoprune.kernels import masks, reference


def sort(scores, k):
    order = scores.sort(dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :k], False)


def topk(scores, k):
    lowest = scores.topk(k, dim=1, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


def kthvalue(scores, k):
    return scores > scores.kthvalue(k, dim=1, keepdim=True).values


def rivals(scores, k):
    found = {rival.__name__: lambda rival=rival: rival(scores, k) for rival in (sort, topk, kthvalue)}
    if scores.device.type == "cpu":
        array = scores.numpy()
        found["partition"] = lambda: np.partition(array, k - 1, axis=1)
    return found


def masking(shape, device):
    scores = (random(*shape, device=device).abs() * norms(shape[1], device)).to(dtype_of(device))
    k = int(SPARSITY * shape[1])

    def right():
        assert torch.equal(masks.row_mask(scores, k).cpu(), reference.row_mask(scores.cpu(), k))

    moved = scores.numel() * (scores.element_size() + 1)
    run = lambda: masks.row_mask(scores, k)  # noqa: E731
    return Case(f"mask {shape[0]}×{shape[1]}", run, right, moved, rivals(scores, k))


def pruning(shape, device):
    weight, factors = random(*shape, device=device, dtype=dtype_of(device)), norms(shape[1], device)
    k, out = int(SPARSITY * shape[1]), torch.empty(shape, dtype=dtype_of(device), device=device)
    scores = weight.float().abs() * factors

    def right():
        kept = reference.row_mask(scores.cpu(), k)
        bits = masks.prune_rows(weight, factors, k, out)
        assert torch.equal(masks.unpack(bits, shape).cpu(), kept)
        assert torch.equal(out.cpu(), weight.cpu().masked_fill(~kept, 0))

    moved = weight.numel() * (2 * weight.element_size()) + weight.numel() // 8
    run = lambda: masks.prune_rows(weight, factors, k, out)  # noqa: E731
    return Case(f"prune {shape[0]}×{shape[1]}", run, right, moved, rivals(scores, k))


def main() -> int:
    device = options(__doc__).device
    masked = compare("row_mask", [masking(shape, device) for shape in shapes(device)], device)
    pruned = compare("prune_rows", [pruning(shape, device) for shape in shapes(device)], device)
    if device == "cpu":
        return missed(masked, sort=20, partition=1)
    return missed(pruned, copy=1 / 2, sort=15)


if __name__ == "__main__":
    sys.exit(main())
