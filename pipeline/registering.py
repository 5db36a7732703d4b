"""The pruned model of a search as an MLflow model, with signature, in the registry: on demand, since it copies all
weights."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

from autoprune.models.errors import InputError
from autoprune.models.export import SIDECAR
from autoprune.pipeline.config import Further
from autoprune.pipeline.mirror import MEMORY
from autoprune.pipeline.run_folder import MODEL
from autoprune.pipeline.tracking import quiet_mlflow

NAME = "pruned"  # of the logged model in its run
# A server that hands gigabytes on to a bucket answers only then; a search must not wait for it so long.
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3600", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}


def register(folder: Path, name: str = "") -> str:
    """Log the model of a finished run to the run's MLflow store, and register it. Returns its address there.

    name: of the registered model; empty: of the target and what it was pruned to. What was logged before is registered
    again as another version, and not copied twice. Raises InputError where the run is not finished, or MLflow has lost
    it.
    """
    added = {setting: value for setting, value in PATIENT.items() if setting not in os.environ}
    os.environ.update(added)
    try:
        return _register(folder, name)
    finally:
        for setting in added:
            del os.environ[setting]


def _register(folder: Path, name: str) -> str:
    try:
        summary = json.loads((folder / "report.json").read_text())
        memory = json.loads((folder / MEMORY).read_text())
        details = json.loads((folder / MODEL / SIDECAR).read_text())
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None) or folder
        raise InputError(f"{folder} holds no finished run ({where} is not there): let the search end first") from None
    target = re.sub(r"[^\w.-]+", "-", Path(summary["target"]).name)
    goal = Further("", summary["sparsity"], summary.get("group", "")).goal
    name = name or f"{target}-pruned-{goal}".replace("%", "").replace(":", "-")
    quiet_mlflow()
    import mlflow
    import mlflow.transformers
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(memory["uri"])
    client = mlflow.MlflowClient(memory["uri"])
    try:
        client.get_run(memory["run_id"])
        found = client.search_logged_models(
            [memory["experiment_id"]],
            f"name = '{NAME}' AND source_run_id = '{memory['run_id']}' AND tags.`autoprune.candidate` = "
            f"'{details['candidate']}'",
        )
        # Not of an upload that was cut off.
        whole = [model for model in found if model.status == LoggedModelStatus.READY]
        if whole:
            model_id = whole[0].model_id
        else:
            with mlflow.start_run(memory["run_id"], log_system_metrics=False):
                model_id = mlflow.transformers.log_model(
                    transformers_model=str(folder / MODEL),
                    name=NAME,
                    task="text-generation",
                    pip_requirements=[f"{package}=={version(package)}" for package in ("torch", "transformers")],
                    tags={"autoprune.candidate": details["candidate"]},
                    metadata={"autoprune": {k: v for k, v in details.items() if k != "layers"}},
                ).model_id
        registered = mlflow.register_model(
            f"models:/{model_id}",
            name,
            tags={
                "autoprune.candidate": details["candidate"],
                "autoprune.report_nll": str(details["perplexity"]["report_nll"]),
                "autoprune.run": summary["name"],
            },
        )
    except MlflowException as error:
        raise InputError(f"MLflow at {memory['uri']} cannot register {name}: {' '.join(str(error).split())}") from None
    return f"models:/{registered.name}/{registered.version}"
