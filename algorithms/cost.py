"""What a program would do to a layer, found without computing anything: its shapes, its work, its memory."""

from __future__ import annotations

import ast
import math
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoprune.algorithms.language import LanguageError, Program
from autoprune.algorithms.vocabulary import STATISTICS

# Wide, tall and square: what is right for all three is right for nearly every shape (a slice may be longer than these),
# and no [in, in] or [out, out] passes. So large that rows and columns weigh as little as they do in a model.
SHAPES = ((512, 768), (768, 512), (640, 640))

# Bounds that are far above what is written to prune (the costliest baseline, RIA, takes 7 operations and 4 matrices)
# and keep a candidate's time below that of the model's own forward pass.
MAX_OPERATIONS = 128
MAX_MATRICES = 16
MAX_STEPS = 400  # operations that are run, whatever their size: each takes time of its own
# Element operations per element that a sort stands for: about log2 of a row's length.
SORT = 12
# In what plain RuntimeErrors say that are of a device, too, where a library found it.
DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "CUSOLVER_STATUS", "NVML_SUCCESS")
SORTS = frozenset({"argsort", "median", "quantile"})


@dataclass(frozen=True)
class Cost:
    """operations: on elements, per weight. matrices: the most that is alive at a time beside W and the statistics, in
    fp32 matrices of W's shape. Both are the greatest over SHAPES."""

    operations: float
    matrices: float


class Meter(TorchFunctionMode):
    """Counts what is computed and what is alive; refuses results with more numbers than W has, such as outer products
    of a row with itself, and whatever goes beyond the bounds, when it does."""

    def __init__(self, what: str, *shape: int) -> None:
        super().__init__()
        self.what, self.numel = f"{what} {list(shape)}", math.prod(shape)
        self.operations = self.bytes = self.peak = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._count(getattr(func, "__name__", ""), [a for a in args if isinstance(a, Tensor)], result)
        return result

    def _count(self, name: str, operands: list[Tensor], result: Tensor) -> None:
        if result.numel() > self.numel:
            raise LanguageError(f"a value of shape {list(result.shape)} is larger than {self.what}")
        if result._is_view() or any(result is operand for operand in operands):
            return
        touched = max(tensor.numel() for tensor in (*operands, result))
        if "matmul" in name:
            touched = operands[0].numel() * math.prod(operands[-1].shape[1:])
        self.operations += touched * (SORT if name in SORTS else 1)
        size = result.numel() * result.element_size()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(result, self._freed, size)
        if self.operations > MAX_OPERATIONS * self.numel:
            raise LanguageError(f"more than {MAX_OPERATIONS} operations per weight; write fewer or shorter loops")
        if self.peak > MAX_MATRICES * 4 * self.numel:
            raise LanguageError(f"more than {MAX_MATRICES} matrices of W's size are alive at a time; hold fewer")

    def _freed(self, size: int) -> None:
        self.bytes -= size

    @property
    def cost(self) -> Cost:
        return Cost(self.operations / self.numel, self.peak / (4 * self.numel))


def dry_run(program: Program) -> Cost:
    """Run the program on meta tensors (nothing is computed) of several shapes.

    Raises LanguageError where an operation fails, a value outgrows W, a bound is passed, or the result is not float32
    of W's shape.
    """
    if _steps(ast.parse(program.source)) > MAX_STEPS:
        raise LanguageError(f"more than {MAX_STEPS} operations are run; write fewer or shorter loops")
    costs = []
    for rows, columns in SHAPES:
        W = torch.empty(rows, columns, device="meta")
        statistics = {name: torch.empty(STATISTICS[name].shape(rows, columns), device="meta") for name in program.reads}
        with metered(program.source, "W", rows, columns) as meter:
            program(W, statistics)
        costs.append(meter.cost)
    return Cost(max(cost.operations for cost in costs), max(cost.matrices for cost in costs))


def _steps(node: ast.AST) -> int:
    """How many operations a program's syntax tree runs."""
    steps = sum(map(_steps, ast.iter_child_nodes(node))) + isinstance(node, (ast.BinOp, ast.Compare, ast.Call))
    return steps * node.iter.args[0].value if isinstance(node, ast.For) else steps


@contextmanager
def refusing(source: str) -> Iterator[None]:
    """While open, a program of this text runs; that an operation fails is a LanguageError.

    Errors of a device are none: whoever runs the program on it cannot be trusted any more.
    """
    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
        if any(word in str(error) for word in DEVICE_ERRORS):
            raise
        raise LanguageError(_where(source, error)) from None


@contextmanager
def metered(source: str, what: str, *shape: int) -> Iterator[Meter]:
    """As `refusing`, under a meter."""
    with refusing(source), Meter(what, *shape) as meter:
        yield meter


def _where(source: str, error: Exception) -> str:
    """The first line of the message, and the line of a program's text that raised it."""
    message = (str(error).splitlines() or [type(error).__name__])[0][:200]
    frames = traceback.walk_tb(error.__traceback__)  # not extract_tb, which reads the files of all frames
    lines = [line for frame, line in frames if frame.f_code.co_filename in ("<score>", "<allocate>")]
    return f"in `{source.splitlines()[lines[-1] - 1].strip()[:160]}`: {message}" if lines else message
