"""The algorithm language: read a candidate's functions and run them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from autoprune.algorithms.operations import OPERATIONS
from autoprune.algorithms.reader import FORMS, Function, canonical
from autoprune.algorithms.translator import LanguageError

__all__ = ["AllocationProgram", "LanguageError", "Program", "parse", "parse_allocation"]

# All of torch that a program can name.
FUNCTIONS = SimpleNamespace(**{o.name: getattr(torch, o.name) for o in OPERATIONS if o.form == "function"})

# Where a number stands in place of a tensor, torch looks its own classes of numbers up: by an import, on behalf of the
# calling function, the first time in a process. A program has no builtins to import with, so this is the first time.
torch.ones(1).clamp(min=0.5)


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
        if wishes.shape != (units,) or not wishes.is_floating_point():
            raise LanguageError(
                f"allocate returned {_dtype(wishes)} {list(wishes.shape)}, expected float64 [{units}], one per unit"
            )
        wishes = wishes.double()  # ranks alone are float32
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
