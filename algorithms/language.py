"""The algorithm language: read a candidate's functions and run them; read a model's whole answer."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from autoprune.algorithms.algorithm import GROUPS, Algorithm, Allocation
from autoprune.algorithms.operations import OPERATIONS
from autoprune.algorithms.reader import FORMS, Function, canonical
from autoprune.algorithms.rules import DEFAULTS
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS

__all__ = ["AllocationProgram", "LanguageError", "Program", "Proposal", "parse", "parse_allocation", "parse_answer"]

# All of torch that a program can name.
FUNCTIONS = SimpleNamespace(**{o.name: getattr(torch, o.name) for o in OPERATIONS if o.form == "function"})

# Where a number stands in place of a tensor, torch looks its own classes of numbers up: by an import, on behalf of the
# calling function, the first time in a process. A program has no builtins to import with, so this is the first time.
torch.ones(1).clamp(min=0.5)

# What an answer may choose for SDSA: lowest and highest; where it names none, the rule's default holds.
SDSA_BOUNDS = {"tau": (0.1, 4.0), "m": (0.0, 0.95), "depth": (0.0, 0.9)}
SDSA = Allocation("sdsa", dict(DEFAULTS["sdsa"]))

MAX_THOUGHT = 400  # characters of a diagnosis or hypothesis


@dataclass(frozen=True)
class Program:
    """A score function that was read.

    source: canonical text: parameters are W and what is read, locals are v0, v1, … in order of first appearance,
    lines without effect are gone, method calls wherever there is a choice, numbers are floats. Reading it again gives
    the same text. reads: the statistics that it reads, in the order of STATISTICS.
    """

    source: str
    reads: tuple[str, ...]
    _score: Callable[..., Tensor] = field(repr=False, compare=False)

    def __call__(self, W: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Scores, float32 [out, in], lower is pruned first; possibly W itself.

        W: float32 [out, in]. statistics: float32 by name, of the shapes that STATISTICS says; at least what `reads`
        names.
        Raises LanguageError where the result has another shape or dtype.
        """
        scores = self._score(W, *(statistics[name] for name in self.reads))
        if not isinstance(scores, Tensor):
            raise LanguageError(f"score returned a {type(scores).__name__}, expected a tensor of W's shape")
        if scores.shape != W.shape or scores.dtype != torch.float32:
            raise LanguageError(
                f"score returned {_dtype(scores)} {list(scores.shape)}, expected float32 {list(W.shape)} as W has"
            )
        return scores


@dataclass(frozen=True)
class AllocationProgram:
    """An allocation that was read. source: canonical text, as of a `Program`. reads: the summaries that it reads, in
    the order of SUMMARIES."""

    source: str
    reads: tuple[str, ...]
    _allocate: Callable[..., Tensor] = field(repr=False, compare=False)

    def __call__(self, profile: Mapping[str, Tensor], sparsity: float) -> Tensor:
        """The retention that each unit wishes for, float64 [units], finite and not all 0; below 0 is 0. Only their
        ratios count, since the budget is met afterwards.

        profile: float64 [units] by name, at least what `reads` names; sparsity: the target, 0 ≤ sparsity < 1.
        Raises LanguageError where the result is something else.
        """
        summaries = {name: profile[name] for name in self.reads}
        wishes = self._allocate(SimpleNamespace(**summaries), sparsity)
        units = len(next(iter(profile.values())))
        if not isinstance(wishes, Tensor):
            raise LanguageError(
                f"allocate returned a {type(wishes).__name__}, expected a tensor with a number per unit"
            )
        if wishes.shape != (units,) or wishes.dtype != torch.float64:
            raise LanguageError(
                f"allocate returned {_dtype(wishes)} {list(wishes.shape)}, expected float64 [{units}], one per unit"
            )
        if not wishes.isfinite().all() or wishes.max() <= 0:
            raise LanguageError("allocate must return retentions that are finite, and one of them above 0")
        return wishes.clamp(min=0)


