"""The lineage graph: every candidate, what it claimed, and what was measured against its parents."""

from __future__ import annotations

import bisect
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import networkx as nx

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.checkpoint import Loaded

# proposed: written, not yet measured; invalid: refused by the language or the probe; repeat: its masks exist already;
# screened: a cheap fidelity found it worse than who holds its niche; surplus: new, but its generation had enough, or
# the budget was used up; evaluated: has a fitness; failed: its evaluation gave none; poison: it brought evaluators down
# or kept them past their deadline, as often as one may.
STATUSES = ("proposed", "invalid", "repeat", "screened", "surplus", "evaluated", "failed", "poison")


@dataclass
class Candidate:
    """An algorithm with its thought, parents, hypothesis, status and measurements.

    id: `g<generation>-c<index>`, seeds `seed-<name>`. algorithm: None where the answer could not be read.
    prompt: the text that the language model was given, answer: what it wrote (both empty for seeds). tokens: what the
    answer took, with its share of the prompt. trials: cheap measurements that filled its constants.
    salvaged: what had to be mended before it could be read (see `algorithms.answers`). regrouped: it is compared in
    another group than the answer says, where it did better on the probe's text.
    mask: packed masks on the probe layers, hexadecimal. repeats: id of the candidate that has the same masks.
    niche: id of the candidate that founded its niche (see `niches`). rungs: what the cheap fidelities measured, by
    name; rival: id of the candidate that they were held against. fresh: measurement on text that
    no generation saw. traceback: what was last seen of one that is poison.
    """

    id: str
    generation: int
    operator: str
    parents: tuple[str, ...] = ()
    algorithm: Algorithm | None = None
    diagnosis: str = ""
    hypothesis: str = ""
    prompt: str = ""
    answer: str = ""
    tokens: float = 0.0
    trials: int = 0
    status: str = "proposed"
    error: str | None = None
    salvaged: tuple[str, ...] = ()
    regrouped: bool = False
    mask: str = ""
    mask_hash: str = ""
    repeats: str | None = None
    niche: str = ""
    rungs: dict[str, float] = field(default_factory=dict)
    rival: str | None = None
    traceback: str = ""
    evaluation: Evaluation | None = None
    fresh: Evaluation | None = None

    def fail(self, evaluation: Evaluation, reason: str = "") -> None:
        """It could not be measured. reason: where the measurement gives none."""
        self.status = "poison" if evaluation.poison else "failed"
        self.error, self.traceback = evaluation.error or reason, evaluation.traceback

    @property
    def fitness(self) -> float:
        """Mean negative log-likelihood per token on the fitness split, nats; infinite where there is none."""
        return self.evaluation.nll if self.evaluation is not None and self.status == "evaluated" else math.inf

    @property
    def believed(self) -> float:
        """Fitness over all text that it was measured on, the fresh text included."""
        if self.fresh is None or self.fresh.nll is None:
            return self.fitness
        tokens = self.evaluation.tokens, self.fresh.tokens
        return (self.fitness * tokens[0] + self.fresh.nll * tokens[1]) / sum(tokens)

    def to_dict(self) -> dict:
        """Plain data; without the seconds of its measurements and a traceback, which are others every time."""
        data = asdict(self)
        del data["traceback"]
        for name in ("evaluation", "fresh"):
            if data[name] is not None:
                del data[name]["seconds"], data[name]["poison"], data[name]["traceback"]  # of a success
        return data

    @classmethod
    def from_dict(cls, data: dict) -> Candidate:
        data = dict(data)
        data["parents"] = tuple(data["parents"])
        data["salvaged"] = tuple(data.get("salvaged", ()))
        if data["algorithm"] is not None:
            data["algorithm"] = Algorithm.from_dict(data["algorithm"])
        for name in ("evaluation", "fresh"):
            if data[name] is not None:
                data[name] = Evaluation.from_dict(data[name])
        return cls(**data)


def mask_distance(one: str, other: str) -> float:
    """Share of probe weights on which two packed masks (hexadecimal) differ, 0 to 1."""
    if len(one) != len(other) or not one:
        return math.nan
    return (int(one, 16) ^ int(other, 16)).bit_count() / (4 * len(one))


def paired_difference(child: Evaluation, parent: Evaluation) -> tuple[float, float]:
    """Mean and standard error (nats per token) of child − parent over the windows that both measured."""
    differences = [c - p for c, p in zip(child.window_nlls, parent.window_nlls, strict=True)]
    mean, count = child.nll - parent.nll, len(differences)
    if count < 2:
        return mean, math.inf
    centre = sum(differences) / count
    return mean, math.sqrt(sum((d - centre) ** 2 for d in differences) / (count - 1) / count)


def noise_bound(error: float, windows: int) -> float:
    """What a mean of paired differences stays below 19 times of 20 where there is no difference: its standard error
    times Student's t for so many windows, 2.1 for 16 and 12.7 for two. Infinite for one window."""
    from scipy.special import stdtrit

    return error * float(stdtrit(windows - 1, 0.975)) if windows > 1 else math.inf


