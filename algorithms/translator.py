"""What a function of the language may consist of: each statement and expression is built anew, or refused.

Candidates are hostile until shown otherwise. Nothing of a source's syntax tree is passed on: the translator builds a
new one out of the few things that it knows (`algorithms.operations`).
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection

from autoprune.algorithms.operations import BY_NAME, KEYWORDS, NEED_DIM, OPERATIONS
from autoprune.algorithms.vocabulary import STATISTICS

MAX_TURNS = 8  # of a loop; loops do not nest
MAX_NUMBER = 1e9
RESERVED = ("torch", "range", "tune", "profile", "_")
MAX_MESSAGE = 400  # characters; a name in the source may be long

OPERATORS = tuple(operation.name for operation in OPERATIONS if operation.form == "operator")
_PARSED = tuple(ast.parse(f"a {sign} b", mode="eval").body for sign in OPERATORS)
ARITHMETIC = tuple(type(node.op) for node in _PARSED if isinstance(node, ast.BinOp))
COMPARISONS = tuple(type(node.ops[0]) for node in _PARSED if isinstance(node, ast.Compare))


class LanguageError(ValueError):
    """Why a source cannot be used, in one line, with line and column where there is one."""


def refuse(node: ast.AST, message: str) -> LanguageError:
    return LanguageError(f"line {node.lineno}, column {node.col_offset + 1}: {message}"[:MAX_MESSAGE])


def nearest(name: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; allowed: {', '.join(sorted(allowed))}"


class Translator:
    """Translates one function's statements; `known` are the names defined so far.

    parameters: names that stand for tensors or numbers. summaries: names that may be read as `profile.NAME`, none
    where there is no profile.
    """

    def __init__(self, parameters: tuple[str, ...], summaries: Collection[str] = ()) -> None:
        self.parameters = parameters
        self.summaries = summaries
        self.known = list(parameters)

    def statements(self, nodes: list[ast.stmt], in_loop: bool = False) -> list[ast.stmt]:
        return [self.statement(node, in_loop) for node in nodes]

    def statement(self, node: ast.stmt, in_loop: bool) -> ast.stmt:
        match node:
            case ast.Assign(targets=[ast.Name() as target], value=value):
                return self.assignment(target, self.expression(value))
            case ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value):
                return self.assignment(target, self.expression(value))
            case ast.AugAssign(target=ast.Name() as target, op=op, value=value):
                # Written out, so that a local that shares W's memory is never changed in place.
                left = self.expression(ast.copy_location(ast.Name(target.id, ast.Load()), target))
                return self.assignment(target, ast.BinOp(left, self.operator(node, op), self.expression(value)))
            case ast.For(
                target=ast.Name() as target,
                iter=ast.Call(func=ast.Name("range"), args=[ast.Constant(int() as turns)], keywords=[]),
                orelse=[],
            ) if not in_loop:
                if isinstance(turns, bool) or not 1 <= turns <= MAX_TURNS:
                    raise refuse(node, f"range({turns}): a loop takes 1 to {MAX_TURNS} turns")
                if target.id in self.known:
                    raise refuse(target, f"'{target.id}' is already a name; write `for _ in range({turns})`")
                body = self.statements(node.body, in_loop=True)
                call = ast.Call(ast.Name("range", ast.Load()), [ast.Constant(turns)], [])
                return ast.For(ast.Name("_", ast.Store()), call, body, [])
            case ast.For():
                raise refuse(node, f"a loop is `for _ in range(N)`, N a literal up to {MAX_TURNS}, and not in a loop")
            case ast.Return(value=ast.expr() as value) if not in_loop:
                return ast.Return(self.expression(value))
        what = f"the statement {type(node).__name__}"
        if isinstance(node, ast.Return):
            what = "a return inside a loop" if in_loop else "a return without a value"
        raise refuse(node, f"{what} is not in the language; expected `name = expression` or a final return")

    def assignment(self, target: ast.Name, value: ast.expr) -> ast.stmt:
        if target.id in self.parameters:
            raise refuse(target, f"'{target.id}' is an input and stays as it is; assign to another name")
        if target.id in RESERVED or "__" in target.id:
            raise refuse(target, f"'{target.id}' cannot be assigned to; choose another name")
        if target.id not in self.known:
            self.known.append(target.id)
        return ast.Assign([ast.Name(target.id, ast.Store())], value)

    def operator(self, node: ast.AST, op: ast.operator) -> ast.operator:
        if not isinstance(op, ARITHMETIC):
            raise refuse(
                node, f"the operator {type(op).__name__} is not in the language; allowed: {' '.join(OPERATORS)}"
            )
        return op

    def expression(self, node: ast.expr) -> ast.expr:
        match node:
            case ast.Name(id="profile") if self.summaries:
                raise refuse(node, f"profile is read by its summaries, profile.NAME: {', '.join(self.summaries)}")
            case ast.Name(id=name):
                if name not in self.known:
                    hint = "; add it to the parameters" if name in STATISTICS else nearest(name, tuple(self.known))
                    raise refuse(node, f"'{name}' is not defined{hint}")
                return ast.Name(name, ast.Load())
            case ast.Constant():
                return ast.Constant(self.number(node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return ast.UnaryOp(ast.USub(), self.expression(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return ast.BinOp(self.expression(left), self.operator(node, op), self.expression(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if isinstance(op, COMPARISONS):
                return ast.Compare(self.expression(left), [op], [self.expression(right)])
            case ast.Subscript(value=value, slice=index):
                return ast.Subscript(self.expression(value), self.index(index), ast.Load())
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                return self.call(node, value, name)
            case ast.Call(func=ast.Name("tune")):
                return self.tuned(node)
            case ast.Attribute(value=ast.Name("profile"), attr=name) if self.summaries:
                if name not in self.summaries:
                    raise refuse(node, f"'{name}' is not a summary{nearest(name, tuple(self.summaries))}")
                return ast.Attribute(ast.Name("profile", ast.Load()), name, ast.Load())
            case ast.Attribute(attr=name):
                raise refuse(node, f"the attribute '{name}' is not in the language; only calls of tensor methods are")
            case ast.Call():
                raise refuse(node, "only tensor methods and functions written torch.NAME(…) can be called")
        raise refuse(node, f"the expression {type(node).__name__} is not in the language")

    def tuned(self, node: ast.Call) -> ast.expr:
        """`tune(value, low, high)`: the value, marked as one that may be moved between low and high."""
        if len(node.args) != 3 or node.keywords:
            raise refuse(node, "expected tune(value, low, high), three numbers")
        signs = [isinstance(argument, ast.UnaryOp) and isinstance(argument.op, ast.USub) for argument in node.args]
        bare = [argument.operand if sign else argument for argument, sign in zip(node.args, signs, strict=True)]
        if not all(isinstance(argument, ast.Constant) for argument in bare):
            raise refuse(node, "expected tune(value, low, high), three numbers")
        value, low, high = (self.number(a) * (-1 if sign else 1) for a, sign in zip(bare, signs, strict=True))
        if not low <= value <= high or low == high:
            raise refuse(node, f"tune({value:g}, {low:g}, {high:g}): expected low ≤ value ≤ high, and low below high")
        return ast.Call(ast.Name("tune", ast.Load()), [_literal(number) for number in (value, low, high)], [])

    def number(self, node: ast.Constant) -> float:
        """Numbers become floats: powers of Python's integers could grow without bound."""
        if type(node.value) not in (int, float) or not abs(node.value) <= MAX_NUMBER:
            raise refuse(node, f"a literal here is a number of at most {MAX_NUMBER:g} in size")
        return float(node.value)

    def integer(self, node: ast.expr) -> ast.expr:
        match node:
            case ast.Constant(int() as value) if type(value) is int and value <= MAX_NUMBER:
                return ast.Constant(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as operand):
                return ast.UnaryOp(ast.USub(), self.integer(operand))
        raise refuse(node, "expected an integer literal")

    def index(self, node: ast.expr) -> ast.expr:
        match node:
            case ast.Tuple(elts=elements):
                return ast.Tuple([self.index(element) for element in elements], ast.Load())
            case ast.Constant(None):
                return ast.Constant(None)
            case ast.Slice(lower=lower, upper=upper, step=step):
                return ast.Slice(*(part and self.integer(part) for part in (lower, upper, step)))
        return self.integer(node)

    def call(self, node: ast.Call, value: ast.expr, name: str) -> ast.expr:
        """`torch.NAME(x, …)` and `x.NAME(…)` become one form, with arguments such as dim given by name."""
        operation = BY_NAME.get(name)
        from_torch = isinstance(value, ast.Name) and value.id == "torch"
        if operation is None or operation.form == "operator":
            allowed = tuple(n for n, o in BY_NAME.items() if o.form != "operator")
            raise refuse(node, f"'{name}' is not in the language{nearest(name, allowed)}")
        positional = list(node.args) if from_torch else [value, *node.args]
        parameters = operation.parameters if operation.form == "function" else ("input", *operation.parameters)
        if len(positional) > len(parameters):
            raise refuse(node, f"{name} takes at most {len(parameters)} arguments, counting the tensor")
        given = dict(zip(parameters, positional, strict=False))
        for keyword in node.keywords:
            if keyword.arg not in parameters or keyword.arg not in KEYWORDS or keyword.arg in given:
                raise refuse(keyword.value, f"{name} takes no further argument '{keyword.arg}'")
            given[keyword.arg] = keyword.value
        if "input" in parameters and "input" not in given:
            raise refuse(node, f"{name} needs a tensor")
        if name in NEED_DIM and "dim" not in given:
            raise refuse(node, f"{name} needs dim=, such as dim=1")
        if name == "median":  # torch's own returns two things; this is the mean of the two in the middle
            name, operation = "quantile", BY_NAME["quantile"]
            parameters, given = ("input", *operation.parameters), given | {"q": ast.Constant(0.5)}
        if name == "argsort":  # of equal values the first comes first, on every device
            given["stable"] = ast.Constant(True)
        plain = [self.expression(argument) for key, argument in given.items() if key not in KEYWORDS]
        named = [
            ast.keyword(key, self.argument(key, given[key])) for key in parameters if key in KEYWORDS and key in given
        ]
        if operation.form == "function":
            return ast.Call(ast.Attribute(ast.Name("torch", ast.Load()), name, ast.Load()), plain, named)
        return ast.Call(ast.Attribute(plain[0], name, ast.Load()), plain[1:], named)

    def argument(self, key: str, node: ast.expr) -> ast.expr:
        if KEYWORDS[key] is int:
            return self.integer(node)
        if KEYWORDS[key] is bool:
            if not (isinstance(node, ast.Constant) and isinstance(node.value, bool)):
                raise refuse(node, f"{key} is True or False")
            return ast.Constant(node.value)
        return self.expression(node)


def _literal(number: float) -> ast.expr:
    """As Python writes it: a sign is an operator of its own."""
    return ast.UnaryOp(ast.USub(), ast.Constant(-number)) if number < 0 else ast.Constant(number)
