"""Masks against the stable-sort reference bit for bit, and the reference against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import LANES, lane

from autoprune.kernels import masks, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Few values, so that ties are everywhere, with both zeros, both infinities, and neighbours in fp32.
VALUES = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-20, 2**-24, float("inf"), float("-inf"), 3.0]


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.5, 0.95]))
    random = np.random.default_rng(seed)
    values = random.choice(VALUES[: draw(st.integers(1, len(VALUES)))], (rows, columns))
    values = np.where(random.random((rows, columns)) < share, random.standard_normal((rows, columns)), values)
    scores = torch.from_numpy(values).to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return scores.T.contiguous().T
    return scores.repeat(1, 2).as_strided(scores.shape, (2 * columns, 1)) if layout == "strided" else scores


def loop_mask(values: list[float], k: int) -> list[bool]:
    """k times: the first of the lowest scores that are left goes."""
    kept = [True] * len(values)
    for _ in range(k):
        lowest = None
        for index, value in enumerate(values):
            if kept[index] and (lowest is None or value < values[lowest]):
                lowest = index
        kept[lowest] = False
    return kept


@settings(deadline=None)
@given(matrices(), st.data())
def test_reference_equals_plain_loops(scores, data):
    k = data.draw(st.integers(0, scores.shape[1]))
    assert reference.row_mask(scores, k).tolist() == [loop_mask(row, k) for row in scores.tolist()]
    k = data.draw(st.integers(0, scores.numel()))
    assert reference.matrix_mask(scores, k).flatten().tolist() == loop_mask(scores.flatten().tolist(), k)


@pytest.mark.parametrize("name", LANES)
@settings(max_examples=100, deadline=None)
@given(scores=matrices(), data=st.data())
def test_masks_equal_reference(name, scores, data):
    k = data.draw(st.integers(0, scores.shape[1]))
    of_all = data.draw(st.integers(0, scores.numel()))
    with lane(name) as device:
        mask, matrix = masks.row_mask(scores.to(device), k), masks.matrix_mask(scores.to(device), of_all)
    assert mask.dtype == torch.bool and mask.shape == scores.shape and mask.device.type == device
    assert torch.equal(mask.cpu(), reference.row_mask(scores, k))
    assert torch.equal(matrix.cpu(), reference.matrix_mask(scores, of_all))


@st.composite
def grouped(draw):
    """Scores of any layout, and m: a divisor of their columns, on either side of PAIRWISE."""
    scores = draw(matrices())
    m = draw(st.sampled_from([2, 3, 4, 5, 8, 13, 16, 17, 20]))
    return scores[:, : scores.shape[1] // m * m], m


@settings(deadline=None)
@given(grouped(), st.data())
def test_nm_reference_equals_plain_loops(case, data):
    scores, m = case
    n = data.draw(st.integers(0, m))
    rows = [[row[start : start + m] for start in range(0, len(row), m)] for row in scores.tolist()]
    expected = [sum((loop_mask(group, n) for group in row), []) for row in rows]
    assert reference.nm_mask(scores, n, m).tolist() == expected


@pytest.mark.parametrize("name", LANES)
@settings(max_examples=100, deadline=None)
@given(case=grouped(), data=st.data())
def test_nm_mask_equals_reference(name, case, data):
    scores, m = case
    n = data.draw(st.integers(0, m))
    with lane(name) as device:
        mask = masks.nm_mask(scores.to(device), n, m)
    assert mask.dtype == torch.bool and mask.shape == scores.shape and mask.device.type == device
    assert torch.equal(mask.cpu(), reference.nm_mask(scores, n, m))


@settings(deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), seed=st.integers(0, 99), data=st.data())
def test_tile_reference_equals_plain_loops(sizes, seed, data):
    down, rows, across, columns = sizes
    scores = torch.randint(-2, 3, (down * rows, across * columns), generator=torch.Generator().manual_seed(seed))
    scores, k = scores.float(), data.draw(st.integers(0, down * across))  # whole numbers: sums are exact in any order
    tile = [[i // rows * across + j // columns for j in range(across * columns)] for i in range(down * rows)]
    sums = [0] * (down * across)
    for row, places in zip(scores.tolist(), tile, strict=True):
        for value, place in zip(row, places, strict=True):
            sums[place] += value
    kept = loop_mask(sums, k)
    assert reference.tile_mask(scores, k, rows, columns).tolist() == [[kept[place] for place in row] for row in tile]


@pytest.mark.parametrize("name", LANES)
@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), data=st.data()
)
def test_tile_mask_equals_reference(name, sizes, dtype, seed, data):
    down, rows, across, columns = sizes
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(down * rows, columns, generator=generator).repeat(1, across).to(dtype)  # tiles in a row tie
    k = data.draw(st.integers(0, down * across))
    with lane(name) as device:
        mask = masks.tile_mask(scores.to(device), k, rows, columns)
    assert mask.dtype == torch.bool and mask.device.type == device and int((~mask).sum()) == k * rows * columns
    assert torch.equal(mask.cpu(), reference.tile_mask(scores, k, rows, columns))


def test_sums_of_tiles_have_a_fixed_order():
    for size in range(1, 20):
        terms = torch.randn(3, size, 5, generator=torch.Generator().manual_seed(size))
        assert torch.equal(masks._halving_sum(terms, 1), reference.halving_sum(list(terms.unbind(1))))


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_any_shape_are_left_alone(sign):
    scores = sign * torch.rand(2, 6, 50, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    masks.row_mask(scores[0], 20)
    masks.tile_mask(scores[0], 5, 2, 1)
    assert torch.equal(masks.matrix_mask(scores, 20).flatten(), reference.row_mask(scores.reshape(1, -1), 20)[0])
    assert torch.equal(masks.nm_mask(scores, 2, 5), reference.nm_mask(scores, 2, 5))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 3, 5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_refused(name, dtype, k, sign):
    for position in (0, 4, 7, 9):
        scores = torch.arange(10.0).to(dtype)
        scores[position] = float("nan")
        scores = scores.reshape(2, 5).copysign(torch.tensor(sign, dtype=dtype))  # NaN has a sign bit, too
        with lane(name) as device:
            scores = scores.to(device)
            for select in (masks.row_mask, masks.matrix_mask, lambda scores, k: masks.nm_mask(scores, k, 5)):
                with pytest.raises(ValueError, match="scores are NaN"):
                    select(scores, k)
            with pytest.raises(ValueError, match="1 of 2 tiles hold NaN"):
                masks.tile_mask(scores, 1, 1, 5)


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_nan_next_to_infinity_is_refused(name, dtype):
    """Its bits exceed those of infinity by one."""
    scores, integers = torch.ones(2, 8, dtype=dtype), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    scores[1, 3] = float("inf")
    with lane(name) as device:
        assert masks.row_mask(scores.to(device), 4)[1, 3]
        scores.view(integers)[1, 3] += 1
        for select in (masks.row_mask, masks.matrix_mask, lambda scores, k: masks.nm_mask(scores, k, 8)):
            with pytest.raises(ValueError, match="scores are NaN"):
                select(scores.to(device), 4)


@pytest.mark.parametrize("k", [-1, 6])
def test_impossible_counts_are_refused(k):
    with pytest.raises(ValueError, match="within 0..5"):
        masks.row_mask(torch.zeros(2, 5), k)
    with pytest.raises(ValueError, match="within 0..5"):
        masks.matrix_mask(torch.zeros(1, 5), k)
    with pytest.raises(ValueError, match="within 0..5"):
        masks.nm_mask(torch.zeros(2, 10), k, 5)
    with pytest.raises(ValueError, match="within 0..5"):
        masks.tile_mask(torch.zeros(2, 10), k, 2, 2)


def test_wrong_scores_are_refused():
    with pytest.raises(ValueError, match="matrix"):
        masks.row_mask(torch.zeros(5), 1)
    with pytest.raises(ValueError, match="floating"):
        masks.row_mask(torch.zeros(2, 5, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="floating"):
        masks.tile_mask(torch.zeros(2, 5, dtype=torch.int64), 1, 1, 1)
    for m in (0, 2, 4):
        with pytest.raises(ValueError, match=rf"groups of {m}"):
            masks.nm_mask(torch.zeros(2, 5), 0, m)
    for rows, columns in ((4, 5), (2, 2), (0, 5), (2, 0)):
        with pytest.raises(ValueError, match=rf"tiles of {rows}x{columns}"):
            masks.tile_mask(torch.zeros(2, 5), 0, rows, columns)


def test_a_tile_with_both_infinities_has_no_mean():
    scores = torch.zeros(2, 4)
    scores[0, 0], scores[1, 3] = float("inf"), float("-inf")
    assert masks.tile_mask(scores, 1, 2, 2).tolist() == [[True, True, False, False]] * 2
    scores[1, 1] = float("-inf")
    with pytest.raises(ValueError, match="1 of 2 tiles hold"):
        masks.tile_mask(scores, 1, 2, 2)


@st.composite
def pruning(draw):
    """A weight, scores or norms, and a comparison group with how many of it are pruned."""
    weight = draw(matrices())
    weight = weight.nan_to_num(0.0, 7.0, -7.0)  # infinite weights times a norm of zero are NaN
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        scores = torch.rand(weight.shape[1], generator=generator) * 3
    else:
        scores = torch.randint(-3, 4, weight.shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    m = draw(st.sampled_from([1, 2, 4, 5, 8, 32]))
    kind = draw(st.sampled_from(["row", "matrix", "n:m"] if weight.shape[1] % m == 0 else ["row", "matrix"]))
    size = {"row": weight.shape[1], "matrix": weight.numel(), "n:m": m}[kind]
    return weight, scores, kind, draw(st.integers(0, size)), m


@pytest.mark.parametrize("name", LANES)
@settings(max_examples=100, deadline=None)
@given(case=pruning(), in_place=st.booleans())
def test_pruning_equals_mask_and_weight(name, case, in_place):
    weight, scores, kind, k, m = case
    full = weight.float().abs() * scores if scores.ndim == 1 else scores
    counts = (k, m) if kind == "n:m" else (k,)
    kept = {"row": reference.row_mask, "matrix": reference.matrix_mask, "n:m": reference.nm_mask}[kind](full, *counts)
    expected = torch.where(kept, weight, torch.zeros_like(weight)).contiguous()
    with lane(name) as device:
        own = weight.to(device, copy=True)
        wider = torch.full((len(own), own.shape[1] + 3), float("nan"), dtype=own.dtype, device=own.device)
        out = (
            own if in_place and own.stride(1) == 1 else wider[:, : own.shape[1]]
        )  # rows further apart than the weight's
        prune = {"row": masks.prune_rows, "matrix": masks.prune_matrix, "n:m": masks.prune_nm}[kind]
        bits = prune(own, scores.to(device), *counts, None if out is own else out)
        assert torch.equal(masks.unpack(bits, weight.shape).cpu(), kept)
        assert torch.equal(bits, masks.pack(kept.to(device)))
    assert torch.equal(out.cpu(), expected) and (out is own or torch.equal(own.cpu(), weight))
    assert wider[:, weight.shape[1] :].isnan().all()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(out.cpu().contiguous().view(integers), expected.view(integers))  # a −0.0 that stays, too


def test_tensors_that_do_not_belong_together_are_refused():
    weight, norms = torch.zeros(2, 4), torch.ones(4)
    for prune in (masks.prune_rows, masks.prune_matrix):
        with pytest.raises(ValueError, match=r"needs scores of its shape, or norms \[in\]"):
            prune(weight, torch.ones(2), 1)
        with pytest.raises(ValueError, match="norms must be torch.float32"):
            prune(weight, norms.double(), 1)
        with pytest.raises(ValueError, match="out is torch.float32"):
            prune(weight, norms, 1, torch.zeros(4, 2))
        with pytest.raises(ValueError, match="side by side"):
            prune(torch.zeros(4, 2).T, norms, 1)
        with pytest.raises(ValueError, match="floating"):
            prune(weight.int(), norms, 1)
        with pytest.raises(ValueError, match="within 0.."):
            prune(weight, norms, 9)


@pytest.mark.parametrize("name", LANES)
def test_parameters_and_trivial_counts(name):
    with lane(name) as device:
        for k in (0, 10, 32):
            weight = torch.nn.Parameter(torch.ones(4, 32, device=device))
            bits = masks.prune_rows(weight, torch.ones(32, device=device, requires_grad=True), k)
            assert weight.tolist() == [[0.0] * k + [1.0] * (32 - k)] * 4
            kept = masks.unpack(bits, (4, 32))
            again = torch.nn.Parameter(torch.ones(4, 32, device=device))
            assert torch.equal(masks.prune_masked(again, kept), bits) and torch.equal(again, weight)
        empty = torch.zeros(3, 0, device=device)
        norms = torch.ones(0, device=device)
        assert len(masks.prune_masked(empty, empty.bool())) == len(masks.prune_rows(empty, norms, 0)) == 0


@pytest.mark.parametrize("name", LANES)
def test_scores_that_share_memory_with_the_output(name):
    whole = torch.randn(33, 32, generator=torch.Generator().manual_seed(0))
    cases = {
        "transposed": lambda w: (w[:32], w[:32].T, w[:32]),
        "norms": lambda w: (w[:32], w[3].abs(), w[:32]),
        "its row": lambda w: (w[:32].abs_(), w[3], w[:32]),
        "shifted": lambda w: (w[:32], torch.ones(32, device=w.device), w[1:]),
        "itself": lambda w: (w[:32], w[:32], w[:32]),
    }
    for what, of in cases.items():
        for prune, mask in ((masks.prune_rows, reference.row_mask), (masks.prune_matrix, reference.matrix_mask)):
            with lane(name) as device:
                weight, scores, out = of(whole.to(device, copy=True))
                before = weight.clone()
                full = (before.abs() * scores if scores.ndim == 1 else scores).cpu()
                expected = before.cpu().masked_fill(~mask(full, 20), 0)
                prune(weight, scores, 20, out)
                assert torch.equal(out.cpu(), expected), what


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("k", [0, 3, 8])
def test_nan_in_pruning_is_refused(name, k):
    for where in ("weight", "norms", "scores", "product"):
        weight, norms, scores = torch.ones(2, 8), torch.ones(8), torch.ones(2, 8)
        if where == "product":
            weight[1, 2], norms[2] = float("inf"), 0.0
        else:
            {"weight": weight, "norms": norms[None], "scores": scores}[where][-1, 2] = float("nan")
        with lane(name) as device:
            given = (weight.to(device), (scores if where == "scores" else norms).to(device))
            for prune in (masks.prune_rows, masks.prune_matrix, lambda w, s, k: masks.prune_nm(w, s, k, 8)):
                with pytest.raises(ValueError, match="scores are NaN"):
                    prune(given[0].clone(), given[1], k)


def test_a_mask_may_hold_any_byte():
    mask = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8).view(torch.bool)
    weight = torch.ones(1, 4)
    assert masks.prune_masked(weight, mask).tolist() == [14] and weight.tolist() == [[0.0, 1.0, 1.0, 1.0]]


def test_means_of_tiles_are_quotients():
    """Not products with a rounded 1/9, by which these two would differ."""
    tiles = torch.zeros(3, 6)
    tiles[0, 0], tiles[0, 3] = 1.1250005960464478, 1.1250004768371582
    assert not masks.tile_mask(tiles, 1, 3, 3)[:, :3].any()
