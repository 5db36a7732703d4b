"""Row selection in Triton against the stable sort, bit for bit."""

import pytest
import torch
from lanes import DTYPES, TRITON, WIDTHS, edges, lane, random

from autoprune.kernels import masks, reference, row_select
from autoprune.kernels.keys import Scores, Target

pytestmark = pytest.mark.parametrize("name", TRITON)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_masks_equal_stable_sort(name, dtype, width):
    scores = random(2, width, dtype=dtype, ties=True)
    with lane(name) as device:
        for k in edges(width):
            target = Target(scores.to(device))
            target.mask.view(torch.uint8).fill_(0xAA)
            row_select.row_select(Scores(scores.to(device)), k, target)
            assert torch.equal(target.mask.cpu(), reference.row_mask(scores, k)), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS[::2] + WIDTHS[-1:])
def test_fused_scores_prune_a_poisoned_output(name, dtype, width):
    weight, norms = random(2, width, dtype=dtype), random(width, seed=1).abs()
    with lane(name) as device:
        for k in edges(width):
            out = torch.full_like(weight, float("nan"), device=device)
            bits = masks.prune_rows(weight.to(device), norms.to(device), k, out)
            kept = reference.row_mask(weight.float().abs() * norms, k)
            assert torch.equal(bits.cpu(), masks.pack(kept)) and torch.equal(out.cpu(), weight.masked_fill(~kept, 0)), k


@pytest.mark.parametrize("width", [40, 700])
def test_special_rows(name, width):
    """Constant rows, zeros of both signs, subnormals, infinities, neighbours in the last bit, far outliers."""
    tiny = torch.finfo(torch.float32).smallest_normal
    rows = [
        torch.full((width,), -3.5),
        torch.zeros(width),
        torch.zeros(width).copysign(random(width)),
        (torch.arange(width) % 7 - 3) * tiny / 16,
        torch.where(torch.arange(width) % 3 == 0, float("inf"), -float("inf")),
        1 + torch.arange(width) * 2.0**-23,
        torch.where(torch.arange(width) == 5, 3e38, random(width) * 1e-30),
    ]
    scores = torch.stack(rows)
    with lane(name) as device:
        for k in edges(width):
            assert torch.equal(masks.row_mask(scores.to(device), k).cpu(), reference.row_mask(scores, k)), k


@pytest.mark.parametrize("looped", [False, True])
def test_layouts_and_rows_of_several_tiles(name, looped, monkeypatch):
    if looped:
        monkeypatch.setattr(row_select, "LONGEST", 64)
        monkeypatch.setattr(row_select, "LOOPED", 64)
    wide = random(3, 150, ties=True)
    for scores in (wide, wide[:, ::2], wide[::2], wide.T[:9], wide[:, 7:100], wide[:0], wide[:, :0]):
        with lane(name) as device:
            for k in sorted({0, int(0.6 * scores.shape[1]), scores.shape[1]}):
                assert torch.equal(masks.row_mask(scores.to(device), k).cpu(), reference.row_mask(scores, k)), k


@pytest.mark.parametrize("width", [320, 300])
def test_rows_of_several_tiles_are_pruned(name, width, monkeypatch):
    monkeypatch.setattr(row_select, "LONGEST", 64)
    monkeypatch.setattr(row_select, "LOOPED", 64)
    weight, norms = random(2, width, dtype=torch.bfloat16, ties=True), random(width, seed=1).abs().round()
    kept = reference.row_mask(weight.float().abs() * norms, 190)
    with lane(name) as device:
        out = torch.full_like(weight, float("nan"), device=device)
        bits = masks.prune_rows(weight.to(device), norms.to(device), 190, out)
        assert torch.equal(bits.cpu(), masks.pack(kept)) and torch.equal(out.cpu(), weight.masked_fill(~kept, 0))


def test_the_longest_rows(name):
    scores = random(1, 131_072, dtype=torch.float16)
    with lane(name) as device:
        assert torch.equal(masks.row_mask(scores.to(device), 80_000).cpu(), reference.row_mask(scores, 80_000))


@pytest.mark.parametrize("looped", [False, True])
def test_nan_is_refused(name, looped, monkeypatch):
    if looped:
        monkeypatch.setattr(row_select, "LONGEST", 64)
        monkeypatch.setattr(row_select, "LOOPED", 64)
    for position in (0, 99):
        scores, norms = random(2, 100), torch.ones(100)
        scores[1, position] = -float("nan")
        with lane(name) as device:
            for call in (
                lambda: masks.row_mask(scores.to(device), 30),  # noqa: B023
                lambda: masks.prune_rows(scores.to(device), norms.to(device), 30),  # noqa: B023
            ):
                with pytest.raises(ValueError, match="scores are NaN"):
                    call()


def test_a_row_beyond_two_to_the_31_elements(name):
    """Offsets are 64 bits wide: the last row begins where 32 would wrap round. What is not touched takes no memory."""
    if name == "interpreter":
        values = torch.empty((1 << 31) + 512, dtype=torch.float16)
    else:
        values = torch.empty((1 << 31) + 512, dtype=torch.float16, device="cuda")
    scores = values.as_strided((3, 500), (1 << 30, 1))
    for row in range(3):
        scores[row] = random(500, seed=row)
    with lane(name):
        assert torch.equal(masks.row_mask(scores, 300).cpu(), reference.row_mask(scores.cpu().contiguous(), 300))
