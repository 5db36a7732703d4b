"""Baselines against their formulas, one weight at a time."""

import pytest
import torch

from autoprune.algorithms.algorithm import GROUPS
from autoprune.algorithms.language import parse
from autoprune.algorithms.scores import BASELINES


def run(name: str, weight: torch.Tensor, x_norm: torch.Tensor) -> torch.Tensor:
    return parse(BASELINES[name].source)(weight, {"x_norm": x_norm})


def loop_score(name: str, weight: list[list[float]], x_norm: list[float]) -> list[list[float]]:
    row_sums = [sum(abs(w) for w in row) for row in weight]
    column_sums = [sum(abs(row[j]) for row in weight) for j in range(len(x_norm))]
    formula = {
        "magnitude": lambda w, i, j: abs(w),
        "wanda": lambda w, i, j: abs(w) * x_norm[j],
        "ria": lambda w, i, j: (abs(w) / column_sums[j] + abs(w) / row_sums[i]) * x_norm[j] ** 0.5,
    }[name]
    return [[formula(w, i, j) for j, w in enumerate(row)] for i, row in enumerate(weight)]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1)])
def test_scores_equal_plain_loops(name, shape):
    generator = torch.Generator().manual_seed(shape[0])
    weight, x_norm = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator) * 9
    score = run(name, weight, x_norm)
    assert score.shape == shape
    expected = torch.tensor(loop_score(name, weight.double().tolist(), x_norm.double().tolist()))
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_dead_rows_columns_and_inputs_score_zero(name):
    weight, x_norm = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(6)
    weight[1], weight[:, 2], x_norm[3] = 0, 0, 0
    score = run(name, weight, x_norm)
    assert score.isfinite().all()
    assert not score[1].any() and not score[:, 2].any()
    assert name == "magnitude" or not score[:, 3].any()


def test_groups_are_those_of_the_papers():
    assert {name: baseline.group for name, baseline in BASELINES.items()} == {
        "magnitude": "matrix",
        "wanda": "row",
        "ria": "matrix",
    }
    assert all(baseline.group in GROUPS for baseline in BASELINES.values())
