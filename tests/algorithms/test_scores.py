"""Baselines against their formulas, one weight at a time."""

import math

import pytest
import torch

from autoprune.algorithms.algorithm import GROUPS, Algorithm
from autoprune.algorithms.cost import dry_run
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.probe import probe
from autoprune.algorithms.scores import BASELINES, NATIVE


def layer(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    statistics = {
        "x_norm": torch.rand(shape[1], generator=generator) * 9,
        "h_inv_diag": torch.rand(shape[1], generator=generator) * 3 + 0.01,
        "g_rms": torch.rand(shape, generator=generator) * 1e-5,
    }
    return torch.randn(shape, generator=generator), statistics


def loop_score(name, weight, statistics):
    """By plain loops over floats; of g_rms only what is proportional to it may matter, so it enters scaled."""
    rows, columns = range(len(weight)), range(len(weight[0]))
    x_norm, h_inv_diag = statistics["x_norm"], statistics["h_inv_diag"]
    summed = [[math.sqrt(128 * g**2) for g in row] for row in statistics["g_rms"]]
    low, high = min(map(min, summed)), max(map(max, summed))
    row_sums = [sum(abs(w) for w in row) for row in weight]
    column_sums = [sum(abs(weight[i][j]) for i in rows) for j in columns]
    formula = {
        "magnitude": lambda w, i, j: abs(w),
        "wanda": lambda w, i, j: abs(w) * x_norm[j],
        "ria": lambda w, i, j: (abs(w) / column_sums[j] + abs(w) / row_sums[i]) * x_norm[j] ** 0.5,
        "pruner-zero": lambda w, i, j: abs(w * w) * (summed[i][j] - low) / (high - low),
        "obs-diag": lambda w, i, j: w**2 / h_inv_diag[j],
        "taylor": lambda w, i, j: abs(w) * statistics["g_rms"][i][j],
    }[name]
    return [[formula(weight[i][j], i, j) for j in columns] for i in rows]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1)])
def test_scores_equal_plain_loops(name, shape):
    weight, statistics = layer(shape, shape[0])
    score = parse(BASELINES[name].source)(weight, statistics)
    assert score.shape == shape
    plain = {key: value.double().tolist() for key, value in statistics.items()}
    expected = torch.tensor(loop_score(name, weight.double().tolist(), plain))
    # A difference of neighbouring gradients keeps their rounding, which is relative to the gradients.
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-6 if name == "pruner-zero" else 0)


@pytest.mark.parametrize("name", BASELINES)
def test_dead_rows_columns_and_inputs_score_zero(name):
    weight, statistics = layer((4, 6))
    weight[1], weight[:, 2], statistics["x_norm"][3] = 0, 0, 0
    score = parse(BASELINES[name].source)(weight, statistics)
    assert score.isfinite().all()
    assert not score[1].any() and not score[:, 2].any()
    assert score[:, 3].any() == ("x_norm" not in parse(BASELINES[name].source).reads)


@pytest.mark.parametrize("level", [0.0, 3e-9, 2.0])
def test_pruner_zero_is_finite_where_all_gradients_are_equal(level):
    weight, statistics = layer((4, 6))
    statistics["g_rms"] = torch.full((4, 6), level)
    assert not parse(BASELINES["pruner-zero"].source)(weight, statistics).any()


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_pruner_zero_does_not_depend_on_the_scale_of_the_gradients(scale):
    weight, statistics = layer((4, 6))
    program = parse(BASELINES["pruner-zero"].source)
    expected = program(weight, statistics)
    statistics["g_rms"] = statistics["g_rms"] * scale
    torch.testing.assert_close(program(weight, statistics), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_pass_the_probe(name):
    dry_run(parse(BASELINES[name].source))
    probe(Algorithm(BASELINES[name].source, BASELINES[name].group), 0.6)


def test_groups_are_those_of_the_papers():
    assert {name: baseline.group for name, baseline in BASELINES.items()} == {
        "magnitude": "matrix",
        "wanda": "row",
        "ria": "matrix",
        "pruner-zero": "row",
        "obs-diag": "row",
        "taylor": "matrix",
    }
    assert all(baseline.group in GROUPS for baseline in BASELINES.values())


def test_native_scores_have_names_that_are_no_scores_of_the_language():
    assert NATIVE == {"sparsegpt": "row"}
    for name, group in NATIVE.items():
        assert name not in BASELINES
        with pytest.raises(LanguageError):
            parse(name)
        with pytest.raises(LanguageError):
            probe(Algorithm(name, group), 0.6)
