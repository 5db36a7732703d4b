"""From an algorithm to masks and new weights, one linear layer and one block at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprune.algorithms.algorithm import Algorithm, Group, Sparsities
from autoprune.algorithms.allocation import TAYLOR, allocate, by_layer, nm_counts
from autoprune.algorithms.allocation import needs as features_of
from autoprune.algorithms.cost import metered
from autoprune.algorithms.language import Program, parse
from autoprune.algorithms.profiles import BlockProfile
from autoprune.algorithms.scores import BASELINES, NATIVE
from autoprune.algorithms.statistics import GRAM_READERS, InputMoments
from autoprune.algorithms.updates import DAMPING, compensate, conjugate_gradients, sparsegpt
from autoprune.kernels.distance import distance
from autoprune.kernels.masks import prune_masked, prune_matrix, prune_nm, prune_rows, prune_tiles, unpack
from autoprune.models.layers import Layer

# An expert that calibration routed fewer tokens to has no statistics worth the name: magnitude decides instead.
EXPERT_TOKENS = 16
# What is scored by |W_ij| times a factor of its column, in canonical text.
_WANDA, _MAGNITUDE = (parse(BASELINES[name].source).source for name in ("wanda", "magnitude"))


def needs(algorithm: Algorithm) -> frozenset[str]:
    """Names of the statistics that an algorithm and its allocation read; "gram" where it needs the Gram matrix of the
    inputs itself."""
    reads = frozenset() if algorithm.score in NATIVE else frozenset(parse(algorithm.score).reads)
    reads |= {"g_rms"} if TAYLOR in features_of(algorithm.allocation) else set()
    return reads | {"gram"} if algorithm.score in NATIVE or algorithm.update != "none" else reads


def planned_sparsities(algorithm: Algorithm, profiles: Sequence[BlockProfile], sparsity: float) -> Sparsities:
    """What every layer is to lose: the allocation's answer, and for n:m the nearest that whole numbers n allow."""
    planned = allocate(algorithm.allocation, profiles, sparsity)
    group = Group.parse(algorithm.group)
    if group.kind != "n:m":
        return planned
    retentions = [[1 - s for s in block] for block in planned]
    numels = [[layer.numel for layer in profile.layers] for profile in profiles]
    if not by_layer(algorithm.allocation):  # one n for the whole block, as one sparsity
        counts = nm_counts([row[:1] for row in retentions], [[sum(row)] for row in numels], group.second)
        counts = [row * len(layers) for row, layers in zip(counts, numels, strict=True)]
    else:
        counts = nm_counts(retentions, numels, group.second)
    return [[1 - n / group.second for n in row] for row in counts]


def prune(weight: Tensor, scores: Tensor, group: Group, sparsity: float, out: Tensor) -> Tensor:
    """Write the weight with the floor of sparsity × group size set to zero in every comparison group to `out`.

    weight, out: [out, in], alike; scores: [out, in], or fp32 norms [in]: then scores are |W_ij|·norm_j. Returns the
    packed mask (`kernels.masks.pack`).
    Raises ValueError for scores that are not finite, and where n:m groups or rectangles do not divide the matrix.
    """
    largest = max(abs(float(bound)) for bound in torch.aminmax(scores))
    if scores.ndim == 1:  # a product rounds to infinity, or is NaN, only where this one is
        largest *= max(abs(float(bound)) for bound in torch.aminmax(weight))
    if not largest <= torch.finfo(scores.dtype).max:
        raise ValueError("the scores are not finite on the target's weights")

    def share(size: int) -> int:
        return int(sparsity * size + 1e-9)  # 0.6 × 5 is 3, though 2.9999… in floating point

    match group.kind:
        case "row":
            return prune_rows(weight, scores, share(weight.shape[1]), out)
        case "matrix":
            return prune_matrix(weight, scores, share(weight.numel()), out)
        case "n:m":
            return prune_nm(weight, scores, share(group.second), group.second, out)
        case _:
            tiles = weight.numel() // (group.first * group.second)
            return prune_tiles(weight, scores, share(tiles), group.first, group.second, out)


