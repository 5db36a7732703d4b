"""The search: seeds → generations → elites. Plain Python over a generator, an evaluator and a tracker.

Results are committed in the order in which candidates were proposed, and every answer and measurement is in the
journal before it is used: a search is a function of its configuration and of the recorded answers, and a resumed
search asks and measures nothing twice.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from autoprune.actors.messages import Answer, Evaluation, Probe, Request
from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.grammar import PARTS, WRITTEN_PARTS, answer_grammar
from autoprune.algorithms.manual import brief
from autoprune.algorithms.translator import LanguageError
from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.checkpoint import Journal, load_checkpoint, save_checkpoint, write_atomic
from autoprune.pipeline.config import Config
from autoprune.pipeline.gcot import Messages, build_prompt
from autoprune.pipeline.lineage import STATUSES, Candidate, Lineage
from autoprune.pipeline.population import choose_operators, choose_parents, seed

JOURNAL, CHECKPOINT = "journal.jsonl", "checkpoint"  # in the run folder


class Generator(Protocol):
    """Who writes: per request, its answers."""

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]: ...


class Evaluator(Protocol):
    """Who measures. `dense`: the unpruned model on each split; `evaluate` yields (index of the job, measurement)."""

    dense: dict[str, Evaluation]

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]: ...

    def evaluate(self, jobs: Sequence[Algorithm], split: str = "fitness") -> Iterator[tuple[int, Evaluation]]: ...


class Tracker(Protocol):
    """Who shows: told of every candidate in proposal order, and of every generation."""

    def candidate(self, candidate: Candidate, edges: list[dict]) -> None: ...

    def generation(self, index: int, metrics: dict[str, float]) -> None: ...


class Progress(Protocol):
    """Who watches: `say` a line; `step` of what is being counted now."""

    def say(self, text: str) -> None: ...

    def step(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Slot:
    """One prompt. parts: of an algorithm, which the answer holds (see `grammar`); the others are the first parent's."""

    operator: str
    parents: tuple[str, ...]
    messages: Messages
    parts: tuple[str, ...]


