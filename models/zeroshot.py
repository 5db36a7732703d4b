"""Zero-shot accuracy on multiple-choice tasks, as lm-evaluation-harness measures it (the optional extra `eval`).

For every document, the answer with the largest log-likelihood given the question is the model's choice. `acc` is the
share of right choices; `acc_norm` is the same after each log-likelihood is divided by its answer's number of
characters, so that long answers are not at a disadvantage (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.models.errors import InputError
from autoprune.models.loading import HUB_ID, HUB_SECONDS, load_config, load_tokenizer, resolve_model
from autoprune.models.pruning import default_device, native_dtype

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# Which metric the papers on pruning report of each of their seven tasks.
METRICS = {
    "boolq": "acc",
    "rte": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
SEVEN = tuple(METRICS)
OTHER_METRICS = ("acc_norm", "acc")  # of any other task: the first of these that it measures
SKLEARNS = {"f1", "mcc"}  # metrics of lm-eval's that take scikit-learn, which is in no lock: nothing else does


@dataclass(frozen=True)
class ZeroShot:
    """A model's accuracy on one task.

    metric: "acc" or "acc_norm". value: from 0 to 1. standard_error: of the mean over samples, None for one sample.
    samples: how many documents were asked about.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.task}: {self.metric} {self.value:.4f}{error} ({self.samples} samples)"


def mean(results: Sequence[ZeroShot]) -> float:
    """Plain mean of the accuracies, each task counting the same whatever its number of samples."""
    return sum(result.value for result in results) / len(results)


def zero_shot(
    model: str,
    tasks: Sequence[str] = SEVEN,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    task_path: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ZeroShot]:
    """Accuracy of a model (bundled name, folder or hub id) on each task, in the order of `tasks`, with no examples.

    tasks: names of multiple-choice tasks of lm-eval, or of task files (*.yaml in lm-eval's format) anywhere below the
    folder `task_path`, which go first. A task file may name Python functions, and those are run: bring only files that
    you trust. limit: only so many documents of each task, the first ones. dtype: what the model computes in ("auto"
    as in `native_dtype`); the log-likelihoods are taken in fp32 whatever it is. No chat template is applied.
    Raises InputError if lm-eval is not installed, for an unknown model or task, a task that measures neither metric,
    and data that cannot be had; all of it before the model is loaded.
    """
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}: expected 1 or more")
    if not tasks:
        raise InputError(f"no task to measure; expected names of tasks, such as {', '.join(SEVEN)}")
    try:
        from lm_eval import evaluate
    except ImportError as error:
        raise InputError(
            f"zero-shot tasks need lm-eval, which is not installed here ({error}); pip install '.[eval]'"
        ) from error
    folder = resolve_model(model)
    with _quiet():
        managers = _managers(task_path, tasks)
        metrics = [_metric(name, managers[name]) for name in tasks]
        loaded = []
        for name in tasks:
            progress(f"loading task {name}")
            loaded.append(_load_task(name, managers[name]))
        progress(f"loading {model}")
        harness = _load_model(folder, native_dtype(dtype), device or default_device(), batch_size)
    results = []
    for name, metric, task in zip(tasks, metrics, loaded, strict=True):
        answer = evaluate(lm=harness, task_dict={"tasks": {name: task}}, limit=limit, log_samples=False)
        # Keys are "metric,filter"; a multiple-choice task has one filter, which may have any name.
        values = {key.partition(",")[0]: value for key, value in answer["results"][name].items()}
        error = values[f"{metric}_stderr"]
        samples = answer["n-samples"][name]["effective"]
        results.append(ZeroShot(name, metric, values[metric], error if samples > 1 else None, samples))
        progress(str(results[-1]))
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings about what its own task files leave out; those of an evaluation are shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _built_in() -> TaskManager:
    """All tasks that come with lm-eval: thousands of files are read, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _managers(task_path: Path | None, tasks: Sequence[str]) -> dict[str, TaskManager]:
    """Which of lm-eval's managers knows each task: that of `task_path`, or the one of all that come with lm-eval."""
    from lm_eval.tasks import TaskManager

    if task_path is not None and not task_path.is_dir():
        raise InputError(f"there is no folder {task_path}; expected one that holds task files (*.yaml)")
    own = TaskManager(include_path=task_path, include_defaults=False)
    managers = {name: own if name in own.task_index else _built_in() for name in tasks}
    for name, manager in managers.items():
        if name not in manager.task_index:
            names = [*own.all_subtasks, *SEVEN, *manager.all_subtasks]
            near = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(
                f"no task {name!r}{hint}; expected tasks of lm-eval, such as {', '.join(SEVEN)}, or of your own files"
            )
    return managers


def _metric(name: str, manager: TaskManager) -> str:
    """Which metric is reported of a task. InputError if it is no single multiple-choice task, or measures neither."""
    if name not in manager.all_subtasks:
        raise InputError(f"{name} is a group of tasks; name those of its tasks that you want")
    settings = manager.task_index[name].cfg
    if settings.get("output_type") != "multiple_choice":
        raise InputError(f"{name} is not a multiple-choice task (output_type: multiple_choice), so it has no accuracy")
    # A task file that lists no metrics measures both.
    measured = [entry["metric"] for entry in settings.get("metric_list") or [{"metric": m} for m in OTHER_METRICS]]
    for metric in (METRICS.get(name), *OTHER_METRICS):
        if metric in measured:
            if SKLEARNS & set(map(str, measured)) and importlib.util.find_spec("sklearn") is None:
                raise InputError(f"the task {name} measures {', '.join(measured)}: pip install scikit-learn first")
            return metric
    raise InputError(f"the task {name} measures {', '.join(map(str, measured))}; expected acc or acc_norm among them")


def _load_task(name: str, manager: TaskManager) -> Task:
    """The task with its data, asked without examples."""
    from huggingface_hub import HfApi, constants

    entry = manager.task_index[name]
    source = str(entry.cfg.get("dataset_path"))
    on_hub = HUB_ID.fullmatch(source) and not Path(source).exists()
    try:
        if on_hub and not constants.HF_HUB_OFFLINE:  # one short question: `datasets` alone retries for half a minute
            HfApi().dataset_info(source, timeout=HUB_SECONDS)
        task = manager.load([name])["tasks"][name]
    except Exception as error:  # the hub's errors, the HTTP library's, those of `datasets`, and of the task's own code
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        if on_hub:
            raise InputError(
                f"cannot get the data of the task {name} from the hub dataset {source} ({reason}); check the network "
                "(HF_HUB_OFFLINE=1 uses a cached copy), or bring a task file with data of your own"
            ) from error
        raise InputError(f"cannot load the task {name} from {entry.yaml_path} ({reason}); correct that file") from error
    task.set_config(key="num_fewshot", value=0)
    return task


def _load_model(folder: Path, dtype: str, device: str, batch_size: int) -> LM:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from autoprune.models.families import is_capped

    class Harness(HFLM):
        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            # Its bar is written several times a second for hours: not into a log.
            return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    attention = "eager" if is_capped(load_config(folder)) else None
    options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    try:
        network = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # safetensors, transformers and torch each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load the model in {folder}: {reason}") from error
    tokenizer = load_tokenizer(folder)
    # What stands before an answer to an empty question. The harness looks for it in the tokenizer alone.
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, network.config.bos_token_id, network.config.eos_token_id)
    return Harness(
        pretrained=network.to(device),
        tokenizer=tokenizer,
        batch_size=batch_size,
        prefix_token_id=next((token for token in known if isinstance(token, int)), 0),
        softmax_dtype="float32",  # sums of log-probabilities in bf16 would be ties where there are none
    )
