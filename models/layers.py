"""The prunable layers of a decoder block: found by structure, given other weights for a time, written to disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from autoprune.models.checkpoint_files import Source
from autoprune.models.errors import InputError

MOST_UNKNOWN = 0.01  # of a block's weights may be of a kind that is not known, such as positions


@dataclass(eq=False)
class Layer:
    """One prunable linear layer of a block: a linear module, or one expert of a tensor that holds all of them.

    name: inside the block, as `self_attn.q_proj`, or `mlp.experts.gate_up_proj.3` for an expert; parameter: 2-D, or
    3-D with the experts along the first dimension; expert: its place there, None for a module; module: to hook, None
    for an expert; sources: where its rows are on disk; transposed: the parameter keeps [in, out].
    """

    name: str
    parameter: nn.Parameter
    expert: int | None
    module: nn.Module | None
    sources: tuple[Source, ...] = ()
    transposed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This layer's part of a tensor of the parameter's shape, as a view [out, in]."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.T if self.transposed else tensor

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in] as it is now, a view of the parameter's data."""
        return self.of(self.parameter.data)

    def store(self, tensors: dict[str, torch.Tensor], mask: torch.Tensor, updated: torch.Tensor | None = None) -> None:
        """Write this layer into tensors as they are on disk, in place and in their dtype: zero where `mask` is False,
        elsewhere `updated` or, without it, what is there, bit for bit. mask: bool [out, in]; updated: [out, in]."""
        for source in self.sources:
            part, rows = source.view(tensors), source.rows or slice(None)
            if updated is not None:
                part.copy_(updated[rows])
            part.masked_fill_(~mask[rows].to(part.device), 0)


@contextmanager
def replaced(layers: list[Layer], weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """While open, the layers named in `weights` have these weights [out, in], cast to their parameter's dtype.

    On the way out the data from before is back, also after an exception; it is never written to, since parameters
    get other tensors for the time (of experts, one copy of the tensor that holds them all). Raises ValueError for a
    name that no layer has, or a weight of another shape.
    """
    named = {layer.name: layer for layer in layers}
    before: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    try:
        for name, weight in weights.items():
            layer = named.get(name)
            if layer is None or layer.weight.shape != weight.shape:
                expected = f"the shape {list(layer.weight.shape)}" if layer else f"one of {', '.join(named)}"
                raise ValueError(f"layer {name} with a weight {list(weight.shape)}: expected {expected}")
            parameter = layer.parameter
            first = id(parameter) not in before
            before.setdefault(id(parameter), (parameter, parameter.data))
            if layer.expert is None:
                weight = weight.to(device=parameter.device, dtype=parameter.dtype)
                parameter.data = weight.T if layer.transposed else weight
            else:
                if first:
                    parameter.data = parameter.data.clone()
                layer.weight.copy_(weight)
        yield
    finally:
        for parameter, data in before.values():
            parameter.data = data


def block_layers(
    block: nn.Module, config: PreTrainedConfig, sources: Callable[[str, int | None, bool], tuple[Source, ...]]
) -> list[Layer]:
    """The prunable layers of one block, in the order in which its modules are registered.

    That is every linear module and every expert of a 3-D parameter whose first dimension is a number of experts in
    `config`; not what chooses or weighs experts: a linear of as many outputs as there are experts, or of one, beside
    them. sources: (tensor name inside the block, expert, transposed) → `Layer.sources`.
    """
    counts = set(_expert_counts(config.to_dict()))
    modules = dict(block.named_modules())
    fused: dict[str, list[str]] = {}  # name of a module → its 3-D parameters
    homes: list[tuple[str, str, int]] = []  # (what holds router and experts, the experts, how many)
    for name, module in modules.items():
        own = [] if isinstance(module, nn.modules.conv._ConvNd) else list(module.named_parameters(recurse=False))
        fused[name] = [key for key, tensor in own if tensor.ndim == 3 and tensor.shape[0] in counts]
        experts = len(getattr(module, fused[name][0])) if fused[name] else 0
        if isinstance(module, nn.ModuleList) and len(module) in counts and has_linears(module):
            experts = len(module)
        if experts:
            homes.append((name.rpartition(".")[0], name, experts))

    def routes(name: str, outputs: int) -> bool:
        return any(
            outputs in (1, experts) and inside(name, home) and not inside(name, held) for home, held, experts in homes
        )

    layers = []
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.ndim == 2:
            transposed = isinstance(module, Conv1D)
            if not routes(name, module.weight.shape[1 if transposed else 0]):
                found = sources(f"{name}.weight", None, transposed)
                layers.append(Layer(name, module.weight, None, module, found, transposed))
        for key in fused[name]:
            # The first of several reads hidden states: in a module that keeps [experts, in, out], so do all.
            reads = getattr(module, fused[name][0]).shape
            several = len(fused[name]) > 1
            guess = several and reads[2] != config.hidden_size and reads[1] == config.hidden_size
            transposed = getattr(module, "is_transposed", guess)
            parameter, full = getattr(module, key), f"{name}.{key}".lstrip(".")
            layers += [
                Layer(f"{full}.{expert}", parameter, expert, None, sources(full, expert, transposed), transposed)
                for expert in range(len(parameter))
            ]
    _refuse_unknown(block, layers, counts)
    return layers


def _expert_counts(config: dict) -> Iterator[int]:
    """The numbers of experts that a configuration speaks of, also in its parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif "expert" in str(key) and type(value) is int:
            yield value


def _refuse_unknown(block: nn.Module, layers: list[Layer], counts: set[int]) -> None:
    """InputError where a noticeable part of a block is neither a layer that was found nor what is left alone: linear
    modules that choose experts, convolutions, biases, vectors."""
    known = {id(layer.parameter) for layer in layers}
    for module in block.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.modules.conv._ConvNd)):
            known |= {id(parameter) for parameter in module.parameters(recurse=False)}
    unknown = {
        name: list(parameter.shape)
        for name, parameter in block.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in known and "bias" not in name and len(parameter) not in counts
    }
    numel, total = sum(map(math.prod, unknown.values())), sum(tensor.numel() for tensor in block.parameters())
    if numel > MOST_UNKNOWN * total:
        name, shape = next(iter(unknown.items()))
        raise InputError(
            f"a block has weights that cannot be read as linear layers, such as {name} {shape} ({numel / total:.0%} of "
            "the block in all): expected linear modules, or experts kept together as [experts, …, …]"
        )


def has_linears(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.Linear, Conv1D)) for part in module.modules())


def inside(name: str, home: str) -> bool:
    return not home or name == home or name.startswith(home + ".")
