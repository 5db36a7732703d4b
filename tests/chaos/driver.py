"""The driver of a search that is to be disturbed: real Ray, real shards of a tiny model, answers that an actor gives
from a script; some candidates are slow, hang, crash or eat memory. `driver.py ADDRESS FOLDER MODEL` begins or goes on.
"""

import sys
from pathlib import Path

import ray
import torch

from autoprune.actors.placement import Layout, reserve
from autoprune.actors.pool import EvaluatorPool
from autoprune.actors.replica import PoolPlan
from autoprune.actors.serving import VllmGenerator
from autoprune.pipeline.config import Config, Data, Evaluators, Generator, SearchPlan, Target
from autoprune.pipeline.search import Search

# Scores, by what happens to whoever runs them: the marker is an exponent, so that each has masks of its own.
SLOW, HANGING, CRASHING, EATING = "1.555", "1.888", "1.666", "1.777"
ANSWER = """Diagnosis: x
Hypothesis: y
Group: {group}
Allocation: sdsa tau=1 m={m} depth=0.5
def score(W, x_norm, x_mean, x_std):
    return {score}
---
"""
DEADLINE = 10.0  # a replica may take ten times as long to start, of which slow machines take half


def answers() -> str:
    exponents = [f"1.{digit}" for digit in range(1, 10)]
    scores = [f"W.abs() ** {e} * x_norm ** {f}" for e, f in zip(exponents, reversed(exponents), strict=True)]
    scores += [f"W.abs() ** {marker} * x_norm.sqrt()" for marker in (SLOW, HANGING, CRASHING, EATING)]
    scores += [f"W.abs() * x_std ** {e}" for e in exponents] + ["W.square() - x_mean", "x_norm * 0"]
    texts = [
        ANSWER.format(group="row" if index % 3 else "matrix", m=round(0.1 + index / 40, 3), score=score)
        for index, score in enumerate(scores)
    ]
    return "".join(texts).removesuffix("---\n")


def evaluator() -> type:
    """Within a function, so that it travels to the actors by value."""
    markers = SLOW, HANGING, CRASHING, EATING

    from autoprune.actors.evaluator import EvaluatorShard

    class Chaotic(EvaluatorShard):
        def forward(self, split, states, tokens, algorithm, sparsities):
            import os
            import resource
            import signal
            import time

            import torch

            slow, hanging, crashing, eating = (algorithm and marker in algorithm.score for marker in markers)
            if slow:
                time.sleep(0.3)
            if hanging:
                time.sleep(10_000)
            if crashing:
                os.kill(os.getpid(), signal.SIGKILL)
            if eating:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28),) * 2)
                torch.ones(1 << 30)
            return super().forward(split, states, tokens, algorithm, sparsities)

    return Chaotic


def engine() -> type:
    class Scripted:
        """Answers as vLLM's actor does, from the options' text."""

        async def start(self, options):
            self.texts = options["texts"]

        async def complete(self, request):
            import asyncio

            from autoprune.actors.messages import Answer

            await asyncio.sleep(0.1)
            indices = range(request.offset, request.offset + request.n)
            return [Answer(self.texts[index % len(self.texts)], 10, 10) for index in indices]

    return Scripted


class Silent:
    """A tracker and a progress; lines go to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def say(self, text):
        with self._file.open("a") as file:
            file.write(text + "\n")

    def candidate(self, *_):
        pass

    generation = step = state = candidate


def main(address: str, folder: Path, model: Path) -> None:
    config = Config(
        name=folder.name,
        runs=str(folder.parent),
        target=Target(str(model), 0.5),
        generator=Generator(kind="vllm", model=str(model), prompt_tokens=100_000, max_model_len=200_000),
        evaluators=Evaluators(shards=2, replicas=2, deadline=DEADLINE, attempts=3),
        data=Data(context=16),
        search=SearchPlan(
            ("magnitude", "wanda", "wanda+sdsa"), generations=5, candidates=5, prompts=3, answers=9, rounds=1, tuning=3,
            repairs=0, cheap_windows=1, lag=1,
        ),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    layout = Layout(2, 2, 1)
    said = Silent(folder / "said.txt")
    places = reserve(layout, 120.0, said.say)
    plan = PoolPlan(
        model=str(model),
        bounds=((0, 2), (2, 4)),
        replicas=2,
        threads=1,
        dtype="float32",
        sparsity=0.5,
        splits={"calibration": tokens, "fitness": tokens, "report": tokens, "fresh": tokens, "probe": tokens[:1]},
        statistics=frozenset(config.search.statistics),
        features=frozenset(),
        deadline=config.evaluators.deadline,
        attempts=config.evaluators.attempts,
        resources=places.evaluator,
        state=str(folder / "actors"),
    )
    pool = EvaluatorPool(plan, said.say, places.replicas, evaluator())
    texts = answers().split("\n---\n")
    generator = VllmGenerator(
        str(model), places.engine, {"texts": texts}, 1, places.engines, report=said.say, actor=engine()
    )
    pool.start()
    generator.wait()
    search = Search(config, folder, generator, pool, said, said)
    search.run()
    (folder / "done").write_text(f"{pool.restarts}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
