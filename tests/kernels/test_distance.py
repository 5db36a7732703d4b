"""Distance and digest of packed masks against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import LANES, TRITON, lane

from autoprune.kernels import distance as module
from autoprune.kernels import masks


def random_mask(size, seed):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.4


def loop_digest(words):
    """By the rule, in whole numbers."""
    limit, total = 1 << 64, 0
    for place, word in enumerate(words, start=1):
        x = (word % (1 << 32) + place * module.STEP) % limit
        x = (x ^ (x >> 30)) * module.FIRST % limit
        x = (x ^ (x >> 27)) * module.SECOND % limit
        total += x ^ (x >> 31)
    return total % limit


@pytest.mark.parametrize("name", LANES)
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2000), st.integers(0, 99))
def test_distance_counts_the_weights_that_differ(name, size, seed):
    first, second = random_mask(size, seed), random_mask(size, seed + 1)
    with lane(name) as device:
        bits = [masks.pack(mask.to(device)) for mask in (first, second)]
        measure = module.distance if name in ("cpu", "other") else module.triton_distance
        assert measure(*bits) == int((first != second).sum())
        assert measure(bits[0], bits[0]) == 0


@pytest.mark.parametrize("name", LANES)
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2000), st.integers(0, 99))
def test_digest_follows_the_rule(name, size, seed):
    with lane(name) as device:
        bits = masks.pack(random_mask(size, seed).to(device))
        measure = module.digest if name in ("cpu", "other") else module.triton_digest
        assert measure(bits) == loop_digest(bits.tolist())


@pytest.mark.parametrize("name", TRITON)
def test_many_words(name):
    words = torch.randint(-(2**31), 2**31, (70_001,), generator=torch.Generator().manual_seed(0)).int()
    with lane(name) as device:
        assert module.triton_digest(words.to(device)) == module.digest(words)
        assert module.triton_distance(words.to(device), ~words.to(device)) == 32 * 70_001
        assert module.distance(words, ~words) == 32 * 70_001


def test_order_and_length_matter():
    words = torch.tensor([1, 2, 3, 0], dtype=torch.int32)
    found = {module.digest(words), module.digest(words.flip(0)), module.digest(words[:3]), module.digest(words[1:])}
    assert len(found) == 4 and all(0 <= digest < 1 << 64 for digest in found)


def test_other_tensors_are_refused():
    words = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="int32"):
        module.digest(words.long())
    with pytest.raises(ValueError, match="3 and 2 words"):
        module.distance(words, words[:2])
