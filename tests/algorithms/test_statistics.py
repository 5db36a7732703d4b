"""Statistics against plain loops and an independent library."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from autoprune.algorithms import statistics
from autoprune.algorithms.statistics import BlockProfile, InputMoments, block_profile


def random_inputs(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 3 + torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_moments_equal_plain_loops(dtype):
    batches = [random_inputs(0, 2, 5, 3).to(dtype), random_inputs(1, 7, 3).to(dtype), random_inputs(2, 3).to(dtype)]
    moments = InputMoments(3)
    for batch in batches:
        moments.add(batch)
    rows = [row for batch in batches for row in batch.reshape(-1, 3).tolist()]
    assert moments.count == len(rows) == 18
    for j in range(3):
        values = [row[j] for row in rows]
        mean = math.fsum(values) / len(values)
        assert moments.x_mean[j].item() == pytest.approx(mean, rel=1e-6)
        assert moments.x_norm[j].item() == pytest.approx(math.sqrt(math.fsum(v * v for v in values) / 18), rel=1e-6)
        variance = math.fsum((v - mean) ** 2 for v in values) / 18
        assert moments.x_std[j].item() == pytest.approx(math.sqrt(variance), rel=1e-6)
    for value in (moments.x_norm, moments.x_mean, moments.x_std):
        assert value.dtype == torch.float32 and value.shape == (3,)


@given(cut=st.integers(0, 12), seed=st.integers(0, 1000))
def test_merging_equals_adding_everything_to_one(cut, seed):
    x = (random_inputs(seed, 12, 4) * 64).round() / 64  # sums of such values are exact, so equality is too
    whole, left, right = InputMoments(4), InputMoments(4), InputMoments(4)
    whole.add(x)
    left.add(x[:cut])
    right.add(x[cut:])
    left.merge(right)
    assert left.count == whole.count
    for name in ("x_norm", "x_mean", "x_std"):
        assert torch.equal(getattr(left, name), getattr(whole, name))


def test_chunks_do_not_show(monkeypatch):
    x = (random_inputs(0, 50, 8) * 64).round() / 64
    whole, chunked = InputMoments(8), InputMoments(8)
    whole.add(x)
    layers = [(random_inputs(1, 30, 8), torch.rand(8)), (random_inputs(2, 4, 20), torch.rand(20))]
    profile = block_profile(layers)
    monkeypatch.setattr(statistics, "CHUNK", 17)
    chunked.add(x)
    assert torch.equal(whole.sum_of_squares, chunked.sum_of_squares)
    assert block_profile(layers).skewness == pytest.approx(profile.skewness, rel=1e-12)
    assert block_profile(layers).outlier_share == profile.outlier_share


def test_a_constant_feature_has_no_spread():
    moments = InputMoments(2)
    moments.add(torch.tensor([[1000.1, 0.0]]).repeat(999, 1))
    assert moments.x_std.tolist() == pytest.approx([0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    moments = InputMoments(3)
    moments.add(torch.ones(2, 3))
    x = torch.ones(4, 3)
    x[3, 1] = bad
    with pytest.raises(ValueError, match="not finite .feature 1 of 3"):
        moments.add(x)
    assert moments.count == 2 and moments.x_norm.tolist() == [1.0, 1.0, 1.0]


def test_wrong_use_of_moments_is_refused():
    moments = InputMoments(3)
    with pytest.raises(ValueError, match="before the first input"):
        _ = moments.x_norm
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\]"):
        moments.add(torch.ones(2, 4))
    with pytest.raises(ValueError, match="4 features"):
        moments.merge(InputMoments(4))


def loop_profile(layers) -> BlockProfile:
    """Both numbers from their definitions, one weight at a time."""
    weights, scores = [], []
    for weight, x_norm in layers:
        for row in weight.tolist():
            for w, x in zip(row, x_norm.tolist(), strict=True):
                weights.append(abs(w))
                scores.append(abs(w) * x)
    mean = math.fsum(weights) / len(weights)
    sigma = math.sqrt(math.fsum((w - mean) ** 2 for w in weights) / len(weights))
    threshold = 5 * math.fsum(scores) / len(scores)
    share = 100 * sum(score > threshold for score in scores) / len(scores)
    return BlockProfile(len(weights), math.fsum((w - mean) ** 3 for w in weights) / len(weights) / sigma**3, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_profile_equals_plain_loops(dtype):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for shape in [(9, 14), (20, 9), (3, 5)]:
        weight = (torch.randn(shape, generator=generator) ** 3).to(dtype)
        layers.append((weight, torch.rand(shape[1], generator=generator)))
    before = [weight.clone() for weight, _ in layers]
    profile, expected = block_profile(iter(layers)), loop_profile(layers)
    assert profile.numel == expected.numel == 321
    assert profile.skewness == pytest.approx(expected.skewness, rel=1e-12)
    assert profile.outlier_share == expected.outlier_share > 0
    assert all(torch.equal(w, b) for (w, _), b in zip(layers, before, strict=True))
    assert BlockProfile(**json.loads(json.dumps(asdict(profile)))) == profile


def test_skewness_equals_scipy_far_from_zero():
    weight = 1000 + torch.rand(200, 300, generator=torch.Generator().manual_seed(0)) ** 4
    expected = stats.skew(weight.double().numpy().ravel())
    assert block_profile([(weight, torch.ones(300))]).skewness == pytest.approx(expected, rel=1e-9)


def test_skewness_of_known_distributions():
    # The half-normal: √2(4 − π)/(π − 2)^1.5 = 0.9953; a constant has none.
    normal = torch.from_numpy(np.random.default_rng(0).standard_normal((1000, 1000)))
    assert block_profile([(normal, torch.ones(1000))]).skewness == pytest.approx(0.9953, abs=0.01)
    for value in (0.1, 0.3, 0.7):  # sums of these in fp64 are rounded, so that the mean is not the value itself
        constant = torch.full((101, 103), -value, dtype=torch.float64)
        assert block_profile([(constant, torch.ones(103))]).skewness == 0.0


def test_zero_inputs_have_no_outliers():
    assert block_profile([(torch.randn(4, 5), torch.zeros(5))]).outlier_share == 0.0


def test_wrong_blocks_are_refused():
    with pytest.raises(ValueError, match="without prunable weights"):
        block_profile([])
    with pytest.raises(ValueError, match="layer 1"):
        block_profile([(torch.ones(2, 3), torch.ones(3)), (torch.ones(2, 3), torch.ones(2))])
    for weight, x_norm in [(torch.full((2, 3), float("nan")), torch.ones(3)), (torch.ones(2, 3), torch.ones(3) / 0)]:
        with pytest.raises(ValueError, match="not finite"):
            block_profile([(weight, x_norm)])
