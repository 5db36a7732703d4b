"""What an algorithm does to three small layers: proof that it runs, and a fingerprint of the masks that it yields."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.language import LanguageError, check_shapes, parse
from autoprune.kernels.masks import matrix_mask, pack, row_mask

# [out, in] of the probe layers: wide, wider, square.
SHAPES = ((32, 64), (48, 96), (64, 64))


@dataclass(frozen=True)
class ProbeResult:
    """mask: bits of the kept weights over all probe layers, as hexadecimal digits. mask_hash: 16 hexadecimal digits
    over the masks and the allocation: the same masks under another allocation are another algorithm."""

    mask: str
    mask_hash: str


@dataclass(frozen=True)
class _Layer:
    W: Tensor
    statistics: dict[str, Tensor]


def _uniform(source: random.Random, *shape: int) -> Tensor:
    """Numbers in (-1, 1), float64. Python promises the same ones for a seed everywhere and always; torch does not."""
    return torch.tensor([source.random() for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape) * 2 - 1


def _heavy(uniform: Tensor) -> Tensor:
    """Student's t with two degrees of freedom from its quantile function, cut at about ±7; arithmetic that every
    machine rounds alike."""
    return uniform * torch.sqrt(2 / (1.04 - uniform.square()))


@functools.cache
def _layers() -> tuple[_Layer, ...]:
    """Heavy-tailed weights whose rows and columns differ in scale; inputs with a few features far above the others."""
    layers = []
    for seed, (rows, columns) in enumerate(SHAPES):
        source = random.Random(seed)
        row_scale = 1 + 0.6 * _uniform(source, rows, 1)
        column_scale = 1 + 0.4 * _uniform(source, columns)
        outlier = torch.arange(columns) % 17 == 5
        W = 0.02 * _heavy(_uniform(source, rows, columns)) * row_scale * torch.where(outlier, 0.5, column_scale)
        std = (1 + 0.8 * _uniform(source, columns)) * torch.where(outlier, 12.0, 0.5)
        mean = 0.3 * _heavy(_uniform(source, columns)) * std
        statistics = {"x_norm": torch.sqrt(mean.square() + std.square()), "x_mean": mean, "x_std": std}
        layers.append(_Layer(W.float(), {name: value.float() for name, value in statistics.items()}))
    return tuple(layers)


def probe(algorithm: Algorithm, sparsity: float) -> ProbeResult:
    """Run the algorithm on the probe layers at the given sparsity of every comparison group, 0 < sparsity < 1.

    Raises LanguageError where its score is outside the language or ill-shaped, is not finite, leaves a comparison
    group without order (all scores equal), changes between two runs, or writes to its inputs.
    """
    program = parse(algorithm.score)
    check_shapes(program)
    masks = []
    for layer in _layers():
        W = layer.W.clone()
        statistics = {name: value.clone() for name, value in layer.statistics.items()}
        scores = program(W, statistics)
        if not scores.isfinite().all():
            raise LanguageError("the scores are not finite on the probe layers; guard divisions, roots and powers")
        again = program(W, statistics)
        unchanged = torch.equal(W, layer.W) and all(torch.equal(statistics[n], layer.statistics[n]) for n in statistics)
        if not torch.equal(scores, again) or not unchanged:
            raise LanguageError("two runs on the same input differ, or the input was written to")
        groups = scores if algorithm.group == "row" else scores.reshape(1, -1)
        if not (groups.amax(dim=1) > groups.amin(dim=1)).all():
            raise LanguageError(f"all scores of a {algorithm.group} are equal on the probe layers; nothing is ranked")
        select = row_mask if algorithm.group == "row" else matrix_mask
        masks.append(select(scores, int(sparsity * groups.shape[1])).reshape(-1))
    bits = pack(torch.cat(masks)).numpy().tobytes()
    return ProbeResult(bits.hex(), hashlib.sha256(bits + str(algorithm.allocation).encode()).hexdigest()[:16])
