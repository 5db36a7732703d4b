"""What a search stands on before anything runs: the target model, its texts as windows, and the plan of the pool."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from autoprune.actors.storage import below
from autoprune.algorithms.algorithm import Algorithm, Group
from autoprune.algorithms.allocation import OPTIONAL
from autoprune.algorithms.allocation import needs as features_of
from autoprune.algorithms.probe import SHAPES
from autoprune.algorithms.scores import halves
from autoprune.algorithms.vocabulary import STATISTICS, SUMMARIES
from autoprune.models.catalogue import CATALOGUE
from autoprune.models.corpora import Corpus, check_spec, evenly, load_corpus, overlap, token_windows
from autoprune.models.errors import InputError
from autoprune.models.footprint import ModelSizes, model_sizes, shard_bounds
from autoprune.models.loading import load_config as load_model_config
from autoprune.models.loading import load_tokenizer, pinned, resolve_model
from autoprune.models.masking import needs
from autoprune.models.pruning import check_model, native_dtype
from autoprune.pipeline.comparison import FILE
from autoprune.pipeline.config import FREE_GROUP, SELF, Config, Data, Target
from autoprune.pipeline.ledger import FRESH, PROBE
from autoprune.pipeline.population import seed

if TYPE_CHECKING:
    from autoprune.actors.placement import ActorResources
    from autoprune.actors.replica import PoolPlan

ACTORS = "actors"  # in the run folder: what evaluators learned of the dense models
SPLITS = ("calibration", "fitness", "report")
TELLING = 40  # characters of a line that is not by chance in two texts, as are headings and lines of code
MOST_SHARED = 0.05  # of the shorter of two splits' texts: headings and the like occur in many
PROBE_TOKENS = 128  # of the first window of the calibration text, which the probe fidelity runs


@dataclass(frozen=True)
class Prepared:
    """model: its name; folder: where it lies; sizes: of its parts. windows: token windows int64 [windows, L] of every
    split, those of fresh text and of the probe included; hashes: sha256 of every text, by split."""

    model: str
    folder: Path
    sizes: ModelSizes
    windows: dict[str, torch.Tensor]
    hashes: dict[str, str]

    @property
    def pinned(self) -> str:
        """The model's name; of the hub, with its revision."""
        return pinned(self.model, self.folder)

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every text with the windows that are taken of it, by split: to go on, a search needs the same."""
        return {
            name: hashlib.sha256(text.encode() + self.windows[name].contiguous().numpy().tobytes()).hexdigest()
            for name, text in self.hashes.items()
        }


def prepare_all(config: Config) -> dict[str, Prepared]:
    """Look at everything that a search is given, of every model, the target's first. Raises InputError, one line, for
    what cannot be used, and where two cases are the same."""
    cases = config.target.every
    for index, case in enumerate(cases):
        if case in cases[:index]:
            raise InputError(f"target.further[{index - 1}] is {case.model} at {case.goal}, which stands there before")
    seeds_of(config)
    texts = load_splits(config.data)
    found = {model: _prepare(config, model, texts) for model in dict.fromkeys(case.model for case in cases)}
    if any(case.group != FREE_GROUP for case in cases):
        for line in misfits(config.target, {name: one.sizes for name, one in found.items()}):
            raise InputError(line)
    return found


def load_splits(data: Data) -> dict[str, Corpus]:
    """The texts by split. InputError where one is no text, or two of them share some of it, under whatever names."""
    check_splits(data)
    texts = {name: load_corpus(getattr(data, name)) for name in SPLITS}
    cuts = {name: _cuts(text) for name, text in texts.items()}
    for other, name in combinations(texts, 2):
        first, text, share = texts[other], texts[name], _shared(cuts[other], cuts[name])
        if share > MOST_SHARED:
            raise InputError(
                f"data.{name} ({text.spec}) and data.{other} ({first.spec}) share {100 * share:.0f}% of the shorter "
                "one: give them different texts"
            )
    return texts


def _cuts(text: Corpus) -> tuple[set[str], set[str]]:
    """The text in whole documents, and in lines: each once, however often it is repeated."""
    lines = {line.strip() for document in text.documents for line in document.splitlines()}
    return set(map(str.strip, text.documents)), lines


def _shared(text: tuple[set[str], set[str]], other: tuple[set[str], set[str]]) -> float:
    """How much of the shorter text is in the other one, too: by documents, or by lines, since the same text may be cut
    into other documents; the larger share."""

    def share(own: set[str], others: set[str], least: int) -> float:
        both = sum(len(passage) for passage in own & others if len(passage) >= least)
        return both / min(sum(map(len, passages)) for passages in (own, others))

    documents, lines = zip(text, other, strict=True)
    return max(share(*documents, least=1), share(*lines, least=TELLING))


def check_splits(data: Data) -> None:
    """InputError where a split is no text, or two of them are, by their names, some of the same."""
    splits = [(name, getattr(data, name)) for name in SPLITS]
    for _, spec in splits:
        check_spec(spec)
    for (other, other_spec), (name, spec) in combinations(splits, 2):
        if overlap(spec, other_spec):
            raise InputError(f"data.{name} ({spec}) overlaps data.{other} ({other_spec}): give them different texts")


def misfits(target: Target, sizes: Mapping[str, ModelSizes]) -> Iterator[str]:
    """A line for each n:m that cannot be cut out of its model, or of the probe's layers. sizes: by model."""
    tried = math.gcd(*(columns for _, columns in SHAPES))
    for index, case in enumerate(target.every):
        if case.group == FREE_GROUP:
            continue
        m = Group.parse(case.group).second
        if index == 0 and tried % m:  # other cases are not probed
            yield f"target.group is {case.group}: expected m that divides {tried}, to try candidates on small layers"
        yield from misfit(case.group, case.model, sizes[case.model])


