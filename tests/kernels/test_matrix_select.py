"""Matrix selection in Triton against the stable sort, bit for bit."""

import pytest
import torch
from lanes import DTYPES, TRITON, WIDTHS, edges, lane, random

from autoprune.kernels import masks, matrix_select, reference
from autoprune.kernels.keys import Scores, Target

pytestmark = pytest.mark.parametrize("name", TRITON)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_masks_equal_stable_sort(name, dtype, width):
    scores = random(2, width, dtype=dtype, ties=True)
    with lane(name) as device:
        for k in edges(2 * width):
            target = Target(scores.to(device))
            target.mask.view(torch.uint8).fill_(0xAA)
            if 0 < k < 2 * width:
                matrix_select.matrix_select(Scores(scores.to(device)), k, target)
                assert torch.equal(target.mask.cpu(), reference.matrix_mask(scores, k)), k
            assert torch.equal(masks.matrix_mask(scores.to(device), k).cpu(), reference.matrix_mask(scores, k)), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 576, 11008])
def test_fused_scores_prune_a_poisoned_output(name, dtype, width):
    weight, norms = random(2, width, dtype=dtype), random(width, seed=1).abs()
    with lane(name) as device:
        for k in edges(2 * width):
            out = torch.full_like(weight, float("nan"), device=device)
            bits = masks.prune_matrix(weight.to(device), norms.to(device), k, out)
            kept = reference.matrix_mask(weight.float().abs() * norms, k)
            assert torch.equal(bits.cpu(), masks.pack(kept)) and torch.equal(out.cpu(), weight.masked_fill(~kept, 0)), k


@pytest.mark.parametrize("values", ["sample below", "sample above", "one value", "two values", "half equal"])
def test_a_misleading_sample_changes_nothing(name, values):
    """What the sample sees lies far from the rest, or too many lie in its bracket."""
    size = 9_000
    scores = random(1, size)
    places = torch.arange(size // matrix_select.SHARE, dtype=torch.float64)
    places = ((places * (5**0.5 - 1) / 2).frac() * size).long()
    if values.startswith("sample"):
        scores[0, places] += 100 if values == "sample above" else -100
    elif values == "half equal":
        scores[0, ::2] = 0.25
    else:
        scores = (random(1, size) > 0.3).float() * (values == "two values")
    with lane(name) as device:
        for k in (1, int(0.6 * size), size - 1):
            assert torch.equal(masks.matrix_mask(scores.to(device), k).cpu(), reference.matrix_mask(scores, k)), k


def test_layouts_and_shapes(name):
    wide = random(6, 60, ties=True)
    for scores in (wide[:, ::2], wide[::2], wide.T, wide.reshape(3, 4, 30), wide[:0], wide[0]):
        with lane(name) as device:
            for k in edges(scores.numel()):
                mask = masks.matrix_mask(scores.to(device), k)
                assert torch.equal(mask.cpu().flatten(), reference.row_mask(scores.reshape(1, -1), k)[0]), k


def test_nan_is_refused_before_anything_is_written(name):
    weight = random(5, 64)
    weight[4, 63] = float("nan")
    with lane(name) as device:
        own = weight.to(device, copy=True)
        with pytest.raises(ValueError, match="scores are NaN"):
            masks.prune_matrix(own, torch.ones(64, device=device), 100)
    assert torch.equal(own.cpu().nan_to_num(9), weight.nan_to_num(9))
