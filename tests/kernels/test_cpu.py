"""Chunks, threads and samples on a CPU: they change how long a mask takes, and nothing in it."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import DTYPES, grouped

from autoprune.kernels import cpu, masks, reference


@contextmanager
def threads(count, **constants):
    """Torch set to so many threads, and small constants, so that small matrices are many chunks in many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with mock.patch.multiple(cpu, **constants):
            yield
    finally:
        torch.set_num_threads(before)


@settings(max_examples=200, deadline=None)
@given(case=grouped(), data=st.data(), count=st.integers(1, 3), chunk=st.sampled_from([1, 16, 64]))
def test_chunks_threads_and_long_rows_change_nothing(case, data, count, chunk):
    scores, m = case
    k, n = data.draw(st.integers(0, scores.shape[1])), data.draw(st.integers(0, m))
    k_of_all = data.draw(st.integers(0, scores.numel()))
    with threads(count, CHUNK=chunk, LONG=chunk, SAMPLE=data.draw(st.sampled_from([1, 4, 50])), SHARE=1):
        found = masks.row_mask(scores, k), masks.matrix_mask(scores, k_of_all), masks.nm_mask(scores, n, m)
        pruned = [scores.contiguous().clone() for _ in range(4)]
        bits = masks.prune_rows(pruned[0], scores, k), masks.prune_matrix(pruned[1], scores, k_of_all)
        norms = 1 + torch.arange(scores.shape[1]) % 3.0
        fused = masks.prune_rows(pruned[2], norms, k), masks.prune_matrix(pruned[3], norms, k_of_all)
    assert torch.equal(found[0], reference.row_mask(scores, k))
    assert torch.equal(found[1], reference.matrix_mask(scores, k_of_all))
    assert torch.equal(found[2], reference.nm_mask(scores, n, m))
    wanda = scores.float().abs() * norms
    expected = [*found[:2], reference.row_mask(wanda, k), reference.matrix_mask(wanda, k_of_all)]
    for own, mask, packed in zip(pruned, expected, [*bits, *fused], strict=True):
        assert torch.equal(packed, masks.pack(mask)) and torch.equal(own, scores.masked_fill(~mask, 0))


def test_as_many_threads_as_torch_is_set_to_use():
    def work(part):
        together.wait()
        return threading.get_ident(), list(part)

    for count in (1, 3):
        together = threading.Barrier(count, timeout=20)  # breaks unless all of them are at work at the same time
        with threads(count, SHARE=10):
            found = cpu._in_threads(work, 8, 35)
        assert len({thread for thread, _ in found}) == count and found[0][0] == threading.get_ident()
        assert sum((part for _, part in found), []) == list(range(8))
    with threads(3, SHARE=10):
        assert cpu._in_threads(list, 8, 19) == [list(range(8))], "too little for two threads"


def test_a_fork_gets_its_own_threads():
    scores = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).abs()
    with threads(2, SHARE=1):
        expected = masks.row_mask(scores, 6)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # kills it, should it wait for threads that are its parent's
            os._exit(0 if torch.equal(masks.row_mask(scores, 6), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_misleading_sample_costs_time_alone():
    width, k = 300_000, 150_000
    scores = torch.rand(width, generator=torch.Generator().manual_seed(0))
    sampled = np.random.default_rng(0).integers(width, size=width // 128)
    scores[sampled] += 10  # the sample's k-th lowest lies far above that of all
    with threads(2, LONG=1000):
        assert torch.equal(masks.matrix_mask(scores, k), reference.matrix_mask(scores, k))
        assert torch.equal(masks.matrix_mask(-scores, k), reference.matrix_mask(-scores, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_with_and_without_ties(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(700, 1000, generator=generator).to(dtype)  # three chunks, the last one shorter
    scores[::7] = scores[::7].round()
    assert scores.numel() > 2 * cpu.CHUNK
    for k in (1, 600, 999):
        assert torch.equal(masks.row_mask(scores, k), reference.row_mask(scores, k))
    for k in (1, 420_000, 699_999):
        expected = reference.matrix_mask(scores, k)
        assert torch.equal(masks.matrix_mask(scores, k), expected)
        with threads(2, LONG=1000):
            assert torch.equal(masks.matrix_mask(scores, k), expected)
            magnitudes = reference.matrix_mask(scores.abs(), k)
            assert torch.equal(masks.matrix_mask(scores.abs(), k), magnitudes)


def test_nan_in_any_chunk_is_refused():
    for position in range(10):
        scores = -torch.arange(10.0)
        scores[position] = float("nan")
        with threads(2, CHUNK=4, LONG=4, SHARE=1), pytest.raises(ValueError, match="scores are NaN"):
            masks.matrix_mask(scores, 5)
        with threads(2, CHUNK=4, LONG=4, SHARE=1), pytest.raises(ValueError, match="scores are NaN"):
            masks.row_mask(scores.reshape(5, 2), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_to_look_first_may_be_far_off(dtype):
    """Rows whose thresholds lie anywhere, both signs and infinities among them, and rows of two values."""
    generator = torch.Generator().manual_seed(0)
    finfo = torch.finfo(dtype)
    exponents = torch.linspace(math.log2(finfo.tiny), math.log2(finfo.max) - 4, 60).double()[torch.randperm(60)]
    scores = torch.randn(60, 333, generator=generator, dtype=torch.float64) * exponents.exp2()[:, None]
    scores[::3] = scores[::3].abs()
    scores[1::6] = torch.where(scores[1::6] > 0, math.inf, -math.inf)
    least, most = torch.tensor([finfo.smallest_normal, finfo.max], dtype=torch.float64)
    scores[5::10] = torch.where(scores[5::10] > 0, most, least)
    for k in (1, 166, 200, 332):
        assert torch.equal(masks.row_mask(scores.to(dtype), k), reference.row_mask(scores.to(dtype), k))


def test_without_a_folder_for_compiled_code_it_is_compiled_anyway():
    """As in a container whose files are read-only."""
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
        "import torch; from autoprune.kernels.masks import row_mask\n"
        "print(row_mask(torch.arange(6.0).reshape(2, 3), 1).int().tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[[0, 1, 1], [0, 1, 1]]\n"


def test_no_thread_writes_after_an_error():
    weight = torch.ones(4000, 500)
    weight[0, 0] = float("nan")
    out = torch.zeros_like(weight)
    with threads(2, SHARE=1), pytest.raises(ValueError, match="scores are NaN"):
        masks.prune_rows(weight, torch.ones(500), 100, out)
    found = out.clone()
    time.sleep(0.2)
    assert torch.equal(out, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_pruning_takes_little_memory(dtype, ties):
    """Less than a quarter of the weight, beside it and the output: numpy's arrays, which are all that is made."""
    weight = torch.randn(3000, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    if ties:
        weight[::2] = 0
    norms, out = torch.rand(4096, generator=torch.Generator().manual_seed(1)), torch.empty_like(weight)
    prunings = {
        "rows": lambda: masks.prune_rows(weight, norms, 2000, out),
        "matrix": lambda: masks.prune_matrix(weight, norms, weight.numel() // 3, out),
        "n:m": lambda: masks.prune_nm(weight, norms, 2, 4, out),
    }
    for name, prune in prunings.items():
        prune()  # compiles
        tracemalloc.start()
        try:
            prune()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < weight.numel() * weight.element_size() / 4, f"{name}: {peak / 1e6:.1f} MB"
