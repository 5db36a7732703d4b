"""The configuration of a search: frozen dataclasses, read by `config_reading`."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from autoprune.algorithms.algorithm import Group
from autoprune.algorithms.scores import halves
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS
from autoprune.models.errors import InputError
from autoprune.models.loading import HUB_ID
from autoprune.pipeline.config_reading import MLFLOW_KEYS, build, check_address, check_name, one_of, plain, read_mapping

GENERATOR_KINDS = ("vllm", "openai", "genetic", "grammar", "scripted")
ALLOCATIONS = ("sdsa", "written")
DESIGNS = ("both", "score", "allocate")
PROMPTS = ("gcot", "topk", "fixed")
FIDELITIES = ("probe", "cheap")
OPERATORS = ("explore", "mutate", "crossover", "simplify", "tune")
SELF = "target"  # as the generator's model: a model designs its own pruning
DTYPES = ("auto", "float32", "bfloat16", "float16")
FREE_GROUP = "free"  # the search chooses among row and matrix


@dataclass(frozen=True)
class Further:
    """Another case in which the algorithm must do well. model: another model; empty: the target's own. group: "n:m",
    by which this case is pruned whatever group and allocation the algorithm has; empty: the target's own."""

    model: str = ""
    sparsity: float = 0.6
    group: str = ""

    @property
    def goal(self) -> str:
        """What is pruned to, for people."""
        return f"{100 * self.sparsity:g}%" if self.group in ("", FREE_GROUP) else self.group


@dataclass(frozen=True)
class Target:
    """The model to prune.

    model: bundled name, local folder or hub id, perhaps with @revision. dtype: what is computed in; "auto" is bfloat16
    where this machine computes it natively, else float32. The pruned checkpoint keeps its own dtype.
    group: where scores compete: "free", over rows or the whole matrix, as the search finds best; or "n:m", such as
    "2:4": of every m consecutive weights of a row n are kept. That leaves no allocation, so a score alone is designed,
    from seeds without one; sparsity, search.design and search.seeds follow from it where a file leaves them out.
    further: other models and sparsities; with any, fitness is nats above the dense model, of the "worst" of all cases
    or their "mean", as `combine` says.
    """

    model: str = "smollm2-135m-instruct"
    sparsity: float = 0.6
    dtype: str = "float32"
    further: tuple[Further, ...] = ()
    combine: str = "worst"
    group: str = FREE_GROUP

    @property
    def every(self) -> tuple[Further, ...]:
        """All cases, the target's own first, with what they leave out."""
        others = (Further(c.model or self.model, c.sparsity, c.group or self.group) for c in self.further)
        return (Further(self.model, self.sparsity, self.group), *others)

    @property
    def goal(self) -> str:
        """What the model is pruned to, for people."""
        return self.every[0].goal

    @property
    def combined(self) -> str:
        """How fitness is made of several cases, "worst" or "mean"; empty where there is one."""
        return self.combine if self.further else ""

    @property
    def cases(self) -> tuple[str, ...]:
        """What fitness is of, for people, where it is of several."""
        if not self.further:
            return ()
        # Two organisations may have a model of one name.
        names = Counter(Path(model).name for model in {case.model for case in self.every})
        shown = {c.model: c.model if names[Path(c.model).name] > 1 else Path(c.model).name for c in self.every}
        return tuple(f"{shown[case.model]} to {case.goal}" for case in self.every)


