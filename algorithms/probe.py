"""What an algorithm does to three small layers, and to models of a few blocks: proof that it runs, and a fingerprint of
the masks that it yields."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.algorithms.algorithm import Algorithm, Group
from autoprune.algorithms.cost import dry_run, metered, refusing
from autoprune.algorithms.language import LanguageError, parse, parse_allocation
from autoprune.algorithms.vocabulary import STATISTICS, SUMMARIES
from autoprune.kernels.masks import matrix_mask, nm_mask, pack, row_mask, tile_mask

# [out, in] of the probe layers: wide, wider, square.
SHAPES = ((32, 64), (48, 96), (64, 64))


@dataclass(frozen=True)
class ProbeResult:
    """mask: bits of the kept weights over all probe layers, as hexadecimal digits. mask_hash: 16 hexadecimal digits
    over the masks, the allocation and the update: the same masks under another allocation are another algorithm."""

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


def _own(seed: int, name: str, *shape: int) -> Tensor:
    """`_uniform` from a source of its own: what a statistic is must not depend on which others there are."""
    return _uniform(random.Random(f"{seed}/{name}"), *shape)


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
        norm = torch.sqrt(mean.square() + std.square())
        values = {
            "x_norm": norm,
            "x_mean": mean,
            "x_std": std,
            # Between |mean| and x_norm, as for every distribution; Gaussian inputs without a mean have 0.8 std.
            "x_absmean": torch.sqrt(mean.square() + ((0.6 + 0.2 * _own(seed, "x_absmean", columns)) * std).square()),
            "x_kurtosis": 3 + 4 * _heavy(_own(seed, "x_kurtosis", columns)).abs() + torch.where(outlier, 60.0, 0.0),
            # At least 1/H_jj, which is where inputs are uncorrelated, with 0.2 for the damping.
            "h_inv_diag": (1 + 3 * _heavy(_own(seed, "h_inv_diag", columns)).abs()) / (2 * norm.square() + 0.2),
            "g_rms": _heavy(_own(seed, "g_rms", rows, columns)).abs(),
        }
        values["g_rms"] /= values["g_rms"].mean()
        layers.append(_Layer(W.float(), {name: values[name].float() for name in STATISTICS}))
    return tuple(layers)


def _masks(scores: Tensor, group: Group, sparsity: float) -> Tensor:
    """Kept weights, bool [out, in]. Raises ValueError where the group does not divide the layer."""
    if group.kind == "row":
        return row_mask(scores, int(sparsity * scores.shape[1]))
    if group.kind == "n:m":
        return nm_mask(scores, group.second - group.first, group.second)
    if group.kind == "tile":
        tiles = scores.numel() // (group.first * group.second)
        return tile_mask(scores, int(sparsity * tiles), group.first, group.second)
    return matrix_mask(scores, int(sparsity * scores.numel()))


def probe(algorithm: Algorithm, sparsity: float) -> ProbeResult:
    """Run the algorithm on the probe layers at the given sparsity of every comparison group, 0 < sparsity < 1.

    Groups n:m are pruned as their name says, whatever the sparsity. Raises LanguageError where the group is unknown or
    does not divide the layers, and where the score is not written in the language or ill-shaped, is not finite, leaves
    a row (a matrix, where its weights or rectangles compete) without order, changes between two runs, or writes to its
    inputs.
    """
    try:
        group = Group.parse(algorithm.group)
    except ValueError as error:
        raise LanguageError(str(error)) from None
    program = parse(algorithm.score)
    dry_run(program)
    masks = []
    for layer in _layers():
        W = layer.W.clone()
        statistics = {name: value.clone() for name, value in layer.statistics.items()}
        with refusing(program.source):  # such as an operation that takes no truth values: without data it is not tried
            scores, again = program(W, statistics), program(W, statistics)
        if not scores.isfinite().all():
            raise LanguageError("the scores are not finite on the probe layers; guard divisions, roots and powers")
        unchanged = torch.equal(W, layer.W) and all(torch.equal(statistics[n], layer.statistics[n]) for n in statistics)
        if not torch.equal(scores, again) or not unchanged:
            raise LanguageError("two runs on the same input differ, or the input was written to")
        wide = "row" if group.kind in ("row", "n:m") else "matrix"
        ranked = scores if wide == "row" else scores.reshape(1, -1)
        if not (ranked.amax(dim=1) > ranked.amin(dim=1)).all():
            raise LanguageError(f"all scores of a {wide} are equal on the probe layers; nothing is ranked")
        try:
            masks.append(_masks(scores, group, sparsity).reshape(-1))
        except ValueError as error:
            raise LanguageError(f"the group {algorithm.group} does not fit a probe layer: {error}") from None
    bits = pack(torch.cat(masks)).numpy().tobytes()
    # Without an update the text is the allocation's alone, as in the checkpoints of searches that know of no update.
    plan = str(algorithm.allocation) + ("" if algorithm.update == "none" else f"/{algorithm.update}")
    if algorithm.allocation.source:  # one that does the same is the same
        plan = plan.replace(str(algorithm.allocation), probe_allocation(algorithm.allocation.source))
    return ProbeResult(bits.hex(), hashlib.sha256(bits + plan.encode()).hexdigest()[:16])


UNITS = (1, 5, 12, 31)  # of the probe's models


@functools.cache
def _models() -> tuple[dict[str, Tensor], ...]:
    """Summaries of models, float64 by name: units of different size, and one far more skewed than the others."""
    models = []
    for units in UNITS:
        spread = {name: _own(units, name, units) for name in SUMMARIES}
        values = {name: 1 + 0.5 * spread[name] for name in SUMMARIES}
        values["numel"] = 1e6 * values["numel"].mul(8).round()
        values["depth"] = torch.arange(units, dtype=torch.float64) / max(units - 1, 1)
        outlier = torch.arange(units) == units // 2
        values["skewness"] = 2 + spread["skewness"] + torch.where(outlier, 15.0, 0.0)
        values["kurtosis"] = 3 + values["skewness"].square()
        models.append(values)
    return tuple(models)


def probe_allocation(source: str) -> str:
    """Run an allocation on the probe's models at several sparsities: 16 hexadecimal digits over what it yields.

    Raises LanguageError where it is not written in the language, an operation fails, a value has more numbers than
    there are units, the result is not what `AllocationProgram` says, differs between two runs, or an input was written
    to.
    """
    program = parse_allocation(source)
    shares = []
    for model, sparsity in itertools.product(_models(), (0.5, 0.7)):
        profile = {name: value.clone() for name, value in model.items()}
        with metered(program.source, "the number of units", len(profile["depth"])):
            wishes = program(profile, sparsity)
        unchanged = all(torch.equal(profile[name], model[name]) for name in model)
        if not unchanged or not torch.equal(program(profile, sparsity), wishes):
            raise LanguageError("two runs of allocate on the same input differ, or the input was written to")
        shares += (wishes / wishes.sum()).tolist()
    return hashlib.sha256(" ".join(f"{share:.9f}" for share in shares).encode()).hexdigest()[:16]
