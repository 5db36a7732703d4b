"""A search without Ray, vLLM and MLflow: the real shards in this process, scripted answers, a list as tracker."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from autoprune.actors.chance import BY_CHANCE
from autoprune.actors.evaluator import EvaluatorShard
from autoprune.actors.generator import ScriptedGenerator
from autoprune.actors.messages import Evaluation, Probe
from autoprune.actors.pool import split_windows
from autoprune.models.masking import planned_sparsities
from autoprune.pipeline.config import Config, Data, Generator, SearchPlan, Target
from autoprune.pipeline.search import Search

ANSWERS = Path(__file__).parents[2] / "configs" / "smoke_answers.txt"


def small_config(folder: Path) -> Config:
    return Config(
        name="run",
        runs=str(folder),
        target=Target("tiny", 0.5),
        generator=Generator(kind="scripted", answers=str(ANSWERS)),
        data=Data(context=16),
        search=SearchPlan(
            ("magnitude", "wanda", "wanda+sdsa"), generations=3, candidates=2, prompts=2, answers=3, tuning=3
        ),
    )


class LocalEvaluator:
    """The Evaluator protocol over shards in this process, bounds saying where each begins and ends.

    measured: every measurement that was asked for, as (key of the algorithm, split). What was measured or probed before
    is not computed anew, which changes nothing: the shards are deterministic.
    """

    room = 1

    def __init__(
        self, folder: Path, sparsity: float, die_after: int | None = None, bounds: Sequence[int] = (0, 4)
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self._shards = [
            EvaluatorShard(str(folder), start, stop, "float32", "cpu", torch.get_num_threads())
            for start, stop in itertools.pairwise(bounds)
        ]
        self._splits = {s: torch.randint(0, 256, (4, 16), generator=generator) for s in ("fitness", "report", "fresh")}
        tokens, features = torch.randint(0, 256, (4, 16), generator=generator), ("kurtosis", "score_std")
        self._splits["probe"] = tokens[:1]
        states = tokens
        for shard in self._shards:
            states = shard.calibrate(states, {"x_norm", "x_mean", "x_std"}, features)
        self._profiles = [profile for shard in self._shards for profile in shard.ready().profiles]
        self._sparsity = sparsity
        self.dense = {split: self._forward(split, None, None) for split in self._splits}
        self.measured: list[tuple[str, str]] = []
        self._known: dict[tuple, Evaluation | Probe] = {}
        self.die_after = die_after

    def _forward(self, split, algorithm, sparsities) -> Evaluation:
        states = tokens = split_windows(self._splits, split)
        numels, pruned, errors = [], [], []
        for shard in self._shards:
            states, report = shard.forward(split, states, tokens, algorithm, sparsities)
            numels, pruned, errors = numels + report.numels, pruned + report.pruned, errors + report.errors
        nlls = report.window_nlls
        shares = tuple(p / n for p, n in zip(pruned, numels, strict=True))
        sparsity = sum(pruned) / sum(numels)
        return Evaluation(sum(nlls) / len(nlls), 15 * len(nlls), tuple(nlls), shares, tuple(errors), sparsity, 0.5)

    def probe(self, algorithms):
        for algorithm in algorithms:
            if algorithm.key not in self._known:
                self._known[algorithm.key] = self._shards[0].probe(algorithm, self._sparsity)
        return [self._known[algorithm.key] for algorithm in algorithms]

    def evaluate(self, jobs, split="fitness", sparsity=None):
        # The last first: results must be committed in the order of the jobs, whatever order they come in.
        for index in reversed(range(len(jobs))):
            if self.die_after is not None and len(self.measured) >= self.die_after:
                raise KeyboardInterrupt
            self.measured.append((jobs[index].key, split))
            place = (jobs[index].key, split, sparsity or self._sparsity)
            if place not in self._known:
                sparsities = planned_sparsities(jobs[index], self._profiles, place[2])
                self._known[place] = self._forward(split, jobs[index], sparsities)
            yield index, self._known[place]


class ListTracker:
    def __init__(self) -> None:
        self.candidates, self.generations = [], []

    def candidate(self, candidate, edges):
        self.candidates.append((candidate.id, len(edges)))

    def generation(self, index, metrics):
        self.generations.append((index, metrics))


class SilentProgress:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text):
        self.said.append(text)

    def step(self, what, done, total):
        pass

    def state(self, facts):
        self.facts = facts


def local_search(folder: Path, evaluator: LocalEvaluator, config: Config | None = None) -> Search:
    """config: other than `small_config`, in the same folder."""
    config = config or small_config(folder)
    config.folder.mkdir(parents=True, exist_ok=True)
    chance = BY_CHANCE.get(config.generator.kind)
    generator = chance(config.seed) if chance else ScriptedGenerator(Path(config.generator.answers))
    return Search(config, config.folder, generator, evaluator, ListTracker(), SilentProgress())


def finished(folder: Path, evaluator: LocalEvaluator) -> Search:
    search = local_search(folder, evaluator)
    search.run()
    return search


def without_clock(lineage) -> str:
    return json.dumps(lineage.to_dict(), sort_keys=True)
