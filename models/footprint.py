"""How many bytes a model's shards need, told from its configuration alone: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from transformers import PretrainedConfig

from autoprune.algorithms.statistics import GRAM_READERS
from autoprune.models.families import build
from autoprune.models.layers import block_layers, inside
from autoprune.models.loading import HUB_MODEL, fetch_config, load_config, resolve_model
from autoprune.models.shard import GRADIENT_WINDOWS, PROFILE_WINDOWS, WINDOWS_AT_ONCE

ARCHITECTURES = Path(__file__).parent / "architectures"  # of models that are bundled, or large and well known
# Multiplications in whose time a logit is written and becomes a likelihood: SmolLM2-135M's head took as long as 12 to
# 13 of its blocks on a CPU, and has the weights of 8.
LOGIT = 300


def known_config(name: str) -> PretrainedConfig:
    """Of a bundled model, a folder, a model in ARCHITECTURES at any revision, or one of the hub, of which only the
    configuration is fetched. Raises InputError as `resolve_model`."""
    stored = ARCHITECTURES / f"{name.partition('@')[0].replace('/', '--')}.json"
    if stored.is_file():
        return load_config(stored)
    if Path(name).expanduser().is_dir() or HUB_MODEL.fullmatch(name) is None:
        return load_config(resolve_model(name))
    return load_config(fetch_config(name))


@dataclass(frozen=True)
class Footprint:
    """Bytes of one shard. On the device: weights: its blocks, with embedding and head where it holds them. states:
    hidden states that are kept or on their way. work: what the largest step takes for a moment. In the CPU's memory
    beside it: gradients: root mean squares, fp32, where algorithms read them. host: all else, at most."""

    weights: int
    states: int
    work: int
    gradients: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.states + self.work


@dataclass(frozen=True)
class Workload:
    """What shards are to do: windows of every split, calibration first, of `context` tokens, and the statistics that
    are asked for. gpu: on one."""

    context: int
    windows: tuple[int, ...]
    statistics: frozenset[str]
    gpu: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """Of a model: bytes of each block, of embedding, head, and what is in every shard; prunable weights of each block;
    of them at most so many in tensors that hold several experts; (rows, columns) of its largest matrix; elements of the
    Gram matrices of a block's layers, at most; the inputs that its layers have; its widths; its attention
    heads, and those whose scores are held at a time, 0 where they are not."""

    blocks: tuple[int, ...]
    embedding: int
    head: int
    tied: bool
    rest: int
    prunable: tuple[int, ...]
    fused: int
    largest: tuple[int, int]
    grams: int
    inputs: frozenset[int]
    hidden: int
    inner: int
    vocabulary: int
    element: int
    all_heads: int
    heads: int

    @property
    def costs(self) -> list[int]:
        """Of each block, in bytes that a token is multiplied with: what its forward pass takes grows with them. The
        head counts with the last one, and what becomes of its logits."""
        return [*self.blocks[:-1], self.blocks[-1] + self.head + LOGIT * self.vocabulary * self.element]

    @property
    def parameters(self) -> int:
        whole = sum(self.blocks) + self.embedding + self.rest + (0 if self.tied else self.head)
        return whole // self.element


def model_sizes(config: PretrainedConfig, name: str, dtype: str) -> ModelSizes:
    """Raises InputError for a model that cannot be run block by block."""
    model, _, prefix = build(config, name, getattr(torch, dtype))
    blocks = model.get_submodule(prefix)
    text = config.get_text_config()
    layers = [block_layers(block, text, lambda *_: ()) for block in blocks]
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    sizes = {part: _bytes(module.state_dict().values()) if module is not None else 0 for part, module in ends.items()}
    outside = [tensor for key, tensor in model.state_dict().items() if not inside(key, prefix)]
    tied = ends["head"] is not None and ends["head"].weight is ends["embedding"].weight
    rest = _bytes(outside) - sizes["embedding"] - sizes["head"]
    shapes = [layer.weight.shape for block in layers for layer in block]
    return ModelSizes(
        blocks=tuple(_bytes(block.state_dict().values()) for block in blocks),
        embedding=sizes["embedding"],
        head=sizes["head"],
        tied=tied,
        rest=max(0, rest),
        prunable=tuple(sum(layer.weight.numel() for layer in block) for block in layers),
        fused=max(sum(one.weight.numel() for one in block if one.expert is not None) for block in layers),
        largest=max(shapes, key=math.prod),
        grams=max(sum(layer.weight.shape[1] ** 2 for layer in block) for block in layers),
        inputs=frozenset(columns for _, columns in shapes),
        hidden=text.hidden_size,
        inner=max(max(shape) for shape in shapes),
        vocabulary=text.vocab_size,
        element=torch.empty(0, dtype=getattr(torch, dtype)).element_size(),
        all_heads=text.num_attention_heads,
        heads=text.num_attention_heads if text._attn_implementation == "eager" else 0,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shard_bounds(costs: Sequence[int], shards: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges of blocks, in order, of which the dearest is as cheap as can be: in a pipeline, all shards wait
    for that one. costs: of each block, at least as many as shards."""
    before = [0, *accumulate(costs)]
    best = {0: (0, 0, ())}  # of so many first blocks: the dearest range, the sum of squares, where ranges start
    for _ in range(shards):
        best = {
            stop: min(
                (max(dearest, cost := before[stop] - before[start]), squares + cost**2, (*starts, start))
                for start, (dearest, squares, starts) in best.items()
                if start < stop
            )
            for stop in range(min(best) + 1, len(before))
        }
    starts = best[len(costs)][2]
    return tuple(zip(starts, (*starts[1:], len(costs)), strict=True))


