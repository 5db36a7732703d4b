"""Profiles of blocks and layers against plain loops and an independent library."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from autoprune.algorithms import statistics
from autoprune.algorithms.profiles import BlockProfile, Profile, block_profile
from autoprune.algorithms.spectra import tail_exponent

ALL = ("log_score_variance", "tail_exponent", "kurtosis", "score_std")


def loop_profile(layers) -> Profile:
    """Every number but the tail exponent from its definition, one weight at a time."""
    weights, scores = [], []
    norms = [norm for _, x_norm in layers for norm in x_norm.tolist()]
    for weight, x_norm in layers:
        for row in weight.tolist():
            for w, x in zip(row, x_norm.tolist(), strict=True):
                weights.append(abs(w))
                scores.append(abs(w) * x)
    mean = math.fsum(weights) / len(weights)
    sigma = math.sqrt(math.fsum((w - mean) ** 2 for w in weights) / len(weights))
    score_mean = math.fsum(scores) / len(scores)
    share = 100 * sum(score > 5 * score_mean for score in scores) / len(scores)
    skewness = math.fsum((w - mean) ** 3 for w in weights) / len(weights) / sigma**3
    logs = [math.log(score) for score in scores if score > 0]
    log_mean = math.fsum(logs) / len(logs)
    return Profile(
        len(weights),
        skewness,
        share,
        score_mean,
        math.fsum((v - log_mean) ** 2 for v in logs) / len(logs),
        kurtosis=math.fsum((w - mean) ** 4 for w in weights) / len(weights) / sigma**4,
        score_std=float(np.std(scores)),
        weight_mean=mean,
        weight_std=sigma,
        input_mean=float(np.mean(norms)),
        input_std=float(np.std(norms)),
    )


@pytest.mark.parametrize("chunk", [17, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_profile_equals_plain_loops(dtype, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for shape in [(9, 14), (20, 9), (3, 5)]:
        weight = (torch.randn(shape, generator=generator) ** 3).to(dtype)
        weight[0, 1] = 0
        layers.append((weight, torch.rand(shape[1], generator=generator)))
    before = [weight.clone() for weight, _ in layers]
    profile = block_profile(iter(layers), ALL)
    for found, own in [(profile, layers), *((part, [layers[i]]) for i, part in enumerate(profile.layers))]:
        expected = loop_profile(own)
        assert found.numel == expected.numel
        assert found.skewness == pytest.approx(expected.skewness, rel=1e-11)
        assert found.outlier_share == expected.outlier_share
        assert found.score_mean == pytest.approx(expected.score_mean, rel=1e-12)
        assert found.log_score_variance == pytest.approx(expected.log_score_variance, rel=1e-11)
        for name in ("kurtosis", "score_std", "weight_mean", "weight_std", "input_mean", "input_std"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9), name
    assert profile.outlier_share > 0 and len(profile.layers) == 3
    exponents = [tail_exponent(weight) for weight, _ in layers]
    assert [part.tail_exponent for part in profile.layers] == exponents
    assert profile.tail_exponent == pytest.approx(sum(exponents) / 3)
    assert all(torch.equal(w, b) for (w, _), b in zip(layers, before, strict=True))
    assert BlockProfile.from_dict(json.loads(json.dumps(asdict(profile)))) == profile


def test_what_was_not_asked_for_is_absent():
    profile = block_profile([(torch.randn(4, 5), torch.ones(5))])
    for found in (profile, *profile.layers):
        assert (found.log_score_variance, found.tail_exponent, found.kurtosis, found.score_std) == (None,) * 4


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
