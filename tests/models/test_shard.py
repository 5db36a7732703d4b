"""A shard against independent oracles: transformers' own forward pass, with masks applied by plain loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.cost import dry_run
from autoprune.algorithms.language import LanguageError, parse
from autoprune.models.masking import Chooser
from autoprune.models.shard import ModelShard

HALF = [[0.5] * 7] * 4  # of every layer of every block
WANDA = Algorithm("def score(W, x_norm):\n    return W.abs() * x_norm\n", "row")


def tokens(windows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(seed))


def mean_nlls(model, ids: torch.Tensor) -> list[float]:
    with torch.inference_mode():
        logits = model(ids).logits.float()
    log_probabilities = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (-log_probabilities.mean(1)).tolist()


def wanda_by_hand(model, calibration: torch.Tensor, sparsity: float) -> None:
    """Prune a transformers model in place: row by row, floor(sparsity × in) lowest |w|·‖x‖, from dense statistics."""
    squares, counts = {}, {}

    def note(name):
        def hook(_, inputs):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            squares[name] = squares.get(name, 0) + (rows**2).sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    layers = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        model(calibration)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        norm = (squares[name] / counts[name]).sqrt()
        for row in layer.weight.data:
            scores = [abs(w) * x for w, x in zip(row.tolist(), norm.float().tolist(), strict=True)]
            scores = torch.tensor(scores, dtype=torch.float64).float().tolist()
            order = sorted(range(len(scores)), key=scores.__getitem__)
            for column in order[: math.floor(sparsity * len(order))]:
                row[column] = 0.0


@pytest.mark.parametrize(("family", "tie"), [("llama", True), ("llama", False), ("qwen2", False)])
def test_dense_and_pruned_passes_equal_transformers(tmp_path, family, tie):
    folder = save_tiny_model(tmp_path / "model", family, tie)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration, text = tokens(3, 40, 1), tokens(5, 32, 2)
    shard = ModelShard(folder, 0, 4, "float32", "cpu")
    shard.calibrate(calibration)
    _, dense = shard.forward("fitness", text, text)
    assert dense.window_nlls == pytest.approx(mean_nlls(model, text), rel=1e-5)

    _, pruned = shard.forward("fitness", text, text, WANDA, HALF)
    wanda_by_hand(model, calibration, 0.5)
    assert pruned.window_nlls == pytest.approx(mean_nlls(model, text), rel=1e-5)
    assert pruned.window_nlls != pytest.approx(dense.window_nlls, rel=1e-3)
    assert pruned.pruned == [n // 2 for n in pruned.numels]
    assert all(error > 0 for error in pruned.errors)

    _, again = shard.forward("fitness", text, text)
    assert again.window_nlls == dense.window_nlls, "pruning left a trace in the dense weights"


def run_split(folder, bounds, calibration, text, algorithm, sparsities):
    shards = [ModelShard(folder, start, stop, "float32", "cpu") for start, stop in bounds]
    states = calibration
    for shard in shards:
        states = shard.calibrate(states)
    for chosen in (None, algorithm):
        states = text
        for shard, (start, stop) in zip(shards, bounds, strict=True):
            own = [[s] * 7 for s in sparsities[start:stop]] if chosen else None
            states, report = shard.forward("fitness", states, text, chosen, own)
    return report.window_nlls


@pytest.mark.parametrize("bounds", [[(0, 1), (1, 4)], [(0, 2), (2, 3), (3, 4)]])
def test_sharded_equals_unsharded(tiny_model, bounds):
    calibration, text, sparsities = tokens(3, 40, 1), tokens(5, 32, 2), [0.3, 0.5, 0.6, 0.4]
    whole = run_split(tiny_model, [(0, 4)], calibration, text, WANDA, sparsities)
    parts = run_split(tiny_model, bounds, calibration, text, WANDA, sparsities)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_a_shard_loads_its_own_blocks_only(tiny_model):
    def numel(start, stop):
        model = ModelShard(tiny_model, start, stop, "float32", "cpu").model
        parts = [*model.blocks, model.model]
        parameters = [p for part in parts for p in part.parameters() if not p.is_meta]
        return sum(numel for _, numel in {(p.data_ptr(), p.numel()) for p in parameters})

    block = numel(1, 2) - 32  # what is small outside the blocks, here the last norm, is in every shard
    assert numel(1, 3) == 2 * block + 32
    assert numel(0, 4) == 4 * block + 256 * 32 + 32  # the tied embedding once, and the last norm


def test_an_algorithm_that_raises_leaves_the_weights_intact(tiny_model):
    shard = ModelShard(tiny_model, 0, 4, "float32", "cpu")
    shard.calibrate(tokens(2, 16, 1))
    before, text = shard.checksum(), tokens(2, 16, 2)
    bad = Algorithm("def score(W, x_norm):\n    return W.abs() / (x_norm - x_norm)\n")
    with pytest.raises(ValueError, match="not finite"):
        shard.forward("fitness", text, text, bad, HALF)
    assert shard.checksum() == before


def test_a_write_to_the_dense_weights_is_noticed(tiny_model):
    shard = ModelShard(tiny_model, 0, 4, "float32", "cpu")
    shard.calibrate(tokens(2, 16, 1))
    text = tokens(2, 16, 2)
    with shard.model.open(2) as layers:
        layers[-1].weight[0, 0] += 1.0
    with pytest.raises(RuntimeError, match="dense weights changed"):
        shard.forward("fitness", text, text, WANDA, HALF)


@pytest.mark.parametrize(
    "body, reason",
    [
        ("return W.abs() * x_norm[:1000]", "must match"),
        ("return W.abs() * (x_norm[:, None] * x_norm[None, :128]).mean()", "larger than W"),
    ],
)
def test_what_fails_on_a_layer_s_own_shape_is_the_candidate_s_fault(body, reason):
    """After the dry run and the probe have passed it, and as a refusal: an evaluator that failed would be replaced."""
    program = parse(f"def score(W, x_norm):\n    {body}\n")
    dry_run(program)
    moments = SimpleNamespace(statistic=lambda name: torch.ones(1536))
    with pytest.raises(LanguageError, match=reason):
        Chooser._scores(program, torch.ones(96, 1536), moments, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_s_own_copy_costs_a_candidate_nothing(dtype):
    names = [f"a{i}" for i in range(14)]
    lines = "".join(f"    {name} = W + {i}\n" for i, name in enumerate(names))
    program = parse(f"def score(W, x_norm):\n{lines}    return {' * '.join(names)}\n")
    assert dry_run(program).matrices == 16  # the bound
    moments = SimpleNamespace(statistic=lambda name: torch.ones(64))
    assert Chooser._scores(program, torch.ones(48, 64, dtype=dtype), moments, None).dtype == torch.float32
