"""Packed masks against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import LANES, lane

from autoprune.kernels import masks


def packed_by_numpy(mask):
    padded = np.zeros(-(-mask.numel() // 32) * 32, dtype=np.bool_)
    padded[: mask.numel()] = mask.numpy().ravel()
    return torch.from_numpy(np.packbits(padded, bitorder="little").view("<i4").astype(np.int32))


@pytest.mark.parametrize("name", LANES)
@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3), seed=st.integers(0, 2**32 - 1), transpose=st.booleans()
)
def test_pack_equals_packbits_and_unpack_inverts_it(name, shape, seed, transpose):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = mask.T if transpose and mask.ndim == 2 else mask
    with lane(name) as device:
        bits = masks.pack(mask.to(device))
        back = masks.unpack(bits, mask.shape)
    assert bits.dtype == torch.int32 and torch.equal(bits.cpu(), packed_by_numpy(mask))
    assert back.dtype == torch.bool and back.device.type == device and torch.equal(back.cpu(), mask)


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("size", [1, 31, 32, 33, 8191, 8192, 8193, 28672])
def test_sizes(name, size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    with lane(name) as device:
        bits = masks.pack(mask.to(device))
        assert torch.equal(bits.cpu(), packed_by_numpy(mask))
        assert torch.equal(masks.unpack(bits, mask.shape).cpu(), mask)


def test_first_weight_is_the_lowest_bit():
    mask = torch.zeros(64, dtype=torch.bool)
    mask[[0, 9, 31, 33]] = True
    assert masks.pack(mask).tolist() == [1 + (1 << 9) - (1 << 31), 2]


def test_wrong_bits_are_refused():
    with pytest.raises(ValueError, match="bool"):
        masks.pack(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1,\)"):
        masks.unpack(torch.zeros(3, dtype=torch.int32), (3, 4))
    with pytest.raises(ValueError, match=r"int32"):
        masks.unpack(torch.zeros(1, dtype=torch.int64), (3, 4))
