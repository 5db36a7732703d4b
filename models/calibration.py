"""What calibration leaves: moments of every linear layer's input, never raw activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from autoprune.algorithms.statistics import InputMoments


@contextmanager
def input_moments(layers: dict[str, nn.Linear]) -> Iterator[dict[str, InputMoments]]:
    """While open, every forward pass adds the layers' inputs to their moments."""
    moments = {name: InputMoments(layer.in_features) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, m=moments[name]: m.add(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
