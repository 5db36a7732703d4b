"""A long search, to see what grows with it: memory of the driver, and what MLflow and checkpoints cost.

    python bench/scaling/long.py runs/long                      # 10,000 candidates
    python bench/scaling/long.py runs/long --candidates 1000

Everything is real but the models: evaluators in Ray prune a tiny one, written on the spot, so that nearly all of the
time is overhead, and a genetic generator writes.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tests"))  # where tiny models are made

POINTS = 10  # at which memory is told


def texts(folder: Path) -> dict[str, Path]:
    """Three files of sentences of made-up words."""
    rng, files = random.Random(0), {}
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(300)]
    for name in ("calibration", "fitness", "report"):
        documents = [" ".join(rng.choices(words, k=400)) for _ in range(40)]
        files[name] = folder / f"{name}.txt"
        files[name].write_text("\n\n".join(documents))
    return files


class Clock:
    """Seconds spent inside functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: type, name: str, label: str) -> None:
        function: Callable = getattr(owner, name)

        def timed(*arguments, **named):
            began = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.monotonic() - began

        setattr(owner, name, timed)


def resident() -> float:
    """Memory of this process, MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--each", type=int, default=50, help="answers of a generation")
    options = parser.parse_args()

    import yaml
    from tiny import save_tiny_model

    from autoprune.pipeline.checkpoint import Journal
    from autoprune.pipeline.config import load_config
    from autoprune.pipeline.launch import run_search
    from autoprune.pipeline.progress import ConsoleProgress
    from autoprune.pipeline.search import Search
    from autoprune.pipeline.tracking import MlflowTracker

    runs = options.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    model = runs / "tiny"
    if not model.exists():
        save_tiny_model(model)
    files = texts(runs)
    config = {
        "name": f"long-{options.candidates}",
        "runs": str(runs),
        "target": {"model": str(model), "sparsity": 0.5, "dtype": "float32"},
        "generator": {"kind": "genetic"},
        "evaluators": {"shards": 1, "replicas": 2},
        "data": {
            "context": 32,
            "calibration_windows": 8,
            "fitness_windows": 8,
            "report_windows": 8,
            **{name: str(path) for name, path in files.items()},
        },
        "search": {
            "seeds": ["magnitude", "wanda", "wanda+sdsa"],
            "generations": options.candidates // options.each,
            "answers": options.each,
            "candidates": options.each,
            "prompts": 5,
            "rounds": 1,
            "cheap_windows": 2,
            "fresh_windows": 4,
            "tuning": 5,
        },
    }
    (runs / "long.yaml").write_text(yaml.safe_dump(config))

    clock, memory, began = Clock(), [], time.monotonic()
    clock.around(MlflowTracker, "candidate", "MLflow")
    clock.around(MlflowTracker, "generation", "MLflow")
    clock.around(MlflowTracker, "finish", "MLflow")
    clock.around(Search, "_save", "checkpoints")
    clock.around(Journal, "append", "journal")
    step = max(1, config["search"]["generations"] // POINTS)
    tell = Search._tell

    def telling(search: Search, generation: int, *winner) -> None:
        tell(search, generation, *winner)
        if generation % step == 0 and (not memory or memory[-1][0] != generation):
            evaluated = len(search.lineage.evaluated())
            memory.append((generation, len(search.lineage), evaluated, resident(), time.monotonic() - began))

    Search._tell = telling
    run_search(load_config(runs / "long.yaml"), False, ConsoleProgress())
    total = time.monotonic() - began
    print("| generation | candidates | with a fitness | driver, MB | s |\n|---:|---:|---:|---:|---:|")
    for generation, candidates, evaluated, size, at in memory:
        print(f"| {generation} | {candidates:,} | {evaluated:,} | {size:,.0f} | {at:,.0f} |")
    shares = ", ".join(f"{name} {spent:.1f} s ({100 * spent / total:.1f}%)" for name, spent in clock.seconds.items())
    print(f"\n{total:.0f} s in all; {shares}")


if __name__ == "__main__":
    main()
