"""How far a search is: for its terminal, for `autoprune status`, and for whoever collects metrics."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from autoprune.models.errors import InputError
from autoprune.pipeline.progress import ConsoleProgress, rates
from autoprune.pipeline.wording import fitness_text

STATUS, LOCK = "status.json", "lock"  # in the run folder
INTERVAL = 2.0  # seconds between two writings of the status


class Status:
    """The Progress of a search that tells a terminal, a file in the run folder and, if given, metrics."""

    def __init__(
        self,
        folder: Path,
        console: ConsoleProgress,
        in_flight: Callable[[], list[list[int]]] = list,
        restarts: Callable[[], int] = int,
        metrics: Callable[[Mapping[str, float | Mapping[str, float]]], None] | None = None,
    ) -> None:
        """in_flight: candidates at each shard of each replica; restarts: of evaluators so far; metrics: takes them by
        name (see `actors.metrics`)."""
        self._file, self._console, self._metrics = folder / STATUS, console, metrics
        self._in_flight, self._restarts = in_flight, restarts
        self._facts: dict = {"host": socket.gethostname(), "pid": os.getpid(), "began": time.time(), "in_flight": []}
        self._written = 0.0
        self._tell()

    def say(self, text: str) -> None:
        self._console.say(text)

    def step(self, what: str, done: int, total: int) -> None:
        self._facts["doing"] = {"what": what, "done": done, "total": total}
        self._console.step(what, done, total)
        if not done:
            self._written = 0.0  # nothing may come after it for long
        self._tell()

    def state(self, facts: Mapping) -> None:
        self._facts |= facts
        self._facts.pop("doing", None)  # it is done
        self._console.state(self._facts)
        self._written = 0.0  # nothing may come after it for as long as answers are written
        self._tell()

    def end(self, how: str) -> None:
        """The sitting ends: "finished", "stopped" or "failed"."""
        self._facts["ended"] = how
        self._written = 0.0
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._written < INTERVAL:
            return
        self._written = now
        # Whoever watches may miss something: that is no reason to end a search.
        with contextlib.suppress(Exception):
            self._write()

    def _write(self) -> None:
        ended, idle = "ended" in self._facts, [[0] * len(shards) for shards in self._facts["in_flight"]]
        flights = [] if ended else self._in_flight()
        self._facts |= {"in_flight": flights, "restarts": self._restarts(), "updated": time.time()}
        self._console.flights(by_shard(flights))
        temporary = self._file.with_name(f".{STATUS}.tmp")
        temporary.write_text(json.dumps(self._facts))  # not synced: who looks wants the newest, not the safest
        os.replace(temporary, self._file)
        if self._metrics is not None and "spent" in self._facts:
            # A gauge would stay at its last value.
            self._metrics(_metrics(self._facts | {"in_flight": idle if ended else flights}))


def by_shard(flights: list[list[int]]) -> list[int]:
    """Candidates at each shard, over all replicas."""
    return [sum(counts) for counts in zip(*flights, strict=True)]


def _metrics(facts: Mapping) -> dict[str, float | dict[str, float]]:
    spent = facts["spent"]
    found = {
        "generation": facts["generation"],
        "answers": spent["answers"],
        "evaluations": spent["evaluations"],
        "cheap_evaluations": spent["cheap"],
        "in_flight": {str(shard): count for shard, count in enumerate(by_shard(facts["in_flight"]))},
        "budget_left": {name: amount for name, amount in facts["left"].items() if amount is not None},
        "evaluator_restarts": facts["restarts"],
    }
    if facts["best"]:
        found["best_fitness_nats"] = facts["best"]["nll"]
    return found | rates(spent)


def read_status(folder: Path) -> dict:
    """The last status of a run, with "state": "running", "finished", "stopped", "failed" or "gone" (it ended without a
    word). Raises InputError where there is none."""
    try:
        facts = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{folder} has no {STATUS}: it is no run, or its search has not measured anything yet"
        ) from None
    return facts | {"state": "running" if is_running(folder) else facts.get("ended", "gone")}


def is_running(folder: Path) -> bool:
    """Whether a process of this machine searches in the folder."""
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def status_lines(facts: Mapping) -> list[str]:
    """For people."""
    ago = time.time() - facts["updated"]
    lines = [f"{facts['state']}, last heard of {ago:.0f} s ago (process {facts['pid']} on {facts['host']})"]
    if "generation" in facts:
        lines.append(f"generation {facts['generation']} of {facts['generations']}, {facts['candidates']} candidates")
    if facts.get("best"):
        best = facts["best"]
        what = "best, after fresh text," if best.get("final") else "best on the fitness split so far"
        measured = fitness_text(best["nll"], best.get("combined", ""))
        lines.append(f"{what} {best['id']}: fitness {best['nll']:.4f}, {measured}")
    if facts.get("doing") and facts["state"] == "running":
        doing = facts["doing"]
        lines.append(f"{doing['what']}: {doing['done']} of {doing['total']}")
    for number, shards in enumerate(facts["in_flight"] if facts["state"] == "running" else []):
        lines.append(f"replica {number}: {' '.join(map(str, shards))} candidates in flight, by shard")
    if facts["restarts"]:
        lines.append(f"{facts['restarts']} evaluators were made anew")
    if "spent" in facts:
        found = rates(facts["spent"])
        lines.append(f"{found['tokens_per_second']:.0f} tokens/s, {found['evaluations_per_hour']:.0f} evaluations/h")
        left = [f"{amount:,.0f} {name}" for name, amount in facts["left"].items() if amount is not None]
        lines.append(f"left: {', '.join(left) or 'no budget has a bound'}")
    return lines
