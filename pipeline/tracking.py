"""One MLflow writer beside the search: a parent run for the search, a child run for each measured candidate.

It uses `MlflowClient` with explicit run ids: no active run, nothing global. The search never waits for it for long
and never fails by it: a call that fails is kept and tried again at the next one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.checkpoint import write_atomic
from autoprune.pipeline.lineage import Candidate
from autoprune.pipeline.mirror import MEMORY
from autoprune.pipeline.tracking_context import SystemSamples, log_inputs, source_tags
from autoprune.pipeline.wording import algorithm_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
LOCAL_UI = "http://127.0.0.1:5000"
PARENT_TAG = "mlflow.parentRunId"  # what makes the UI show a run under another
NOTE_TAG = "mlflow.note.content"  # what it shows as a run's description
MEASURED = ("evaluated", "failed", "poison")
VALUE_LENGTH = 500  # of a parameter or a tag: the limit of older servers
DESCRIBED = 4000  # characters of an algorithm in a description; a server takes 5000 for a tag at least
ENDED = ("FINISHED", "FAILED")
PARAMS_PER_BATCH = 100  # the server's limit
METRICS_PER_BATCH = 1000  # the same
REQUEST_TIMEOUT = 10  # seconds; MLflow's own is 120, with 7 retries: minutes in which the search would stand still
PAUSE = 15.0  # seconds for which a store that failed is left alone: each call may take a time-out
FAILURES_PER_CALL = 2  # then give up until the next call, so that a dead store costs two time-outs at most
# Seconds for calls that are due beside the new one: a store that was away for a day gets what it missed bit by bit.
CATCHING_UP, CATCHING_UP_AT_END = 5.0, 60.0
PER_GENERATION = "best_fitness_nll"  # a metric that every generation has


def quiet_mlflow() -> None:
    """Before MLflow is imported: no usage reports, no chatter, no long retries inside a call, and no
    model that would be unpickled."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    import mlflow  # noqa: F401  sets up its loggers, which are then made quiet

    # Not even errors: they reach us as exceptions, and would fill the terminal with tracebacks.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def flatten(config: dict, prefix: str = "") -> dict[str, str]:
    """Nested config as MLflow parameters: `{"a": {"b": 1}}` gives `{"a.b": "1"}`; long values are cut."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = cut(value if isinstance(value, str) else json.dumps(value, default=str))
    return flat


def cut(text: str) -> str:
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("[SQL:")[0].split())[:200] or type(error).__name__


def now() -> int:
    return time.time_ns() // 1_000_000


class MlflowTracker:
    """Writes one search to MLflow.

    uri: `sqlite:////absolute/path/mlflow.db` (artifacts go to `mlartifacts/` beside it) or a server's http(s) address.
    folder: the run folder; `mlflow.json` there remembers the parent run, so that a resumed search goes on with it.
    Raises InputError when the store cannot be opened. After `start`, nothing here raises.
    """

    kind = "search"  # tag of the parent run

    def __init__(self, uri: str, experiment: str, run_name: str, folder: Path) -> None:
        self.uri, self.experiment, self.run_name, self.folder = uri, experiment, run_name, folder
        if not uri.startswith((SQLITE + "/", "http://", "https://")):
            raise InputError(
                f"MLflow store {uri!r} cannot be used: expected sqlite:////absolute/path/mlflow.db or http(s)://server"
            )
        self._statuses: dict[str, str] = {}  # of every candidate seen, for the counts
        self._written: set[str] = set()  # candidates whose child run is complete
        self._doubtful: set[str] = set()  # those that may have a child run that is not
        self._generations: set[int] = set()  # whose metrics are there
        self._opening: Callable[[], None] | None = None  # what a store that was away when a run was resumed has missed
        self._pending: deque[Callable[[], None]] = deque()
        self._warned, self._failed = False, -PAUSE
        quiet_mlflow()
        from mlflow import MlflowClient

        self._client: MlflowClient = self._or_input_error(lambda: MlflowClient(uri))

    def _or_input_error(self, action: Callable):
        try:
            if self.uri.startswith(SQLITE):
                Path(self.uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
            return action()
        except InputError:
            raise
        except Exception as error:  # SQLAlchemy, requests and MLflow each have their own
            raise InputError(
                f"MLflow at {self.uri} cannot be used: {_one_line(error)}; start the server, correct the address, "
                f"or keep the default (a database in the folder of runs)"
            ) from error

    @property
    def ui_command(self) -> str:
        """The shell command that shows this store in a browser (`--port` chooses another port than 5000).

        The UI reads a database's artifacts straight from their folder and answers to localhost only; to look at it from
        another machine, forward the port, or add `--host 0.0.0.0 --allowed-hosts NAME`.
        """
        if self.uri.startswith(SQLITE):
            command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", self.uri, "--workers", "1"]
        else:
            command = [sys.executable, "-m", "webbrowser", self.uri]
        return shlex.join(command)

    @property
    def run_address(self) -> str:
        """Where the UI shows the run: on the server, or on this machine once `ui_command` runs there."""
        server = LOCAL_UI if self.uri.startswith(SQLITE) else self.uri.rstrip("/")
        return f"{server}/#/experiments/{self._experiment_id}/runs/{self._run_id}"

    # Opening

    def start(
        self, config: dict, texts: Mapping[str, tuple[str, str]] | None = None, models: Sequence[str] = ()
    ) -> None:
        """Open the parent run, or the one that `mlflow.json` remembers, with the flattened config as parameters, and
        texts and models as its inputs (see `log_inputs`).

        Raises InputError when the store is not there: at the start a person is present who can put it right. A run that
        is remembered goes on without it, as a job does that is tried again at night.
        """
        self._source = source_tags() | {"autoprune.kind": self.kind}
        self._samples = SystemSamples()
        opening = partial(self._start, config, texts or {}, models)
        memory = self._memory()
        if memory is None:
            self._or_input_error(opening)
            return
        self._experiment_id, self._run_id = memory["experiment_id"], memory["run_id"]
        try:
            opening()
        except InputError:  # the store answered, and cannot be used
            raise
        except Exception as error:  # SQLAlchemy, requests and MLflow each have their own
            self._fail(error)
            self._opening = opening

    def _start(self, config: dict, texts: Mapping[str, tuple[str, str]], models: Sequence[str]) -> None:
        from mlflow.entities import Param

        self._experiment_id = self._find_experiment()
        run = self._remembered_run()
        if run is None:
            run = self._client.create_run(self._experiment_id, run_name=self.run_name, tags=self._source)
            self._write_memory(run.info.run_id)
            log_inputs(self._client, run.info.run_id, self._experiment_id, texts, models)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
            self._find_children(run.info.run_id)
        self._run_id = run.info.run_id
        # A parameter cannot be changed, so a resumed run keeps those that it has.
        params = [Param(k, v) for k, v in flatten(config).items() if k not in run.data.params]
        for first in range(0, len(params), PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params[first : first + PARAMS_PER_BATCH])

    def _find_experiment(self) -> str:
        found: Experiment | None = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            location = None  # a server chooses its own
            if self.uri.startswith(SQLITE):
                location = (Path(self.uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}  # of MLflow's two views the one with charts
            return self._client.create_experiment(self.experiment, artifact_location=location, tags=kind)
        if found.lifecycle_stage != "active":
            raise InputError(f"MLflow experiment {self.experiment!r} was deleted; restore it or choose another name")
        return found.experiment_id

    def _remembered_run(self):
        from mlflow.exceptions import MlflowException

        memory = self._memory()
        if memory is None or memory["experiment_id"] != self._experiment_id:
            return None
        try:
            run = self._client.get_run(memory["run_id"])
            return run if run.info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        return None

    def _memory(self) -> dict[str, str] | None:
        """The parent run of an earlier sitting in this store."""
        try:
            memory = json.loads((self.folder / MEMORY).read_text())
            return memory if memory["uri"] == self.uri else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.folder / MEMORY} is damaged: without it the search goes on in a new run") from None

    def _write_memory(self, run_id: str) -> None:
        memory = {"uri": self.uri, "experiment_id": self._experiment_id, "run_id": run_id}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / MEMORY, json.dumps(memory, indent=1).encode())

    @property
    def _inherited(self) -> dict[str, str]:
        """Of the parent's tags, those that a child has too: MLflow's own, such as the user and the commit."""
        return {name: value for name, value in self._source.items() if name.startswith("mlflow.")}

    def _find_children(self, run_id: str) -> None:
        """What the store has of an earlier sitting, in a few requests and not one for each candidate."""
        self._generations = {metric.step for metric in self._client.get_metric_history(run_id, PER_GENERATION)}
        token = None
        while True:
            mine = f"tags.`{PARENT_TAG}` = '{run_id}'"
            page = self._client.search_runs([self._experiment_id], mine, max_results=1000, page_token=token)
            for run in page:
                if run.info.status in ENDED:
                    self._written.add(run.data.tags.get("autoprune.candidate", ""))
                else:
                    self._doubtful.add(run.data.tags.get("autoprune.candidate", ""))
            token = page.token
            if not token:
                return

    # Writing

    def candidate(self, candidate: Candidate, edges: list[dict]) -> None:
        """A child run for a candidate that was measured, or failed while it was; the others are only counted.

        edges: `Lineage.edge(parent, candidate.id)` for each of its parents, in their order. Called again for the same
        candidate, it finds the child run that exists.
        """
        self._statuses[candidate.id] = candidate.status
        if candidate.status in MEASURED:
            self._do(partial(self._candidate, candidate, edges, now()))

    def generation(self, index: int, metrics: dict[str, float]) -> None:
        """Metrics of one generation, on the parent run with step = index, and the machine's load since the last. Told
        again of the same generation, it writes only what is not there."""
        self._do(partial(self._generation, index, metrics, now()))
        self._do(partial(self._log_system, self._samples.take()))

    def finish(
        self,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        metrics: dict[str, float],
        artifacts: list[Path],
        note: str = "",
    ) -> None:
        """Final metrics, the number of candidates of each status and artifacts on the parent run, then close it.

        note: Markdown that the UI shows as the run's description.
        """
        self._samples.end()
        self._do(partial(self._log_system, self._samples.take()))
        counts = {f"candidates_{name}": float(count) for name, count in Counter(self._statuses.values()).items()}
        self._do(partial(self._finish, status, metrics | counts, artifacts, note, now()), last=True)
        if self._pending:
            logger.warning("MLflow at %s misses %d records; the run folder has them all", self.uri, len(self._pending))

    def _do(self, call: Callable[[], None], last: bool = False) -> None:
        """Make this call, then those that failed before, for a few seconds; one that fails now goes to the end and
        blocks no other.

        Their order does not matter: each carries its own run, step and time. A store that failed is left alone for a
        while, but for the last call.
        """
        self._pending.appendleft(call)
        if time.monotonic() - self._failed < PAUSE and not last:
            return
        failures, end = 0, time.monotonic() + (CATCHING_UP_AT_END if last else CATCHING_UP)
        if self._opening is not None:
            if not self._tried(self._opening):
                return
            self._opening = None
        for _ in range(len(self._pending)):
            pending = self._pending.popleft()
            if not self._tried(pending):
                self._pending.append(pending)
                failures += 1
                if failures == FAILURES_PER_CALL:
                    return
            if time.monotonic() > end:
                return

    def _tried(self, call: Callable[[], None]) -> bool:
        """Whether a call went well; whatever it fails with, the search goes on."""
        try:
            call()
        except Exception as error:
            self._fail(error)
            return False
        return True

    def _fail(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("MLflow at %s: %s; kept, to be tried again", self.uri, _one_line(error))
            self._warned = True
        self._failed = time.monotonic()

    def _generation(self, index: int, metrics: dict[str, float], timestamp: int) -> None:
        if index not in self._generations:
            self._log(self._run_id, metrics, timestamp, step=index)
            self._generations.add(index)

    def _log(self, run_id: str, metrics: dict[str, float], timestamp: int, step: int = 0) -> None:
        from mlflow.entities import Metric

        # Not every store can hold a NaN or an infinity.
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        batch: list[Metric] = [Metric(name, value, timestamp, step) for name, value in finite.items()]
        self._client.log_batch(run_id, metrics=batch)

    def _log_system(self, samples: list[tuple[int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        batch = [Metric(name, value, at, at) for at, seen in samples for name, value in seen.items()]
        for first in range(0, len(batch), METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=batch[first : first + METRICS_PER_BATCH])

    def _finish(self, status: str, metrics: dict[str, float], artifacts: list[Path], note: str, timestamp: int) -> None:
        if note:
            self._client.set_tag(self._run_id, NOTE_TAG, note)
        self._log(self._run_id, metrics, timestamp)
        for path in artifacts:
            self._client.log_artifact(self._run_id, str(path))
        self._client.set_terminated(self._run_id, status, timestamp)

    def _candidate(self, candidate: Candidate, edges: list[dict], end: int) -> None:
        if candidate.id in self._written:
            return
        found = None
        if candidate.id in self._doubtful:
            # Asking the store, not a memory of our own, also finds a child whose creation was cut off.
            mine = f"tags.`{PARENT_TAG}` = '{self._run_id}' and tags.`autoprune.candidate` = '{candidate.id}'"
            found = next(iter(self._client.search_runs([self._experiment_id], mine, max_results=1)), None)
        self._doubtful.add(candidate.id)
        if found is None:
            seconds = candidate.evaluation.seconds if candidate.evaluation else 0.0
            tags, start = self._inherited | self._tags(candidate, edges), end - int(seconds * 1000)
            found = self._client.create_run(self._experiment_id, start_time=start, run_name=candidate.id, tags=tags)
        if found.info.status not in ENDED:
            run_id = found.info.run_id
            with tempfile.TemporaryDirectory() as folder:
                for name, text in self._artifacts(candidate, edges).items():
                    (Path(folder) / name).write_text(text, errors="backslashreplace")
                self._client.log_artifacts(run_id, folder)
            self._log(run_id, self._metrics(candidate, edges), end)
            self._client.set_terminated(run_id, "FINISHED" if candidate.status == "evaluated" else "FAILED", end)
        self._written.add(candidate.id)

    def _tags(self, candidate: Candidate, edges: list[dict]) -> dict[str, str]:
        tags = {
            "candidate": candidate.id,
            "parents": ",".join(candidate.parents),
            "generation": str(candidate.generation),
            "operator": candidate.operator,
            "status": candidate.status,
            "verdict": edges[0]["verdict"] if edges else "",
            "mask_hash": candidate.mask_hash,
            "error": candidate.error or "",
        }
        if candidate.algorithm is not None:
            tags["code_hash"] = candidate.algorithm.key
            tags["group"] = candidate.algorithm.group
            tags["allocation"] = str(candidate.algorithm.allocation)
        # An empty tag says nothing in the UI: a seed has no parents and no verdict.
        written = {f"autoprune.{name}": cut(value) for name, value in tags.items() if value}
        return {PARENT_TAG: self._run_id, NOTE_TAG: self._description(candidate), **written}

    @staticmethod
    def _description(candidate: Candidate) -> str:
        """Markdown that the UI shows first. Both parts are fenced, since a language model wrote them."""
        parts = [("text", cut(candidate.hypothesis))]
        if candidate.algorithm is not None:
            parts.append(("python", algorithm_text(candidate.algorithm).rstrip()[:DESCRIBED]))
        fence = "`" * max([3, *(len(run) + 1 for _, text in parts for run in re.findall("`+", text))])
        return "\n\n".join(f"{fence}{kind}\n{text}\n{fence}" for kind, text in parts if text)

    @staticmethod
    def _metrics(candidate: Candidate, edges: list[dict]) -> dict[str, float]:
        evaluation = candidate.evaluation
        if evaluation is None or candidate.status != "evaluated":
            return {}
        metrics = {
            "fitness_nll": evaluation.nll,
            "fitness_perplexity": perplexity(evaluation.nll),
            "sparsity": evaluation.sparsity,
            "evaluation_seconds": evaluation.seconds,
        }
        if edges and "effect" in edges[0]:
            metrics["delta_nll"] = edges[0]["effect"]
        return metrics

    @staticmethod
    def _artifacts(candidate: Candidate, edges: list[dict]) -> dict[str, str]:
        verdict = edges[0]["verdict"] if edges else "none: it has no parent"
        thought = {"Diagnosis": candidate.diagnosis, "Hypothesis": candidate.hypothesis, "Verdict": verdict}
        files = {
            "thought.md": "\n".join(f"## {name}\n\n{text or '(none)'}\n" for name, text in thought.items()),
            "prompt.txt": candidate.prompt,
            "answer.txt": candidate.answer,
            "traceback.txt": candidate.traceback,
        }
        if candidate.algorithm is not None:
            files["algorithm.py"] = algorithm_text(candidate.algorithm)
        return {name: text for name, text in files.items() if text}
