"""Where kernels are tested: on a CPU as always, and as Triton, on CUDA or, without that, in Triton's interpreter."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from triton.runtime.autotuner import Autotuner

from autoprune.kernels import distance, masks, matrix_select, nm_select, pack, row_select

CUDA = torch.cuda.is_available()
# conftest.py turns the interpreter on where there is no CUDA: in one process it is one or the other.
TRITON = [
    pytest.param("interpreter", marks=pytest.mark.skipif(CUDA, reason="the kernels run on CUDA here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs CUDA")]),
]
LANES = ["cpu", "other", *TRITON]  # other: any device that has kernels neither of its own nor of Triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 31, 32, 33, 576, 1000, 1536, 4096, 11008, 28672]


if CUDA:  # one number of warps each: which of them is the fastest is for the benchmarks to find
    for module in (distance, matrix_select, nm_select, pack, row_select):
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[1:2]


@contextmanager
def lane(name):
    """The device to put tensors on, while `masks` uses what the lane is for."""
    triton = {"interpreter": {"cpu"}, "cuda": {"cuda"}}.get(name, set())
    with mock.patch.multiple(masks, TRITON_DEVICES=triton, CPU_DEVICES=set() if name == "other" else {"cpu"}):
        yield "cuda" if name == "cuda" else "cpu"


def edges(size):
    """Counts of pruned scores among `size`."""
    return sorted({0, min(1, size), size // 2, int(0.6 * size), max(size - 1, 0), size})


def random(*shape, dtype=torch.float32, seed=0, ties=False):
    """Numbers from a normal distribution; with ties, every other row has few different values."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if ties:
        values[..., ::2, :] = (values[..., ::2, :] * 2).round() / 2
    return values.to(dtype)
