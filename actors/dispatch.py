"""Which candidate runs on which replica: the in-flight table of a pool, its deadlines, and who is to blame.

Pure: the clock and every call are the caller's, so that the same table dispatches to actors, and in a simulation.
A replica is a pipeline of shards; candidates leave it in the order in which they entered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# In flight per shard of a replica. Where candidates take different times, a short one waits at some shard behind a long
# one, and the shards before it would idle if nothing else were under way. Simulated with durations that vary tenfold,
# 4 shards and 50 candidates each: 5 in flight keep the shards busy 69% of the time, 8 83%, 12 87%, and more no longer.
IN_FLIGHT = 3
# What the end of a replica counts against a candidate that seems to have no part in it, where one that it may have
# caused counts 1: it may take its whole node down.
BLAMELESS = 1 / 8
# Seconds from one try to start an actor to the next one, where it fails again and again: together more than Ray takes
# to see that a node is gone, to which it sends new actors until then.
PAUSES = (0.0, 15.0, 75.0)
TRIES = len(PAUSES) + 1  # so often may it fail in a row, where no other one is left to work


def depth(shards: int) -> int:
    """Candidates that may be in flight in a replica of so many shards: one that waits for each where there is one."""
    return IN_FLIGHT * shards if shards > 1 else 2


def shallow(shards: int) -> int:
    """The same where fewer wait than there are replicas: what waits in one could be with another one sooner. Simulated
    as above, 8 replicas of one shard with 4 candidates each are busy 81% of the time instead of 74%; of several shards
    it makes little difference."""
    return 2 * shards if shards > 1 else 1


@dataclass
class _Lane:
    """A replica as the table sees it. progressed: when something last left it, or entered it while it was empty. alone:
    nothing may enter behind what is in it."""

    jobs: deque[int] = field(default_factory=deque)
    progressed: float = 0.0
    open: bool = True
    alone: bool = False


class Dispatch:
    """Jobs 0 … n−1 on their way through replicas 0 … R−1. Every job ends exactly once: by `finish`, or as given up.

    A job that may have brought a replica down is a suspect: it comes last and has a replica to itself, so that it
    neither takes the blame for what is behind it nor takes others down; before it would be given up, nothing else is in
    flight anywhere, since replicas may share a machine's memory.

    depth: jobs that may be in flight in a replica, and `shallow` where no more wait than there are replicas. deadline:
    seconds in which a replica that has work must finish something. attempts: how often a job may bring a replica down
    before it is given up.
    """

    def __init__(
        self, jobs: int, replicas: int, depth: int, deadline: float, attempts: int, shallow: int | None = None
    ) -> None:
        self._queue, self._failures = deque(range(jobs)), [0.0] * jobs
        self._suspects: deque[int] = deque()
        self._shallow = depth if shallow is None else shallow
        self._broke: list[set[int]] = [set() for _ in range(jobs)]  # by job: the replicas that it may have brought down
        self._lanes = [_Lane() for _ in range(replicas)]
        self._depth, self._deadline, self._attempts = depth, deadline, attempts

    @property
    def left(self) -> bool:
        """Whether there are jobs that have not ended."""
        return bool(self._queue or self._suspects) or any(lane.jobs for lane in self._lanes)

    def assign(self, now: float) -> tuple[int, int] | None:
        """The next job to send, and the replica to send it to: one that it has not brought down, and of these the one
        with the least in flight; so a machine that breaks whatever it is given is not alone to judge. None where
        nothing waits, or no replica has room."""
        open_ = [index for index, lane in enumerate(self._lanes) if lane.open and not lane.alone]
        alone = not self._queue
        if not alone:
            room = self._depth if len(open_) == 1 or len(self._queue) > len(open_) else self._shallow
            open_ = [index for index in open_ if len(self._lanes[index].jobs) < room]
        elif self._suspects:
            busy = [index for index, lane in enumerate(self._lanes) if lane.jobs]
            tried = [self._suspects[0], *(job for index in busy for job in self._lanes[index].jobs)]
            last = any(self._failures[job] + 1 >= self._attempts for job in tried)
            open_ = [] if last and busy else [index for index in open_ if index not in busy]
        waiting = self._suspects if alone else self._queue
        if not waiting or not open_:
            return None
        job = waiting.popleft()
        replica = min(open_, key=lambda index: (index in self._broke[job], len(self._lanes[index].jobs)))
        lane = self._lanes[replica]
        lane.alone = alone
        if not lane.jobs:
            lane.progressed = now
        lane.jobs.append(job)
        return replica, job

    def in_flight(self) -> list[list[int]]:
        """Of each replica, the jobs that are on their way through it, in order."""
        return [list(lane.jobs) for lane in self._lanes]

    def oldest(self) -> dict[int, int]:
        """Replica → the job that leaves it next, of those that have work."""
        return {index: lane.jobs[0] for index, lane in enumerate(self._lanes) if lane.jobs}

    def finish(self, replica: int, now: float) -> int:
        """The oldest job of a replica has left it. Returns the job."""
        lane = self._lanes[replica]
        lane.progressed, lane.alone = now, False
        return lane.jobs.popleft()

    def withdraw(self, replica: int) -> None:
        """The job that was assigned to a replica last cannot be sent, which ends it."""
        lane = self._lanes[replica]
        lane.jobs.pop()
        lane.alone = False

    def late(self, now: float) -> list[int]:
        """Replicas that have work and have finished nothing for longer than the deadline."""
        lanes = enumerate(self._lanes)
        return [index for index, lane in lanes if lane.jobs and now - lane.progressed > self._deadline]

    def close(self, replica: int, blame: bool = True) -> int | None:
        """A replica is gone: what was in flight is sent again, first of all; its oldest job last of all, if it is a
        suspect. blame: whether that may have brought it down. Returns that job if it is given up, which ends it."""
        lane = self._lanes[replica]
        lane.open = lane.alone = False
        jobs = list(lane.jobs)
        lane.jobs.clear()
        given_up = None
        if jobs:
            self._failures[jobs[0]] += 1 if blame else BLAMELESS
            self._broke[jobs[0]].add(replica)
            if self._failures[jobs[0]] >= self._attempts:
                given_up = jobs.pop(0)
            elif self._failures[jobs[0]] >= 1:
                self._suspects.append(jobs.pop(0))
        self._queue.extendleft(reversed(jobs))
        return given_up

    def open(self, replica: int) -> None:
        """A replica takes work again."""
        self._lanes[replica].open = True
