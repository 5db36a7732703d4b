"""Time to prune every linear layer of SmolLM2-135M, without forwards: Wanda scores, selection in row groups at 60%, new
weights, by AutoPrune and by the plain torch that stands in `reference`.

    python bench/selection.py [--repeats N] [--threads N]

Both take turns, block by block, in one process with equal threads. The weights are the real ones where the cache holds
them, otherwise random ones of the same shapes. Ends with exit code 1 where a mask or a weight differs, or where
AutoPrune takes more than an eighth of the reference's time.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.scores import WANDA
from autoprune.algorithms.statistics import InputMoments
from autoprune.models.catalogue import CATALOGUE
from autoprune.models.checkpoint_files import read_tensors
from autoprune.models.layers import Layer
from autoprune.models.masking import Chooser

MODEL, BLOCKS, SPARSITY, LEAST_RATIO = "smollm2-135m-instruct", 30, 0.6, 8
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def reference(weight: Tensor, x_norm: Tensor) -> Tensor:
    """Prune one layer in place as its definition reads; the mask of pruned weights [out, in]."""
    scores = weight.abs() * x_norm
    order = torch.sort(scores, dim=1, stable=True).indices
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    pruned.scatter_(1, order[:, : int(weight.shape[1] * SPARSITY)], True)
    weight[pruned] = 0
    return pruned


def read_blocks() -> list[dict[str, Tensor]]:
    """Weights fp32 by name, per block."""
    names = [{name: f"model.layers.{block}.{name}.weight" for name in SHAPES} for block in range(BLOCKS)]
    if CATALOGUE[MODEL].on_disk():
        tensors = read_tensors(CATALOGUE[MODEL].folder, {full for block in names for full in block.values()})
        return [{name: tensors[full].float() for name, full in block.items()} for block in names]
    print(f"{MODEL} is not in the cache: random weights instead")
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(BLOCKS)]


def random_moments(features: int) -> InputMoments:
    """Of inputs whose features differ in scale, as those of a language model do."""
    generator = torch.Generator().manual_seed(features)
    moments = InputMoments(features, {"x_norm"})
    moments.add(torch.randn(64, features, generator=generator) * torch.randn(features, generator=generator).exp())
    return moments


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    moments = {columns: random_moments(columns) for _, columns in SHAPES.values()}
    blocks = read_blocks()
    chooser = Chooser(Algorithm(WANDA.source, WANDA.group))
    differences, seconds = set(), {"reference": [], "AutoPrune": []}
    for repeat in range(options.repeats + 1):  # the first one warms up
        spent = dict.fromkeys(seconds, 0.0)
        for index, block in enumerate(blocks):
            layers = [
                Layer(name, nn.Parameter(weight, requires_grad=False), None, None) for name, weight in block.items()
            ]
            own = {name: moments[weight.shape[1]] for name, weight in block.items()}
            expected = {name: weight.clone() for name, weight in block.items()}
            began = time.perf_counter()
            pruned = {name: reference(weight, own[name].statistic("x_norm")) for name, weight in expected.items()}
            between = time.perf_counter()
            choice = chooser.block(layers, own, {}, [SPARSITY] * len(layers))
            ended = time.perf_counter()
            spent["reference"] += between - began
            spent["AutoPrune"] += ended - between
            for name in block:
                if not (
                    torch.equal(choice.mask(name), ~pruned[name]) and torch.equal(choice.weights[name], expected[name])
                ):
                    differences.add(f"{index}.{name}")
        for name, sums in seconds.items():
            sums += [spent[name]] if repeat else []
    medians = {name: statistics.median(sums) for name, sums in seconds.items()}
    for name, sums in seconds.items():
        spread = f"{min(sums):.3f} to {max(sums):.3f}"
        print(f"{name}: {medians[name]:.3f} s (median of {len(sums)}; {spread}) for {len(blocks) * len(SHAPES)} layers")
    ratio = medians["reference"] / medians["AutoPrune"]
    ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
    print(f"ratio {ratio:.1f} (single runs {min(ratios):.1f} to {max(ratios):.1f}); {LEAST_RATIO} or more is expected")
    print(f"masks and weights: {'equal' if not differences else 'DIFFERENT in ' + ', '.join(sorted(differences))}")
    return 0 if ratio >= LEAST_RATIO and not differences else 1


if __name__ == "__main__":
    sys.exit(main())