def misfit(group: str, model: str, sizes: ModelSizes) -> Iterator[str]:
    """A line if an n:m cannot be cut out of a model."""
    uneven = sorted(count for count in sizes.inputs if count % Group.parse(group).second)
    if uneven:
        yield f"{model} has layers of {uneven[0]} inputs, which {group} cannot cut: choose another group"


def _prepare(config: Config, model: str, texts: dict[str, Corpus]) -> Prepared:
    folder = resolve_model(model)
    check_model(folder, model, config.data.context)
    sizes = model_sizes(load_model_config(folder), model, config.target.dtype)
    blocks = len(sizes.blocks)
    if config.evaluators.shards > blocks:
        shards = config.evaluators.shards
        raise InputError(f"evaluators.shards is {shards}: expected at most {blocks}, the blocks of {model}")
    hashes = {name: text.sha256 for name, text in texts.items()}
    return Prepared(model, folder, sizes, _windows(config, texts, load_tokenizer(folder)), hashes)


def _windows(config: Config, texts: dict[str, Corpus], tokenizer) -> dict[str, torch.Tensor]:
    """Token windows of every split, evenly spaced over its text; calibration and report as `prune` and `evaluate` take
    them; the probe is a part of the first one; fresh windows lie between those of fitness."""
    cut = {
        n: token_windows(texts[n], tokenizer, config.data.context, getattr(config.data, f"{n}_windows"))
        for n in ("calibration", "report")
    }
    every = token_windows(texts["fitness"], tokenizer, config.data.context)
    fitness, fresh = spread(len(every), config.data.fitness_windows, config.search.fresh_windows)
    if not fresh:
        raise InputError(
            f"data.fitness ({config.data.fitness}) has {len(every)} windows of {config.data.context} tokens: expected "
            f"more than data.fitness_windows ({config.data.fitness_windows}), so that fresh text is left for the elites"
        )
    probe = cut["calibration"][:1, :PROBE_TOKENS]
    return cut | {"fitness": every[fitness], FRESH: every[fresh], PROBE: probe}


def spread(windows: int, fitness: int, fresh: int) -> tuple[list[int], list[int]]:
    """Places of so many fitness and fresh windows among all: evenly spaced, each kind over the whole. Where there are
    too few windows, fewer are fresh."""
    count = min(fitness + fresh, windows)
    places = evenly(windows, count)
    own = set(evenly(count, min(fitness, count)))
    return [p for i, p in enumerate(places) if i in own], [p for i, p in enumerate(places) if i not in own]


