"""Who are the parents: seeds, and the choice of parents for a prompt."""

from __future__ import annotations

import difflib
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autoprune.algorithms.algorithm import GROUPS, UPDATES, Algorithm, Allocation, Group
from autoprune.algorithms.allocation import WRITTEN, AllocationError, check_allocation
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.reader import FORMS, Function, canonical
from autoprune.algorithms.rules import written_out
from autoprune.algorithms.scores import BASELINES, NATIVE, halves
from autoprune.models.errors import InputError
from autoprune.pipeline.config import FREE_GROUP
from autoprune.pipeline.lineage import Candidate, mask_distance

# What the baselines claim, so that the first prompts have a claim to set against the evidence.
CLAIMS = {
    "magnitude": "large weights matter most",
    "wanda": "a weight matters as much as the signal that it carries: its size times the norm of its input",
    "ria": "a weight matters by its share of its row and of its column, so that no channel is lost as a whole",
    "pruner-zero": "a weight matters by its square times the size of the gradient of the loss by it",
    "obs-diag": "a weight matters by the error that is left when the other weights of its row make up for its loss",
    "taylor": "a weight matters by what its loss costs to first order: its size times the size of its gradient",
    "sparsegpt": "which weights matter changes as others make up for the pruned ones, so choose and update in turn",
    "uniform": "every block can spare the same share",
    "owl": "blocks with more outlier scores must keep more",
    "sdsa": "blocks whose weights are more skewed hold outliers and must keep more",
    "dlp": "blocks with a smaller share of all scores must keep more",
    "dsa": "blocks whose scores spread over fewer orders of magnitude must keep more",
    "alphapruning": "blocks whose weights have a spectrum with a heavier tail are better trained and must keep more",
    "atp": "errors of early blocks add up, so early blocks must keep more",
}
OWN_CLAIM = "written by hand"  # of a file


def baseline(text: str) -> Algorithm:
    """The algorithm that `SCORE[/UPDATE][+ALLOCATION]` names, such as `wanda/cg+sdsa` or `sparsegpt+owl@layer`.

    SCORE: one of BASELINES, or of NATIVE, whose mask alone counts where no update is named; its group is its paper's.
    UPDATE: one of UPDATES, none if left out. ALLOCATION: see `read_allocation`; uniform if left out. Raises InputError
    for an unknown name.
    """
    method, _, allocation = text.partition("+")
    score, slash, update = method.partition("/")
    _known("score", score, (*BASELINES, *NATIVE))
    if slash:
        _known("update", update, UPDATES)
    group = NATIVE[score] if score in NATIVE else BASELINES[score].group
    source = score if score in NATIVE else parse(BASELINES[score].source).source
    return Algorithm(source, group, read_allocation(allocation or "uniform"), update or "none")


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise InputError(f"unknown {what} {name!r}: expected {', '.join(names)}" + (f"; {near[0]}?" if near else ""))


def read_allocation(text: str) -> Allocation:
    """`NAME[@layer][:key=value,…]`; `explicit[@layer]:0.5,0.6,…` with one sparsity per block (or layer); or
    `FILE.py[@layer]` with a function `allocate(profile, sparsity)` in the algorithm language.

    Defaults are written out, so that equal allocations have equal texts. Raises InputError, one line.
    """
    file = text.removesuffix("@layer")
    if file.endswith(".py"):  # in whose path there may be any character
        functions = read_functions(Path(file))
        if "allocate" not in functions:
            raise InputError(f"{file} holds no `{FORMS['allocate']}`")
        return Allocation(WRITTEN, {}, "block" if file == text else "layer", source=functions["allocate"].text)
    head, colon, settings = text.partition(":")
    name, at, per = head.partition("@")
    if at and per != "layer":
        raise InputError(f"unknown ending {at + per!r} of allocation {head!r}: expected @layer or nothing")
    if name.endswith(".py"):
        raise InputError(f"{text!r}: an allocation from a file has no parameters; write them into {name}")
    if settings == "tuned":
        raise InputError(f"{text!r} needs a fitness split: `autoprune compare` tunes; here, give parameters or none")
    parts = [part.strip() for part in settings.split(",")] if colon else []
    per = "layer" if at else "block"
    try:
        if name == "explicit":
            allocation = Allocation(name, {}, per, tuple(float(part) for part in parts))
        else:
            pairs = [part.partition("=") for part in parts]
            parameters = {key.strip(): float(value) for key, _, value in pairs}
            allocation = Allocation(name, written_out(name, parameters), per)
        check_allocation(allocation)
    except AllocationError as error:
        raise InputError(str(error)) from None
    except ValueError:
        raise InputError(f"cannot read the parameters of allocation {text!r}: expected numbers, key=value,…") from None
    return allocation