def footprint(sizes: ModelSizes, start: int, stop: int, load: Workload) -> Footprint:
    """Of the shard with the blocks start … stop − 1."""
    first, last = start == 0, stop == len(sizes.blocks)
    weights = sum(sizes.blocks[start:stop]) + sizes.rest
    weights += sizes.embedding * first + sizes.head * (last and not (first and sizes.tied))
    window = load.context * sizes.hidden * sizes.element
    states = 2 * max(load.windows) * window  # what enters a block and what leaves it
    calibrating = 2 * load.windows[0] * window
    kept = PROFILE_WINDOWS * len(load.windows) * (stop - start) * load.context * sizes.hidden * 2  # bf16
    attention = WINDOWS_AT_ONCE * load.context * (4 * sizes.inner + 8 * sizes.hidden) * sizes.element
    # Scores, in fp32 for their softmax, and what comes of it.
    attention += WINDOWS_AT_ONCE * sizes.heads * load.context**2 * (4 + 2 * sizes.element)
    block = max(sizes.prunable[start:stop])
    gradients = backward = means = 0
    if "g_rms" in load.statistics:
        gradients = 4 * sum(sizes.prunable[start:stop])
        calibrating += GRADIENT_WINDOWS * window * (stop - start)  # what entered each block, until it is gone through
        # Sums of squares, fp32, of a block and of the one before; gradients of two windows, beside those of an expert;
        # and one window's graph, about twice what its forward pass takes.
        backward = (2 * 4 + 2 * sizes.element) * block + sizes.element * sizes.fused + 2 * attention // WINDOWS_AT_ONCE
        if load.gpu and not sizes.heads:  # there attention's backward holds them (see `squared_gradients`)
            backward += 3 * 4 * sizes.all_heads * load.context**2
        means = 2 * 4 * block  # of a block and of the one before
    rows, columns = sizes.largest
    # A layer's weight in fp32, its score, what the score is made of, and the mask.
    score = 4 * (5 if gradients else 4) * rows * columns
    # A pruned block lies beside the dense one; experts that share a tensor are gathered in another.
    pruned = (4 if "gram" in load.statistics else sizes.element) * block + sizes.element * sizes.fused
    logits = last * 3 * 4 * load.context * sizes.vocabulary
    grams = 2 * 4 * sizes.grams if load.statistics & GRAM_READERS else 0  # with their factors
    host = max(grams, means) + 2 * max(load.windows) * window
    work = max(score + pruned, attention + pruned, logits, backward)
    return Footprint(weights, max(states, calibrating) + kept, work, gradients, host)
