"""A search without Ray, vLLM and MLflow: the real shards in this process, scripted answers, a list as tracker."""

from pathlib import Path

import torch

from autoprune.actors.evaluator import EvaluatorShard
from autoprune.actors.generator import GrammarGenerator, ScriptedGenerator
from autoprune.actors.messages import Evaluation
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
        search=SearchPlan(("magnitude", "wanda", "wanda+sdsa"), generations=3, candidates=2, prompts=2, answers=3),
    )


class LocalEvaluator:
    """The Evaluator protocol over one shard in this process. `measured` counts how often each algorithm ran."""

    def __init__(self, folder: Path, sparsity: float, die_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._shard = EvaluatorShard(str(folder), 0, 4, "float32", "cpu", torch.get_num_threads())
        self._splits = {s: torch.randint(0, 256, (4, 16), generator=generator) for s in ("fitness", "report")}
        tokens, features = torch.randint(0, 256, (4, 16), generator=generator), ("kurtosis", "score_std")
        self._shard.calibrate(tokens, {"x_norm", "x_mean", "x_std"}, features)
        self._profiles = self._shard.profiles()
        self._sparsity = sparsity
        self.dense = {split: self._forward(split, None, None) for split in self._splits}
        self.measured: list[str] = []
        self.die_after = die_after

    def _forward(self, split, algorithm, sparsities) -> Evaluation:
        tokens = self._splits[split]
        _, report = self._shard.forward(split, tokens, tokens, algorithm, sparsities)
        nlls = report.window_nlls
        shares = tuple(p / n for p, n in zip(report.pruned, report.numels, strict=True))
        sparsity = sum(report.pruned) / sum(report.numels)
        return Evaluation(sum(nlls) / len(nlls), 60, tuple(nlls), shares, tuple(report.errors), sparsity, 0.0)

    def probe(self, algorithms):
        return [self._shard.probe(algorithm, self._sparsity) for algorithm in algorithms]

    def evaluate(self, jobs, split="fitness"):
        # The last first: results must be committed in the order of the jobs, whatever order they come in.
        for index in reversed(range(len(jobs))):
            if self.die_after is not None and len(self.measured) >= self.die_after:
                raise KeyboardInterrupt
            self.measured.append(jobs[index].key)
            sparsities = planned_sparsities(jobs[index], self._profiles, self._sparsity)
            yield index, self._forward(split, jobs[index], sparsities)


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


def local_search(folder: Path, evaluator: LocalEvaluator, config: Config | None = None) -> Search:
    """config: other than `small_config`, in the same folder."""
    config = config or small_config(folder)
    config.folder.mkdir(parents=True, exist_ok=True)
    by_chance = config.generator.kind == "grammar"
    generator = GrammarGenerator(config.seed) if by_chance else ScriptedGenerator(Path(config.generator.answers))
    return Search(config, config.folder, generator, evaluator, ListTracker(), SilentProgress())
