"""Generators without a language model: draws from the grammar, and genetic programming over the algorithm language."""

from __future__ import annotations

import random
from collections.abc import Sequence

from autoprune.actors.messages import Answer, Answered, Request, estimate
from autoprune.algorithms.algorithm import GROUPS, Allocation
from autoprune.algorithms.answers import SDSA, sdsa_bounds
from autoprune.algorithms.derivation import derive
from autoprune.algorithms.grammar import answer_rules
from autoprune.algorithms.language import parse
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.variation import NoVariationError, crossed, mutated, part_rules
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS


class GrammarGenerator:
    """Draws its answers from the grammar at random, whatever the prompt says: what a language model has to beat.

    The n-th answer of a search follows from the seed and n alone.
    """

    THOUGHT = "drawn from the grammar at random"
    count = staticmethod(estimate)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generate(self, requests: Sequence[Request], answered: Answered = lambda *_: None) -> list[list[Answer]]:
        return [
            [
                self._answer(request, random.Random(f"{self._seed}/answer {request.offset + i}"))
                for i in range(request.n)
            ]
            for request in requests
        ]

    def _answer(self, request: Request, source: random.Random) -> Answer:
        rules = answer_rules(parts=request.parts, statistics=request.statistics)
        return Answer(derive(rules, source, lambda _: self.THOUGHT))

    def stop(self) -> None:
        pass


class GeneticGenerator(GrammarGenerator):
    """Varies the parents of a request by the moves of genetic programming (`algorithms.variation`): the search without
    a language model. `explore` draws from the grammar instead; `simplify` puts one of its own parts in a part's place.

    The n-th answer of a search follows from the seed, n and the parents.
    """

    THOUGHT = "varied at random"
    TRIES = 20  # until a variation is in the language
    REGROUPED = 0.25  # share of mutated scores whose group is drawn anew
    SPREADS = {"tau": (0.5, 2.0), "m": (0.7, 1.4), "depth": (0.6, 1.6), "taylor": (0.5, 2.0)}  # of a mutated allocation
    LEAST = {"taylor": 0.25}  # that is spread, else 0.05: from 0 nothing would come

    def _answer(self, request: Request, source: random.Random) -> Answer:
        if request.operator == "explore" or not request.parents:
            return super()._answer(request, source)
        lines = [f"Diagnosis: {self.THOUGHT}", f"Hypothesis: {self.THOUGHT}"]
        if "group" in request.parts:
            group = source.choice(request.parents).group
            if request.operator != "crossover" and source.random() < self.REGROUPED:
                group = source.choice(GROUPS)
            lines.append(f"Group: {group}")
        if "allocation" in request.parts:
            lines.append(f"Allocation: {self._allocation(request, source)}")
        for name in ("allocate", "score"):
            if name in request.parts:
                lines.append(self._varied(name, request, source).strip())
        return Answer("\n".join(lines))

    def _allocation(self, request: Request, source: random.Random) -> str:
        """SDSA's parameters, each from either parent and, but for crossover, about half of them moved. Of a parent with
        another rule the default's count."""
        own = [a.allocation if a.allocation.name == SDSA.name else SDSA for a in request.parents]
        settings = []
        for key, (low, high) in sdsa_bounds(request.statistics).items():
            value = source.choice(own).parameters.get(key, 0.0)
            if request.operator != "crossover" and source.random() < 0.5:
                value = max(value, self.LEAST.get(key, 0.05)) * source.uniform(*self.SPREADS[key])
            settings.append(f"{key}={min(max(value, low), high):.3f}")
        return f"sdsa {' '.join(settings)}"

    def _varied(self, name: str, request: Request, source: random.Random) -> str:
        """A varied function; the first parent's, where nothing comes of TRIES tries."""
        rules = part_rules(request.statistics)
        texts = [a.score if name == "score" else _allocate(a.allocation) for a in request.parents]
        for _ in range(self.TRIES):
            try:
                if request.operator == "crossover":
                    text = crossed(texts[0], texts[-1], name, source)
                else:
                    text = mutated(texts[0], name, source, rules, simpler=request.operator == "simplify")
            except (LanguageError, NoVariationError):
                continue
            if name == "allocate" or set(parse(text).reads) <= set(request.statistics):
                return text
        return texts[0]


def _allocate(allocation: Allocation) -> str:
    """An allocation as a function: its own, or what does as its rule does, or the uniform one."""
    return allocation.source or WRITTEN_ALLOCATIONS.get(allocation.name, WRITTEN_ALLOCATIONS["uniform"])


BY_CHANCE = {"grammar": GrammarGenerator, "genetic": GeneticGenerator}  # by kind: made from a seed alone