def read_score(file: Path) -> tuple[Algorithm, bool]:
    """An algorithm from a file in the algorithm language, and whether the file says how the budget is spread.

    Its group and allocation are those of comment lines `# group: …` and `# allocation: …`, as `algorithm_text` and
    `algorithms/found` have them; the group is row, the allocation the file's `allocate`, or uniform, where there is
    none. Raises InputError, one line.
    """
    return score_in(file, read_source(file))


def score_in(file: Path, text: str) -> tuple[Algorithm, bool]:
    """As `read_score`, of what was read from the file."""
    functions = functions_in(file, text)
    if "score" not in functions:
        raise InputError(f"{file} holds no `{FORMS['score']}`")
    lines = re.findall(r"^#\s*(group|allocation)\s*:[^\S\n]*(.*\S)", text, re.MULTILINE | re.IGNORECASE)
    said = {key.lower(): value for key, value in lines}
    name, *settings = said.get("allocation", "uniform").split()
    if "allocate" in functions:
        per = "layer" if name == f"{WRITTEN}@layer" else "block"
        allocation = Allocation(WRITTEN, per=per, source=functions["allocate"].text)
    elif name.partition("@")[0] == WRITTEN:
        raise InputError(f"{file} says `allocation: {WRITTEN}` and holds no `{FORMS['allocate']}`")
    else:
        try:
            allocation = read_allocation(f"{name}:{','.join(settings)}" if settings else name)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    group = said.get("group", "row")
    try:
        Group.parse(group)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    return Algorithm(functions["score"].text, group, allocation), "allocate" in functions or "allocation" in said


def read_functions(file: Path) -> dict[str, Function]:
    """By name, from a file, or "-" for what stands in. Raises InputError, one line."""
    return functions_in(file, read_source(file))


def read_source(file: Path) -> str:
    """The text of a file, or of what stands in for "-". Raises InputError, one line."""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', 'it is not text')}") from None


def functions_in(file: Path, text: str) -> dict[str, Function]:
    """As `read_functions`, of what was read from the file. Its comments do not count as source."""
    try:
        return canonical(re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    except LanguageError as error:
        raise InputError(f"{file}: {error}") from None


def seed(text: str, group: str = FREE_GROUP) -> Candidate:
    """A baseline, or an algorithm from a file (see `read_score`), as a candidate of generation 0. group: the n:m that
    all prune by; else its own counts.

    Raises InputError as `baseline` and `read_score` do, and for native scores and updates: a search improves scores
    that can be read.
    """
    score, allocation = halves(text)
    if score.endswith(".py"):
        algorithm, _ = read_score(Path(score))
        algorithm = replace(algorithm, allocation=read_allocation(allocation)) if allocation else algorithm
        if group == FREE_GROUP and algorithm.group not in GROUPS:
            raise InputError(f"{score} is for {algorithm.group} and cannot be a seed: expected {' or '.join(GROUPS)}")
    else:
        algorithm = baseline(text)
    if algorithm.score in NATIVE or algorithm.update != "none":
        raise InputError(f"{text} cannot be a seed: expected a score of {', '.join(BASELINES)}, without an update")
    claims = [CLAIMS.get(score.partition("/")[0], OWN_CLAIM), CLAIMS.get(algorithm.allocation.name, "")]
    if group != FREE_GROUP:  # there is nothing to claim of an allocation
        algorithm, claims = replace(algorithm, group=group, allocation=Allocation("uniform")), claims[:1]
    hypothesis = "; ".join(claim for claim in claims if claim)
    # Of files the names: their paths are others on another machine.
    name = "+".join(filter(None, (Path(score).name if score.endswith(".py") else score, Path(allocation).name)))
    return Candidate(f"seed-{name}", 0, "seed", algorithm=algorithm, hypothesis=hypothesis)


def choose_parents(rng: random.Random, operator: str, best: Sequence[Candidate]) -> tuple[str, ...]:
    """The focal candidate and, for crossover, the elite whose masks are farthest from its masks.

    best: the elites, best first; the focal candidate is drawn among them, the better with more weight (linear in rank).
    """
    focal = rng.choices(best, [len(best) - rank for rank in range(len(best))])[0]
    if operator != "crossover" or len(best) < 2:
        return (focal.id,)
    others = [candidate for candidate in best if candidate.id != focal.id]
    partner = max(others, key=lambda other: mask_distance(focal.mask, other.mask))
    return (focal.id, partner.id)
