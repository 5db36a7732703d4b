"""Shares are such that every actor finds a place, and as large as that allows."""

from hypothesis import given
from hypothesis import strategies as st

from autoprune.actors.placement import Layout, equal_share


def fits(share: float, actors: int, places: list[float]) -> bool:
    """Greedy packing of equal things, which is optimal: as many as each place holds."""
    return sum(int(size * 100) // round(share * 100) for size in places) >= actors


@given(st.integers(1, 40), st.lists(st.integers(1, 16), min_size=1, max_size=8))
def test_a_share_fits_and_a_larger_one_does_not(actors, sizes):
    places = [float(size) for size in sizes]
    share = equal_share(actors, places)
    assert fits(share, actors, places)
    assert share == 1.0 or not fits(share + 0.01, actors, places)


def test_what_is_left_of_a_gpu_goes_to_those_of_which_nothing_is_said():
    given = Layout(shards=1, replicas=1, threads=1, gpus_per_shard=0.5)
    assert given.gpu_shares(1) == (0.5, 0.5) and given.gpu_shares(2) == (1.0, 0.5) and given.gpu_shares(0) == (1.0, 0.5)
    assert Layout(shards=2, replicas=2, threads=1, gpus_per_engine=0.3).gpu_shares(1) == (0.3, 0.17)
    assert Layout(shards=1, replicas=1, threads=1).gpu_shares(1) == (0.5, 0.5)


def test_known_cases():
    assert equal_share(3, [1.0, 1.0]) == 0.5  # two shards and a generator on two GPUs
    assert equal_share(5, [1.0] * 4) == 0.5
    assert equal_share(3, [1.0] * 4) == 1.0
    assert equal_share(3, [1.0]) == 0.33
