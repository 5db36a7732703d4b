"""Searches in processes of their own: how they are called, who is left of them, and what they leave on disk."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from autoprune.pipeline.checkpoint import Journal

ROOT = Path(__file__).parents[1]
LAST = 3  # generation of the searches that `brief` describes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "autoprune", *map(str, arguments)]


def settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def search_command(config: str, runs: Path, *pairs: str) -> list[str]:
    return command("search", ROOT / "configs" / config, *settings(f"runs={runs}", *pairs))


def brief(model: Path) -> list[str]:
    """Settings of configs/smoke.yaml with which a search lasts little longer than its start: who is killed in it, and
    goes on, matters, not what it finds."""
    return [
        f"target.model={model}",
        "data.context=64",
        "data.calibration=wikipedia-sample[0:2]",
        "data.fitness=wikipedia-sample[40:42]",
        "data.report=wikipedia-sample[70:71]",
        "data.report_windows=1",
        "search.sensitivity=false",
        "search.seeds=[wanda]",
        f"search.generations={LAST}",
    ]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, **options)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, otherwise: str, patience: float = 300.0) -> None:
    """Until something has happened. Fails with `otherwise` after `patience` seconds, and where the process ends."""
    deadline = time.monotonic() + patience
    while not happened():
        assert process.poll() is None, f"{otherwise}: ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{otherwise}: waited {patience:g} s"
        time.sleep(0.02)


def wait_for_answers(folder: Path, generation: int, process: subprocess.Popen) -> None:
    """Until the search in `folder` has its answers of a generation, and begins to measure them. `process` lives as long
    as it does."""
    journal = folder / "journal.jsonl"
    wanted = f'"kind": "answers", "generation": {generation},'.encode()
    wait_for(
        lambda: journal.exists() and wanted in journal.read_bytes(), process, f"no answers of generation {generation}"
    )


def processes_of(folder: Path, kind: str = "") -> list[int]:
    """Processes whose environment or command names the folder, and whose command holds `kind`; this one aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            words = (entry / "cmdline").read_bytes()
            text = words + (entry / "environ").read_bytes()
        except OSError:
            continue
        named = str(folder).encode() in text and kind.encode() in words
        if state != "Z" and named and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def no_process_of(folder: Path, kind: str = "", patience: float = 30.0) -> bool:
    """Whether, within `patience` seconds, none of `processes_of` is left."""
    # Ray's own agents notice only after a while that their raylet is gone.
    agents = "DashboardAgent", "RuntimeEnvAgent"
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        late = {pid for agent in agents for pid in processes_of(folder, agent)}
        if not set(processes_of(folder, kind)) - late:
            return True
        time.sleep(0.5)
    return False


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in Journal(folder / "journal.jsonl") if record["kind"] == kind]


def measured_keys(folder: Path) -> list[tuple[str, str]]:
    return [(record["key"], record["split"]) for record in records(folder, "evaluation")]


def lineage_without_clock(folder: Path) -> dict:
    lineage = json.loads((folder / "lineage.json").read_text())
    assert len(lineage["candidates"]) > 3
    for candidate in lineage["candidates"]:
        (candidate["evaluation"] or {}).pop("seconds", None)
    return lineage


def check_stopped(folder: Path) -> None:
    """A search that was stopped or killed was in the midst of its work."""
    assert not (folder / "report.md").exists(), "it had ended"
    assert not (folder / "checkpoint" / f"generation-{LAST:04}").exists(), "nothing but the report was left to do"


def check_same_end(folder: Path, whole: Path) -> None:
    """A disturbed search found what the whole one did, and asked and measured nothing twice on the way."""
    keys = measured_keys(folder)
    assert len(keys) == len(set(keys)), "a finished candidate was evaluated again"
    assert sorted(keys) == sorted(measured_keys(whole))
    asked = [(record["generation"], record["round"], record["what"]) for record in records(folder, "answers")]
    assert len(asked) == len(set(asked)), "answers were asked for again"
    assert lineage_without_clock(folder) == lineage_without_clock(whole)
    table = [json.loads((run / "report.json").read_text())["table"] for run in (folder, whole)]
    assert table[0] == table[1]


def mlflow_run(folder: Path):
    """The run that stands for a search, as MLflow has it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    return client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
