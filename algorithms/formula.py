"""A function of the algorithm language as mathematics, in the LaTeX that Markdown readers and matplotlib both know.

i counts the outputs of a layer, j its inputs, b the units of an allocation (blocks, or layers).
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.reader import canonical
from autoprune.algorithms.rules import DEFAULTS
from autoprune.algorithms.vocabulary import STATISTICS

SYMBOLS = {
    "W": r"W_{ij}",
    "x_norm": r"\Vert X_j\Vert",
    "x_mean": r"\bar{X}_j",
    "x_std": r"\sigma_j",
    "x_absmean": r"a_j",
    "x_kurtosis": r"\kappa_j",
    "h_inv_diag": r"[H^{-1}]_{jj}",
    "g_rms": r"G_{ij}",
}
INDEX = {"m": "ij", "r": "j", "c": "i", "o": "i", "u": "b", "s": ""}  # of each type of value; "o" is [out]
ORDER, SUM, PRODUCT, SIGN, ATOM = range(5)  # how tightly a text holds together
LONGEST = 120  # characters of a text that stands in another: what is longer has a line and a name of its own
FUNCTIONS = {"tanh": r"\tanh", "exp": r"\exp", "log": r"\ln", "sigmoid": r"\mathrm{sigmoid}", "sign": r"\mathrm{sign}"}
REDUCTIONS = {
    "mean": r"\mathrm{mean}",
    "sum": r"\sum",
    "amax": r"\max",
    "amin": r"\min",
    "std": r"\mathrm{std}",
    "var": r"\mathrm{var}",
    "norm": r"\mathrm{norm}",
    "quantile": r"\mathrm{quantile}",
}
ALONG = {"softmax": r"\mathrm{softmax}", "cumsum": r"\mathrm{cumsum}", "argsort": r"\mathrm{argsort}"}
SIGNS = {ast.Gt: ">", ast.GtE: r"\geq", ast.Lt: "<", ast.LtE: r"\leq"}


@dataclass(frozen=True)
class _Value:
    text: str
    tightness: int
    type: str  # as `algorithms.operations` has them, and "o": [out]
    half: bool = False  # whether it is the number 0.5

    def within(self, tightness: int) -> str:
        """In brackets where it holds together less tightly than its place asks."""
        return self.text if self.tightness >= tightness else rf"\left({self.text}\right)"


def score_formula(source: str) -> list[str]:
    """Lines of LaTeX for a score function, the last one that of the score S; none for a function with a loop, or for a
    score that is no program."""
    if not source.startswith("def "):
        return []
    return _lines(canonical(source)["score"].text, r"S_{ij}")


def allocation_formula(allocation: Allocation) -> list[str]:
    """Lines of LaTeX for an allocation that is a function, or SDSA's with its numbers; none for others."""
    if allocation.source:
        return _lines(canonical(allocation.source)["allocate"].text, r"r_b \propto")
    return [_sdsa(DEFAULTS["sdsa"] | allocation.parameters)] if allocation.name == "sdsa" else []


def read_symbols(source: str) -> dict[str, str]:
    """What the symbols of a score's formula mean: LaTeX → description."""
    reads = canonical(source)["score"].reads if source.startswith("def ") else ()
    return {SYMBOLS["W"]: "the weight"} | {SYMBOLS[name]: STATISTICS[name].description for name in reads}


def _sdsa(parameters: dict[str, float]) -> str:
    tau, m, depth = (parameters[name] for name in ("tau", "m", "depth"))
    power = "" if tau == 1 else rf"^{{{_number(1 / tau)}}}"
    spread = rf"{_number(1 - m)} + {_number(m)}\,\frac{{\gamma_b{power}}}{{\mathrm{{mean}}_b\,\gamma_b{power}}}"
    early = rf"\left(1 + {_number(depth)}\left(1 - \frac{{b}}{{B-1}}\right)\right)" if depth else ""
    taylor = rf"\,t_l^{{{_number(parameters['taylor'])}}}" if parameters.get("taylor") else ""
    exponent = r"^{\frac{s}{1.5\,(1-s)}}"
    return rf"r_b \propto \left(\left({spread}\right){early}{taylor}\right){exponent}"


def _lines(text: str, name: str) -> list[str]:
    """name: of what the function returns, left of the sign."""
    try:
        return _written(text, name)
    except _Unwritten:
        return []


