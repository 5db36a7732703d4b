"""The operations of the algorithm language: one table that the grammar writes from and the validator reads from.

Every value has one of five types, by shape: of a score, matrix "m" [out, in], row "r" [in] (one number per input
feature), column "c" [out, 1] (one per output row) and scalar "s" []; of an allocation, "u" [units] (one per block or
layer) and "s". What the grammar writes is never negative: weights enter as
`W.abs()` or `W.square()`, and a difference stands inside `.abs()`. So roots, logarithms and powers are finite, and
`x + 1e-6` is a safe denominator. Differences and extremes that could turn a whole comparison group into one number
(`m - m`, the larger of a matrix and its row sums) are not written.
"""

from __future__ import annotations

from dataclasses import dataclass

TYPES = ("m", "r", "c", "s", "u")


@dataclass(frozen=True)
class Operation:
    """One allowed torch function or operator, and the ways in which the grammar writes it.

    name: an operator's sign, or the torch name. form: "operator"; "method": also accepted as `torch.name(x, …)`;
    "function": only as `torch.name(…)`. doc: what it gives, in a line. parameters: the arguments after the first
    tensor (of a function: all), in positional order; those in KEYWORDS may be given by name. writings: (type of the
    result, text), where `{m}`, `{r}`, `{c}`, `{s}`, `{u}` stand for operands of that type, `{k}` for a factor, `{e}`
    for an exponent and `{q}` for a share. Without writings, it is accepted from other sources only.
    """

    name: str
    form: str
    doc: str
    parameters: tuple[str, ...] = ()
    writings: tuple[tuple[str, str], ...] = ()


# Arguments that may be given by name, and what they must be: a literal of this type, or (None) any expression.
KEYWORDS = {"q": None, "dim": int, "keepdim": bool, "stable": bool, "p": None, "min": None, "max": None}
# Operations that must be told along which dimension: over a whole matrix they would cost too much, or mean nothing.
NEED_DIM = frozenset({"quantile", "median", "softmax", "cumsum", "argsort"})


def _each(types: str, text: str) -> tuple[tuple[str, str], ...]:
    """The same writing for several types: `{t}` in the text is the type, which is the result's too."""
    return tuple((t, text.replace("{t}", f"{{{t}}}")) for t in types)


def _operator(sign: str, doc: str, *writings: tuple[str, str]) -> Operation:
    return Operation(sign, "operator", doc, (), writings)


def _elementwise(name: str, doc: str, types: str = "") -> Operation:
    return Operation(name, "method", doc, (), _each(types, f"{{t}}.{name}()"))


def _reduction(name: str, doc: str, results: str = "", parameters: tuple[str, ...] = ("dim", "keepdim")) -> Operation:
    """Over the outputs (a row is left), over the inputs (a column is left), or over everything; "u": over the units."""
    texts = {"r": f"{{m}}.{name}(dim=0)", "c": f"{{m}}.{name}(dim=1, keepdim=True)", "s": f"{{m}}.{name}()"}
    writings = tuple((result, texts[result]) for result in results if result in texts)
    if "s" in results:
        writings += (("s", f"{{r}}.{name}()"), ("s", f"{{c}}.{name}()"))
    if "u" in results:
        writings += (("s", f"{{u}}.{name}()"),)
    return Operation(name, "method", doc, parameters, writings)


