"""A comparison in MLflow: a parent run, and a child run for each cell with the same parameters and metrics."""

from __future__ import annotations

from functools import partial

from autoprune.pipeline.comparison import DENSE, Cell, Result
from autoprune.pipeline.comparison_report import perplexity_of, setting_of
from autoprune.pipeline.tracking import PARENT_TAG, MlflowTracker, cut, now


class ComparisonTracker(MlflowTracker):
    """Opens, fails and catches up as the tracker of a search does."""

    kind = "comparison"

    def cell(self, cell: Cell, result: Result) -> None:
        """A child run for a cell. Called again for the same cell, it finds the run that exists."""
        self._do(partial(self._cell, cell, result, now()))

    def _cell(self, cell: Cell, result: Result, end: int) -> None:
        from mlflow.entities import Param

        # Asking the store, not a memory of our own, also finds a child whose creation was cut off by a kill.
        mine = f"tags.`{PARENT_TAG}` = '{self._run_id}' and tags.`autoprune.cell` = '{cell.key}'"
        found = self._client.search_runs([self._experiment_id], mine, max_results=1)
        if found and found[0].info.status in ("FINISHED", "FAILED"):
            return
        if found:
            run_id = found[0].info.run_id
        else:
            tags = self._inherited | {PARENT_TAG: self._run_id, "autoprune.kind": self.kind, "autoprune.cell": cell.key}
            written = {"parameters": setting_of(result), "error": result.error or ""}
            tags |= {f"autoprune.{name}": cut(text) for name, text in written.items() if text}
            start = end - int(result.seconds * 1000)
            run = self._client.create_run(self._experiment_id, start_time=start, run_name=str(cell), tags=tags)
            run_id = run.info.run_id
        params = [Param(name, cut(value)) for name, value in _params(cell).items()]
        self._client.log_batch(run_id, params=params)
        if result.error is None:
            self._log(run_id, _metrics(result), end)
        self._client.set_terminated(run_id, "FAILED" if result.error else "FINISHED", end)


def _params(cell: Cell) -> dict[str, str]:
    """The same keys for every cell, so that runs can be laid side by side."""
    if cell.method is None:
        none = dict.fromkeys(("update", "group", "allocation"), "none")
        return {"model": cell.model, "score": DENSE, **none, "sparsity": "0"}
    return {
        "model": cell.model,
        "score": cell.method.score,
        "update": cell.method.update,
        "group": cell.algorithm.group,
        "allocation": cell.method.allocation,
        "sparsity": f"{cell.target.share:g}",
    }


def _metrics(result: Result) -> dict[str, float]:
    return {
        "perplexity": perplexity_of(result),
        "nll": result.nll,
        "kl": result.kl,
        "sparsity_achieved": result.sparsity,
        "pruning_seconds": result.pruning_seconds,
    }
