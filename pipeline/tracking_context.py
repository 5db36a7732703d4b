"""What MLflow is told of a search beside its candidates: the code, the texts, the models, and the machine's load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import autoprune

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOT = Path(__file__).parents[1]
DIGEST = 32  # characters of a text's sha256: MLflow takes 36 at most
PERIOD = 15.0  # seconds between two looks at the machine
MOST_SAMPLES = 20  # that are written at a time; of more, evenly spaced ones


def source_tags() -> dict[str, str]:
    """User, program and git commit, as MLflow has them, whether files differ from that commit, our version, and the
    hash of the locks that the environment is made from."""
    from mlflow.tracking.context.registry import resolve_tags

    tags = dict(resolve_tags()) | {"autoprune.version": autoprune.__version__}
    if (ROOT / ".git").exists():  # an installed package may lie within somebody else's repository
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
            changed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
            tags["autoprune.git_dirty"] = str(bool(changed.strip())).lower()
    locks = sorted((ROOT / "deploy" / "locks").glob("*.txt"))
    if locks:
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in locks)).hexdigest()
        tags["autoprune.lock"] = digest[:16]
    return tags


def log_inputs(
    client: MlflowClient, run_id: str, experiment_id: str, texts: Mapping[str, tuple[str, str]], models: Sequence[str]
) -> None:
    """The texts and the models that a search stands on, as inputs of its run.

    texts: split → (corpus, sha256). models: names of the unpruned ones.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, LoggedModelStatus

    datasets = [
        DatasetInput(
            Dataset(corpus[-500:], digest[:DIGEST], "corpus", json.dumps({"corpus": corpus, "sha256": digest})),
            [InputTag("mlflow.data.context", split)],
        )
        for split, (corpus, digest) in texts.items()
    ]
    logged = []
    for model in models:
        name = re.sub(r"[^\w-]+", "-", Path(model).name)  # MLflow takes no dot here
        entry = client.create_logged_model(
            experiment_id, name=name, tags={"autoprune.model": model}, model_type="unpruned"
        )
        client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)
        logged.append(LoggedModelInput(entry.model_id))
    client.log_inputs(run_id, datasets=datasets, models=logged)


class SystemSamples:
    """Looks at the driver's machine every PERIOD seconds, in a thread of its own. What it sees is taken by whoever
    writes: a database has one writer."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no GPU, or not the library that asks it
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            self._monitors.append(GPUMonitor())
        self._samples: list[tuple[int, dict[str, float]]] = []
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            with contextlib.suppress(Exception):  # a look that fails is one look less
                self._look()

    def _look(self) -> None:
        seen: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            seen |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._samples.append((time.time_ns() // 1_000_000, seen))

    def take(self) -> list[tuple[int, dict[str, float]]]:
        """(milliseconds since 1970, metrics) of the looks since the last call, at most MOST_SAMPLES."""
        samples, self._samples = self._samples, []
        step = -(-len(samples) // MOST_SAMPLES) if samples else 1
        return samples[::step]

    def end(self) -> None:
        self._ended.set()
