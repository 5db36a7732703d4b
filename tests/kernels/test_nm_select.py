"""n of every m neighbours in Triton against the stable sort, bit for bit."""

import pytest
import torch
from lanes import DTYPES, TRITON, lane, random

from autoprune.kernels import masks, nm_select, reference
from autoprune.kernels.keys import Scores, Target

pytestmark = pytest.mark.parametrize("name", TRITON)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 13, 16, 31, 32])
def test_masks_equal_stable_sort(name, dtype, m):
    scores = random(3, 70 * m, dtype=dtype, ties=True)
    with lane(name) as device:
        for n in sorted({0, 1, m // 2, m - 1, m}):
            target = Target(scores.to(device))
            target.mask.view(torch.uint8).fill_(0xAA)
            nm_select.nm_select(Scores(scores.to(device)), n, m, target)
            assert torch.equal(target.mask.cpu(), reference.nm_mask(scores, n, m)), n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "m"), [(576, 4), (1536, 8), (576, 3), (11008, 4), (32, 32), (28672, 4), (36, 4)])
def test_fused_scores_prune_a_poisoned_output(name, dtype, width, m):
    weight, norms = random(2, width, dtype=dtype), random(width, seed=1).abs()
    with lane(name) as device:
        for n in (1, m // 2, m - 1):
            out = torch.full_like(weight, float("nan"), device=device)
            bits = masks.prune_nm(weight.to(device), norms.to(device), n, m, out)
            kept = reference.nm_mask(weight.float().abs() * norms, n, m)
            assert torch.equal(bits.cpu(), masks.pack(kept)) and torch.equal(out.cpu(), weight.masked_fill(~kept, 0)), n


def test_layouts_and_larger_groups(name):
    wide = random(8, 64, ties=True)
    for scores in (wide[:, ::2], wide[::2], wide.T, wide.reshape(2, 4, 64), wide[:0], wide[0]):
        for n, m in ((1, 2), (2, 4), (3, 8)):
            with lane(name) as device:
                assert torch.equal(masks.nm_mask(scores.to(device), n, m).cpu(), reference.nm_mask(scores, n, m))
    with lane(name) as device:  # beyond what is compared in registers: as rows
        assert torch.equal(masks.nm_mask(wide.to(device), 40, 64).cpu(), reference.nm_mask(wide, 40, 64))


def test_nan_is_refused(name):
    scores = random(2, 64)
    scores[1, 63] = float("nan")
    with lane(name) as device, pytest.raises(ValueError, match="scores are NaN"):
        masks.nm_mask(scores.to(device), 2, 4)