OPERATIONS = (
    _operator(
        "+",
        "sum",
        *_each("mrcu", "{t} + {t}"),
        *_each("mrcu", "{t} + {k} * {t}"),
        ("m", "{m} + {r}"),
        ("m", "{m} + {c}"),
    ),
    _operator("-", "difference"),
    _operator("*", "product", *_each("mrcu", "{t} * {t}"), ("m", "{m} * {r}"), ("m", "{m} * {c}")),
    _operator(
        "/",
        "quotient",
        ("m", "{m} / ({r} + 1e-6)"),
        ("m", "{m} / ({c} + 1e-6)"),
        ("m", "{m} / ({s} + 1e-6)"),
        *_each("rcu", "{t} / ({t} + 1e-6)"),
        *_each("rcu", "{t} / ({s} + 1e-6)"),
    ),
    _operator("**", "power", *_each("mrcu", "{t} ** {e}")),
    _operator(
        "@", "matrix product, with a row statistic mostly: [out, in] @ [in] → [out]", ("c", "({m} @ {r})[:, None]")
    ),
    _operator(">", "where left exceeds right"),
    _operator(">=", "where left is at least right"),
    _operator("<", "where left is below right"),
    _operator("<=", "where left is at most right"),
    Operation(
        "abs",
        "method",
        "absolute value",
        (),
        (("m", "({m} - {r}).abs()"), ("m", "({m} - {c}).abs()"), *_each("rcu", "({t} - {s}).abs()")),
    ),
    _elementwise("square", "square", "rcu"),
    _elementwise("sqrt", "square root", "mrcu"),
    _elementwise("log1p", "ln(1 + x)", "mrcu"),
    _elementwise("tanh", "hyperbolic tangent", "rcu"),
    _elementwise("sigmoid", "1 / (1 + exp(−x))", "rcu"),
    # The only decreasing function: between exp(-1) and 1, so it can neither overflow nor vanish.
    Operation("exp", "method", "exponential", (), _each("rcu", "(-{t}.tanh()).exp()")),
    _elementwise("log", "natural logarithm"),
    _elementwise("rsqrt", "1 / square root"),
    _elementwise("relu", "x where positive, else 0"),
    _elementwise("sign", "−1, 0 or 1"),
    _elementwise("float", "comparisons and ranks as numbers"),
    Operation("pow", "method", "power", ("exponent",)),
    Operation("unsqueeze", "method", "one more dimension of length 1, as x[:, None] and x[None, :] make", ("dim",)),
    _reduction("mean", "mean", "rcsu"),
    _reduction("sum", "sum", "rc"),
    _reduction("amax", "greatest", "rcsu"),
    _reduction("amin", "least"),
    _reduction("std", "standard deviation, n − 1 below", "rcs"),
    _reduction("var", "variance, n − 1 below"),
    _reduction("norm", "p-norm, Euclidean by default", "rc", ("p", "dim", "keepdim")),
    Operation(
        "quantile",
        "method",
        "the value that a share q of the others lie below, interpolated",
        ("q", "dim", "keepdim"),
        (
            ("r", "{m}.quantile({q}, dim=0)"),
            ("c", "{m}.quantile({q}, dim=1, keepdim=True)"),
            ("s", "{r}.quantile({q}, dim=0)"),
            ("s", "{u}.quantile({q}, dim=0)"),
        ),
    ),
    Operation(
        "median",
        "method",
        "quantile at 0.5",
        ("dim", "keepdim"),
        (("r", "{m}.median(dim=0)"), ("c", "{m}.median(dim=1, keepdim=True)"), ("s", "{r}.median(dim=0)")),
    ),
    Operation("softmax", "method", "exp(x) over its sum along dim", ("dim",), _each("ru", "{t}.softmax(dim=0)")),
    Operation("cumsum", "method", "running sum along dim", ("dim",), (("u", "{u}.cumsum(dim=0)"),)),
    Operation(
        "argsort",
        "method",
        "places of the values in ascending order, of equals the first first; twice gives ranks",
        ("dim", "stable"),
        _each("ru", "{t}.argsort(dim=0).argsort(dim=0).float()"),
    ),
    Operation("clamp", "method", "x held between min and max", ("min", "max"), _each("rcu", "{t}.clamp(max={s})")),
    Operation(
        "maximum", "function", "the greater of two", ("input", "other"), _each("mrcu", "torch.maximum({t}, {t})")
    ),
    Operation("minimum", "function", "the lesser of two", ("input", "other"), _each("mrcu", "torch.minimum({t}, {t})")),
    Operation(
        "where",
        "function",
        "second where the first holds, else third",
        ("condition", "input", "other"),
        (
            ("m", "torch.where({m} > {c}, {m}, {k} * {m})"),
            ("m", "torch.where({m} > {s}, {m}, {k} * {m})"),
            *_each("rcu", "torch.where({t} > {s}, {t}, {k} * {t})"),
        ),
    ),
)

BY_NAME = {operation.name: operation for operation in OPERATIONS}