@dataclass
class Spent:
    """What the search has used, over all its sittings. Seconds are the driver's."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    evaluations: int = 0
    generating: float = 0.0
    evaluating: float = 0.0
    total: float = 0.0


@dataclass
class Search:
    """One search in one folder. `run` does what is left of it. began: when this sitting did, by the monotonic clock."""

    config: Config
    folder: Path
    generator: Generator
    evaluator: Evaluator
    tracker: Tracker
    progress: Progress
    began: float = field(default_factory=time.monotonic)
    lineage: Lineage = field(default_factory=Lineage)
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self._journal = Journal(self.folder / JOURNAL)
        records = self._journal.records
        self._answers = {(r["generation"], r["round"]): r for r in records if r["kind"] == "answers"}
        self._measured = {(r["key"], r["split"]): r for r in records if r["kind"] == "evaluation"}
        self._done = -1

    def run(self) -> None:
        """Seeds, then generations; a checkpoint after each."""
        self.restore()
        if self._done < 0:
            self._commit(0, [seed(text) for text in self.config.search.seeds])
            if not self.lineage.evaluated():
                errors = "; ".join(f"{c.id}: {c.error}" for c in self.lineage)
                raise InputError(f"none of the seeds could be measured ({errors})")
        for generation in range(max(1, self._done + 1), self.config.search.generations + 1):
            self._commit(generation, self._propose(generation))

    def measure(self, algorithms: Sequence[Algorithm], split: str) -> list[Evaluation]:
        """Measurements in the order of the jobs; what the journal holds is not measured again."""
        missing = {a.key: a for a in algorithms if (a.key, split) not in self._measured}
        began = time.monotonic()
        jobs = list(missing.values())
        for done, (index, evaluation) in enumerate(self.evaluator.evaluate(jobs, split), start=1):
            now = time.monotonic()
            record = {
                "kind": "evaluation",
                "key": jobs[index].key,
                "split": split,
                "evaluation": asdict(evaluation),
                "seconds": now - began,
            }
            began = now
            if not evaluation.lost:  # what the actors lost may be measured when the search is resumed
                self._journal.append(record)
            self._measured[jobs[index].key, split] = record
            self.progress.step(f"evaluating ({split})", done, len(jobs))
        results = []
        for algorithm in algorithms:
            record = self._measured[algorithm.key, split]
            self.spent.evaluating += record["seconds"]
            results.append(Evaluation.from_dict(record["evaluation"]))
        return results

    def _propose(self, generation: int) -> list[Candidate]:
        """Ask until there are enough algorithms that nobody wrote before, or the rounds are used up."""
        plan, candidates, fresh = self.config.search, [], 0
        for round_ in range(plan.rounds):
            slots = self.slots(generation, round_)
            answers = self._ask(generation, round_, slots)
            written = []
            # The first answer to each prompt, then the second, …: no prompt's answers crowd out another's.
            pairs = [[(slot, answer) for answer in texts] for slot, texts in zip(slots, answers, strict=True)]
            for slot, answer in filter(None, itertools.chain(*itertools.zip_longest(*pairs))):
                index = len(candidates) + len(written)
                written.append(self.read(f"g{generation:02d}-c{index:02d}", generation, slot, answer))
            self._probe(written, candidates)
            candidates += written
            fresh = sum(c.status == "proposed" for c in candidates)
            if fresh >= plan.candidates:
                break
        self.progress.say(f"generation {generation}: {len(candidates)} answers, {fresh} new algorithms")
        return candidates

    def slots(self, generation: int, round_: int) -> list[Slot]:
        """The prompts of one round: who are the parents, and what is asked."""
        plan = self.config.search
        rng = random.Random(f"{self.config.seed}/{generation}/{round_}")
        slots = []
        for operator in choose_operators(rng, plan.operators, plan.prompts):
            parents = choose_parents(rng, operator, self.lineage, plan.elites)
            if operator == "crossover" and len(parents) < 2:
                operator = "mutate"  # there is nobody else yet
            task, parts = operator, WRITTEN_PARTS if plan.allocation == "written" else PARTS
            if operator == "mutate":
                # Of the allocation or of the score, in turn: it is then known which made the difference. A generation
                # of one mutation has its turn, too.
                turn = generation + round_ + sum(slot.operator == "mutate" for slot in slots)
                parts = ("score",) if turn % 2 else (parts[1],)
                task = f"mutate {parts[0]}"
            dense = self.evaluator.dense["fitness"].nll
            sparsity = self.config.target.sparsity
            limit = self._prompt_limit
            messages = build_prompt(
                self.lineage, task, parents, dense, sparsity, limit, plan.statistics, plan.allocation
            )
            slots.append(Slot(operator, parents, messages, parts))
        return slots

    @property
    def _prompt_limit(self) -> int:
        """Characters that a prompt may have: code takes a token for every two and a half, or more."""
        writer = self.config.generator
        room = int(2.5 * (writer.max_model_len - writer.max_tokens))
        # Such a server may refuse the grammar and be told in words.
        return room - len(brief(self.config.search.allocation == "written")) if writer.kind == "openai" else room

    def request(self, slot: Slot, count: int, round_: int, offset: int) -> Request:
        """What the generator is asked for `count` answers. offset: see `Request`."""
        writer = self.config.generator
        return Request(
            slot.messages,
            n=count,
            temperature=writer.temperature + writer.heat * round_,
            max_tokens=writer.max_tokens,
            grammar=answer_grammar(parts=slot.parts, statistics=self.config.search.statistics),
            brief=brief("allocate" in slot.parts),
            offset=offset,
            parts=slot.parts,
            statistics=self.config.search.statistics,
        )

    def _ask(self, generation: int, round_: int, slots: list[Slot]) -> list[list[Answer]]:
        """Answers per slot, from the journal where it has them."""
        record = self._answers.get((generation, round_))
        if record is None:
            plan = self.config.search
            share, extra = divmod(plan.answers, plan.prompts)
            counts = [share + (index < extra) for index in range(plan.prompts)]
            requests = [
                self.request(slot, count, round_, self.spent.answers + sum(counts[:index]))
                for index, (slot, count) in enumerate(zip(slots, counts, strict=True))
            ]
            began = time.monotonic()
            answers = self.generator.generate(requests)
            record = {
                "kind": "answers",
                "generation": generation,
                "round": round_,
                "answers": [[asdict(answer) for answer in texts] for texts in answers],
                "seconds": time.monotonic() - began,
            }
            self._journal.append(record)
        answers = [[Answer(**answer) for answer in texts] for texts in record["answers"]]
        self.spent.generating += record["seconds"]
        for texts in answers:
            self.spent.answers += len(texts)
            self.spent.prompt_tokens += texts[0].prompt_tokens if texts else 0
            self.spent.completion_tokens += sum(answer.completion_tokens for answer in texts)
        return answers

    def read(self, name: str, generation: int, slot: Slot, answer: Answer) -> Candidate:
        """An answer as a candidate; one that cannot be read is invalid, with the reason."""
        prompt = "\n\n".join(f"[{role}]\n{text}" for role, text in slot.messages)
        candidate = Candidate(name, generation, slot.operator, slot.parents, prompt=prompt, answer=answer.text)
        parent = self.lineage[slot.parents[0]].algorithm
        offered, cut = self.config.search.statistics, answer.finish_reason == "length"
        try:
            proposal = parse_answer(answer.text, slot.parts, parent, offered, cut)
        except LanguageError as error:
            candidate.status, candidate.error = "invalid", str(error)
            return candidate
        candidate.algorithm, candidate.salvaged = proposal.algorithm, proposal.salvaged
        candidate.diagnosis, candidate.hypothesis = proposal.diagnosis, proposal.hypothesis
        return candidate

    def _probe(self, written: list[Candidate], earlier: list[Candidate]) -> None:
        """Settle which candidates are invalid and which repeat another's masks, before anything is measured."""
        readable = [c for c in written if c.status == "proposed"]
        probes = self.evaluator.probe([c.algorithm for c in readable])
        others = reversed([*self.lineage, *earlier])
        known = {c.mask_hash: c.id for c in others if c.status in ("evaluated", "failed", "proposed")}
        for candidate, probe in zip(readable, probes, strict=True):
            if probe.error is not None:
                candidate.status, candidate.error = "invalid", probe.error
                continue
            candidate.mask, candidate.mask_hash = probe.mask, probe.mask_hash
            if probe.mask_hash in known:
                candidate.status, candidate.repeats = "repeat", known[probe.mask_hash]
            else:
                known[probe.mask_hash] = candidate.id

    def _commit(self, generation: int, candidates: list[Candidate]) -> None:
        """Measure what is new, add everything to the graph in proposal order, tell the tracker, save."""
        if generation == 0:
            self._probe(candidates, [])
        chosen = [c for c in candidates if c.status == "proposed"]
        if generation > 0:
            chosen = chosen[: self.config.search.candidates]
            for candidate in candidates:
                if candidate.status == "proposed" and candidate not in chosen:
                    candidate.status = "surplus"
        evaluations = self.measure([c.algorithm for c in chosen], "fitness")
        for candidate, evaluation in zip(chosen, evaluations, strict=True):
            candidate.status = "evaluated" if evaluation.error is None else "failed"
            candidate.evaluation = evaluation if evaluation.error is None else None
            candidate.error = evaluation.error
            self.spent.evaluations += 1
        for candidate in candidates:
            self.lineage.add(candidate)
        for candidate in candidates:
            edges = self._edges(candidate)
            self.tracker.candidate(candidate, edges)
            if candidate.status in ("evaluated", "failed"):
                self.progress.say(self._line(candidate, edges))
        self.tracker.generation(generation, self._metrics(candidates))
        self._save(generation)

    def _edges(self, candidate: Candidate) -> list[dict]:
        return [{"parent": parent, **self.lineage.edge(parent, candidate.id)} for parent in candidate.parents]

    def _line(self, candidate: Candidate, edges: list[dict]) -> str:
        """One measured candidate, for people."""
        if candidate.status == "failed":
            return f"  {candidate.id}: {candidate.error}"
        line = f"  {candidate.id}: fitness {candidate.fitness:.4f}, perplexity {perplexity(candidate.fitness):.2f}"
        if edges and "effect" in edges[0]:
            edge = edges[0]
            line += f" ({candidate.operator} of {edge['parent']}: {edge['effect']:+.4f}, {edge['verdict']})"
        return line + (" ← best" if candidate is self.lineage.evaluated()[0] else "")

    def _metrics(self, candidates: list[Candidate]) -> dict[str, float]:
        best = self.lineage.evaluated()
        counts = {status: sum(c.status == status for c in candidates) for status in STATUSES[1:]}
        metrics = {}
        if best:
            metrics = {"best_fitness_nll": best[0].fitness, "best_fitness_perplexity": perplexity(best[0].fitness)}
        return metrics | {name: float(value) for name, value in counts.items()}

    def spend(self) -> Spent:
        """What was spent until now."""
        now = time.monotonic()
        self.spent.total, self.began = self.spent.total + now - self.began, now
        return self.spent

    def _save(self, generation: int) -> None:
        self._done = generation
        self.spend()
        lineage = json.dumps(self.lineage.to_dict(), indent=1).encode()
        spent = json.dumps(asdict(self.spent)).encode()
        save_checkpoint(self.folder / CHECKPOINT, generation, {"lineage.json": lineage, "spent.json": spent})
        write_atomic(self.folder / "lineage.json", lineage)

    def restore(self) -> None:
        """Take up the newest valid checkpoint; the journal then answers for what came after it."""
        loaded = load_checkpoint(self.folder / CHECKPOINT)
        if loaded is None:
            return
        for line in loaded.damaged:
            self.progress.say(f"passed over a damaged checkpoint: {line}")
        self.lineage = Lineage.from_dict(json.loads(loaded.files["lineage.json"]))
        self.spent = Spent(**json.loads(loaded.files["spent.json"]))
        self._done = loaded.generation
        for candidate in self.lineage:  # a tracker that was away when the search stopped catches up
            self.tracker.candidate(candidate, self._edges(candidate))
        self.progress.say(f"resumed after generation {loaded.generation} with {len(self.lineage)} candidates")
