"""The search: seeds → generations → elites. Plain Python over a generator, an evaluator and a tracker.

Results are committed in the order in which candidates were proposed, and every answer and measurement is in the
journal before it is used: a search is a function of its configuration and of the recorded answers, and a resumed
search asks and measures nothing twice.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from autoprune.actors.messages import Answer, Evaluation, Request
from autoprune.algorithms.algorithm import GROUPS, Algorithm
from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.constants import fill
from autoprune.algorithms.given import givens
from autoprune.algorithms.translator import LanguageError
from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.checkpoint import (
    Entry,
    checkpoint_name,
    drop_newer,
    load_checkpoint,
    save_checkpoint,
    save_part,
    write_atomic,
)
from autoprune.pipeline.config import Config
from autoprune.pipeline.gcot import VERSION, repair_prompt
from autoprune.pipeline.ledger import FRESH, FULL, REPORT, Evaluator, Generator, Ledger, Spent
from autoprune.pipeline.lineage import STATUSES, Candidate, Lineage, checkpointed, json_lines
from autoprune.pipeline.mirror import CHECKPOINT, Mirror
from autoprune.pipeline.population import seed
from autoprune.pipeline.prompting import Prompter, Slot, reads_prompts
from autoprune.pipeline.screening import Screen, reading, subset_nll
from autoprune.pipeline.trials import Trial, trials


class Tracker(Protocol):
    """Who shows: told of every candidate in proposal order, and of every generation."""

    def candidate(self, candidate: Candidate, edges: list[dict]) -> None: ...

    def generation(self, index: int, metrics: dict[str, float]) -> None: ...


class Progress(Protocol):
    """Who watches: `say` a line; `step` of what is being counted now; `state`, how far the search is."""

    def say(self, text: str) -> None: ...

    def step(self, what: str, done: int, total: int) -> None: ...

    def state(self, facts: Mapping) -> None: ...


@dataclass
class Search:
    """One search in one folder. `run` does what is left of it. began: when this sitting did, by the monotonic clock."""

    config: Config
    folder: Path
    generator: Generator
    evaluator: Evaluator
    tracker: Tracker
    progress: Progress
    began: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    mirror: Mirror | None = None
    lineage: Lineage = field(default_factory=Lineage)

    def __post_init__(self) -> None:
        clock = {"mirror": self.mirror} | ({} if self.began is None else {"began": self.began})
        self.ledger = Ledger(
            self.folder, self.generator, self.evaluator, self.config.budgets, self.progress.step, **clock
        )
        if self.mirror is not None:
            self.mirror.begin(self.config.to_yaml().encode(), self.ledger.records)
        self.screen = Screen(self.config.search, self.lineage, self.ledger.measure)
        pools = [case.pool for case in self.evaluator.cases] if self.config.target.further else [self.evaluator]
        self.ledger.begin([nll for pool in pools for nll in pool.dense[FULL].window_nlls], self.texts, VERSION)
        dense = self.evaluator.dense[FULL].nll
        # What prompts are read off: the lineage itself, or with a lag what of it may be known by then.
        self.seen = Lineage() if self.config.search.lag else self.lineage
        self.prompter = Prompter(self.config, self.seen, dense, self.generator.count, self.screen.effect, self._tried)
        self._done = -1
        self._parts: dict[str, Entry] = {}
        self._trials: dict[str, list[Trial]] = {}  # of candidates whose prompts asked for them

    @property
    def spent(self) -> Spent:
        return self.ledger.spent

    def run(self) -> None:
        """Seeds, then generations until all are done or a budget is used up, a checkpoint after each; then the elites
        on fresh text."""
        self.restore()
        if self._done < 0:
            self._commit(0, [seed(text, self.config.target.group) for text in self.config.search.seeds])
        for generation in range(max(1, self._done + 1), self.config.search.generations + 1):
            begun = self.ledger.asked(generation, 0) or self.ledger.ended(generation) is not None
            budget = None if begun else self.ledger.exhausted()
            if budget:
                self.progress.say(f"the search ends before generation {generation}: {budget} is used up")
                break
            self._forget_fresh()
            self._tell(generation)
            candidates = self._propose(generation)
            if self.config.search.lag and generation < self.config.search.generations:
                self._ask_ahead(generation + 1)
            self._commit(generation, candidates)
        self._see(self.config.search.generations)
        self._confirm()

    def _confirm(self) -> None:
        """Measure the elites on text that no generation saw: the best of many is partly the luckiest."""
        best = self.prompter.elites()
        self._forget_fresh()
        for candidate, evaluation in zip(best, self.measure([c.algorithm for c in best], FRESH), strict=True):
            candidate.fresh = evaluation if evaluation.error is None else None
        self._save(self._done)
        write_atomic(self.folder / "lineage.json", self.lineage.to_json().encode())
        winner = self.lineage.best()
        self.progress.say(f"best after {len(best)} elites met fresh text: {winner.id}, {winner.believed:.4f} over all")
        self._tell(self._done, winner)

    def _forget_fresh(self) -> None:
        """What elites of an earlier end, before the budget was raised, had on fresh text: others are better now."""
        for candidate in self.lineage:
            candidate.fresh = None

    def measure(self, algorithms: Sequence[Algorithm], split: str) -> list[Evaluation]:
        """Measurements in the order of the algorithms; what the journal holds is not measured again."""
        return self.ledger.measure(algorithms, split, must=split.partition("@")[0] in (FRESH, REPORT))

    # Proposing

    def _propose(self, generation: int) -> list[Candidate]:
        """Ask until there are enough algorithms that nobody wrote before, or the rounds are used up."""
        plan, candidates, fresh, repairs = self.config.search, [], 0, plan_repairs(self.config)
        self._see(generation - 1 - plan.lag)
        for round_ in range(plan.rounds):
            slots = self.prompter.slots(generation, round_)
            asked = [slot for slot in slots if slot.operator != "tune"]
            written = [self._tuned(generation, slot, i) for i, slot in enumerate(s for s in slots if s not in asked)]
            answers = self._ask(generation, round_, "round", asked, self._share(len(asked)))
            read = self._read_all(generation, asked, answers, len(candidates) + len(written))
            written += [candidate for _, candidate in read]
            self._probe(written, candidates)
            candidates += written
            broken = [(slot, candidate) for slot, candidate in read if candidate.status == "invalid"]
            mended = self._repaired(generation, round_, broken, candidates, repairs)
            repairs -= len(mended)
            candidates += mended
            fresh = sum(c.status == "proposed" for c in candidates)
            enough = fresh >= plan.candidates or self.ledger.ended(generation) is not None or self.ledger.exhausted()
            if enough and not self.ledger.asked(generation, round_ + 1):
                break
        self.progress.say(f"generation {generation}: {len(candidates)} answers, {fresh} new algorithms")
        return candidates

    def _see(self, generation: int) -> None:
        """Prompts may speak of candidates up to this generation, and of the seeds."""
        if self.seen is not self.lineage:
            for candidate in self.lineage:
                if candidate.id not in self.seen and candidate.generation <= max(0, generation):
                    self.seen.add(candidate)

    def _ask_ahead(self, generation: int) -> None:
        """Have the first answers of a generation written while the one before is measured, of which its prompts say
        nothing; unless a budget is used up."""
        self._see(generation - 1 - self.config.search.lag)
        if self.ledger.exhausted():
            return
        asked = [slot for slot in self.prompter.slots(generation, 0) if slot.operator != "tune"]
        counts = self._share(len(asked))
        self.ledger.ask_ahead((generation, 0, "round"), lambda: self._requests(0, asked, counts))

    def _share(self, prompts: int) -> list[int]:
        """Answers to ask of each prompt of a round, within the budget."""
        total = min(self.config.search.answers, self.ledger.left("calls"))
        share, extra = divmod(int(total), max(prompts, 1))
        return [share + (index < extra) for index in range(prompts)]

    def _ask(self, generation: int, round_: int, what: str, slots: list[Slot], counts: list[int]) -> list[list[Answer]]:
        """Answers per slot, from the journal where it has them."""
        answers = self.ledger.answers((generation, round_, what), lambda: self._requests(round_, slots, counts))
        return answers + [[]] * (len(slots) - len(answers))

    def _requests(self, round_: int, slots: list[Slot], counts: list[int]) -> list[Request]:
        if self.config.generator.kind == "vllm":
            for slot in slots:
                self.prompter.check_room(slot)
        offsets = itertools.accumulate(counts, initial=self.spent.answers)
        return [
            self.prompter.request(slot, count, round_, offset)
            for slot, count, offset in zip(slots, counts, offsets, strict=False)
            if count
        ]

    def _read_all(
        self, generation: int, slots: list[Slot], answers: list[list[Answer]], first: int
    ) -> list[tuple[Slot, Candidate]]:
        # The first answer to each prompt, then the second, …: no prompt's answers crowd out another's.
        pairs = [[(slot, answer, texts) for answer in texts] for slot, texts in zip(slots, answers, strict=True)]
        found = []
        for slot, answer, texts in filter(None, itertools.chain(*itertools.zip_longest(*pairs))):
            candidate = self.read(f"g{generation:02d}-c{first + len(found):02d}", generation, slot, answer)
            candidate.tokens = answer.completion_tokens + round(answer.prompt_tokens / len(texts), 1)
            found.append((slot, candidate))
        return found

    def read(self, name: str, generation: int, slot: Slot, answer: Answer) -> Candidate:
        """An answer as a candidate; one that cannot be read is invalid, with the reason."""
        candidate = Candidate(name, generation, slot.operator, slot.parents, prompt=slot.text, answer=answer.text)
        parent = self.lineage[slot.parents[0]].algorithm
        offered, cut = self.config.search.statistics, answer.finish_reason == "length"
        try:
            given = givens(*(self.lineage[name].algorithm.score for name in slot.parents[: slot.given]))
            proposal = parse_answer(answer.text, slot.parts, parent, offered, cut, given)
        except LanguageError as error:
            candidate.status, candidate.error = "invalid", str(error)
            return candidate
        candidate.algorithm, candidate.salvaged = proposal.algorithm, proposal.salvaged
        candidate.diagnosis, candidate.hypothesis = proposal.diagnosis, proposal.hypothesis
        return candidate

    def _repaired(
        self,
        generation: int,
        round_: int,
        broken: list[tuple[Slot, Candidate]],
        earlier: list[Candidate],
        most: int,
    ) -> list[Candidate]:
        """Invalid answers that leave room for it, each asked for once more with its error, so many at most: what comes
        is a child of the same parents, and of the broken one."""
        slots, origins = [], {}
        for slot, candidate in broken:
            if len(slots) == most:
                break
            messages = repair_prompt(slot.messages, candidate.answer, candidate.error, self.prompter.setting)
            if messages is not None:
                slots.append(replace(slot, operator="repair", messages=messages))
                origins[id(slots[-1])] = candidate.id
        if not slots:
            return []
        counts = [int(index < self.ledger.left("calls")) for index in range(len(slots))]
        answers = self._ask(generation, round_, "repair", slots, counts)
        read = self._read_all(generation, slots, answers, len(earlier))
        for slot, candidate in read:
            candidate.parents = (*slot.parents, origins[id(slot)])
        written = [candidate for _, candidate in read]
        self._probe(written, earlier)
        return written

    def _tuned(self, generation: int, slot: Slot, index: int) -> Candidate:
        """The first parent with its constants filled by a search on the cheap fidelity. Nobody is asked."""
        parent = self.lineage[slot.parents[0]]
        candidate = Candidate(f"g{generation:02d}-c{index:02d}", generation, "tune", slot.parents)
        trials: set[str] = set()

        def measure(algorithms: list[Algorithm]) -> list[float]:
            trials.update(algorithm.key for algorithm in algorithms)
            readings = [reading(evaluation) for evaluation in self.screen.measure("cheap", algorithms)]
            return [math.inf if value is None else value for value in readings]

        start = subset_nll(parent.evaluation, self.screen.windows)
        plan = self.config.search
        candidate.algorithm, _ = fill(
            parent.algorithm, measure, start, plan.tuning, self.prompter.parts, plan.statistics
        )
        candidate.trials = len(trials)
        candidate.hypothesis = f"other constants, the best of {len(trials)} that were tried, on a part of the text"
        return candidate

    def _probe(self, written: list[Candidate], earlier: list[Candidate]) -> None:
        """Settle which candidates are invalid, in which group new scores are compared, and which repeat another's
        masks, before anything is measured."""
        readable = [c for c in written if c.status == "proposed"]
        for candidate, probe in zip(readable, self.ledger.probe([c.algorithm for c in readable]), strict=True):
            if probe.error is not None:
                candidate.status, candidate.error = "poison" if probe.poison else "invalid", probe.error
                candidate.traceback = probe.traceback
            candidate.mask, candidate.mask_hash = probe.mask, probe.mask_hash
        others = reversed([*self.lineage, *earlier])
        settled = [c for c in others if c.status in ("evaluated", "failed", "poison", "screened", "proposed")]
        known = {c.mask_hash: c.id for c in settled}
        self._choose_groups([c for c in readable if c.status == "proposed"], known)
        for candidate in (c for c in readable if c.status == "proposed"):
            if candidate.mask_hash in known:
                candidate.status, candidate.repeats = "repeat", known[candidate.mask_hash]
            else:
                known[candidate.mask_hash] = candidate.id

    def _choose_groups(self, valid: list[Candidate], known: Collection[str]) -> None:
        """New scores are compared where they do better on the probe's text, over rows or the whole matrix, whatever
        their answers say: which of the two suits a score is cheap to measure, and hard to foresee."""
        if "group" not in self.prompter.parts or "probe" not in self.config.search.fidelities:
            return
        new = [c for c in valid if c.algorithm.group in GROUPS and self._has_new_score(c)]
        others = [replace(c.algorithm, group=next(g for g in GROUPS if g != c.algorithm.group)) for c in new]
        probes = self.ledger.probe(others)
        choices = [
            (candidate, other, probe)
            for candidate, other, probe in zip(new, others, probes, strict=True)
            # Where both masks exist it is a repeat in any case; what is no algorithm over there stays.
            if probe.error is None and not (candidate.mask_hash in known and probe.mask_hash in known)
        ]
        self.screen.measure("probe", [a for candidate, other, _ in choices for a in (candidate.algorithm, other)])
        for candidate, other, probe in choices:
            here, there = map(reading, self.screen.measure("probe", [candidate.algorithm, other]))
            if there is not None and (here is None or there < here):
                candidate.algorithm, candidate.regrouped = other, True
                candidate.mask, candidate.mask_hash = probe.mask, probe.mask_hash

    def _has_new_score(self, candidate: Candidate) -> bool:
        """Whether it was written, and no parent has it."""
        parents = [self.lineage[p].algorithm for p in candidate.parents if p in self.lineage]
        written = candidate.operator not in ("seed", "tune")
        return written and all(p is None or p.score != candidate.algorithm.score for p in parents)

    def _tried(self, parent: Candidate) -> list[Trial]:
        """What one more statistic does to a candidate's score, on the probe's text; for who reads prompts."""
        plan = self.config.search
        if not (plan.trials and reads_prompts(self.config) and "probe" in plan.fidelities):
            return []
        if parent.id in self._trials:
            return self._trials[parent.id]
        found = trials(parent.algorithm, plan.statistics)
        algorithms = [parent.algorithm, *(trial.algorithm for trial in found)]
        if not found:
            return []
        here, *there = map(reading, self.screen.measure("probe", algorithms))
        effects = [None if here is None or value is None else value - here for value in there]
        measured = [replace(trial, effect=effect) for trial, effect in zip(found, effects, strict=True)]
        self._trials[parent.id] = measured
        return measured

    # Measuring

    def _commit(self, generation: int, candidates: list[Candidate]) -> None:
        """Measure the new ones, cheapest fidelity first, and record all of them in proposal order."""
        if generation == 0:
            self._probe(candidates, [])
            chosen = [c for c in candidates if c.status == "proposed"]
        else:
            chosen = self._within_budget(generation, [c for c in candidates if c.status == "proposed"])
        # What somebody wrote by hand may be poison; the baselines are none.
        known = generation == 0 and not any(".py" in text for text in self.config.search.seeds)
        evaluations = self.ledger.measure([c.algorithm for c in chosen], FULL, must=known)
        for candidate, evaluation in zip(chosen, evaluations, strict=True):
            if evaluation.error is None:
                candidate.status, candidate.evaluation = "evaluated", evaluation
            else:
                candidate.fail(evaluation)
        self.ledger.end(generation, [c.id for c in chosen])
        if generation == 0 and not any(c.status == "evaluated" for c in candidates):
            errors = "; ".join(f"{c.id}: {c.error}" for c in candidates)
            raise InputError(f"none of the seeds could be measured ({errors})")
        self._take(generation, candidates)
        for candidate in candidates:
            if candidate.status in ("evaluated", "failed", "poison"):
                self.progress.say(self._line(candidate, self._edges(candidate)))
        self._save(generation)
        self._tell(generation)
        self.progress.say(f"  {self.ledger.line()}")

    def _take(self, generation: int, candidates: list[Candidate]) -> None:
        """A generation joins the lineage, and the tracker hears of it."""
        for candidate in candidates:
            self.lineage.add(candidate)
        self.screen.learn(candidates)
        for candidate in candidates:
            self.tracker.candidate(candidate, self._edges(candidate))
        self.tracker.generation(generation, self._metrics(candidates))

    def _within_budget(self, generation: int, candidates: list[Candidate]) -> list[Candidate]:
        """Those that pass the fidelities, as many as a generation and the budget allow; the rest is surplus."""
        passed, before = self.screen.passed(candidates), self.ledger.ended(generation)
        room = int(min(self.config.search.candidates, self.ledger.left("evaluations")))
        chosen = passed[:room] if before is None else [c for c in passed if c.id in before]
        for candidate in passed:
            if candidate not in chosen:
                candidate.status = "surplus"
        return chosen

    def _edges(self, candidate: Candidate) -> list[dict]:
        return [{"parent": parent, **self.lineage.edge(parent, candidate.id)} for parent in candidate.parents]

    def _line(self, candidate: Candidate, edges: list[dict]) -> str:
        """One measured candidate, for people."""
        if candidate.status != "evaluated":
            return f"  {candidate.id}: {candidate.error}"
        line = f"  {candidate.id}: fitness {candidate.fitness:.4f}, perplexity {perplexity(candidate.fitness):.2f}"
        line += " × dense" if self.config.target.further else ""
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
        metrics |= {f"rank_correlation.{name}": value for name, value in self.screen.correlations().items()}
        return metrics | {name: float(value) for name, value in counts.items()}

    def _tell(self, generation: int, winner: Candidate | None = None) -> None:
        """Whoever watches, how far the search is. winner: after fresh text."""
        found, bounds = self.lineage.evaluated(), asdict(self.config.budgets)
        best = winner or (found[0] if found else None)
        about = {"combined": self.config.target.combined, "final": winner is not None}
        self.progress.state(
            {
                "generation": generation,
                "generations": self.config.search.generations,
                "candidates": len(self.lineage),
                "best": {"id": best.id, "nll": best.fitness, **about} if best else None,
                "spent": asdict(self.spend()),
                "left": {name: self.ledger.left(name) if bound else None for name, bound in bounds.items()},
            }
        )

    # Keeping

    def spend(self) -> Spent:
        """What was spent until now."""
        return self.ledger.tick()

    def _save(self, generation: int) -> None:
        """A checkpoint. The candidates of a generation are written once; what becomes of the elites later is beside
        them."""
        self._done, folder = generation, self.folder / CHECKPOINT
        part = f"{checkpoint_name(generation)}.json"
        if part not in self._parts:
            own = [c.to_dict() | {"fresh": None} for c in self.lineage.of_generation(generation)]
            self._parts[part] = save_part(folder, part, json_lines(own).encode())
        spent = asdict(self.spend()) | {"used": self.ledger.used, "records": len(self.ledger.records)}
        fresh = {c.id: c.to_dict()["fresh"] for c in self.lineage if c.fresh is not None}
        files = {"spent.json": json.dumps(spent).encode(), "fresh.json": json.dumps(fresh).encode()}
        save_checkpoint(folder, generation, files, self._parts)
        self.ledger.copy_checkpoint(checkpoint_name(generation))

    def restore(self) -> None:
        """Take up the newest valid checkpoint; the journal then answers for what came after it."""
        loaded = load_checkpoint(self.folder / CHECKPOINT)
        if loaded is None:
            return
        for line in loaded.damaged:
            self.progress.say(f"passed over a damaged checkpoint: {line}")
        spent = json.loads(loaded.files.get("spent.json", "null"))
        if spent is None or any(last >= len(self.ledger.records) for _, last in spent["used"]):
            why = "no checkpoint is left" if spent is None else "the checkpoint is ahead of the journal"
            self.progress.say(f"{why}: the search begins again, and its journal answers")
            drop_newer(self.folder / CHECKPOINT, -1)
            return
        drop_newer(self.folder / CHECKPOINT, loaded.generation)
        restored, self._parts = checkpointed(loaded), loaded.entries
        for candidate in restored:
            if candidate.evaluation is not None:
                seconds = self.ledger.seconds(candidate.algorithm.key)
                candidate.evaluation = replace(candidate.evaluation, seconds=seconds)
            elif candidate.status == "poison":
                candidate.traceback = self.ledger.traceback(candidate.algorithm.key)
        self.ledger.restore(spent["used"], spent["total"], spent.get("records", len(self.ledger.records)))
        self._done = loaded.generation
        for generation, candidates in itertools.groupby(restored, lambda candidate: candidate.generation):
            self._take(generation, list(candidates))  # a tracker that was away when the search stopped catches up
        self.progress.say(f"resumed after generation {loaded.generation} with {len(self.lineage)} candidates")


def plan_repairs(config: Config) -> int:
    """How many answers of a generation may be repaired; a fixed prompt learns nothing, from errors neither, nor does
    who does not read."""
    return config.search.repairs if reads_prompts(config) and config.search.prompt != "fixed" else 0