def finite(value):
    """The value; None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_lines(items: Sequence[dict]) -> str:
    """A JSON array with a line for each item."""
    return "[\n" + ",\n".join(map(json.dumps, items)) + "\n]"


class Lineage:
    """A `networkx.DiGraph` whose nodes are candidates in proposal order and whose edges point from parent to child."""

    def __init__(self) -> None:
        self.graph = nx.DiGraph()
        self._ranked: list[Candidate] = []  # those that have a fitness, best first
        self._generations: dict[int, list[Candidate]] = {}

    def add(self, candidate: Candidate) -> None:
        """With the status that it keeps."""
        if candidate.id in self.graph:
            raise ValueError(f"there is a candidate {candidate.id} already")
        candidate.prompt = sys.intern(candidate.prompt)  # many answers have one prompt
        self.graph.add_node(candidate.id, candidate=candidate)
        self._generations.setdefault(candidate.generation, []).append(candidate)
        if candidate.status == "evaluated":
            bisect.insort_right(self._ranked, candidate, key=lambda c: c.fitness)
        for parent in candidate.parents:
            self.graph.add_edge(parent, candidate.id, **self._edge(self[parent], candidate))

    @staticmethod
    def _edge(parent: Candidate, child: Candidate) -> dict:
        """What the edge says: operator, hypothesis, verdict; effect in nats, its standard error, where errors moved."""
        edge = {"operator": child.operator, "hypothesis": child.hypothesis, "verdict": child.status}
        if child.mask and parent.mask:
            edge["mask_distance"] = mask_distance(child.mask, parent.mask)
        if child.status != "evaluated" or parent.status != "evaluated":
            return edge
        effect, error = paired_difference(child.evaluation, parent.evaluation)
        edge |= {"effect": effect, "effect_error": error}
        edge["verdict"] = "inconclusive" if abs(effect) <= error else "confirmed" if effect < 0 else "refuted"
        pairs = zip(child.evaluation.block_errors, parent.evaluation.block_errors, strict=False)
        moved = [c - p for c, p in pairs]
        if moved:
            edge["most_improved_block"] = min(range(len(moved)), key=moved.__getitem__)
            edge["most_worsened_block"] = max(range(len(moved)), key=moved.__getitem__)
        return edge

    def __getitem__(self, name: str) -> Candidate:
        return self.graph.nodes[name]["candidate"]

    def __contains__(self, name: str) -> bool:
        return name in self.graph

    def __iter__(self) -> Iterator[Candidate]:
        """Candidates in the order in which they were proposed."""
        return (data["candidate"] for _, data in self.graph.nodes(data=True))

    def __len__(self) -> int:
        return self.graph.number_of_nodes()

    def evaluated(self) -> list[Candidate]:
        """Candidates that have a fitness, best first; ties in proposal order."""
        return list(self._ranked)

    def of_generation(self, generation: int) -> list[Candidate]:
        return list(self._generations.get(generation, ()))

    def best(self) -> Candidate:
        """Of those that were measured again on fresh text the best over all text; without any, the best."""
        measured = self.evaluated()
        return min([c for c in measured if c.fresh is not None] or measured, key=lambda c: c.believed)

    def edge(self, parent: str, child: str) -> dict:
        return self.graph.edges[parent, child]

    def children(self, name: str) -> list[Candidate]:
        return [self[child] for child in self.graph.successors(name)]

    def contrast(self, name: str) -> list[Candidate]:
        """The best and the worst measured child, where there are two."""
        measured = sorted((c for c in self.children(name) if c.status == "evaluated"), key=lambda c: c.fitness)
        return list({c.id: c for c in measured[:1] + measured[-1:]}.values())

    def failures(self, name: str) -> list[Candidate]:
        """Children that came to nothing: refused, stopped by a cheap fidelity, or measured and worse."""
        return [
            child
            for child in self.children(name)
            if child.status in ("invalid", "screened", "failed", "poison")
            or self.edge(name, child.id)["verdict"] == "refuted"
        ]

    def ancestors_path(self, name: str) -> list[Candidate]:
        """From the oldest ancestor down to the candidate, along first parents."""
        path = [self[name]]
        while path[0].parents:
            path.insert(0, self[path[0].parents[0]])
        return path

    def to_dict(self) -> dict:
        """For JSON: what is not finite, such as the standard error of one window, is None."""
        edges = [
            {"parent": p, "child": c, **{name: finite(value) for name, value in data.items()}}
            for p, c, data in self.graph.edges(data=True)
        ]
        return {"candidates": [c.to_dict() for c in self], "edges": edges}

    def to_json(self) -> str:
        """`to_dict` with a line for each candidate and each edge."""
        data = self.to_dict()
        return f'{{"candidates": {json_lines(data["candidates"])}, "edges": {json_lines(data["edges"])}}}\n'

    @classmethod
    def from_dict(cls, data: dict) -> Lineage:
        """Edges are computed anew from the candidates, so they cannot disagree with them."""
        lineage = cls()
        for candidate in data["candidates"]:
            lineage.add(Candidate.from_dict(candidate))
        return lineage


def checkpointed(loaded: Loaded) -> Lineage:
    """The lineage that a checkpoint of a search holds."""
    candidates = [one for part in loaded.parts.values() for one in json.loads(part)]
    fresh = json.loads(loaded.files["fresh.json"])
    return Lineage.from_dict({"candidates": [one | {"fresh": fresh.get(one["id"])} for one in candidates]})
