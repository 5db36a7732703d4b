"""Where kernels are tested: on a CPU as always, and as Triton, on CUDA or, without that, in Triton's interpreter."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from autoprune.kernels import masks

CUDA = torch.cuda.is_available()
# conftest.py turns the interpreter on where there is no CUDA: in one process it is one or the other.
TRITON = [
    pytest.param("interpreter", marks=pytest.mark.skipif(CUDA, reason="the kernels run on CUDA here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA")]),
]
LANES = ["cpu", *TRITON]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def lane(name):
    """The device to put tensors on, while `masks` uses what the lane is for."""
    kernels = {"cpu": set(), "interpreter": {"cpu"}, "cuda": {"cuda"}}[name]
    with mock.patch.object(masks, "TRITON_DEVICES", kernels):
        yield "cuda" if name == "cuda" else "cpu"


def random(*shape, dtype=torch.float32, seed=0, ties=False):
    """Numbers from a normal distribution; with ties, every other row has few different values."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if ties:
        values[..., ::2, :] = (values[..., ::2, :] * 2).round() / 2
    return values.to(dtype)
