"""From any source text to the canonical text of its functions, or to a refusal.

A source holds `score(W, …)`, `allocate(profile, sparsity)`, or both.
"""

from __future__ import annotations

import ast
import os
import warnings
from dataclasses import dataclass

from autoprune.algorithms.translator import LanguageError, Translator, nearest, refuse
from autoprune.algorithms.vocabulary import STATISTICS, SUMMARIES

MAX_SOURCE = 10_000  # characters
MAX_DEPTH = 40  # of the syntax tree; keeps every recursion below far from the interpreter's limit
MAX_NODES = 1_000
MAX_BITS = 64  # of an integer
# Where a source is said to stand: for some errors Python opens the file of that name, to show a line of it. No file can
# have this name.
NOWHERE = f"{os.devnull}/candidate"
COMMUTATIVE = (ast.Add, ast.Mult)  # bit by bit, for floats as well
FORMS = {"score": "def score(W, …):", "allocate": "def allocate(profile, sparsity):"}


class NotPythonError(LanguageError):
    """The source cannot be parsed at all: it may have been cut."""


@dataclass(frozen=True)
class Function:
    """text: canonical. reads: the statistics, or summaries, that it reads, in the order of their table."""

    text: str
    reads: tuple[str, ...]


class _InOrder(ast.NodeTransformer):
    """Operands whose order does not matter, in the order of their texts; a number stands first in a product and last in
    a sum, as people write it."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        self.generic_visit(node)
        if isinstance(node.op, COMMUTATIVE):
            sign = 1 if isinstance(node.op, ast.Add) else -1
            node.left, node.right = sorted(
                (node.left, node.right), key=lambda side: (sign * isinstance(side, ast.Constant), ast.unparse(side))
            )
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("maximum", "minimum"):
            node.args.sort(key=ast.unparse)
        return node


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    """Names of the parameters, checked against the form of the function."""
    arguments = function.args
    names = tuple(argument.arg for argument in arguments.args)
    plain = ast.arguments([], arguments.args, None, [], [], None, [])
    bare = not function.decorator_list and ast.dump(arguments) == ast.dump(plain)
    if function.name == "allocate":
        if not bare or names != ("profile", "sparsity"):
            raise refuse(function, f"expected `{FORMS['allocate']}`")
        return names
    if not bare or names[:1] != ("W",):
        raise refuse(function, f"expected `def score(W, …):`, the other parameters out of {', '.join(STATISTICS)}")
    for argument in arguments.args[1:]:
        if argument.arg not in STATISTICS:
            raise refuse(argument, f"'{argument.arg}' is not a statistic{nearest(argument.arg, tuple(STATISTICS))}")
    if len(set(names)) < len(names):
        raise refuse(function, "a parameter stands twice")
    return names


def _imports_torch(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import) and [(alias.name, alias.asname) for alias in node.names] == [("torch", None)]


def python(source: str) -> ast.Module:
    """The syntax of any Python, within bounds that keep everything that walks it fast.

    Raises NotPythonError, or LanguageError where a bound is passed.
    """
    if len(source) > MAX_SOURCE:
        raise LanguageError(f"the source has {len(source)} characters, at most {MAX_SOURCE} are read")
    try:
        with warnings.catch_warnings(action="ignore"):  # `1if` and the like would be printed for the driver to read
            module = ast.parse(source, NOWHERE)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"line {error.lineno}, column {error.offset}: " if getattr(error, "lineno", None) else ""
        raise NotPythonError(f"{where}not Python: {getattr(error, 'msg', None) or 'nested too deeply'}") from None
    level, nodes, depth = [module], 0, 0
    while level:
        nodes, depth = nodes + len(level), depth + 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise LanguageError(f"the source is too large: at most {MAX_NODES} nodes, nested {MAX_DEPTH} deep")
        for node in level:
            # Python refuses to write out integers of thousands of digits, which any message about them would do.
            if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
                raise refuse(node, "the integer is too large")
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return module


def _functions(source: str) -> list[ast.FunctionDef]:
    """The syntax of the source's functions, otherwise unchecked."""
    module = python(source)
    body = [node for node in module.body if not _imports_torch(node)]
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    if not body or len(names) < len(body) or not set(names) <= FORMS.keys() or len(set(names)) < len(names):
        forms = " and ".join(f"`{form}`" for form in FORMS.values())
        raise LanguageError(f"expected {forms}, one of them or each once, and nothing beside them")
    return body


def _names(node: ast.AST, context: type) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)]


def _without_dead(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Without the lines that the returned value does not depend on; a loop stays or goes as a whole."""
    live: set[str] = set()
    kept: list[ast.stmt] = []
    for statement in reversed(statements):
        stores = set(_names(statement, ast.Store))
        if isinstance(statement, ast.Return) or stores & live:
            if isinstance(statement, ast.Assign):
                live -= stores
            live |= set(_names(statement, ast.Load))
            kept.insert(0, statement)
    return kept


def canonical(source: str) -> dict[str, Function]:
    """The functions of a source by name: "score", "allocate", or both, in this order.

    Raises LanguageError for everything outside the language.
    """
    found = {function.name: _canonical(function) for function in _functions(source)}
    return {name: found[name] for name in FORMS if name in found}


def _canonical(function: ast.FunctionDef) -> Function:
    parameters, allocates = _parameters(function), function.name == "allocate"
    translator = Translator(("sparsity",), tuple(SUMMARIES)) if allocates else Translator(parameters)
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    statements = translator.statements(body)
    returns = [i for i, statement in enumerate(statements) if isinstance(statement, ast.Return)]
    if not statements or returns != [len(statements) - 1]:
        raise refuse(function, f"{function.name} must end with its only return")
    statements = _without_dead(statements)
    if allocates:
        read = {n.attr for s in statements for n in ast.walk(s) if isinstance(n, ast.Attribute)}
        reads, names = tuple(name for name in SUMMARIES if name in read), parameters
    else:
        read = {name for statement in statements for name in _names(statement, ast.Load)}
        reads = tuple(name for name in STATISTICS if name in read and name in parameters)
        names = ("W", *reads)
    # A name is stored before it is read, so the order of stores is the order of first appearance.
    stored = [name for statement in statements for name in _names(statement, ast.Store) if name != "_"]
    renamed = {name: f"v{i}" for i, name in enumerate(dict.fromkeys(stored))}
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                node.id = renamed.get(node.id, node.id)
    arguments = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    definition = ast.FunctionDef(function.name, arguments, [_InOrder().visit(one) for one in statements], [], None)
    return Function(ast.unparse(ast.fix_missing_locations(ast.Module([definition], []))), reads)