def settled(config: Config) -> Config:
    """The configuration with what depends on this machine and this folder decided, so that it can be resumed later."""
    model = absolute(config.target.model)
    further = tuple(replace(case, model=absolute(case.model) or model) for case in config.target.further)
    target = replace(config.target, dtype=native_dtype(config.target.dtype), model=model, further=further)
    writer = config.generator
    own = config.target.model if writer.model == SELF else writer.model
    # What a server calls its model may be the name of a folder here.
    own = own if writer.kind == "openai" else absolute(own)
    writer = replace(writer, model=own, answers=absolute(writer.answers))
    data = replace(config.data, **{name: absolute(getattr(config.data, name)) for name in SPLITS})
    read = read_by_seeds(config)
    offered = config.search.statistics
    offered += tuple(name for name in STATISTICS if name in read and name not in offered)
    seeds = tuple("+".join(absolute_part(part) for part in halves(text) if part) for text in config.search.seeds)
    names = [seed(text, config.target.group).id.removeprefix("seed-") for text in seeds]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"search.seeds has two of the name {name}: give the files different names")
    plan = replace(config.search, statistics=offered, seeds=seeds)
    storage = config.storage if "://" in config.storage or not config.storage else str(Path(config.storage).resolve())
    return replace(
        config,
        search=plan,
        runs=str(Path(config.runs).resolve()),
        storage=storage,
        target=target,
        generator=writer,
        data=data,
    )


def absolute_part(text: str) -> str:
    """A score or an allocation that is a file, `FILE.py[@layer]`, with the file's absolute path; any other as it is."""
    file = text.removesuffix("@layer")
    return absolute(file) + text[len(file) :] if file.endswith(FILE) else text


def read_by_seeds(config: Config) -> frozenset[str]:
    """Statistics that the seeds of a search read."""
    return frozenset().union(*map(needs, seeds_of(config)))


def seeds_of(config: Config) -> list[Algorithm]:
    """Raises InputError as `seed` does."""
    return [seed(text, config.target.group).algorithm for text in config.search.seeds]


def absolute(name: str) -> str:
    """A path that exists here as an absolute one; any other name, and the slice after a path, as they are."""
    # A folder's own name may have a bracket.
    path, bracket, rest = (name, "", "") if Path(name).exists() else name.partition("[")
    if path in CATALOGUE:
        return name
    return f"{Path(path).resolve()}{bracket}{rest}" if path and Path(path).exists() else name


def pool_plan(
    config: Config, prepared: Prepared, resources: ActorResources, engine: ActorResources | None = None
) -> PoolPlan:
    """The evaluators that a search needs: what its seeds and its candidates may read is measured. engine: what one of
    vLLM's reserves, if they write."""
    from autoprune.actors.replica import PoolPlan  # imports Ray

    evaluators, seeds = config.evaluators, seeds_of(config)
    sleeping = engine is not None and config.generator.kind == "vllm" and config.generator.sleeps
    written = OPTIONAL & SUMMARIES.keys() if config.search.allocation == "written" else frozenset()
    return PoolPlan(
        model=prepared.pinned,  # a replica that is made anew in a week is not another model
        bounds=shard_bounds(prepared.sizes.costs, evaluators.shards),
        replicas=evaluators.replicas,
        threads=evaluators.threads,
        dtype=config.target.dtype,
        sparsity=config.target.sparsity,
        splits=prepared.windows,
        statistics=frozenset(config.search.statistics),
        features=frozenset(written).union(*(features_of(seed.allocation) for seed in seeds)),
        deadline=evaluators.deadline,
        attempts=evaluators.attempts,
        resources=resources,
        state=below(place_of(config), f"{ACTORS}/{_folder_name(prepared.model)}"),
        gives=engine.num_gpus if sleeping and engine.num_gpus < 1 else 0.0,
    )


def place_of(config: Config) -> str:
    """Where a run is kept: in its storage, or else its own folder."""
    return below(config.storage, config.name) if config.storage else str(config.folder)


def _folder_name(model: str) -> str:
    """Of a model's own folder: two may end in the same name."""
    return f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