class _Settled(ast.NodeTransformer):
    """`tune(value, low, high)` of a program that is to run: the value."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return node.args[0] if isinstance(node.func, ast.Name) and node.func.id == "tune" else node


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def parse(source: str) -> Program:
    """Read a score function, with any local names, from any source; a leading `import torch` is dropped.

    Raises LanguageError for everything outside the language. Shapes are not checked here, but by `cost.dry_run`.
    """
    function = _only(source, "score")
    return Program(function.text, function.reads, _compiled(function, "score"))


def parse_allocation(source: str) -> AllocationProgram:
    """As `parse`, for `allocate(profile, sparsity)`."""
    function = _only(source, "allocate")
    return AllocationProgram(function.text, function.reads, _compiled(function, "allocate"))


def _only(source: str, name: str) -> Function:
    functions = canonical(source)
    if functions.keys() != {name}:
        raise LanguageError(f"expected exactly one function, `{FORMS[name]}`, and nothing beside it")
    return functions[name]


def _compiled(function: Function, name: str) -> Callable[..., Tensor]:
    namespace: dict = {"__builtins__": {}, "range": range, "torch": FUNCTIONS}
    with warnings.catch_warnings(action="ignore"):  # of the compiler, about numbers that are called or indexed
        exec(compile(_Settled().visit(ast.parse(function.text)), f"<{name}>", "exec"), namespace)
    return namespace[name]


@dataclass(frozen=True)
class Proposal:
    """What a language model's answer says: one sentence each of diagnosis and hypothesis ("" if missing)."""

    diagnosis: str
    hypothesis: str
    algorithm: Algorithm


def _line(text: str, name: str) -> str:
    """What stands after `name:`, at its last occurrence at the beginning of a line; markup around it is dropped."""
    found = re.findall(rf"^[^\w\n]*{name}[*_ \t]*:[*_ \t]*(.*)$", text, re.IGNORECASE | re.MULTILINE)
    return found[-1].strip() if found else ""


def _thought(text: str, name: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in _line(text, name))
    return " ".join(printable.split())[:MAX_THOUGHT]


def _allocation(line: str, default: Allocation) -> Allocation:
    if not line:
        return default
    name, *settings = re.sub(r"[`*,]", " ", line).split() or [""]
    if name == "uniform" and not settings:
        return Allocation("uniform")
    parameters = dict(SDSA.parameters)
    for setting in settings:
        key, _, value = setting.partition("=")
        low, high = SDSA_BOUNDS.get(key, (1, 0))
        if not re.fullmatch(r"\d*\.?\d+", value) or not low <= float(value) <= high:
            name = ""
        else:
            parameters[key] = float(value)
    if name != "sdsa":
        bounds = " ".join(f"{key}={low:g}…{high:g}" for key, (low, high) in SDSA_BOUNDS.items())
        raise LanguageError(f"the allocation is '{line[:80]}', expected 'uniform' or 'sdsa {bounds}'")
    return Allocation("sdsa", parameters)


def _function(text: str) -> tuple[str, bool]:
    """The source of the function that the text begins with, and whether it runs to the end of the text."""
    lines = text.split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    open_brackets = 0
    for last, line in enumerate(lines):
        outside = line.strip() and len(line) - len(line.lstrip()) <= indent and open_brackets <= 0
        if last > 0 and (outside or line.lstrip().startswith("```")):
            return textwrap.dedent("\n".join(lines[:last])), False
        open_brackets += len(re.findall(r"[(\[{]", line)) - len(re.findall(r"[)\]}]", line))
    return textwrap.dedent(text), True


def parse_answer(
    text: str,
    group: str = "row",
    allocation: Allocation = SDSA,
    statistics: Collection[str] = DEFAULT_STATISTICS,
) -> Proposal:
    """Read an answer of the form that `grammar.answer_grammar` enforces, and less orderly ones.

    Code fences, markup, and prose before and after are skipped; the thoughts may be missing; group and allocation are
    what holds where the answer names none. Of several functions the first counts. statistics: those that it may read;
    one that is only listed as a parameter does no harm.
    Raises LanguageError where there is no function, where it was cut, where it is outside the language, or where it
    reads a statistic that is not offered.
    """
    text = text.replace("\r\n", "\n")
    start = re.search(r"^[ \t]*def[ \t]+score\b", text, re.MULTILINE)
    if start is None:
        raise LanguageError("the answer holds no line `def score(W, …):`; it was cut, or the function never written")
    head = text[: start.start()]
    source, at_end = _function(text[start.start() :])
    try:
        program = parse(source)
    except LanguageError as error:
        if at_end and ("not Python" in str(error) or not re.search(r"^\s+return .*\Z", source, re.MULTILINE)):
            raise LanguageError("the answer was cut before the function ended; write a shorter one") from None
        raise
    missing = [name for name in program.reads if name not in statistics]
    if missing:
        offered = ", ".join(("W", *statistics))
        raise LanguageError(f"the score reads {', '.join(missing)}: not offered here; offered are {offered}")
    named = _line(head, "Group")
    found = re.search(rf"\b({'|'.join(GROUPS)})\b", named.lower())
    if named and not found:
        raise LanguageError(f"the group is '{named[:80]}', expected {' or '.join(GROUPS)}")
    chosen = found[1] if found else group
    algorithm = Algorithm(program.source, chosen, _allocation(_line(head, "Allocation"), allocation))
    return Proposal(_thought(head, "Diagnosis"), _thought(head, "Hypothesis"), algorithm)
