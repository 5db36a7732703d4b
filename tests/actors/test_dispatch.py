"""The in-flight table, by itself: every job ends once whatever breaks, nobody idles while work waits, blame is fair."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.actors.dispatch import BLAMELESS, Dispatch, depth


def fill(table: Dispatch, now: float = 0.0) -> list[tuple[int, int]]:
    return list(iter(lambda: table.assign(now), None))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_job_ends_exactly_once(jobs, replicas, room, attempts, rng):
    table = Dispatch(jobs, replicas, room, deadline=10.0, attempts=attempts)
    ended, sent, blamed, closed = [], [0] * jobs, [0.0] * jobs, set()
    while table.left:
        for replica, job in fill(table):
            assert replica not in closed and job not in ended
            sent[job] += 1
        oldest = table.oldest()
        if oldest and rng.random() < 0.7:
            ended.append(table.finish(replica := rng.choice(sorted(oldest)), 0.0))
            assert ended[-1] == oldest[replica]
        elif oldest and rng.random() < 0.7:
            replica, blame = rng.choice(sorted(oldest)), rng.random() < 0.5
            blamed[oldest[replica]] += 1 if blame else BLAMELESS
            given_up = table.close(replica, blame)
            closed.add(replica)
            assert (given_up is None) == (blamed[oldest[replica]] < attempts)
            ended += [] if given_up is None else [given_up]
        elif closed:
            table.open(replica := rng.choice(sorted(closed)))
            closed.discard(replica)
    assert sorted(ended) == list(range(jobs))
    assert all(count >= 1 for count in sent)
    assert max(blamed, default=0) < attempts + 1


def test_work_goes_to_whoever_has_least_and_no_further_than_there_is_room():
    table = Dispatch(10, 2, 3, 10.0, 2)
    assert [replica for replica, _ in fill(table)] == [0, 1] * 3
    table.finish(1, 0.0)
    table.finish(1, 0.0)
    assert [replica for replica, _ in fill(table)] == [1, 1]


def test_what_was_in_flight_goes_first_and_in_order_and_a_suspect_last_and_alone():
    table = Dispatch(5, 1, 3, 10.0, 2)
    assert [job for _, job in fill(table)] == [0, 1, 2]
    assert table.close(0) is None and fill(table) == []
    table.open(0)
    assert [job for _, job in fill(table)] == [1, 2, 3]
    assert table.close(0, blame=False) is None
    table.open(0)
    assert [job for _, job in fill(table)] == [1, 2, 3]
    for expected in (1, 2, 3, 4):
        assert table.finish(0, 0.0) == expected
        fill(table)
    assert table.oldest() == {0: 0} and fill(table) == []
    assert table.close(0) == 0, "blamed twice" and not table.left
    table.open(0)
    assert table.close(0) is None, "nothing was in flight"


def test_an_innocent_one_does_not_take_the_blame_for_what_is_behind_it_again_and_again():
    """Whenever jobs 0 and 1 meet, the replica ends, and 1 is the reason."""
    table, ended, given_up = Dispatch(4, 1, 3, 10.0, 3), [], []
    while table.left:
        fill(table)
        flying = table.in_flight()[0]
        if 1 in flying:
            given_up += filter(None, [table.close(0)])
            table.open(0)
        else:
            ended.append(table.finish(0, 0.0))
    assert given_up == [1] and sorted(ended) == [0, 2, 3]


def test_before_a_job_is_given_up_nothing_else_is_in_flight():
    """Replicas of one machine share its memory."""
    table = Dispatch(4, 2, 2, 10.0, 2)
    assert fill(table) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert table.close(0) is None
    table.open(0)
    assert fill(table) == [(0, 2)]
    assert table.finish(0, 0.0) == 2 and fill(table) == [], "two others are under way elsewhere"
    table.finish(1, 0.0)
    table.finish(1, 0.0)
    assert fill(table) == [(1, 0)], "not where it broke"
    assert table.close(1) == 0 and not table.left


def test_a_last_try_is_alone_even_where_another_suspect_waits():
    table = Dispatch(2, 2, 2, 10.0, 3)
    assert fill(table) == [(0, 0), (1, 1)]
    assert table.close(0) is None
    table.open(0)
    assert fill(table) == [(0, 0)], "its second try"
    assert table.close(0) is None
    table.open(0)
    assert fill(table) == [] and table.close(1) is None
    table.open(1)
    assert fill(table) == [(1, 0)], "its last one, beside which the other suspect waits"
    assert table.finish(1, 0.0) == 0 and fill(table) == [(0, 1)]


def test_where_little_is_left_it_waits_for_whoever_is_free_first():
    table = Dispatch(4, 2, 2, 10.0, 2, shallow=1)
    assert fill(table) == [(0, 0), (1, 1)]
    assert table.finish(1, 0.0) == 1 and fill(table) == [(1, 2)]
    assert table.finish(1, 0.0) == 2 and fill(table) == [(1, 3)]
    assert table.finish(0, 0.0) == 0 and fill(table) == []
    assert fill(Dispatch(5, 2, 2, 10.0, 2, shallow=1)) == [(0, 0), (1, 1), (0, 2)], "more than two wait at first"
    assert len(fill(Dispatch(3, 1, 2, 10.0, 2, shallow=1))) == 2, "one alone takes what it can"


def test_a_machine_that_breaks_whatever_it_is_given_does_not_judge_alone():
    """It is empty when it is back, and yet a job that broke there goes elsewhere, where that is empty, too."""
    table = Dispatch(2, 2, 2, 10.0, 3)
    assert [table.assign(0.0) for _ in range(2)] == [(0, 0), (1, 1)]
    assert table.close(0) is None
    table.finish(1, 0.0)
    table.open(0)
    assert fill(table) == [(1, 0)]


def test_a_job_that_cannot_be_sent_is_gone():
    table = Dispatch(2, 1, 3, 10.0, 2)
    table.assign(0.0)
    table.withdraw(0)
    table.assign(0.0)
    assert table.oldest() == {0: 1}
    table.finish(0, 0.0)
    assert not table.left


def test_a_replica_is_late_when_nothing_left_it_for_longer_than_the_deadline():
    table = Dispatch(3, 2, 2, deadline=10.0, attempts=2)
    table.assign(100.0)
    assert table.late(110.0) == [] and table.late(110.1) == [0]
    table.assign(105.0)
    table.assign(108.0)  # the first replica's second
    assert table.late(112.0) == [0]
    table.finish(0, 112.0)
    assert table.late(116.0) == [1] and table.late(122.5) == [0, 1]
    table.finish(0, 122.0)
    assert table.late(1000.0) == [1], "one without work is not late"


def busy(jobs: list[float], shards: int, room: int) -> float:
    """Share of the time in which the shards of one replica work, each job taking the same time on each of them."""
    table, free, ends, now = Dispatch(len(jobs), 1, room, 1e9, 1), [0.0] * shards, {}, 0.0
    while table.left:
        for _, job in fill(table, now):
            at = now
            for shard in range(shards):
                free[shard] = at = max(at, free[shard]) + jobs[job]
            ends[job] = at
        now = ends[table.finish(0, now)]
    return sum(jobs) / now


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_more_in_flight_would_not_keep_the_shards_busier(shards):
    """With durations that vary tenfold; half as many would."""
    rng = random.Random(0)
    jobs = [10 ** rng.random() for _ in range(400)]
    chosen = busy(jobs, shards, depth(shards))
    assert chosen > 0.97 * busy(jobs, shards, 100)
    assert chosen > 1.05 * busy(jobs, shards, shards + 1)
