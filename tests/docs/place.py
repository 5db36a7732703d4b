"""Where the commands of the pages are run: a folder with small models and texts under the names that the pages use."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import torch
from pages import ROOT

from autoprune.actors.evaluator import EvaluatorShard
from autoprune.actors.messages import Evaluation
from autoprune.actors.pool import EvaluatorPool
from autoprune.actors.replica import split_windows
from autoprune.models.export import export
from autoprune.models.loading import resolve_model
from autoprune.models.masking import planned_sparsities
from autoprune.pipeline.cli import main

# What makes a search, a comparison and pruning short. What a search or a comparison sets itself counts more.
SEARCH = {
    "generator.kind": "scripted",
    "generator.answers": "configs/smoke_answers.txt",
    "evaluators.shards": 1,
    "data.context": 32,
    "data.calibration_windows": 2,
    "data.fitness_windows": 3,
    "data.report_windows": 2,
    "search.seeds": ["wanda"],
    "search.generations": 1,
    "search.candidates": 1,
    "search.prompts": 2,
    "search.answers": 2,
    "search.rounds": 1,
    "search.tuning": 1,
    "search.cheap_windows": 1,
    "search.fresh_windows": 1,
    "search.sensitivity": False,
}
PRUNE = ["--windows", "2", "--calibration", "wikipedia.jsonl[0:40]"]
COMPARE = {
    "sparsities": [0.5],
    "evaluations": 2,
    "data.context": 32,
    "data.calibration_windows": 2,
    "data.fitness_windows": 2,
    "data.report_windows": 2,
}
SENTENCE = "The quick brown fox jumps over the lazy dog, and {} of them look on while the sun goes down. "


class PoolHere(EvaluatorPool):
    """One real shard in this process: actors take seconds to start, and a page has a dozen searches."""

    def start(self) -> None:
        plan = self.plan
        self._shard = EvaluatorShard(plan.model, 0, plan.bounds[-1][1], plan.dtype, "cpu", torch.get_num_threads())
        tokens = plan.splits["calibration"]
        self._shard.calibrate(tokens, plan.statistics, plan.features)
        if "g_rms" in plan.statistics:
            self._shard.backward(tokens)
        self._profiles = self._shard.ready().profiles
        self.dense = {split: self._forward(split) for split in plan.splits if split != "calibration"}

    def _forward(self, split, algorithm=None, sparsities=None) -> Evaluation:
        tokens = split_windows(self.plan.splits, split)
        return self._collect(split, [self._shard.forward(split, tokens, tokens, algorithm, sparsities)[1]])

    def evaluate(self, jobs, split="fitness", sparsity=None):
        for index, job in enumerate(jobs):
            try:
                planned = planned_sparsities(job, self._profiles, sparsity or self.plan.sparsity)
                yield index, self._forward(split, job, planned)
            except ValueError as error:
                yield index, Evaluation(None, 0, error=str(error))

    def probe(self, algorithms):
        return [self._shard.probe(algorithm, self.plan.sparsity) for algorithm in algorithms]

    def export(self, out, algorithm, details):
        planned = planned_sparsities(algorithm, self._profiles, self.plan.sparsity)

        def write(paths):
            return [self._shard.export([paths[0]], algorithm, planned)[0]]

        source = resolve_model(self.plan.model)
        return export(source, out, 1, write, algorithm, self.plan.sparsity, planned, details)


class Place:
    """The folder, and what names in commands stand for there."""

    def __init__(self, folder: Path, tiny: Path, server: str) -> None:
        self.folder = folder
        model = shutil.copytree(tiny, folder / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
        self._names = {
            "/path/or/hub-id": str(model),
            "smollm2-135m-instruct": str(model),
            "qwen2.5-coder-1.5b-instruct": str(shutil.copytree(model, folder / "other")),
            "wikipedia-sample": "wikipedia.jsonl",
            "http://host:8000/v1": server,
            "/mnt/shared": str(folder / "shared"),
        }
        texts = (("wikipedia", 106, 6), ("my", 700, 1), ("unseen", 50, 1))
        for file, (name, documents, sentences) in enumerate(texts):  # none stands in another one
            first = range(10_000 * file, 10_000 * file + 7 * documents, 7)
            rows = ({"text": "".join(SENTENCE.format(d + s) for s in range(sentences))} for d in first)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree(ROOT / "configs", folder / "configs")
        for file in ("demo.yaml", "compare.yaml"):
            path = folder / "configs" / file
            path.write_text(self.named(path.read_text()))

    def named(self, text: str) -> str:
        for name, here in self._names.items():
            text = text.replace(name, here)
        candidate = next(iter(self.candidates()), "none")
        return re.sub(r"\bg\d\d-c\d\d\b", candidate, text)

    def candidates(self) -> list[str]:
        """Ids in the run that is asked, of those that a language model wrote and that could be read."""
        file = self.folder / "runs" / "demo" / "lineage.json"
        nodes = json.loads(file.read_text())["candidates"] if file.exists() else []
        return [node["id"] for node in nodes if node["algorithm"] and node["operator"] != "seed"]

    def words(self, text: str) -> tuple[list[str], Path | None]:
        """Of an autoprune command, as it is run here, and where its output goes, if not to the terminal."""
        words = shlex.split(self.named(text), comments=True)[1:]
        target = None
        if ">" in words:
            words, (target,) = words[: words.index(">")], words[words.index(">") + 1 :]
        settings = {"search": SEARCH, "compare": COMPARE}.get(words[0], {})
        if words[0] == "search" and words[1].startswith("--"):  # a run goes on as it was
            settings = {}
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        few = PRUNE if words[0] == "prune" else []
        return [*words[:2], *sets, *words[2:], *few], self.folder / target if target else None

    def clear(self, words: list[str]) -> None:
        """Room for what a command makes: the place has runs of these names from the start."""
        if "--out" in words:
            shutil.rmtree(self.folder / words[words.index("--out") + 1], ignore_errors=True)
        if words[0] == "search" and "--resume" not in words:
            names = [word.partition("=")[2] for word in words if word.startswith("name=")]
            shutil.rmtree(self.folder / "runs" / (names or ["demo"])[-1], ignore_errors=True)

    def search(self, *sets: str, config: str = "configs/demo.yaml") -> int:
        """A search from settings alone."""
        words, _ = self.words(shlex.join(["autoprune", "search", config, *sets]))
        self.clear(words)
        return main(words)