@dataclass(frozen=True)
class Generator:
    """Who writes candidates.

    kind: "vllm" serves `model` in a Ray actor, "openai" asks the server at `base_url` for `model` (its key is read
    from the environment variable `api_key_variable`), "genetic" varies the parents and "grammar" draws from the
    grammar, both at random, without a language model, "scripted" reads `answers`, a file.
    model: bundled name, local folder or hub id; "target": the model that is pruned designs its own pruning.
    temperature: of the first round; it rises by `heat` with each further round of a generation.
    prompt_tokens: that a prompt may have; the oldest evidence is dropped first.
    max_model_len (of prompt and answer together), kv_cache_gib (on a CPU) and engine (further arguments of vLLM's
    AsyncEngineArgs) are for "vllm". So are engines: so many of them share the prompts, each on tensor_parallel GPUs, or
    on a part of one (gpus_per_engine; 0: as large a share of the cluster's as every other actor); and sleeps: they
    leave the GPU's memory to evaluators while they do not write. deadline: seconds that a round's answers may take
    before an engine is started again, or a server taken to be away.
    """

    kind: str = "vllm"
    model: str = "qwen2.5-coder-1.5b-instruct"
    base_url: str = "http://127.0.0.1:8000/v1"
    api_key_variable: str = "OPENAI_API_KEY"
    answers: str = ""
    temperature: float = 0.9
    heat: float = 0.15
    max_tokens: int = 400
    prompt_tokens: int = 2048
    max_model_len: int = 4096
    kv_cache_gib: int = 1
    engines: int = 1
    tensor_parallel: int = 1
    gpus_per_engine: float = 0.0
    sleeps: bool = False
    deadline: float = 1800.0
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluators:
    """The actors that measure candidates: `replicas` pipelines of `shards` actors.

    threads: of each actor, on a CPU, where those with a GPU factor what h_inv_diag takes. gpus_per_shard: a GPU for
    each actor (1), or a part of one; 0: an equal share of those that the cluster has when the search starts, between
    all actors, one at most. wait: seconds for which a search waits for the cluster to have room. deadline: seconds that
    a replica may take for one candidate before it is replaced; attempts: how often a candidate may cause that before it
    is given up.
    """

    shards: int = 2
    replicas: int = 1
    threads: int = 1
    gpus_per_shard: float = 0.0
    wait: float = 600.0
    deadline: float = 600.0
    attempts: int = 3


@dataclass(frozen=True)
class Data:
    """Three splits of text that must not overlap: what calibrates, what the search sees, and what it never sees.

    Each is a corpus with an optional slice of documents, cut into windows of `context` tokens, of which so many are
    taken, evenly spaced over the whole text.
    """

    context: int = 512
    calibration: str = "wikipedia-sample[0:40]"
    calibration_windows: int = 32
    fitness: str = "wikipedia-sample[40:70]"
    fitness_windows: int = 8
    report: str = "wikipedia-sample[70:106]"
    report_windows: int = 16


@dataclass(frozen=True)
class SearchPlan:
    """How candidates are proposed.

    seeds: what a search starts from and is compared with: baselines as `score` or `score+allocation`, where either may
    be a file of one's own, such as `my.py+sdsa`; without an allocation, a file's own. generations × candidates new
    algorithms are measured. A round asks `prompts` prompts for `answers` answers in all; a generation has at most
    `rounds` rounds, until it has enough algorithms that are new. repairs: so many invalid answers of a generation are
    asked for once more, with the error.
    elites: how many of the best are parents; with `diversity`, the best of each niche: of algorithms that read the same
    and whose masks on the probe differ by less than `niche_radius`; and prompts for scores offer few statistics then,
    rather those that were hardly tried. trials: measure on the probe's text what one more statistic does to a parent's
    score, tell the prompts that change it, and offer what promises more.
    prompt: "gcot", the reasoning of the graph; "topk", the best algorithms; "fixed", the seeds, the same
    every time. Of the latter two every second asks for a score alone.
    operators: relative frequencies to begin with; with `adapt`, those that improve more per token come more often, and
    a search that stands still explores more. tuning: measurements on the cheap fidelity for one tuned algorithm.
    lag: 1 lets the language model write a generation's first answers while the one before is measured, so that its
    prompts know results up to the one before last; 0 waits.
    fidelities: what a new algorithm must pass before it is measured on the whole fitness split: "probe", the
    likelihood of a short text, which also decides in which group a new score is compared, and "cheap", that of
    `cheap_windows` windows of the fitness split.
    fresh_windows: of the fitness text, between those of the fitness split; at the end the elites are measured on them,
    before one is believed to be the best.
    statistics: what the scores that are written may read beside W (see `algorithms.vocabulary`),
    what the seeds read included; with g_rms, SDSA's `taylor` may be chosen, too. design: what is
    designed: the "score" (and its group), how to "allocate", or "both". allocation: what is written of it: "sdsa", the
    parameters of SDSA, or "written", a function `allocate(profile, sparsity)`.
    sensitivity: at the end, measure on the cheap windows what pruning each block alone costs, for the report.
    """

    seeds: tuple[str, ...] = ("magnitude", "wanda", "wanda+owl", "wanda+sdsa", "ria+sdsa")
    generations: int = 3
    candidates: int = 8
    prompts: int = 4
    answers: int = 16
    rounds: int = 3
    repairs: int = 2
    elites: int = 4
    diversity: bool = True
    niche_radius: float = 0.1
    trials: bool = True
    prompt: str = "gcot"
    operators: dict[str, float] = field(
        default_factory=lambda: {"explore": 1.0, "mutate": 2.0, "crossover": 1.0, "simplify": 0.5, "tune": 1.0}
    )
    adapt: bool = True
    lag: int = 0
    tuning: int = 12
    fidelities: tuple[str, ...] = FIDELITIES
    cheap_windows: int = 2
    fresh_windows: int = 8
    statistics: tuple[str, ...] = DEFAULT_STATISTICS
    design: str = "both"
    allocation: str = "sdsa"
    sensitivity: bool = True


