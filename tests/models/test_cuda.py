"""A model measured on CUDA against itself on the CPU, which the oracles of the other tests hold."""

from dataclasses import replace

import pytest
import torch

from autoprune.actors.evaluator import EvaluatorShard
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.models.masking import planned_sparsities
from autoprune.models.measuring import Workbench
from autoprune.pipeline.population import baseline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
READ = frozenset({"x_norm", "x_mean", "x_std", "x_absmean", "x_kurtosis", "g_rms"})
SCORES = ("magnitude", "wanda", "ria", "pruner-zero", "obs-diag", "sparsegpt")
EVERYTHING = """def score(W, x_norm, x_mean, x_std, x_absmean, x_kurtosis, g_rms):
    return (W.abs() * x_norm + W * x_mean).abs() * (x_std + x_absmean) / x_kurtosis.sqrt() + (W * g_rms).square().sqrt()
"""


@pytest.fixture(scope="module")
def benches(tiny_model):
    generator = torch.Generator().manual_seed(0)
    splits = {name: torch.randint(0, 256, (6, 24), generator=generator) for name in ("calibration", "report")}
    return [Workbench(tiny_model, 4, splits, "float32", device, False, READ, ()) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("score", [*SCORES, "everything"])
@pytest.mark.parametrize("group", ["row", "matrix", "2:4"])
def test_an_algorithm_measures_on_cuda_as_on_the_cpu(benches, score, group):
    algorithm = Algorithm(EVERYTHING, group) if score == "everything" else replace(baseline(score), group=group)
    share = 0.5 if group == "2:4" else 0.6
    on_cpu, on_cuda = (bench.measure([(algorithm, share)], "report")[0] for bench in benches)
    assert on_cuda.nll == pytest.approx(on_cpu.nll, rel=2e-3) and on_cuda.kl == pytest.approx(on_cpu.kl, rel=2e-2)
    assert on_cuda.block_sparsities == on_cpu.block_sparsities


@pytest.mark.parametrize("update", ["sparsegpt", "cg"])
def test_an_update_measures_on_cuda_as_on_the_cpu(benches, update):
    algorithm = baseline(f"wanda/{update}")
    on_cpu, on_cuda = (bench.measure([(algorithm, 0.6)], "report")[0] for bench in benches)
    assert on_cuda.nll == pytest.approx(on_cpu.nll, rel=2e-3)


def test_an_evaluator_runs_on_cuda_in_bfloat16(tiny_model):
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    algorithm = Algorithm(EVERYTHING, "matrix", Allocation("sdsa", {"taylor": 0.5}))
    reports, shares = {}, {}
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        shard = EvaluatorShard(str(tiny_model), 0, 4, dtype, device, torch.get_num_threads())
        shard.calibrate(tokens, READ, {"skewness"})
        shard.backward(tokens)
        _, dense = shard.forward("report", tokens, tokens, None, None)
        planned = planned_sparsities(algorithm, shard.ready().profiles, 0.6)
        states, report = shard.forward("report", tokens, tokens, algorithm, planned)
        reports[device] = (dense, report)
        shares[device] = [layer.taylor_mean for profile in shard.ready().profiles for layer in profile.layers]
        assert states.device.type == "cpu", "what crosses the wire is no tensor of a device"
    assert shares["cuda"] == pytest.approx(shares["cpu"], rel=3e-2)
    for on_cpu, on_cuda in zip(*reports.values(), strict=True):
        assert on_cuda.pruned == pytest.approx(on_cpu.pruned, rel=1e-2) and on_cuda.numels == on_cpu.numels
        assert on_cuda.window_nlls == pytest.approx(on_cpu.window_nlls, rel=3e-2)
