"""One layer, from scores to a pruned weight and its mask."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoprune.algorithms.algorithm import Algorithm, Group
from autoprune.algorithms.language import Program
from autoprune.algorithms.scores import BASELINES
from autoprune.algorithms.statistics import InputMoments
from autoprune.kernels import reference
from autoprune.models.layers import Layer
from autoprune.models.masking import Chooser, prune


def layer_and_moments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    moments = InputMoments(64, {"x_norm"})
    moments.add(torch.randn(20, 64, generator=generator) * torch.randn(64, generator=generator).exp())
    return Layer("fc", nn.Parameter(weight, requires_grad=False), None, None), moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", ["row", "matrix", "2:4", "4x4"])
@pytest.mark.parametrize("name", ["wanda", "magnitude", "ria"])
def test_weight_and_mask_follow_from_the_scores(name, group, dtype):
    layer, moments = layer_and_moments(dtype)
    chooser = Chooser(Algorithm(BASELINES[name].source, group))
    choice = chooser.block([layer], {"fc": moments}, {}, [0.5])
    scores = chooser.program(layer.weight.float(), {n: moments.statistic(n) for n in chooser.program.reads})
    kept = {
        "row": lambda: reference.row_mask(scores, 32),
        "matrix": lambda: reference.matrix_mask(scores, 48 * 32),
        "2:4": lambda: reference.nm_mask(scores, 2, 4),
        "4x4": lambda: reference.tile_mask(scores, 96, 4, 4),
    }[group]()
    assert torch.equal(choice.mask("fc"), kept) and choice.pruned == 48 * 32
    assert torch.equal(choice.weights["fc"], layer.weight.masked_fill(~kept, 0))


@pytest.mark.parametrize("name", ["wanda", "magnitude"])
def test_kernels_make_the_scores_of_these_themselves(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("the program was run")

    monkeypatch.setattr(Program, "__call__", refuse)
    layer, moments = layer_and_moments()
    Chooser(Algorithm(BASELINES[name].source, "row")).block([layer], {"fc": moments}, {}, [0.5])
    with pytest.raises(AssertionError, match="was run"):
        Chooser(Algorithm(BASELINES["ria"].source, "row")).block([layer], {"fc": moments}, {}, [0.5])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_scores_that_are_not_finite_are_refused(value):
    weight = torch.ones(4, 8)
    weight[2, 3] = value
    for scores in (torch.full((8,), 10.0), weight * 10):
        with pytest.raises(ValueError, match="not finite"):
            prune(weight, scores, Group.parse("row"), 0.5, torch.empty_like(weight))


def test_an_expert_that_no_gradient_reached_is_pruned_by_magnitude_where_the_score_reads_gradients():
    """Its tokens all came after the windows that have gradients: equal ones say nothing of its weights."""
    layer, moments = layer_and_moments()
    expert = replace(layer, expert=0, parameter=nn.Parameter(layer.weight[None], requires_grad=False))
    flat, known = torch.ones(48, 64), torch.rand(48, 64, generator=torch.Generator().manual_seed(1))
    chooser, wanda = Chooser(Algorithm(BASELINES["pruner-zero"].source)), Chooser(Algorithm(BASELINES["wanda"].source))
    by_magnitude = Chooser(Algorithm(BASELINES["magnitude"].source)).block([layer], {"fc": moments}, {}, [0.5])
    choice = chooser.block([expert], {"fc": moments}, {"fc": flat}, [0.5])
    assert choice.fallbacks == ["fc"] and torch.equal(choice.mask("fc"), by_magnitude.mask("fc"))
    assert chooser.block([expert], {"fc": moments}, {"fc": known}, [0.5]).fallbacks == []
    assert wanda.block([expert], {"fc": moments}, {"fc": flat}, [0.5]).fallbacks == []