@dataclass(frozen=True)
class Budgets:
    """What a search may use, over all its sittings; 0: no bound. Whichever is reached first ends it.

    calls: answers of the language model. tokens: read and written by it. evaluations: on the whole fitness split,
    seeds included. gpu_seconds: computing time of the evaluators, on CPUs too. wall_clock: seconds. Calls and
    evaluations are never exceeded; the others are looked at before each round of prompts, so what was asked for is
    still measured.
    """

    calls: int = 0
    tokens: int = 0
    evaluations: int = 0
    gpu_seconds: float = 0.0
    wall_clock: float = 0.0


@dataclass(frozen=True)
class Tracking:
    """MLflow. uri: a server or a database; empty: `mlflow.db` in the folder of runs. experiment: its name; empty: one
    for each task, such as `autoprune/MODEL@60%` (searches), or `autoprune` (comparisons)."""

    uri: str = ""
    experiment: str = ""


@dataclass(frozen=True)
class Config:
    """Everything that a search depends on. name: of the run; runs: the folder in which runs lie. storage: another one,
    on any filesystem that pyarrow.fs knows (such as s3://bucket/folder), to which a run is copied as it goes on, and
    from which it is resumed where its own folder is gone; empty: none."""

    name: str = "search"
    runs: str = "runs"
    storage: str = ""
    seed: int = 0
    target: Target = field(default_factory=Target)
    generator: Generator = field(default_factory=Generator)
    evaluators: Evaluators = field(default_factory=Evaluators)
    data: Data = field(default_factory=Data)
    search: SearchPlan = field(default_factory=SearchPlan)
    budgets: Budgets = field(default_factory=Budgets)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def to_dict(self) -> dict:
        return plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_config(path: Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The configuration of a search. Raises InputError, one line, for anything unusable."""
    config = build(Config, completed(read_mapping(Config, path, overrides)))
    check_config(config)
    return config


def completed(data: dict) -> dict:
    """A configuration's mapping with what n:m groups say of keys that it leaves out."""
    target, search = data.get("target"), data.get("search", {})
    if not isinstance(target, dict):
        return data
    own, further = target.get("group"), target.get("further")
    for case in [target, *(further if isinstance(further, list) else ())]:
        share = _nm_sparsity(case.get("group") or own) if isinstance(case, dict) else None
        if share is not None:
            case.setdefault("sparsity", share)
    if _nm_sparsity(own) is None or not isinstance(search, dict):
        return data
    return data | {"search": {"design": "score", "seeds": _scores(SearchPlan().seeds)} | search}


def _nm_sparsity(group: Any) -> float | None:
    """1 − n/m; None for what is no n:m."""
    try:
        return Group.parse(group).sparsity if isinstance(group, str) else None
    except ValueError:
        return None


def _scores(seeds: typing.Sequence[str]) -> list[str]:
    """Seeds without their allocations, each once."""
    return list(dict.fromkeys(halves(seed)[0] for seed in seeds))


def check_config(config: Config) -> None:
    """InputError, one line, for values that no search can run with. Does not look at models, texts or the network."""
    target, generator, data, search = config.target, config.generator, config.data, config.search
    check_name(config.name)
    check_address("storage", config.storage, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    check_address("tracking.uri", config.tracking.uri, MLFLOW_KEYS)
    check_address("generator.base_url", generator.base_url, generator.api_key_variable)
    if config.seed < 0:
        raise InputError(f"seed is {config.seed}: expected 0 or more")
    for index, case in enumerate(target.every):
        _check_goal(f"target.further[{index - 1}]" if index else "target", case, target.group)
    if target.group != FREE_GROUP:
        _check_uniform(target.group, search)
    one_of("target.combine", target.combine, ("worst", "mean"))
    one_of("target.dtype", target.dtype, DTYPES)
    one_of("generator.kind", generator.kind, GENERATOR_KINDS)
    if generator.kind == "scripted" and not generator.answers:
        raise InputError("generator.answers is empty: a scripted generator needs a file of answers")
    for section, names in (
        ("evaluators", ("shards", "replicas", "threads", "wait", "deadline", "attempts")),
        ("search", ("generations", "candidates", "prompts", "answers", "rounds", "elites", "tuning")),
        ("search", ("cheap_windows", "fresh_windows")),
        ("generator", ("max_tokens", "max_model_len", "prompt_tokens", "kv_cache_gib", "engines", "tensor_parallel")),
    ):
        for name in names:
            value = getattr(getattr(config, section), name)
            if value <= 0:
                raise InputError(f"{section}.{name} is {value:g}: expected more than 0")
    check_data(data)
    if search.lag not in (0, 1):
        raise InputError(f"search.lag is {search.lag}: expected 0 or 1")
    if search.lag and generator.kind == "vllm" and generator.sleeps:
        raise InputError(
            "search.lag and generator.sleeps exclude each other (with a lag the engine writes while evaluators "
            "measure): set search.lag to 0, or generator.sleeps to false"
        )
    share, gpus = config.evaluators.gpus_per_shard, generator.gpus_per_engine
    part = "expected a part of a GPU, such as 0.5, or"
    if not 0 <= share <= 1:  # an evaluator computes on one
        raise InputError(f"evaluators.gpus_per_shard is {share:g}: {part} 1; more shards use more; 0: equal shares")
    if gpus < 0 or (gpus > 1 and gpus % 1):
        raise InputError(f"generator.gpus_per_engine is {gpus:g}: {part} whole ones; 0: equal shares")
    if search.answers < search.prompts:
        raise InputError(f"search.answers is {search.answers}: expected at least search.prompts ({search.prompts})")
    if not search.seeds:
        raise InputError("search.seeds is empty: expected at least one baseline, such as wanda")
    for seed in search.seeds:
        if search.seeds.count(seed) > 1:
            raise InputError(f"search.seeds names {seed} twice: expected each once")
    if 0 < config.budgets.evaluations < len(search.seeds):
        raise InputError(
            f"budgets.evaluations is {config.budgets.evaluations}: expected at least {len(search.seeds)}, the seeds"
        )
    if generator.kind == "vllm" and generator.max_tokens >= generator.max_model_len:
        raise InputError(
            f"generator.max_tokens is {generator.max_tokens}: expected less than generator.max_model_len "
            f"({generator.max_model_len}), which prompt and answer share"
        )
    for name in ("temperature", "heat"):
        value = getattr(generator, name)
        if not 0 <= value < 100:
            raise InputError(f"generator.{name} is {value:g}: expected 0 or more")
    for name, choices in (("allocation", ALLOCATIONS), ("design", DESIGNS), ("prompt", PROMPTS)):
        one_of(f"search.{name}", getattr(search, name), choices)
    for fidelity in search.fidelities:
        one_of("search.fidelities", fidelity, FIDELITIES)
    if list(search.fidelities) != [name for name in FIDELITIES if name in search.fidelities]:
        raise InputError(
            f"search.fidelities are {', '.join(search.fidelities)}: expected each once, probe before cheap"
        )
    if search.cheap_windows >= data.fitness_windows and "cheap" in search.fidelities:
        raise InputError(
            f"search.cheap_windows is {search.cheap_windows}: expected less than data.fitness_windows "
            f"({data.fitness_windows}), or search.fidelities without cheap"
        )
    if search.repairs < 0:
        raise InputError(f"search.repairs is {search.repairs}: expected 0 or more")
    if not 0 <= search.niche_radius <= 1:
        raise InputError(f"search.niche_radius is {search.niche_radius:g}: expected a share of the mask, 0 to 1")
    for field_ in dataclasses.fields(config.budgets):
        value = getattr(config.budgets, field_.name)
        if not value >= 0:
            raise InputError(f"budgets.{field_.name} is {value:g}: expected 0, for no bound, or more")
    for operator, weight in search.operators.items():
        one_of("search.operators", operator, OPERATORS)
        if weight < 0:
            raise InputError(f"search.operators.{operator} is {weight:g}: expected 0 or more")
    if not any(weight for operator, weight in search.operators.items() if operator != "tune"):
        raise InputError("search.operators are all 0: at least one beside tune must be positive")
    if search.operators.get("tune") and "cheap" not in search.fidelities and search.prompt != "fixed":
        raise InputError("search.operators.tune needs search.fidelities to have cheap, on which constants are filled")
    for name in search.statistics:
        one_of("search.statistics", name, tuple(STATISTICS))
        if search.statistics.count(name) > 1:
            raise InputError(f"search.statistics names {name} twice: expected each once")


def _check_goal(where: str, case: Further, own: str) -> None:
    """own: the target's group."""
    if not 0 < case.sparsity < 1:
        raise InputError(
            f"{where}.sparsity is {case.sparsity:g}: expected a number between 0 and 1, such as 0.6 for 60%"
        )
    share = _nm_sparsity(case.group)
    if share is None and case.group != FREE_GROUP:
        raise InputError(f"{where}.group is {case.group!r}: expected {FREE_GROUP}, or n:m such as 2:4, with n below m")
    if share is None and own != FREE_GROUP:
        raise InputError(f"{where}.group is {FREE_GROUP}, and target.group is {own}: expected n:m in every case then")
    if share is not None and abs(case.sparsity - share) > 1e-9:
        raise InputError(
            f"{where}.sparsity is {case.sparsity:g}, and group {case.group} means {share:g}: give that, or leave it out"
        )


def _check_uniform(group: str, search: SearchPlan) -> None:
    """n:m keeps the same share everywhere."""
    reason = f"target.group {group} leaves no room for an allocation"
    if search.design != "score":
        raise InputError(f"search.design is {search.design}: {reason}; expected score")
    if any(halves(seed)[1] not in ("", "uniform") for seed in search.seeds):
        seeds, expected = (", ".join(names) for names in (search.seeds, _scores(search.seeds)))
        raise InputError(f"search.seeds are {seeds}: {reason}; expected scores alone, such as {expected}")


def check_data(data: Data) -> None:
    """InputError for numbers that no text can be cut by."""
    for name in ("calibration_windows", "fitness_windows", "report_windows"):
        value = getattr(data, name)
        if value <= 0:
            raise InputError(f"data.{name} is {value}: expected more than 0")
    if data.context < 2:
        raise InputError(f"data.context is {data.context}: expected at least 2 tokens")


# What a run may be resumed with other values of: where it lies, what it may use, and where it runs. None of it changes
# what a candidate's measurement is.
FREE = {
    "": ("name", "runs", "storage", "budgets", "tracking"),
    "evaluators": ("replicas", "gpus_per_shard", "wait", "deadline", "attempts"),
    "search": ("sensitivity",),
    "generator": (
        "base_url",
        "api_key_variable",
        "kv_cache_gib",
        "engines",
        "tensor_parallel",
        "gpus_per_engine",
        "sleeps",
        "deadline",
    ),
}


def difference(old: Config, new: Config) -> list[str]:
    """One line per key whose value differs and is not FREE: `key: old → new`."""
    for section, names in FREE.items():
        mine = getattr(new, section) if section else new
        theirs = replace(getattr(old, section) if section else old, **{name: getattr(mine, name) for name in names})
        old = replace(old, **{section: theirs}) if section else theirs

    def walk(a: Any, b: Any, where: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [line for key in {**a, **b} for line in walk(a.get(key), b.get(key), f"{where}.{key}".strip("."))]
        return [] if a == b else [f"{where}: {a!r} → {b!r}"]

    return walk(_placed(old), _placed(new), "")


def _placed(config: Config) -> dict:
    """As a mapping, in which files that came with a Ray job are named from its folder: Ray unpacks the next job, and
    the same one on another cluster, somewhere else. And without revisions of models of the hub: where the newest one
    has become another, the old one has to be named, and what the dense models measure tells one from the other."""
    text = re.sub(r'(?<=["+])/[^"]*/_ray_pkg_[0-9a-f]+/', "", json.dumps(config.to_dict()))
    return json.loads(re.sub(rf'"({HUB_ID.pattern})@[\w.-]+"', r'"\1"', text))
