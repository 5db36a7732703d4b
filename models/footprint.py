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
from autoprune.models.loading import HUB_MODEL, load_config, resolve_model
from autoprune.models.shard import GRADIENT_WINDOWS, PROFILE_WINDOWS, WINDOWS_AT_ONCE

ARCHITECTURES = Path(__file__).parent / "architectures"  # of models that are large to fetch, and well known


def known_config(name: str) -> PretrainedConfig:
    """Of a bundled model, a folder, a model in ARCHITECTURES, or one of the hub, of which only the configuration is
    fetched. Raises InputError as `resolve_model`."""
    stored = ARCHITECTURES / f"{name.replace('/', '--')}.json"
    if stored.is_file():
        return load_config(stored)
    match = HUB_MODEL.fullmatch(name)
    if Path(name).expanduser().is_dir() or match is None:
        return load_config(resolve_model(name))
    return load_config(match["id"], match["revision"])


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device of one shard. weights: its blocks, with embedding and head where it holds them. gradients:
    root mean squares, fp32, where algorithms read them. states: hidden states that are kept or on their way. work: what
    the largest step takes for a moment. host: in the CPU's memory beside it, at most."""

    weights: int
    gradients: int
    states: int
    work: int
    host: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.work


@dataclass(frozen=True)
class Workload:
    """What shards are to do: windows of every split, calibration first, of `context` tokens, and the statistics that
    are asked for."""

    context: int
    windows: tuple[int, ...]
    statistics: frozenset[str]


@dataclass(frozen=True)
class ModelSizes:
    """Of a model: bytes of each block, of embedding, head, and what is in every shard; prunable weights of each block;
    (rows, columns) of its largest matrix; the inputs that its layers have; and its widths."""

    blocks: tuple[int, ...]
    embedding: int
    head: int
    tied: bool
    rest: int
    prunable: tuple[int, ...]
    largest: tuple[int, int]
    inputs: frozenset[int]
    hidden: int
    inner: int
    vocabulary: int
    element: int

    @property
    def costs(self) -> list[int]:
        """Of each block, in bytes that a token is multiplied with: what its forward pass takes grows with them. The
        head counts with the last one."""
        return [*self.blocks[:-1], self.blocks[-1] + self.head]

    @property
    def parameters(self) -> int:
        whole = sum(self.blocks) + self.embedding + self.rest + (0 if self.tied else self.head)
        return whole // self.element


def model_sizes(config: PretrainedConfig, name: str, dtype: str) -> ModelSizes:
    """Raises InputError for a model that cannot be run block by block."""
    model, _, prefix = build(config, name, getattr(torch, dtype))
    blocks = model.get_submodule(prefix)
    text = config.get_text_config()
    layers = [block_layers(block, config, lambda *_: ()) for block in blocks]
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
        largest=max(shapes, key=math.prod),
        inputs=frozenset(columns for _, columns in shapes),
        hidden=text.hidden_size,
        inner=max(max(shape) for shape in shapes),
        vocabulary=text.vocab_size,
        element=torch.empty(0, dtype=getattr(torch, dtype)).element_size(),
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
    gradients = 0
    if "g_rms" in load.statistics:
        gradients = 4 * sum(sizes.prunable[start:stop])
        calibrating += GRADIENT_WINDOWS * window * (stop - start)  # what entered each block, until it is gone through
    rows, columns = sizes.largest
    score = 4 * 4 * rows * columns  # the weight in fp32, its score, what the score is made of, and the mask
    attention = WINDOWS_AT_ONCE * load.context * (4 * sizes.inner + 8 * sizes.hidden) * sizes.element
    logits = last * 3 * 4 * load.context * sizes.vocabulary
    grams = 2 * 4 * columns**2 if load.statistics & GRAM_READERS else 0
    host = grams + 2 * max(load.windows) * window
    return Footprint(weights, gradients, max(states, calibrating) + kept, max(score, attention, logits), host)
