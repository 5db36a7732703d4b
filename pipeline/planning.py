"""What a search would need before anything starts: memory of each actor, GPUs, tokens, hours, and what does not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from autoprune.models.errors import InputError
from autoprune.models.footprint import (
    Footprint,
    ModelSizes,
    Workload,
    footprint,
    known_config,
    model_sizes,
    shard_bounds,
)
from autoprune.pipeline.config import FREE_GROUP, SELF, Config
from autoprune.pipeline.launch import layout_of
from autoprune.pipeline.preparation import check_splits, misfits, read_by_seeds
from autoprune.pipeline.prompting import reads_prompts
from autoprune.pipeline.search import plan_repairs

GIB = 2**30
WORKER = 1.5 * GIB  # of the host's memory that a process takes before it holds anything: Python, torch, Ray
# Rates that hours are told from, of one GPU (an H100, a third of its peak) and of one CPU thread (AVX-512, float32).
# flops: of forward passes; bandwidth: bytes/s, of which pruning a model once moves PASSES times its weights; tokens:
# that one engine writes per second, many at a time, with PARAMETERS parameters; it falls as the model grows.
RATES = {
    "cuda": {"flops": 3e14, "bandwidth": 2e12, "tokens": 4000.0},
    "cpu": {"flops": 7e10, "bandwidth": 8e9, "tokens": 200.0},
}
PASSES = 10
PARAMETERS = 1.5e9
# Of an answer, measured over searches with Qwen2.5-Coder-1.5B: tokens, and measurements that are not on the whole
# fitness split (the probe in both groups where they are free, the cheap windows of those that pass it).
ANSWER_TOKENS = 100
PROBES, CHEAP = 2.0, 0.5
TRIALS = 3  # of each statistic, for every new elite
PROBE_SECONDS = 0.2  # of a call that hardly computes


@dataclass
class Plan:
    """actors: rows of the table: who, how many, its parts in bytes, its total, and what one place has, or None. hours:
    low and high. problems: what does not fit, a line each. gpus_there: this machine's, where it is planned for."""

    device: str
    actors: list[dict] = field(default_factory=list)
    gpus: float = 0.0
    gpus_there: int | None = None
    cpus: float = 0.0
    host_bytes: int = 0
    answers: int = 0
    tokens: tuple[int, int] = (0, 0)
    evaluations: int = 0
    hours: tuple[float, float] = (0.0, 0.0)
    problems: list[str] = field(default_factory=list)


def plan(config: Config, gpu_gib: float, host_gib: float | None = None, gpus: int | None = None) -> Plan:
    """What the configuration asks for. gpu_gib: memory of one GPU; 0: everything runs on CPUs. host_gib: memory of the
    machine, where all actors are on one. gpus: how many there are, which actors share as a search would; None: as many
    as are asked for, a whole one for each actor of which nothing is said. Raises InputError for a model or a text that
    is not known, and for splits that overlap; of a text nothing is read, but for documents that are counted from its
    end."""
    check_splits(config.data)
    device = "cuda" if gpu_gib else "cpu"
    found = Plan(device, gpus_there=gpus)
    read = read_by_seeds(config) | set(config.search.statistics)
    data, extra = config.data, config.search
    windows = (data.calibration_windows, data.fitness_windows, extra.fresh_windows, data.report_windows, 1)
    load = Workload(data.context, windows, read, bool(gpu_gib))
    models = dict.fromkeys(case.model for case in config.target.every)
    dtype = config.target.dtype if config.target.dtype != "auto" else "bfloat16" if gpu_gib else "float32"
    sizes = {model: model_sizes(known_config(model), model, dtype) for model in models}
    found.problems += misfits(config.target, sizes)
    engine, shard = layout_of(config, len(models)).gpu_shares(gpus or 0) if gpu_gib else (0.0, 0.0)
    for model, size in sizes.items():
        _add_evaluators(found, config, model, size, load, shard, gpu_gib)
    if config.generator.kind == "vllm":
        _add_engines(found, config, engine, gpu_gib)
    if gpu_gib:
        found.gpus = sum(row["count"] * row["gpus"] for row in found.actors)
        if gpus is not None and found.gpus > gpus:
            advice = "ask for less with evaluators.replicas, evaluators.shards, evaluators.gpus_per_shard"
            found.problems.append(f"all actors need {found.gpus:g} GPUs, and there are {gpus}: {advice}")
    found.cpus = sum(row["count"] * row["cpus"] for row in found.actors)
    found.host_bytes = int(sum(row["count"] * row["host"] for row in found.actors))
    if host_gib is not None and found.host_bytes > host_gib * GIB:
        needed = found.host_bytes / GIB
        found.problems.append(f"all actors on one machine need {needed:.0f} GiB of memory, and it has {host_gib:.0f}")
    _count(found, config, sizes[config.target.model])
    return found


