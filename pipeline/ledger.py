"""What was asked and measured: each answer and measurement is in the journal before it is used, and is never paid for
twice; what was spent; and the budgets, of which whichever is reached first ends the search.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Protocol

from autoprune.actors.aside import Aside
from autoprune.actors.messages import Answer, Answered, Evaluation, Messages, Probe, Request
from autoprune.algorithms.algorithm import Algorithm
from autoprune.models.errors import InputError, Lost
from autoprune.pipeline.checkpoint import Journal
from autoprune.pipeline.config import Budgets
from autoprune.pipeline.mirror import Mirror

JOURNAL = "journal.jsonl"  # in the run folder
# Nats by which a window's likelihood under the dense model may differ on another machine; another text differs by more.
SAME_DENSE = 0.02
# The splits: what budgets.evaluations counts, the cheapest fidelity's, and two that no generation sees.
FULL, PROBE, FRESH, REPORT = "fitness", "probe", "fresh", "report"


class Generator(Protocol):
    """Who writes: per request, its answers. `count`: tokens of a prompt, as its own tokenizer has them."""

    def generate(self, requests: Sequence[Request], answered: Answered) -> list[list[Answer]]: ...

    def count(self, messages: Messages) -> int: ...


class Evaluator(Protocol):
    """Who measures. `dense`: the unpruned model on each split; `evaluate` yields (index of the job, measurement).

    A split is "probe", "fitness", "fresh" or "report", or some windows of one, such as "fitness[1,5]".
    """

    dense: dict[str, Evaluation]

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]: ...

    def evaluate(self, jobs: Sequence[Algorithm], split: str = FULL) -> Iterator[tuple[int, Evaluation]]: ...


@dataclass
class Spent:
    """What the search has used, over all its sittings. evaluations: on the whole fitness split; cheap: on less.

    generating, evaluating: the driver's seconds; gpu_seconds: the evaluators' own. total: seconds of all sittings.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    evaluations: int = 0
    cheap: int = 0
    generating: float = 0.0
    evaluating: float = 0.0
    gpu_seconds: float = 0.0
    total: float = 0.0

    def of(self, budget: str) -> float:
        """What was spent of the budget of this name."""
        return {
            "calls": self.answers,
            "tokens": self.prompt_tokens + self.completion_tokens,
            "evaluations": self.evaluations,
            "gpu_seconds": self.gpu_seconds,
            "wall_clock": self.total,
        }[budget]