@dataclass
class BlockChoice:
    """What an algorithm makes of one block.

    bits: packed masks of the kept weights by layer; weights: what the layers' weights become, [out, in]; updated: those
    among them whose kept weights changed, too, fp32; fallbacks: experts that were pruned by magnitude for want of
    text; dead: layers with inputs that were zero for every token, and how many; dampings: layers whose Hessian needed
    more damping than usual, and how much (as a multiple of its mean diagonal).
    """

    bits: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    updated: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    dead: dict[str, int] = field(default_factory=dict)
    dampings: dict[str, float] = field(default_factory=dict)

    def mask(self, layer: str) -> Tensor:
        """Kept weights of a layer, bool [out, in]."""
        return unpack(self.bits[layer], self.weights[layer].shape)

    @property
    def pruned(self) -> int:
        """How many weights of the block are zero by this choice."""
        kept = sum(distance(bits, torch.zeros_like(bits)) for bits in self.bits.values())
        return sum(weight.numel() for weight in self.weights.values()) - kept


class Chooser:
    """An algorithm made ready to prune blocks."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.group = Group.parse(algorithm.group)
        self.program = None if algorithm.score in NATIVE else parse(algorithm.score)
        self.reads = needs(algorithm)
        self.scores_by_gradients = self.program is not None and "g_rms" in self.program.reads

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

    def _unknown(self, moments: InputMoments, gradient: Tensor | None) -> bool:
        """Whether too little text reached an expert to go by: few tokens, or for a score that reads gradients none of
        the windows that have them."""
        flat = self.scores_by_gradients and gradient is not None and bool((gradient == gradient.flatten()[0]).all())
        return moments.count < EXPERT_TOKENS or flat

    def _layer(
        self, layer: Layer, moments: InputMoments, gradient: Tensor | None, sparsity: float, choice: BlockChoice
    ) -> None:
        name, weight = layer.name, layer.weight
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        choice.weights[name] = out
        if layer.expert is not None and self._unknown(moments, gradient):
            choice.fallbacks.append(name)
            choice.bits[name] = prune(weight, torch.ones(weight.shape[1], device=out.device), self.group, sparsity, out)
            return
        dead = int((moments.sum_of_squares == 0).sum())
        if dead:
            choice.dead[name] = dead
        update, updated = self.algorithm.update, None
        if self.program is None:
            mask, updated = sparsegpt(weight.cpu(), moments.factor, self.group, sparsity)
            choice.bits[name] = prune_masked(weight, mask.to(weight.device), out)
        else:
            scores = self._scores(self.program, weight, moments, gradient)
            choice.bits[name] = prune(weight, scores, self.group, sparsity, out)
            if update != "none":
                updated = compensate(weight.cpu(), choice.mask(name).cpu(), moments.factor)
        if update == "cg":
            updated = conjugate_gradients(weight.cpu(), choice.mask(name).cpu(), moments.gram, start=updated)
        if self.reads & GRAM_READERS and moments.damping > DAMPING:
            choice.dampings[name] = moments.damping
        if update != "none":  # Gram matrices live, and are used, on the CPU
            choice.updated[name] = choice.weights[name] = updated.to(weight.device)

    @staticmethod
    def _scores(program: Program, weight: Tensor, moments: InputMoments, gradient: Tensor | None) -> Tensor:
        """[out, in], or [in] where kernels make the scores themselves, as they read the weight."""
        if program.source == _WANDA:
            return moments.statistic("x_norm").float().to(weight.device)
        if program.source == _MAGNITUDE:
            return torch.ones(weight.shape[1], device=weight.device)
        statistics = {
            name: (gradient if name == "g_rms" else moments.statistic(name)).to(weight.device) for name in program.reads
        }
        # What fails or grows on this shape alone, such as `x_norm[:1000]`, is the candidate's fault, not the actor's.
        W = weight.float()
        with metered(program.source, "W", *weight.shape):
            return program(W, statistics)