def _add_evaluators(
    found: Plan, config: Config, model: str, sizes: ModelSizes, load: Workload, gpus: float, gpu_gib: float
) -> None:
    evaluators = config.evaluators
    blocks = len(sizes.blocks)
    if evaluators.shards > blocks:
        found.problems.append(f"evaluators.shards is {evaluators.shards}: {model} has {blocks} blocks")
        return
    largest = _largest(sizes, evaluators.shards, load)
    room = gpus * gpu_gib * GIB if gpu_gib else None
    parts = {"weights": largest.weights, "states": largest.states, "work": largest.work}
    if not gpu_gib:
        parts["gradients"] = largest.gradients
    found.actors.append(
        {
            "who": f"evaluator shard of {model}",
            "count": evaluators.shards * evaluators.replicas,
            "gpus": gpus if gpu_gib else 0.0,
            "cpus": 0.0 if gpu_gib else float(evaluators.threads),
            "parts": parts,
            "total": sum(parts.values()),
            "room": room,
            "host": WORKER + largest.host + largest.gradients + (0 if gpu_gib else largest.total),
        }
    )
    if room is not None and largest.total > 0.95 * room:

        def fit(shards: int, context: int = load.context) -> bool:
            return _largest(sizes, shards, replace(load, context=context)).total <= 0.95 * room

        shards = next((n for n in range(evaluators.shards, blocks + 1) if fit(n)), None)
        halves = (load.context >> n for n in range(1, 4))
        context = next((length for length in halves if length > 1 and fit(evaluators.shards, length)), None)
        advice = "no number of shards fits: take larger GPUs"
        if shards:
            needed = f"{gpus:g} GPU for each of {shards * evaluators.replicas}"
            advice = f"evaluators.shards={shards} would fit, which takes {needed}"
        if context:
            advice += f"; data.context={context} would fit on the GPUs that there are"
        needed = f"{largest.total / GIB:.1f} GiB and may take 95% of {room / GIB:.1f} GiB"
        found.problems.append(f"a shard of {model} needs {needed}: {advice}")


def _largest(sizes: ModelSizes, shards: int, load: Workload) -> Footprint:
    """Of so many shards."""
    found = (footprint(sizes, *bounds, load) for bounds in shard_bounds(sizes.costs, shards))
    return max(found, key=lambda one: one.total)


