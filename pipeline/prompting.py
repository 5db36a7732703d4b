"""What is asked in a round: which operators, of which parents, for which parts of an algorithm, in which words."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoprune.actors.messages import Request
from autoprune.algorithms.constants import constants
from autoprune.algorithms.given import givens
from autoprune.algorithms.grammar import PARTS, WRITTEN_PARTS, answer_grammar
from autoprune.algorithms.manual import brief
from autoprune.models.errors import InputError
from autoprune.pipeline.config import FREE_GROUP, Config
from autoprune.pipeline.focus import WARMTH, focus
from autoprune.pipeline.gcot import Count, Messages, Setting, build_prompt, plain_prompt
from autoprune.pipeline.lessons import lessons
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.niches import elites
from autoprune.pipeline.operators import choose, weights
from autoprune.pipeline.population import choose_parents
from autoprune.pipeline.trials import Trial, promises, trial_lines

LINES = 3  # that may stand above an answer's return
TRIALS = 3  # that a prompt tells of
SIMPLE_LINES = 1  # in an answer that is to be simpler


@dataclass(frozen=True)
class Slot:
    """One prompt. parts: of an algorithm, which the answer holds (see `grammar`); the others are the first parent's.
    statistics: that its score may read. lines: that a function of the answer may have above its return."""

    operator: str
    parents: tuple[str, ...]
    messages: Messages
    parts: tuple[str, ...]
    statistics: tuple[str, ...] = ()
    lines: int = LINES
    given: int = 0

    @property
    def text(self) -> str:
        """The messages, for people."""
        return "\n\n".join(f"[{role}]\n{text}" for role, text in self.messages)


class Prompter:
    """Reads prompts off the lineage of one search. A function of configuration, seed and graph.

    dense: NLL of the unpruned model on the fitness split. count: tokens of a prompt. effect: of a child against its
    parent, as `lessons` takes it. tried: what one more statistic does to a candidate's score (see `trials`).
    """

    def __init__(
        self,
        config: Config,
        lineage: Lineage,
        dense: float,
        count: Count,
        effect: Callable[[Candidate, Candidate], float | None],
        tried: Callable[[Candidate], Sequence[Trial]] = lambda _: (),
    ) -> None:
        self._config, self._lineage, self._dense, self._count, self._effect = config, lineage, dense, count, effect
        self._tried = tried

    def slots(self, generation: int, round_: int) -> list[Slot]:
        """The prompts of one round: who are the parents, and what is asked. `tune` asks nobody, and once a
        generation at most."""
        plan = self._config.search
        rng = random.Random(f"{self._config.seed}/{generation}/{round_}")
        operators = dict(plan.operators)
        if plan.prompt == "topk":  # one way to ask
            tune = operators.pop("tune", 0.0)
            operators = {"improve": sum(operators.values()), "tune": tune}
        untuned = [c for c in self.elites() if self._tunable(c)]
        if round_ > 0 or plan.prompt == "fixed" or not untuned:
            operators.pop("tune", None)
        # Of the last `lag` generations nothing may be known: that they brought nothing is not said by that.
        frequencies = weights(operators, self._lineage, generation - plan.lag) if plan.adapt else operators
        slots: list[Slot] = []
        for operator in choose(rng, frequencies, plan.prompts):
            if operator == "tune" and any(slot.operator == "tune" for slot in slots):
                others = {name: weight for name, weight in frequencies.items() if name != "tune"}
                (operator,) = choose(rng, others, 1)
            parents = choose_parents(rng, operator, untuned if operator == "tune" else self.elites())
            turn = generation + round_ + len(slots)
            slot = self._slot(rng, operator, parents, turn)
            slots.append(slot if self._room_for(slot) else self._shorter(rng, slot, turn))
        return slots

    def _shorter(self, rng: random.Random, slot: Slot, turn: int) -> Slot:
        """Instead of a prompt whose parents are too long for the context: with one of them, then with other elites and
        seeds; the one itself where all are too long."""
        seeds = [c for c in self._lineage.evaluated() if c.operator == "seed"]
        others = [("mutate", slot.parents[0]), *(("explore", c.id) for c in (*self.elites(), *seeds))]
        shorter = (self._slot(rng, operator, (name,), turn) for operator, name in others)
        return next(filter(self._room_for, shorter), slot)

    def _tunable(self, candidate: Candidate) -> bool:
        """Whether it has constants to fill that were not filled before."""
        tuned = any(child.operator == "tune" for child in self._lineage.children(candidate.id))
        return (
            not tuned
            and candidate.operator != "tune"
            and bool(constants(candidate.algorithm, self.parts, self._config.search.statistics))
        )

    def _slot(self, rng: random.Random, operator: str, parents: tuple[str, ...], turn: int) -> Slot:
        """turn: by which mutations of the score and of the allocation come in turn, so that it is known which made the
        difference; a search of one mutation per generation has its turns, too."""
        plan, parts = self._config.search, self.parts
        if operator == "tune":
            return Slot(operator, parents, (), ())
        if plan.prompt != "gcot":
            # Every second prompt asks for the score alone: one that is good must not be lost to a poor allocation.
            asked = parts if turn % 2 or "score" not in parts else self._scored
            setting = replace(self.setting, parts=asked)
            if plan.prompt == "topk":
                best = self.elites()
                return Slot("improve", (best[0].id,), plain_prompt(best, "topk", setting), asked, plan.statistics)
            seeds = [c for c in self._lineage.evaluated() if c.operator == "seed"]
            return Slot("sample", (seeds[0].id,), plain_prompt(seeds, "fixed", setting), asked, plan.statistics)
        if (operator == "crossover" and len(parents) < 2) or (operator == "simplify" and "score" not in parts):
            operator = "mutate"  # there is nobody else yet, or nothing to simplify
        lines, asked = LINES, self._scored or parts
        task = operator if "score" in parts else f"{operator}_allocate"
        if operator == "mutate":
            choices = [part for part in parts if part != "group"]
            if "score" in choices and plan.operators.get("tune"):
                choices = ["score", *choices]  # twice as often: the numbers of an allocation are tuned unasked
            chosen = choices[turn % len(choices)]
            parents = self._focal(rng, parents) if chosen == "score" and plan.diversity else parents
            asked, task = self._scored if chosen == "score" else (chosen,), f"mutate_{chosen}"
            task += "_alone" if asked == ("score",) else ""
        elif operator == "simplify":
            asked, lines = ("score",), SIMPLE_LINES
        statistics, trials = plan.statistics, ()
        if plan.diversity and "score" in asked and set(asked) <= {"group", "score"}:
            if operator in ("mutate", "crossover"):
                trials = self._tried(self._lineage[parents[0]])
            algorithms = [self._lineage[parent].algorithm for parent in parents]
            statistics = focus(rng, self._lineage, operator, algorithms, statistics, promises(trials))
        given = self._given(operator, asked, parents)
        setting = replace(self.setting, statistics=statistics, given=given)
        told = lessons(self._lineage, self._effect), trial_lines(trials, statistics, TRIALS)
        messages = build_prompt(self._lineage, task, parents, setting, *told)
        return Slot(operator, parents, messages, asked, statistics, max(lines, given), given)

    def _given(self, operator: str, asked: tuple[str, ...], parents: tuple[str, ...]) -> int:
        """How many parents' scores the answer may build on: for who reads, where scores are changed or joined."""
        count = {"mutate": 1, "crossover": 2}.get(operator, 0)
        if "score" not in asked or not reads_prompts(self._config):
            return 0
        return count if len(givens(*self._scores(parents[:count]))) == count else 0

    def _scores(self, names: Sequence[str]) -> list[str]:
        return [self._lineage[name].algorithm.score for name in names]

    def _focal(self, rng: random.Random, parents: tuple[str, ...]) -> tuple[str, ...]:
        """Who is changed where that is a score: of the elites rather one that would be good with one more statistic.
        Half of what a trial says counts: its text is short."""
        best = self.elites()
        effects = [promises(self._tried(candidate)) for candidate in best]
        if not any(effects):
            return parents
        levels = [c.fitness + min(0.0, *own.values(), 0.0) / 2 for c, own in zip(best, effects, strict=True)]
        chances = [math.exp((min(levels) - level) / WARMTH) for level in levels]
        (chosen,) = rng.choices(best, chances)
        return (chosen.id,)

    def elites(self) -> list[Candidate]:
        return elites(self._lineage, self._config.search.elites, self._config.search.diversity)

    @property
    def parts(self) -> tuple[str, ...]:
        plan = self._config.search
        if self._config.target.group != FREE_GROUP:
            return ("score",)
        parts = WRITTEN_PARTS if plan.allocation == "written" else PARTS
        return {"both": parts, "score": ("group", "score"), "allocate": parts[1:2]}[plan.design]

    @property
    def _scored(self) -> tuple[str, ...]:
        """The parts of a score, where scores are designed."""
        return tuple(part for part in self.parts if part in ("group", "score"))

    @property
    def setting(self) -> Setting:
        writer, plan, target, room = self._config.generator, self._config.search, self._config.target, self._room
        return Setting(
            dense=self._dense,
            sparsity=target.sparsity,
            count=self._count,
            limit=min(writer.prompt_tokens, room),
            repair=min(writer.max_tokens, room - min(writer.prompt_tokens, room)),
            parts=self.parts,
            statistics=plan.statistics,
            diverse=plan.diversity,
            cases=target.cases,
            combine=target.combine,
            group=target.group,
        )

    def request(self, slot: Slot, count: int, round_: int, offset: int) -> Request:
        """What the generator is asked for `count` answers. offset: see `Request`."""
        writer = self._config.generator
        return Request(
            slot.messages,
            n=count,
            temperature=writer.temperature + writer.heat * round_,
            max_tokens=writer.max_tokens,
            grammar=answer_grammar(slot.lines, slot.parts, slot.statistics, slot.given),
            brief=brief("allocate" in slot.parts),
            offset=offset,
            parts=slot.parts,
            statistics=slot.statistics,
            operator=slot.operator,
            parents=tuple(self._lineage[parent].algorithm for parent in slot.parents),
        )

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have beside its answer."""
        writer = self._config.generator
        return writer.max_model_len - writer.max_tokens if writer.kind == "vllm" else 10**9

    def _room_for(self, slot: Slot) -> bool:
        return not slot.messages or self._count(slot.messages) <= self._room

    def check_room(self, slot: Slot) -> None:
        if not self._room_for(slot):
            tokens, room = self._count(slot.messages), self._room
            raise InputError(
                f"the shortest prompt has {tokens} tokens, and generator.max_model_len − max_tokens leaves {room}: "
                "raise max_model_len, or lower max_tokens or the number of search.statistics"
            )


def reads_prompts(config: Config) -> bool:
    """Whether who writes reads what it is asked."""
    return config.generator.kind not in ("grammar", "genetic")
