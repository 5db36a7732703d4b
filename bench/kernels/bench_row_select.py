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


def masking(shape, k, of_rows, device, select, expected):
    """select, expected: masks of scores and a count, ours and the reference's; of_rows: scores as rivals see them."""
    scores = (random(*shape, device=device).abs() * norms(shape[1], device)).to(dtype_of(device))

    def right():
        assert torch.equal(select(scores, k).cpu(), expected(scores.cpu(), k))

    moved = scores.numel() * (scores.element_size() + 1)
    label = f"mask {shape[0]}×{shape[1]}"
    return Case(label, lambda: select(scores, k), right, moved, rivals(of_rows(scores), k))


def pruning(label, shape, counts, of_rows, device, prune, expected):
    """As `masking`, of a weight and norms; counts: k, or n and m."""
    weight, factors = random(*shape, device=device, dtype=dtype_of(device)), norms(shape[1], device)
    out = torch.empty_like(weight)
    scores = weight.float().abs() * factors

    def right():
        kept = expected(scores.cpu(), *counts)
        bits = prune(weight, factors, *counts, out)
        assert torch.equal(masks.unpack(bits, shape).cpu(), kept)
        assert torch.equal(out.cpu(), weight.cpu().masked_fill(~kept, 0))

    moved = weight.numel() * (2 * weight.element_size()) + weight.numel() // 8
    label = f"{label} {shape[0]}×{shape[1]}"
    return Case(label, lambda: prune(weight, factors, *counts, out), right, moved, rivals(of_rows(scores), counts[0]))


def cases(device, select, prune, expected, of_rows, size):
    """Masks and prunings of all shapes; size: of a shape, the number of scores that compete."""
    counts = [(shape, int(SPARSITY * size(shape))) for shape in shapes(device)]
    masked = [masking(shape, k, of_rows, device, select, expected) for shape, k in counts]
    return masked, [pruning("prune", shape, (k,), of_rows, device, prune, expected) for shape, k in counts]


def main() -> int:
    device = options(__doc__).device
    masking_cases, pruning_cases = cases(
        device, masks.row_mask, masks.prune_rows, reference.row_mask, lambda scores: scores, lambda shape: shape[1]
    )
    masked = compare("row_mask", masking_cases, device)
    pruned = compare("prune_rows", pruning_cases, device)
    if device == "cpu":
        return missed(masked, sort=20, partition=1)
    return missed(pruned, copy=1 / 2, sort=15)


if __name__ == "__main__":
    sys.exit(main())