def _add_engines(found: Plan, config: Config, gpus: float, gpu_gib: float) -> None:
    writer = config.generator
    name = config.target.model if writer.model == SELF else writer.model
    options = known_config(name)
    room = 0.9 * gpus * gpu_gib * GIB if gpu_gib else None
    row = {"who": f"vLLM engine with {name}", "count": writer.engines, "gpus": gpus, "cpus": 0.0, "room": room}
    try:
        sizes = model_sizes(options, name, "bfloat16")
    except InputError:  # quantised, or no decoder that is pruned here: vLLM may serve it
        cache = 0 if gpu_gib else writer.kv_cache_gib * GIB
        found.actors.append(row | {"parts": {}, "total": None, "host": WORKER * 2 + cache})
        return
    text = options.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sequences = -(-config.search.answers // writer.engines)
    cache = 2 * 2 * len(sizes.blocks) * heads * width * writer.max_model_len * sequences
    weights = sizes.parameters * 2
    at_a_time = sequences
    if room is not None and room >= weights + cache / sequences:
        at_a_time = min(sequences, int((room - weights) / (cache / sequences)))
    total = weights + (cache * at_a_time // sequences if gpu_gib else writer.kv_cache_gib * GIB)
    parts = {"weights": weights, "cache": total - weights}
    if at_a_time < sequences:
        row["note"] = f" for {at_a_time} of {sequences} answers at a time"
    host = WORKER * 2 + ((weights if writer.sleeps else 0) if gpu_gib else total)  # asleep, weights are there
    found.actors.append(row | {"parts": parts, "total": total, "host": host, "parameters": sizes.parameters})
    if room is not None and weights + cache / sequences > room:
        needed = f"{(weights + cache / sequences) / GIB:.0f} GiB, and it has {room / GIB:.0f}"
        found.problems.append(f"an engine with {name} needs {needed}: raise generator.tensor_parallel")


def _count(found: Plan, config: Config, sizes: ModelSizes) -> None:
    """Answers, tokens, evaluations and hours: at most what the search may use, and about what it takes."""
    search, budgets, writer = config.search, config.budgets, config.generator
    answers = search.generations * search.answers * search.rounds
    answers += search.generations * plan_repairs(config)
    found.answers = min(answers, budgets.calls) if budgets.calls else answers
    prompts = found.answers * search.prompts // max(1, search.answers)
    about = prompts * writer.prompt_tokens // 2 + found.answers * ANSWER_TOKENS
    most = prompts * writer.prompt_tokens + found.answers * writer.max_tokens
    if not reads_prompts(config) or writer.kind == "scripted":
        about = most = 0
    found.tokens = tuple(min(count, budgets.tokens or count) for count in (about, most))
    full = len(search.seeds) + search.generations * search.candidates
    found.evaluations = min(full, budgets.evaluations) if budgets.evaluations else full

    rates, data = RATES[found.device], config.data
    weights = sum(sizes.blocks)
    threads = 1 if found.device == "cuda" else config.evaluators.threads
    shards, replicas = config.evaluators.shards, config.evaluators.replicas

    def seconds(windows: float) -> float:
        """Of computing for one candidate, over all its shards."""
        tokens = windows * data.context
        passes = 2 * sizes.parameters * tokens / (rates["flops"] * threads)
        return passes + PASSES * weights / rates["bandwidth"] + PROBE_SECONDS

    cases = 1 + len(config.target.further)
    work = found.evaluations * seconds(data.fitness_windows)
    probes = PROBES if config.target.group == FREE_GROUP else 1.0
    work += found.answers * (probes * seconds(128 / data.context) + CHEAP * seconds(search.cheap_windows))
    if search.trials and search.diversity and reads_prompts(config):
        tried = TRIALS * search.elites + 2 * TRIALS * search.generations // 3
        work += tried * len(search.statistics) * seconds(128 / data.context)
    work += search.generations * search.tuning * seconds(search.cheap_windows)
    reported = (len(search.seeds) + 1) * seconds(data.report_windows)
    reported += len(sizes.blocks) * seconds(search.cheap_windows) * search.sensitivity
    start = 2 * seconds(sum((data.calibration_windows, data.fitness_windows, data.report_windows)))
    start += 3 * seconds(16) if "g_rms" in search.statistics else 0
    # Candidates follow one another through the shards, so all shards work, but for the ends of a generation.
    computing = cases * ((work + reported) / (replicas * shards) + start / shards)
    engine = next((row for row in found.actors if "parameters" in row), None)
    writing = 0.0
    if engine is not None:
        rate = rates["tokens"] * (PARAMETERS / engine["parameters"]) ** 0.7 * max(1, engine["count"])
        rate *= max(1, writer.tensor_parallel) ** 0.8
        if found.device == "cpu":
            rate = min(rate, 50.0 * (PARAMETERS / engine["parameters"]))
        writing = found.answers * ANSWER_TOKENS / rate
    hours = (computing + writing + 120) / 3600
    found.hours = (hours / 2, hours * 2)


def plan_lines(found: Plan, config: Config) -> Iterable[str]:
    """For people."""
    yield f"{config.name}: {config.target.model} to {config.target.goal}"
    for row in found.actors:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in row["parts"].items() if size)
        room = f" of {row['room'] / GIB:.0f} GiB" if row["room"] else ""
        place = f", {row['gpus']:g} GPU each" if row["gpus"] else f", {row['cpus']:g} CPU each" if row["cpus"] else ""
        parts += row.get("note", "")
        size = "memory not known" if row["total"] is None else f"{row['total'] / GIB:.1f} GiB{room} ({parts})"
        yield f"  {row['count']} × {row['who']}{place}: {size}"
    places = f"{found.gpus:g} GPUs" if found.device == "cuda" else f"{found.cpus:g} CPUs"
    yield (
        f"needs {places} and {found.host_bytes / GIB:.0f} GiB of memory beside them"
        if found.device == "cuda"
        else (f"needs {places} and {found.host_bytes / GIB:.0f} GiB of memory")
    )
    shared = found.gpus_there is None and not (config.evaluators.gpus_per_shard and config.generator.gpus_per_engine)
    if found.device == "cuda" and shared:
        yield "on fewer GPUs, actors without a share of their own have equal ones"
    low, high = found.tokens
    tokens = f"about {low:,} tokens, at most {high:,}" if found.answers and high else "no tokens"
    yield f"at most {found.answers:,} answers ({tokens})"
    yield f"at most {found.evaluations:,} evaluations on the whole fitness split"
    known = all(row["total"] is not None for row in found.actors)
    beside = "" if known else " beside what it takes to write"
    yield f"roughly {_hours(found.hours[0])} to {_hours(found.hours[1])}{beside}, from rates of {_device(found.device)}"
    yield from (f"does not fit: {problem}" for problem in found.problems)
    if not found.problems:
        yield "everything fits" if known else "everything of which that is known fits"


def _hours(hours: float) -> str:
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.0f} h"


def _device(device: str) -> str:
    return "an H100" if device == "cuda" else "a CPU with AVX-512"


def machine_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