@dataclass
class Ledger:
    """Between a search and those who write and measure. began: when this sitting did, by the monotonic clock. mirror:
    where the journal is copied to.

    A record of the journal counts as spent when the search comes to it, not before: so a resumed search has the same
    budget left at each of its steps as one that was never stopped. What the journal holds is always used, whatever the
    budgets say: it was paid for.
    """

    folder: Path
    generator: Generator
    evaluator: Evaluator
    budgets: Budgets
    step: Callable[[str, int, int], None] = lambda what, done, total: None
    began: float = field(default_factory=time.monotonic)
    spent: Spent = field(default_factory=Spent)
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        self._journal = Journal(self.folder / JOURNAL)
        # Records of whose time a checkpoint tells, and those of earlier sittings.
        self._timed, self._earlier = 0, len(self._journal)
        self._used: set[int] = set()  # places of the records that count as spent
        self._places: dict[tuple, int] = {}
        self._asked: set[tuple[int, int]] = set()  # generation and round of what was asked for, if only in part
        self._ahead: dict[tuple[int, int, str], Aside] = {}
        self._writing, self._closed = threading.Lock(), False
        self._poisoned: dict[str, int] = {}  # places of records that have a traceback, by algorithm
        for place, record in enumerate(self._journal):
            self._index(place, record)

    def begin(self, now: Sequence[float], texts: Mapping[str, str], prompts: str = "") -> None:
        """Note what the dense models measure on the windows of the fitness split, the sha256 of the texts with their
        windows, and the version of the prompts; raises InputError where they were others when the journal was begun,
        since measurements of other texts, weights or arithmetic are no rivals, and answers to other prompts no
        answers."""
        place = self._places.get(("dense",))
        if place is None and self._places:
            raise InputError(
                f"{self.folder} was begun by a version that did not note on what text it measured: start another run"
            )
        if place is None:
            self._append({"kind": "dense", "window_nlls": list(now), "texts": dict(texts), "prompts": prompts})
            return
        noted = self._use(place)
        then = noted.get("prompts") or "of an earlier version"
        if then != (prompts or then):
            raise InputError(
                f"{self.folder} was begun with prompts {then}, and these are {prompts}: its answers are to other "
                "questions; start another run"
            )
        changed = [name for name, digest in texts.items() if noted["texts"].get(name, digest) != digest]
        if changed:
            raise InputError(
                f"{self.folder} cannot go on: the text of {', '.join(changed)}, or what windows are taken of it, is "
                "not what it was when the search began: start another run"
            )
        before = noted["window_nlls"]
        apart = max((abs(a - b) for a, b in zip(before, now, strict=False)), default=0.0)
        if len(before) != len(now) or apart > SAME_DENSE:
            raise InputError(
                f"{self.folder} cannot go on: the dense model measured {fmean(before):.4f} nats on {len(before)} "
                f"windows of the fitness text when it began, and {fmean(now):.4f} on {len(now)} now. The text, the "
                "model or the arithmetic is another: start another run"
            )

    def restore(self, used: Sequence[Sequence[int]], total: float, records: int) -> None:
        """Take up where a checkpoint was written: with these records used, after so many seconds, when the journal had
        so many records. What an earlier sitting did after that is timed by its records."""
        self._timed = records
        for first, last in used:
            for place in range(first, last + 1):
                self._use(place)
        self.spent.total = total

    @property
    def used(self) -> list[list[int]]:
        """First and last place of every run of records that count as spent."""
        runs: list[list[int]] = []
        for place in sorted(self._used):
            if runs and runs[-1][1] == place - 1:
                runs[-1][1] = place
            else:
                runs.append([place, place])
        return runs

    def _use(self, place: int) -> dict:
        record = self._journal[place]
        if place not in self._used:
            self._used.add(place)
            _count(self.spent, record)
            if self._timed <= place < self._earlier and not record.get("ahead"):
                self.spent.total += record.get("seconds", 0.0)
        return record

    def close(self, hurry: bool = False) -> None:
        """Nothing is written any more: whoever comes next has the journal to themselves. hurry: a storage that does not
        answer is not waited for."""
        held = self._writing.acquire(timeout=1.0 if hurry else -1)
        try:
            if held and self.mirror is not None and not self._closed:
                self.mirror.close(self.records, hurry)
            self._closed = True
        finally:
            if held:
                self._writing.release()

    def copy_checkpoint(self, name: str) -> None:
        """A checkpoint was written: to the mirror with it, if there is one."""
        if self.mirror is not None:
            with self._writing:
                self.mirror.saved(name, self.records)

    @property
    def records(self) -> Sequence[dict]:
        """What the journal holds."""
        return self._journal

    def _append(self, record: dict) -> dict:
        return self._use(self._note(record))

    def _note(self, record: dict) -> int:
        """Put a record into the journal; returns its place."""
        with self._writing:  # answers that were asked for ahead arrive in a thread of their own
            if self._closed:
                raise Lost("the search has ended")
            self._journal.append(record)
            if self.mirror is not None:
                self.mirror.appended(self.records)
            place = len(self._journal) - 1
            self._index(place, record)
        return place

    def _index(self, place: int, record: dict) -> None:
        self._places[_name(record)] = place
        if record.get("what") == "round" or record["kind"] == "begun":
            self._asked.add((record["generation"], record.get("round", 0)))
        if record["kind"] in ("evaluation", "probe") and record[record["kind"]].get("traceback"):
            self._poisoned[record["key"]] = place

    def answers(self, key: tuple[int, int, str], ask: Callable[[], Sequence[Request]]) -> list[list[Answer]]:
        """Answers per request, in order. key: generation, round, and what is asked for. ask: makes the requests, if
        the journal does not have their answers. In a generation that has ended nothing more is asked."""
        name = ("answers", *key)
        ahead = self._ahead.pop(key, None)
        if ahead is not None:
            began = time.monotonic()
            ahead.wait()
            waited = {"kind": "waited", **_place(key), "seconds": time.monotonic() - began}
            self._append(waited)
        elif ("waited", *key) in self._places:
            self._use(self._places["waited", *key])
        if name not in self._places:
            if self.ended(key[0]) is not None:
                return []
            requests = ask()
            self.step("prompts, being answered", 0, len(requests))
            self._ask(key, requests)
        return [[Answer(**answer) for answer in texts] for texts in self._use(self._places[name])["answers"]]

    def ask_ahead(self, key: tuple[int, int, str], ask: Callable[[], Sequence[Request]]) -> None:
        """Begin to ask what `answers` will want, and go on meanwhile. What arrives is in the journal at once, and
        counts as spent when the search comes to it."""
        if ("answers", *key) not in self._places and self.ended(key[0]) is None:
            requests = ask()
            if ("begun", key[0]) not in self._places:  # a resumed search must not think that a budget came before it
                self._append({"kind": "begun", "generation": key[0]})
            self._ahead[key] = Aside(lambda: self._ask(key, requests, ahead=True))

    def _ask(self, key: tuple[int, int, str], requests: Sequence[Request], ahead: bool = False) -> None:
        """Ask what the journal has no answer to, which each gets as it comes, so that what a stopped search paid for is
        not paid for again; then those of the whole round, which count."""
        began, place = time.monotonic(), _place(key)
        digests = [hashlib.sha256(repr(request).encode()).hexdigest() for request in requests]
        left = [index for index, digest in enumerate(digests) if ("answer", *key, digest) not in self._places]

        def answered(index: int, texts: Sequence[Answer]) -> None:
            record = {"kind": "answer", **place, "request": digests[left[index]]}
            self._note(record | {"answers": [asdict(answer) for answer in texts]})

        asked = self.generator.generate([requests[index] for index in left], answered) if left else []
        new = {index: [asdict(answer) for answer in texts] for index, texts in zip(left, asked, strict=True)}
        answers = [
            new[index] if index in new else self._journal[self._places["answer", *key, digest]]["answers"]
            for index, digest in enumerate(digests)
        ]
        record = {"kind": "answers", **place, "answers": answers, "seconds": time.monotonic() - began}
        self._note(record | ({"ahead": True} if ahead else {}))

    def measure(self, algorithms: Sequence[Algorithm], split: str, must: bool = False) -> list[Evaluation]:
        """Measurements in the order of the jobs; what the journal holds is not measured again. must: none of them can
        be poison (a known baseline, or one that was measured before): where evaluators end, something else is wrong,
        and Lost is raised."""
        missing = {a.key: a for a in algorithms if ("evaluation", a.key, split) not in self._places}
        jobs, began = list(missing.values()), time.monotonic()
        for done, (index, evaluation) in enumerate(self.evaluator.evaluate(jobs, split) if jobs else (), start=1):
            now = time.monotonic()
            record = {
                "kind": "evaluation",
                "key": jobs[index].key,
                "split": split,
                "evaluation": asdict(evaluation),
                "seconds": now - began,
            }
            began = now
            if must and evaluation.poison:
                raise Lost(f"an algorithm that is known to work cannot be measured on {split} ({evaluation.error})")
            self._append(record)
            self.step(f"evaluating ({split})", done, len(jobs))
        return [self._measured(algorithm.key, split) for algorithm in algorithms]

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]:
        """What the score functions do on the probe layers. Only what is poison gets into the journal: finding that out
        takes evaluators, and another time it might not be found."""
        left = {a.key: a for a in algorithms if ("probe", a.key) not in self._places}
        probes = dict(zip(left, self.evaluator.probe(list(left.values())) if left else (), strict=True))
        for key, probe in probes.items():
            if probe.poison:
                self._append({"kind": "probe", "key": key, "probe": asdict(probe)})
        known = {a.key: self._places.get(("probe", a.key)) for a in algorithms}
        return [
            probes[a.key] if known[a.key] is None else Probe(**self._use(known[a.key])["probe"]) for a in algorithms
        ]

    def _measured(self, key: str, split: str) -> Evaluation:
        place = self._places["evaluation", key, split]
        return Evaluation.from_dict(self._use(place)["evaluation"])

    def seconds(self, key: str) -> float:
        """Of an algorithm's evaluation: the journal's to know, as is a traceback, since they are others every time, and
        the graph is not."""
        place = self._places.get(("evaluation", key, FULL))
        return 0.0 if place is None else self._journal[place]["evaluation"]["seconds"]

    def traceback(self, key: str) -> str:
        """Of an algorithm that is poison, on whatever text it was found out."""
        if key not in self._poisoned:
            return ""
        record = self._journal[self._poisoned[key]]
        return record[record["kind"]]["traceback"]

    def asked(self, generation: int, round_: int) -> bool:
        """Whether the journal has answers of this round, if not all: they were paid for, so they are used."""
        return (generation, round_) in self._asked

    def ended(self, generation: int) -> list[str] | None:
        """Ids of the candidates that were measured in full in a generation that was committed; None for another. What
        a budget ended stays ended when it is replayed under a larger one."""
        place = self._places.get(("generation", generation))
        return None if place is None else self._use(place)["chosen"]

    def end(self, generation: int, chosen: Sequence[str]) -> None:
        if self.ended(generation) is None:
            self._append({"kind": "generation", "generation": generation, "chosen": list(chosen)})

    def look(self, key: str) -> int:
        """The report split was looked at when this algorithm was the best. Returns how many have been."""
        if ("look", key) not in self._places:
            self._append({"kind": "look", "key": key})
        return sum(kind == "look" for kind, *_ in self._places)

    def left(self, budget: str) -> float:
        """Of the budget of this name; infinite where it has no bound."""
        bound = getattr(self.budgets, budget)
        return max(0.0, bound - self.spent.of(budget)) if bound else float("inf")

    def exhausted(self) -> str | None:
        """The budget that is used up, with its bound, or None."""
        self.tick()
        for budget in fields(self.budgets):
            if self.left(budget.name) <= 0:
                return f"{budget.name} ({getattr(self.budgets, budget.name):g})"
        return None

    def tick(self) -> Spent:
        """What was spent until now."""
        now = time.monotonic()
        self.spent.total, self.began = self.spent.total + now - self.began, now
        return self.spent

    def line(self) -> str:
        """What was spent, and of what, for people."""
        self.tick()
        units = {"gpu_seconds": " s of computing", "wall_clock": " s"}
        parts = []
        for budget in fields(self.budgets):
            bound, spent = getattr(self.budgets, budget.name), self.spent.of(budget.name)
            of = f" of {bound:,.0f}" if bound else ""
            parts.append(f"{spent:,.0f}{of}{units.get(budget.name, ' ' + budget.name)}")
        return f"spent: {', '.join(parts)}"


