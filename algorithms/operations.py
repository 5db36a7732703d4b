"""The operations of the algorithm language: one table that the grammar writes from and the validator reads from.

Every value has one of four types, by shape: matrix "m" [out, in], row "r" [in] (one number per input feature), column
"c" [out, 1] (one per output row) and scalar "s" []. What the grammar writes is never negative: weights enter as
`W.abs()` or `W.square()`, and a difference stands inside `.abs()`. So roots, logarithms and powers are finite, and
`x + 1e-6` is a safe denominator. Differences and extremes that could turn a whole comparison group into one number
(`m - m`, the larger of a matrix and its row sums) are not written.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPES = ("m", "r", "c", "s")


@dataclass(frozen=True)
class Operation:
    """One allowed torch function or operator, and the ways in which the grammar writes it.

    name: an operator's sign, or the torch name. form: "operator"; "method": also accepted as `torch.name(x, …)`;
    "function": only as `torch.name(…)`. parameters: the arguments after the first tensor (of a function: all), in
    positional order; those in KEYWORDS may be given by name. writings: (type of the result, text), where `{m}`, `{r}`,
    `{c}`, `{s}` stand for operands of that type, `{k}` for a factor and `{e}` for an exponent. Without writings, it
    is accepted from other sources only.
    """

    name: str
    form: str
    parameters: tuple[str, ...] = ()
    writings: tuple[tuple[str, str], ...] = ()


# Arguments that may be given by name, and what they must be: a literal of this type, or (None) any expression.
KEYWORDS = {"q": None, "dim": int, "keepdim": bool, "stable": bool, "p": None, "min": None, "max": None}
# Operations that must be told along which dimension: over a whole matrix they would cost too much, or mean nothing.
NEED_DIM = frozenset({"quantile", "median", "softmax", "cumsum", "argsort"})


def _each(types: str, text: str) -> tuple[tuple[str, str], ...]:
    """The same writing for several types: `{t}` in the text is the type, which is the result's too."""
    return tuple((t, text.replace("{t}", f"{{{t}}}")) for t in types)


def _operator(sign: str, *writings: tuple[str, str]) -> Operation:
    return Operation(sign, "operator", (), writings)


def _elementwise(name: str, types: str = "") -> Operation:
    return Operation(name, "method", (), _each(types, f"{{t}}.{name}()"))


def _reduction(name: str, results: str = "", parameters: tuple[str, ...] = ("dim", "keepdim")) -> Operation:
    """Over the outputs (a row is left), over the inputs (a column is left), or over everything."""
    texts = {"r": f"{{m}}.{name}(dim=0)", "c": f"{{m}}.{name}(dim=1, keepdim=True)", "s": f"{{m}}.{name}()"}
    writings = tuple((result, texts[result]) for result in results)
    if "s" in results:
        writings += (("s", f"{{r}}.{name}()"), ("s", f"{{c}}.{name}()"))
    return Operation(name, "method", parameters, writings)


OPERATIONS = (
    _operator(
        "+",
        *_each("mrc", "{t} + {t}"),
        *_each("mrc", "{t} + {k} * {t}"),
        ("m", "{m} + {r}"),
        ("m", "{m} + {c}"),
    ),
    _operator("-"),
    _operator("*", *_each("mrc", "{t} * {t}"), ("m", "{m} * {r}"), ("m", "{m} * {c}")),
    _operator(
        "/",
        ("m", "{m} / ({r} + 1e-6)"),
        ("m", "{m} / ({c} + 1e-6)"),
        ("m", "{m} / ({s} + 1e-6)"),
        *_each("rc", "{t} / ({t} + 1e-6)"),
        *_each("rc", "{t} / ({s} + 1e-6)"),
    ),
    _operator("**", *_each("mrc", "{t} ** {e}")),
    _operator("@"),
    _operator(">"),
    _operator(">="),
    _operator("<"),
    _operator("<="),
    Operation(
        "abs",
        "method",
        (),
        (("m", "({m} - {r}).abs()"), ("m", "({m} - {c}).abs()"), *_each("rc", "({t} - {s}).abs()")),
    ),
    _elementwise("square", "rc"),
    _elementwise("sqrt", "mrc"),
    _elementwise("log1p", "mrc"),
    _elementwise("tanh", "rc"),
    _elementwise("sigmoid", "rc"),
    # The only decreasing function: between exp(-1) and 1, so it can neither overflow nor vanish.
    Operation("exp", "method", (), _each("rc", "(-{t}.tanh()).exp()")),
    _elementwise("log"),
    _elementwise("rsqrt"),
    _elementwise("relu"),
    _elementwise("sign"),
    _elementwise("float"),
    Operation("pow", "method", ("exponent",)),
    Operation("unsqueeze", "method", ("dim",)),
    _reduction("mean", "rcs"),
    _reduction("sum", "rc"),
    _reduction("amax", "rcs"),
    _reduction("amin"),
    _reduction("std", "rcs"),
    _reduction("var"),
    _reduction("norm", "rc", ("p", "dim", "keepdim")),
    Operation("quantile", "method", ("q", "dim", "keepdim")),
    Operation("median", "method", ("dim", "keepdim")),
    Operation("softmax", "method", ("dim",)),
    Operation("cumsum", "method", ("dim",)),
    Operation("argsort", "method", ("dim", "stable")),
    Operation("clamp", "method", ("min", "max"), _each("rc", "{t}.clamp(max={s})")),
    Operation("maximum", "function", ("input", "other"), _each("mrc", "torch.maximum({t}, {t})")),
    Operation("minimum", "function", ("input", "other"), _each("mrc", "torch.minimum({t}, {t})")),
    Operation(
        "where",
        "function",
        ("condition", "input", "other"),
        (
            ("m", "torch.where({m} > {c}, {m}, {k} * {m})"),
            ("m", "torch.where({m} > {s}, {m}, {k} * {m})"),
            *_each("rc", "torch.where({t} > {s}, {t}, {k} * {t})"),
        ),
    ),
)

BY_NAME = {operation.name: operation for operation in OPERATIONS}