def _written(text: str, name: str) -> list[str]:
    body = ast.parse(text).body[0].body
    if any(isinstance(statement, ast.For) for statement in body):
        return []
    stored = Counter(statement.targets[0].id for statement in body[:-1])
    if any(count > 1 for count in stored.values()):
        return []
    loads = [n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    uses, writer, lines = Counter(loads), _Writer(), []
    for statement in body[:-1]:
        local, value = statement.targets[0].id, writer.write(statement.value)
        named = uses[local] > 1 or len(value.text) > LONGEST
        if named and not isinstance(statement.value, ast.Name):
            index = f",{INDEX[value.type]}" if INDEX[value.type] else ""
            symbol = rf"v_{{{local[1:]}{index}}}"
            lines.append(f"{symbol} = {value.text}")
            value = _Value(symbol, ATOM, value.type)
        writer.locals[local] = value
    relation = "" if name.endswith("propto") else " ="
    return [*lines, f"{name}{relation} {writer.write(body[-1].value).text}"]


class _Unwritten(Exception):
    """Something for which there is no formula."""


def _number(value: float) -> str:
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    if not exponent:
        return mantissa
    power = rf"10^{{{int(exponent)}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"


class _Writer:
    """Writes expressions; locals: what stands for each."""

    def __init__(self) -> None:
        self.locals: dict[str, _Value] = {}

    def write(self, node: ast.expr) -> _Value:
        match node:
            case ast.Name(id=name):
                return self._name(name)
            case ast.Constant(value=value):
                return _Value(_number(value), PRODUCT if "cdot" in _number(value) else ATOM, "s", value == 0.5)
            case ast.Attribute(attr=name):
                return _Value(rf"\mathrm{{{name.replace('_', ' ')}}}_b".replace(" ", r"\ "), ATOM, "u")
            case ast.UnaryOp(operand=operand):
                value = self.write(operand)
                return _Value(f"-{value.within(SIGN)}", SUM, value.type)
            case ast.BinOp(left=left, op=op, right=right):
                return self._operator(op, self.write(left), self.write(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                one, other = self.write(left), self.write(right)
                text = f"{one.within(SUM)} {SIGNS[type(op)]} {other.within(SUM)}"
                return _Value(text, ORDER, _wider(one.type, other.type))
            case ast.Subscript(value=value, slice=index):
                return self._reshaped(self.write(value), ast.unparse(index))
            case ast.Call(func=ast.Name("tune"), args=[value, *_]):
                return self.write(value)
            case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr=name), args=arguments):
                return self._function(name, [self.write(argument) for argument in arguments])
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=arguments, keywords=keywords):
                return self._method(name, value, arguments, {k.arg: k.value for k in keywords})
        raise AssertionError(ast.dump(node))

    def _name(self, name: str) -> _Value:
        if name in self.locals:
            return self.locals[name]
        if name == "sparsity":
            return _Value("s", ATOM, "s")
        return _Value(SYMBOLS[name], ATOM, "m" if name == "W" else STATISTICS[name].type)

    def _operator(self, op: ast.operator, left: _Value, right: _Value) -> _Value:
        kind = _wider(left.type, right.type)
        match op:
            case ast.Add():
                return _Value(f"{left.within(SUM)} + {right.within(PRODUCT)}", SUM, kind)
            case ast.Sub():
                return _Value(f"{left.within(SUM)} - {right.within(PRODUCT)}", SUM, kind)
            case ast.Mult():
                if right.text[:1].isdigit() and not left.text[:1].isdigit():
                    left, right = right, left  # a number that is marked to be tuned stands where it was written
                digits = left.text[-1:].isdigit() and right.text[:1].isdigit()
                sign = r" \cdot " if digits else r"\,"
                return _Value(f"{left.within(PRODUCT)}{sign}{right.within(PRODUCT)}", PRODUCT, kind)
            case ast.Div():
                return _Value(rf"\frac{{{left.text}}}{{{right.text}}}", PRODUCT, kind)
            case ast.Pow():
                return self._power(left, right)
        over = "j" if left.type == "m" else INDEX[left.type] or "j"
        return _Value(rf"\sum_{{{over}}} {left.within(PRODUCT)}\,{right.within(PRODUCT)}", SUM, "o")

    def _power(self, base: _Value, exponent: _Value) -> _Value:
        kind = _wider(base.type, exponent.type)
        if exponent.half:
            return _Value(rf"\sqrt{{{base.text}}}", ATOM, kind)
        plain = base.tightness == ATOM and "^" not in base.text and not base.text.startswith(r"\mathrm")
        return _Value(rf"{base.text if plain else base.within(ATOM + 1)}^{{{exponent.text}}}", SIGN, kind)

    def _reshaped(self, value: _Value, index: str) -> _Value:
        types = {"(:, None)": "c", "(None, :)": "r", ":": value.type}
        if index not in types:
            raise _Unwritten  # some of the numbers: no letter says which
        return _Value(value.text, value.tightness, types[index])

    def _function(self, name: str, values: list[_Value]) -> _Value:
        kind = "s"
        for value in values:
            kind = _wider(kind, value.type)
        texts = ", ".join(value.text for value in values)
        if name == "where":
            return _Value(rf"\mathrm{{if}}\left({texts}\right)", ATOM, kind)
        return _Value(rf"\{'max' if name == 'maximum' else 'min'}\left({texts}\right)", ATOM, kind)

    def _method(self, name: str, node: ast.expr, arguments: list[ast.expr], named: dict[str, ast.expr]) -> _Value:
        ranks = name == "argsort" and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if ranks and node.func.attr == "argsort":  # twice: ranks
            if ast.unparse(named["dim"]) != ast.unparse(next(k.value for k in node.keywords if k.arg == "dim")):
                raise _Unwritten
            value = self.write(node.func.value)
            over = self._over(value.type, named)
            return _Value(rf"\mathrm{{rank}}_{{{over}}}\left({value.text}\right)", ATOM, value.type)
        value = self.write(node)
        inner = rf"\left({value.text}\right)"
        if name in REDUCTIONS:
            return self._reduced(name, value, named)
        if name in ALONG:
            return _Value(rf"{ALONG[name]}_{{{self._over(value.type, named)}}}{inner}", ATOM, value.type)
        if name in FUNCTIONS:
            return _Value(f"{FUNCTIONS[name]}{inner}", ATOM, value.type)
        match name:
            case "abs":
                return _Value(rf"\left|{value.text}\right|", ATOM, value.type)
            case "square":
                return self._power(value, _Value("2", ATOM, "s"))
            case "pow":
                return self._power(value, self.write(arguments[0]))
            case "sqrt":
                return _Value(rf"\sqrt{{{value.text}}}", ATOM, value.type)
            case "rsqrt":
                return _Value(rf"\frac{{1}}{{\sqrt{{{value.text}}}}}", PRODUCT, value.type)
            case "log1p":
                return _Value(rf"\ln\left(1 + {value.text}\right)", ATOM, value.type)
            case "relu":
                return _Value(rf"\max\left(0, {value.text}\right)", ATOM, value.type)
            case "clamp":
                for bound, function in (("min", "max"), ("max", "min")):
                    if bound in named:
                        limit = self.write(named[bound]).text
                        value = _Value(rf"\{function}\left({value.text}, {limit}\right)", ATOM, value.type)
                return value
            case "unsqueeze":
                dim = ast.literal_eval(arguments[0] if arguments else named["dim"])
                return _Value(value.text, value.tightness, "r" if dim == 0 else "c")
        return value  # float: the same number

    def _over(self, kind: str, named: dict[str, ast.expr]) -> str:
        if kind == "m" and "dim" in named:
            return "i" if ast.literal_eval(named["dim"]) in (0, -2) else "j"
        return INDEX[kind]

    def _reduced(self, name: str, value: _Value, named: dict[str, ast.expr]) -> _Value:
        over = self._over(value.type, named)
        below = over
        if name == "quantile":
            below = f"{over}, {self.write(named['q']).text}" if "q" in named else over
        elif name == "norm" and "p" in named:
            below = f"{over}, {self.write(named['p']).text}"
        kept = ast.literal_eval(named["keepdim"]) if "keepdim" in named else False
        left = {"ij": "s", "i": "r", "j": "c" if kept else "o"}[over] if value.type == "m" else "s"
        # A sum takes in whatever follows it.
        return _Value(rf"{REDUCTIONS[name]}_{{{below}}}\left({value.text}\right)", SUM if name == "sum" else ATOM, left)


def _wider(one: str, other: str) -> str:
    """The type of what two values broadcast to."""
    if one == other or other == "s":
        return one
    return other if one == "s" else "u" if "u" in (one, other) else "m"
