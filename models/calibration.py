"""What calibration leaves: moments of every linear layer's input, never raw activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from autoprune.algorithms.statistics import InputMoments
from autoprune.models.layers import Layer


class _Collector:
    """Gives every layer the moments of its inputs.

    Layers that are called one after the other on the same tensor (q, k and v; gate and up) share one InputMoments,
    which is filled once: their statistics are the same, and a Gram matrix is large.
    """

    def __init__(self, layers: Iterable[Layer], wants: Iterable[str]) -> None:
        self.moments = {layer.name: InputMoments(layer.weight.shape[1], wants) for layer in layers}
        self._sharers: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def add(self, name: str, x: Tensor) -> None:
        owner = self._last[0] if self._last is not None and self._last[1] is x else name
        if self._sharers.setdefault(name, owner) != owner:
            raise RuntimeError(f"{name} had the input of {self._sharers[name]} in one pass and not in another")
        if owner == name:
            try:
                self.moments[name].add(x)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from None
            self._last = (name, x)
        else:
            self.moments[name] = self.moments[owner]


# By which an expert's inputs meet its weight, the second operand.
PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _ExpertCalls(TorchFunctionMode):
    """Sees the calls by which a fused expert meets the tokens that were routed to it: `linear(x, experts[e])`, or
    `x @ experts[e]` where experts are kept [in, out]."""

    def __init__(self, collector: _Collector, experts: list[Layer]) -> None:
        super().__init__()
        self.collector = collector
        self.names = {layer.weight.data_ptr(): layer.name for layer in experts}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and args[1].data_ptr() in self.names:
            self.collector.add(self.names[args[1].data_ptr()], args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def input_moments(layers: list[Layer], wants: Iterable[str] = ()) -> Iterator[dict[str, InputMoments]]:
    """While open, every forward pass adds the layers' inputs to their moments, by layer name.

    wants: the statistics that will be asked for (see `InputMoments`). A fused expert counts the tokens routed to it.
    """
    collector = _Collector(layers, frozenset(wants))
    handles = [
        layer.module.register_forward_pre_hook(lambda _, inputs, name=layer.name: collector.add(name, inputs[0]))
        for layer in layers
        if layer.module is not None
    ]
    experts = [layer for layer in layers if layer.expert is not None]
    try:
        if experts:
            with _ExpertCalls(collector, experts):
                yield collector.moments
        else:
            yield collector.moments
    finally:
        collector._last = None
        for handle in handles:
            handle.remove()


def squared_gradients(layers: list[Layer], hidden: Tensor, block, upstream: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Sum over windows of the squared gradient of each weight, and the gradient of what entered the block.

    hidden: [windows, L, D] as it enters; block: from such states to those that leave; upstream: the loss's gradient
    by the latter. Each window is one sample: its gradient is squared on its own. Returns ({layer: fp32 [out, in]},
    [windows, L, D]).
    """
    parameters = list({id(layer.parameter): layer.parameter for layer in layers}.values())
    sums = {id(parameter): torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}
    entering = []
    for window, gradient in zip(hidden.split(1), upstream.split(1), strict=True):
        # Other backends add up in whatever order a GPU's threads come: replicas would not agree on a bit.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if hidden.is_cuda else nullcontext():
            for parameter in parameters:
                parameter.requires_grad_(True)
            window = window.clone().requires_grad_(True)
            leaving = block(window)
            # Experts that no token of this window reached have no gradient.
            found = torch.autograd.grad(leaving, [window, *parameters], gradient, allow_unused=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        entering.append(found[0])
        for parameter, squared in zip(parameters, found[1:], strict=True):
            if squared is not None:
                sums[id(parameter)] += squared.float().square_()
    return {layer.name: layer.of(sums[id(layer.parameter)]) for layer in layers}, torch.cat(entering)