def _place(key: tuple[int, int, str]) -> dict:
    return dict(zip(("generation", "round", "what"), key, strict=True))


def _name(record: dict) -> tuple:
    """What a record is found by."""
    if record["kind"] in ("answers", "answer", "waited"):
        name = (record["kind"], record["generation"], record["round"], record["what"])
        return (*name, record["request"]) if record["kind"] == "answer" else name
    if record["kind"] in ("generation", "begun"):
        return (record["kind"], record["generation"])
    if record["kind"] == "dense":
        return ("dense",)
    if record["kind"] in ("probe", "look"):
        return (record["kind"], record["key"])
    return ("evaluation", record["key"], record["split"])


def _count(spent: Spent, record: dict) -> None:
    if record["kind"] == "answers":
        spent.generating += record["seconds"]
        for texts in record["answers"]:
            spent.answers += len(texts)
            spent.prompt_tokens += texts[0]["prompt_tokens"] if texts else 0
            spent.completion_tokens += sum(answer["completion_tokens"] for answer in texts)
    if record["kind"] != "evaluation":
        return
    spent.evaluating += record["seconds"]
    spent.gpu_seconds += record["evaluation"]["seconds"]
    if record["split"] == FULL:
        spent.evaluations += 1
    elif record["split"].partition("@")[0] not in (FRESH, REPORT):
        spent.cheap += 1
