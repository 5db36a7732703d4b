"""From an algorithm to masks and new weights, one linear layer and one block at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprune.algorithms.algorithm import Algorithm, Group, Sparsities
from autoprune.algorithms.allocation import allocate, nm_counts
from autoprune.algorithms.cost import metered
from autoprune.algorithms.language import Program, parse
from autoprune.algorithms.profiles import BlockProfile
from autoprune.algorithms.scores import BASELINES, NATIVE
from autoprune.algorithms.statistics import GRAM_READERS, InputMoments
from autoprune.algorithms.updates import DAMPING, compensate, conjugate_gradients, sparsegpt
from autoprune.kernels.masks import matrix_mask, nm_mask, row_mask, tile_mask
from autoprune.models.layers import Layer

# An expert that calibration routed fewer tokens to has no statistics worth the name: magnitude decides instead.
EXPERT_TOKENS = 16


def needs(algorithm: Algorithm) -> frozenset[str]:
    """Names of the statistics that an algorithm reads; "gram" where it needs the Gram matrix of the inputs itself."""
    reads = frozenset() if algorithm.score in NATIVE else frozenset(parse(algorithm.score).reads)
    return reads | {"gram"} if algorithm.score in NATIVE or algorithm.update != "none" else reads


def planned_sparsities(algorithm: Algorithm, profiles: Sequence[BlockProfile], sparsity: float) -> Sparsities:
    """What every layer is to lose: the allocation's answer, and for n:m the nearest that whole numbers n allow."""
    planned = allocate(algorithm.allocation, profiles, sparsity)
    group = Group.parse(algorithm.group)
    if group.kind != "n:m":
        return planned
    retentions = [[1 - s for s in block] for block in planned]
    numels = [[layer.numel for layer in profile.layers] for profile in profiles]
    if algorithm.allocation.per == "block":  # one n for the whole block, as one sparsity
        counts = nm_counts([row[:1] for row in retentions], [[sum(row)] for row in numels], group.second)
        counts = [row * len(layers) for row, layers in zip(counts, numels, strict=True)]
    else:
        counts = nm_counts(retentions, numels, group.second)
    return [[1 - n / group.second for n in row] for row in counts]


def mask_of(scores: Tensor, group: Group, sparsity: float) -> Tensor:
    """Kept weights, bool [out, in]: the floor of sparsity × group size is pruned in every comparison group.

    Raises ValueError for scores that are not finite, and where n:m groups or rectangles do not divide the matrix.
    """
    if not all(bound.isfinite() for bound in torch.aminmax(scores)):
        raise ValueError("the scores are not finite on the target's weights")

    def share(size: int) -> int:
        return int(sparsity * size + 1e-9)  # 0.6 × 5 is 3, though 2.9999… in floating point

    match group.kind:
        case "row":
            return row_mask(scores, share(scores.shape[1]))
        case "matrix":
            return matrix_mask(scores, share(scores.numel()))
        case "n:m":
            return nm_mask(scores, share(group.second), group.second)
        case _:
            tiles = scores.numel() // (group.first * group.second)
            return tile_mask(scores, share(tiles), group.first, group.second)


@dataclass
class BlockChoice:
    """What an algorithm makes of one block.

    masks: kept weights by layer; updated: new weights, fp32, of the layers whose kept weights changed;
    fallbacks: experts that were pruned by magnitude for want of tokens; dead: layers with inputs that were zero for
    every token, and how many; dampings: layers whose Hessian needed more damping than usual, and how much (as a
    multiple of its mean diagonal).
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    updated: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    dead: dict[str, int] = field(default_factory=dict)
    dampings: dict[str, float] = field(default_factory=dict)

    def weights(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Weights [out, in] of the pruned layers."""
        return {
            layer.name: self.updated[layer.name] if layer.name in self.updated else masked(layer.weight, mask)
            for layer in layers
            if (mask := self.masks[layer.name]) is not None
        }

    @property
    def pruned(self) -> int:
        return sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with zeros where the mask is False: a product of its bits, ten times faster than one in bfloat16."""
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    return (bits * mask).view(weight.dtype)


class Chooser:
    """An algorithm made ready to prune blocks."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.group = Group.parse(algorithm.group)
        self.program = None if algorithm.score in NATIVE else parse(algorithm.score)
        self.reads = needs(algorithm)

    def block(
        self,
        layers: Sequence[Layer],
        moments: Mapping[str, InputMoments],
        gradients: Mapping[str, Tensor],
        sparsities: Sequence[float],
    ) -> BlockChoice:
        """moments, gradients: by layer; the latter only has to hold what the algorithm reads. sparsities: per layer.

        Raises LanguageError or ValueError, naming the layer, where the algorithm yields no usable scores.
        """
        choice = BlockChoice()
        for layer, sparsity in zip(layers, sparsities, strict=True):
            try:
                self._layer(layer, moments[layer.name], gradients.get(layer.name), sparsity, choice)
            except ValueError as error:
                raise type(error)(f"{layer.name}: {error}") from None
        return choice

    def _layer(
        self, layer: Layer, moments: InputMoments, gradient: Tensor | None, sparsity: float, choice: BlockChoice
    ) -> None:
        name, weight = layer.name, layer.weight
        if layer.expert is not None and moments.count < EXPERT_TOKENS:
            choice.fallbacks.append(name)
            magnitude = parse(BASELINES["magnitude"].source)
            choice.masks[name] = mask_of(magnitude(weight.float(), {}), self.group, sparsity)
            return
        dead = int((moments.sum_of_squares == 0).sum())
        if dead:
            choice.dead[name] = dead
        update = self.algorithm.update
        updated = None
        if self.program is None:
            mask, updated = sparsegpt(weight.cpu(), moments.factor, self.group, sparsity)
        else:
            mask = mask_of(self._scores(self.program, weight, moments, gradient), self.group, sparsity)
            if update != "none":
                updated = compensate(weight.cpu(), mask.cpu(), moments.factor)
        if update == "cg":
            updated = conjugate_gradients(weight.cpu(), mask.cpu(), moments.gram, start=updated)
        choice.masks[name] = mask.to(weight.device)
        if self.reads & GRAM_READERS and moments.damping > DAMPING:
            choice.dampings[name] = moments.damping
        if update != "none":
            choice.updated[name] = updated.to(weight.device)  # Gram matrices live, and are used, on the CPU

    @staticmethod
    def _scores(program: Program, weight: Tensor, moments: InputMoments, gradient: Tensor | None) -> Tensor:
        statistics = {
            name: (gradient if name == "g_rms" else moments.statistic(name)).to(weight.device) for name in program.reads
        }
        # What fails or grows on this shape alone, such as `x_norm[:1000]`, is the candidate's fault, not the actor's.
        W = weight.float()
        with metered(program.source, "W", *weight.shape):
            return program(W, statistics)
