"""What a comparison is: its configuration, the methods that it names, and its cells with the key that each is kept by.

A cell is one method at one sparsity on one model, or the dense model. Its key is a hash of everything that decides its
figures, so a cell that was measured once is never measured again, whatever else the configuration says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
import yaml

from autoprune.algorithms.algorithm import UPDATES, Algorithm, Group
from autoprune.algorithms.rules import RANGES, REVISIONS
from autoprune.algorithms.scores import BASELINES, NATIVE
from autoprune.algorithms.tuning import MOST_EVALUATIONS
from autoprune.models.errors import InputError
from autoprune.pipeline.config import DTYPES, Data, Tracking, check_data
from autoprune.pipeline.config_reading import MLFLOW_KEYS, check_address, check_name, one_of, plain, read_config
from autoprune.pipeline.population import baseline, read_allocation, read_score

# Of a cell's file and key: raise it when the meaning of a figure changes, and everything is measured anew. What an
# allocation yields has numbers of its own: REVISIONS.
SCHEMA = 3
TUNED = ":tuned"  # behind an allocation: its parameters are sought on the fitness split
TAYLOR = re.compile(r"sdsa(@layer)?:taylor=[^,:]*")  # may stand before it: then taylor is sought, too, from there on
DENSE = "dense"
FILE, OWN = ".py", "own"  # a score that is a file, and the allocation that stands in it


@dataclass(frozen=True)
class Methods:
    """scores × updates × allocations.

    scores: names of `algorithms.scores`, or files, as `read_score` reads them. updates: of `algorithm.UPDATES`.
    allocations: as `read_allocation` reads them, or with `:tuned` in place of parameters, which are then sought on the
    fitness split; `sdsa:taylor=0.5:tuned` seeks taylor as well, from 0.5 on; or "own", what a file says itself.
    """

    scores: tuple[str, ...] = ("magnitude", "wanda")
    updates: tuple[str, ...] = ("none",)
    allocations: tuple[str, ...] = ("uniform", "owl", "sdsa")


@dataclass(frozen=True)
class Comparison:
    """Every method at every sparsity on every model.

    name: of the run; runs: the folder in which runs lie. models: bundled names, local folders or hub ids. dtype: what
    is computed in; "auto" is bfloat16 where this machine computes it natively, else float32. offload: hold one block
    in memory at a time. sparsities: shares to remove, and n:m patterns, which replace the comparison group.
    evaluations: measurements for one tuned allocation. side_by_side: how many algorithms that need Gram matrices share
    one walk over the blocks; each holds the hidden states of the report split.
    """

    name: str = "compare"
    runs: str = "runs"
    models: tuple[str, ...] = ("smollm2-135m-instruct",)
    dtype: str = "auto"
    offload: bool = False
    methods: tuple[Methods, ...] = (Methods(),)
    sparsities: tuple[float | str, ...] = (0.5, 0.6)
    data: Data = field(default_factory=Data)
    evaluations: int = 16
    side_by_side: int = 8
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def to_dict(self) -> dict:
        return plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def all_methods(self) -> list[Method]:
        """In the order of the configuration, each once."""
        groups = (product(group.scores, group.updates, group.allocations) for group in self.methods)
        return list(dict.fromkeys(Method(*parts) for group in groups for parts in group))

    def targets(self) -> list[Target]:
        return list(dict.fromkeys(Target.read(value) for value in self.sparsities))


@dataclass(frozen=True)
class Target:
    """A share of the weights to remove, and the n:m pattern that says so, if one does."""

    share: float
    pattern: str = ""

    @property
    def m(self) -> int:
        """Of a pattern n:m; 0 otherwise."""
        return int(self.pattern.partition(":")[2] or 0)

    @classmethod
    def read(cls, value: float | str) -> Target:
        """Raises InputError, one line, for what is neither a share nor a pattern."""
        expected = "expected numbers between 0 and 1, such as 0.6 for 60%, or patterns such as 2:4"
        if isinstance(value, str):
            try:
                group = Group.parse(value)
            except ValueError:
                group = None
            if group is None or group.sparsity is None:
                raise InputError(f"sparsities holds {value!r}: {expected}")
            return cls(group.sparsity, value)
        if not 0 < value < 1:
            raise InputError(f"sparsities holds {value:g}: {expected}")
        return cls(value)

    def __str__(self) -> str:
        return self.pattern or f"{100 * self.share:g}%"


@dataclass(frozen=True)
class Method:
    """A score, a weight update and an allocation, by name."""

    score: str
    update: str
    allocation: str

    def __str__(self) -> str:
        """`SCORE[/UPDATE][+ALLOCATION[@layer][:tuned]]`; without what stands for nothing: none and uniform."""
        return self.scoring + (f"+{Path(self.allocation).name}" if self.allocation != "uniform" else "")

    @property
    def scoring(self) -> str:
        """Score and update: what allocations are compared under."""
        name = Path(self.score).stem if self.score.endswith(FILE) else self.score
        return name + (f"/{self.update}" if self.update != "none" else "")

    @property
    def tuned(self) -> bool:
        return self.allocation.endswith(TUNED)

    def algorithm(self, target: Target) -> Algorithm:
        """The algorithm; where the allocation is tuned, that from which tuning starts."""
        allocation = self.allocation.removesuffix(TUNED)
        if self.score.endswith(FILE):
            algorithm, _ = read_score(Path(self.score))
            own = algorithm.allocation if allocation == OWN else read_allocation(allocation)
            algorithm = replace(algorithm, allocation=own, update=self.update)
        else:
            algorithm = baseline(f"{self.scoring}+{allocation}")
        return replace(algorithm, group=target.pattern) if target.pattern else algorithm


@dataclass(frozen=True)
class Subject:
    """A model that methods are compared on.

    checkpoint: what tells its weights from others of the same name: their sha256. windows: token windows
    int64 [n, L] by split. texts: by split, the corpus and the sha256 of its text. dtype: never "auto".
    """

    model: str
    folder: Path
    blocks: int
    checkpoint: dict
    dtype: str
    windows: dict[str, torch.Tensor]
    texts: dict[str, tuple[str, str]]

    def split(self, name: str) -> dict:
        """What tells a split from another one: its text and its tokens."""
        tokens = self.windows[name]
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return {"text": self.texts[name][1], "windows": len(tokens), "context": tokens.shape[1], "tokens": digest}


@dataclass(frozen=True)
class Cell:
    """method, target: None for the dense model. what: everything that decides the figures; key: its hash."""

    model: str
    method: Method | None
    target: Target | None
    what: dict

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.what, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def algorithm(self) -> Algorithm:
        return Algorithm.from_dict(self.what["algorithm"])

    def __str__(self) -> str:
        return f"{self.method} at {self.target}" if self.method else DENSE


def cells(config: Comparison, subject: Subject) -> list[Cell]:
    """The dense model, then every method at every sparsity, in the order of the configuration."""
    dense = {
        "schema": SCHEMA,
        "model": subject.model,
        "checkpoint": subject.checkpoint,
        "dtype": subject.dtype,
        "report": subject.split("report"),
    }
    found = [Cell(subject.model, None, None, dense)]
    pruned = {**dense, "calibration": subject.split("calibration")}
    fitness = subject.split("fitness")
    for method, target in product(config.all_methods(), config.targets()):
        what = {
            **pruned,
            "method": str(method),
            "sparsity": target.share,
            "algorithm": method.algorithm(target).to_dict(),
        }
        revision = REVISIONS.get(what["algorithm"]["allocation"]["name"])
        if revision:
            what |= {"revision": revision}
        if method.tuned:
            what |= {"fitness": fitness, "evaluations": config.evaluations}
        found.append(Cell(subject.model, method, target, what))
    return found


@dataclass(frozen=True)
class Result:
    """What a cell was found to be. All figures are None where `error` says why there are none.

    algorithm: as it was measured, with tuned parameters; None for the dense model. nll, standard_error, kl and
    kl_standard_error: nats per token, over `tokens` scored tokens of the report split. sparsity: achieved. fallbacks,
    dead_inputs, damped: see `models.shard.ShardReport`.
    fitness_nll, trace: of a tuned allocation, the best on the fitness split, and every allocation that was tried, as
    [its text, nats per token]; the latter is None where it is not finite. seconds: all that the cell took.
    window_nlls: the NLL of each window; empty in cells of earlier versions.
    """

    seconds: float
    device: str
    algorithm: dict | None = None
    error: str | None = None
    nll: float | None = None
    standard_error: float | None = None
    kl: float | None = None
    kl_standard_error: float | None = None
    tokens: int | None = None
    sparsity: float | None = None
    block_sparsities: tuple[float, ...] = ()
    fallbacks: tuple[str, ...] = ()
    dead_inputs: int = 0
    damped: int = 0
    pruning_seconds: float | None = None
    forward_seconds: float | None = None
    fitness_nll: float | None = None
    trace: tuple[Sequence, ...] = ()
    window_nlls: tuple[float, ...] = ()

    def to_bytes(self, cell: Cell) -> bytes:
        """The content of the cell's file."""
        return json.dumps({"what": cell.what, "result": dataclasses.asdict(self)}, indent=1, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes, cell: Cell) -> Result:
        """Raises ValueError where this is not the file of that cell."""
        content = json.loads(data)
        if not isinstance(content, dict) or content.get("what") != json.loads(json.dumps(cell.what)):
            raise ValueError("it describes another cell")
        try:
            tuples = {name: tuple(content["result"][name]) for name in ("block_sparsities", "fallbacks", "trace")}
            tuples["window_nlls"] = tuple(content["result"].get("window_nlls", ()))
            return cls(**content["result"] | tuples)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it holds no result ({error})") from None


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a configuration. Raises InputError, one line, for anything unusable."""
    config = read_config(Comparison, path, overrides)
    check_comparison(config)
    return config


def check_comparison(config: Comparison) -> None:
    """InputError, one line, for values that no comparison can run with. Looks at no models and no texts."""
    check_name(config.name)
    one_of("dtype", config.dtype, DTYPES)
    for name in ("models", "methods", "sparsities"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: expected at least one")
    if not 1 <= config.evaluations <= MOST_EVALUATIONS:
        raise InputError(f"evaluations is {config.evaluations}: expected 1 to {MOST_EVALUATIONS}")
    if config.side_by_side < 1:
        raise InputError(f"side_by_side is {config.side_by_side}: expected 1 or more")
    check_data(config.data)
    check_address("tracking.uri", config.tracking.uri, MLFLOW_KEYS)
    config.targets()
    names: dict[str, str] = {name: name for name in (*BASELINES, *NATIVE)}
    for score in (score for group in config.methods for score in group.scores if score.endswith(FILE)):
        if names.setdefault(Path(score).stem, score) != score:
            raise InputError(f"methods.scores holds {score} and {names[Path(score).stem]}: give them different names")
    files: dict[str, str] = {}  # of allocations, by name
    for group in config.methods:
        for name in ("scores", "updates", "allocations"):
            if not getattr(group, name):
                raise InputError(f"methods.{name} is empty: expected at least one")
        for score in group.scores:
            if score.endswith(FILE):
                algorithm, spread = read_score(Path(score))
                means = Group.parse(algorithm.group).sparsity
                for target in config.targets() if means is not None else ():
                    if not target.pattern and target.share != means:
                        raise InputError(
                            f"sparsities holds {target}, and {score} is for {algorithm.group}, which means "
                            f"{100 * means:g}%: give that, or {algorithm.group}"
                        )
                if OWN in group.allocations and not spread:
                    raise InputError(f"methods.allocations holds {OWN!r}, and {score} says nothing of an allocation")
            else:
                one_of("methods.scores", score, (*BASELINES, *NATIVE))
            if OWN in group.allocations and not score.endswith(FILE):
                raise InputError(
                    f"methods.allocations holds {OWN!r} beside the score {score}: only files have their own"
                )
        for update in group.updates:
            one_of("methods.updates", update, UPDATES)
        for allocation in group.allocations:
            start = allocation.removesuffix(TUNED)
            if allocation == OWN:
                continue
            if start == OWN:
                raise InputError(f"methods.allocations holds {allocation!r}: what a file says itself cannot be tuned")
            rule, file = read_allocation(start).name, start.removesuffix("@layer")
            if file.endswith(FILE) and files.setdefault(Path(file).name, file) != file:
                both = f"{file} and {files[Path(file).name]}"
                raise InputError(f"methods.allocations holds {both}: give them different names")
            given = start.partition(":")[2]
            if start != allocation and (given and not TAYLOR.fullmatch(start) or not RANGES.get(rule)):
                reason = "tune them or give them" if RANGES.get(rule) else f"{start} has no parameters to tune"
                raise InputError(f"methods.allocations holds {allocation!r}: {reason}")
