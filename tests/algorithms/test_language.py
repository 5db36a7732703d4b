"""What the language lets in, what it keeps out, and that its canonical form means what the source meant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoprune.algorithms.cost import dry_run
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.operations import OPERATIONS
from autoprune.algorithms.statistics import STATISTIC
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS

RIA = """
def score(W, x_norm):
    return (W.abs() / W.abs().sum(dim=0, keepdim=True) + W.abs() / W.abs().sum(dim=1, keepdim=True)) * x_norm ** 0.5
"""
FREE = '''
import torch

def score(W: torch.Tensor, x_std, x_norm) -> torch.Tensor:
    """Any names, any of the accepted forms."""
    importance = torch.abs(W)
    unused = x_std * 2
    importance *= x_norm[None, :] ** 2
    for step in range(2):
        importance = importance / (torch.norm(importance, p=2, dim=1, keepdim=True) + 1e-6)
    big = importance > importance.mean(1, keepdim=True)
    return torch.where(big, importance, 0.5 * importance)
'''


def layer(rows=6, columns=9):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(rows, columns, generator=generator)
    return W, {name: torch.rand(columns, generator=generator) + 0.1 for name in ("x_norm", "x_mean", "x_std")}


def function(body, parameters="W, x_norm, x_mean, x_std"):
    return f"def score({parameters}):\n" + "".join(f"    {line}\n" for line in body.split("\n"))


@pytest.mark.parametrize("source", [function("return W.abs()", "W"), function("return W.abs() * x_norm"), RIA, FREE])
def test_program_computes_what_python_would(source):
    W, statistics = layer()
    before = W.clone()
    program = parse(source)
    dry_run(program)
    namespace = {}
    exec(source, {"torch": torch}, namespace)
    expected = namespace["score"](W.clone(), *(statistics[n] for n in _parameters(source)))
    assert torch.equal(program(W, statistics), expected)
    assert torch.equal(W, before)


def _parameters(source):
    return [
        name.split(":")[0].strip()
        for name in source.partition("score(")[2].partition(") ->")[0].partition("):")[0].split(",")
    ][1:]


def test_canonical_form():
    program = parse(FREE)
    assert program.source.splitlines() == [
        "def score(W, x_norm):",
        "    v0 = W.abs()",
        "    v0 = v0 * x_norm[None, :] ** 2.0",
        "    for _ in range(2):",
        "        v0 = v0 / (v0.norm(p=2.0, dim=1, keepdim=True) + 1e-06)",
        "    v1 = v0 > v0.mean(dim=1, keepdim=True)",
        "    return torch.where(v1, v0, 0.5 * v0)",
    ]
    assert program.reads == ("x_norm",)
    assert parse(program.source) == program


def test_names_spacing_and_order_of_parameters_do_not_matter():
    one = parse("def score(W, x_norm, x_std):\n  a=W.abs( )*x_std\n  b=a+x_norm\n  return b/2")
    other = parse(
        "def score(W, x_std, x_mean, x_norm):\n\tv1 = torch.abs(W) * x_std\n\tv0 = v1 + x_norm\n\treturn v0 / 2.0"
    )
    assert one.source == other.source
    assert one.reads == ("x_norm", "x_std")


def test_augmented_assignment_never_reaches_the_input():
    W, statistics = layer()
    before = W.clone()
    scores = parse(function("m = W\nm *= x_norm\nm **= 2\nreturn m"))(W, statistics)
    assert torch.equal(W, before)
    assert torch.equal(scores, (W * statistics["x_norm"]) ** 2)


def test_a_local_may_carry_the_name_of_a_statistic_that_is_no_parameter():
    W, statistics = layer()
    program = parse(function("x_norm = W.abs()\nreturn x_norm * 2", "W"))
    assert program.reads == ()
    assert torch.equal(program(W, statistics), W.abs() * 2)


@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_of_the_table_can_be_read_and_has_its_shape(name):
    program = parse(function(f"return W.abs() * {name}", f"W, {name}"))
    assert program.reads == (name,)
    dry_run(program)
    # Broadcast as what it is not, a row gives a matrix of another shape, and so does a matrix.
    wrong = f"{name}[:, None] * W" if STATISTICS[name].type == "r" else f"{name}[None, :] * W"
    with pytest.raises(LanguageError):
        dry_run(parse(function(f"return {wrong}", f"W, {name}")))


def test_statistics_are_read_in_the_order_of_the_table():
    backwards = list(STATISTICS)[::-1]
    program = parse(function("return W * (" + " + ".join(backwards) + ")", ", ".join(["W", *backwards])))
    assert program.reads == tuple(STATISTICS)
    assert program.source.startswith(f"def score(W, {', '.join(STATISTICS)}):")
    generator = torch.Generator().manual_seed(0)
    W, values = layer()[0], {n: torch.rand(s.shape(6, 9), generator=generator) for n, s in STATISTICS.items()}
    torch.testing.assert_close(program(W, values), W * sum(values.values()))


def test_the_table_is_sound():
    assert set(DEFAULT_STATISTICS) <= STATISTICS.keys()
    assert {name for name, statistic in STATISTICS.items() if statistic.type == "r"} == STATISTIC.keys()
    for name, statistic in STATISTICS.items():
        assert name.isidentifier() and statistic.type in ("r", "m")
        assert statistic.description.isprintable() and 10 < len(statistic.description) < 100


OUTSIDE = [
    "import os\nreturn W.abs()",
    "return __import__('os').system('true')",
    "return W.__class__",
    "return W.abs().__class__.__mro__",
    "return torch.ones(3, 3)",
    "return torch.rand_like(W)",
    "return torch.load('x')",
    "return torch.ops.aten.abs(W)",
    "return torch.nn.functional.relu(W)",
    "return W.apply_(lambda x: x)",
    "return W.abs_()",
    "return W.data",
    "return W.T",
    "return W.numpy()",
    "return W.tolist()",
    "return (lambda: W)()",
    "return [w for w in W]",
    "return eval('W')",
    "return print(W)",
    "return open('f')",
    "return range(3)",
    "return torch",
    "return W // 2",
    "return W % 2",
    "return W << 2",
    "return W if True else W",
    "return W and W",
    "return not W",
    "return 1 < W < 2",
    "return W in W",
    "return W[W > 0]",
    "return W['a']",
    "return W[x_norm]",
    "return W[0.5]",
    "return W[...]",
    "return f'{W}'",
    "return 'W'",
    "return True * W",
    "return None",
    "return W * 1j",
    "return W * 1e10",
    "return W * 1e999",
    "return W * " + "9" * 5000,
    "return (W, W)",
    "return *W,",
    "return {}",
    "return W.sum(dim=(0, 1))",
    "return W.sum(dim=x_norm)",
    "return W.sum(dim=1, keepdim=1)",
    "return W.sum(dim=1, dtype=torch.float64)",
    "return W.sum(1, dim=1)",
    "return torch.abs(W, out=W)",
    "return torch.abs(*W)",
    "return W.sum(**W)",
    "return W.max(dim=1)",
    "return (y := W)",
    "return undefined",
    "return",
    "W = W.abs()\nreturn W",
    "W += 1\nreturn W",
    "x_norm = W\nreturn W",
    "W[0] = 1\nreturn W",
    "W.data = 1\nreturn W",
    "a = b = W\nreturn a",
    "a, b = W, W\nreturn a",
    "a: int\nreturn W",
    "torch = W\nreturn torch",
    "range = W\nreturn W",
    "__builtins__ = W\nreturn W",
    "del W\nreturn x_norm",
    "global W\nreturn W",
    "assert W\nreturn W",
    "pass\nreturn W",
    "W.abs()\nreturn W",
    "raise W",
    "yield W\nreturn W",
    "while True: a = W\nreturn W",
    "with W: a = W\nreturn W",
    "try: a = W\nfinally: b = W\nreturn W",
    "def f(): return W\nreturn f()",
    "class A: a = W\nreturn W",
    "if True: a = W\nreturn W",
    "for w in W: a = w\nreturn W",
    "for _ in range(9): a = W\nreturn W",
    "for _ in range(0): a = W\nreturn a",
    "for _ in range(True): a = W\nreturn W",
    "for _ in range(2, 4): a = W\nreturn W",
    "for W in range(2): a = W\nreturn W",
    "for i in range(2): a = W * i\nreturn a",
    "for _ in range(8):\n    for _ in range(8): a = W\nreturn W",
    "for _ in range(2): return W",
    "for _ in range(2): a = W\nelse: b = W\nreturn W",
    "return W\nreturn W",
    "return W\na = W",
    "return " + "(" * 300 + "W" + ")" * 300,
    "return " + "-" * 9000 + "W",
    "return W" + " + W" * 2000,
    "return W" + ".abs()" * 100,
    "return W * 2" + "0" * 20000,
    "return W\0",
    "return W * '\ud800'",
]


@pytest.mark.parametrize("body", OUTSIDE, ids=range(len(OUTSIDE)))
def test_outside_is_refused(body):
    with pytest.raises(LanguageError) as refusal:
        parse(function(body))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "",
        "score = 1",
        "def other(W):\n    return W",
        "def score():\n    return 1",
        "def score(x_norm, W):\n    return W",
        "def score(W, W):\n    return W",
        "def score(W, x):\n    return W",
        "def score(W, x_norm=1):\n    return W",
        "def score(W, *x_norm):\n    return W",
        "def score(W, *, x_norm):\n    return W",
        "def score(W, /):\n    return W",
        "def score(W, **x):\n    return W",
        "@torch.no_grad()\ndef score(W):\n    return W",
        "async def score(W):\n    return W",
        "import os\ndef score(W):\n    return W",
        "import torch as range\ndef score(W):\n    return W",
        "from torch import abs\ndef score(W):\n    return W",
        "def score(W):\n    return W\nscore(1)",
        "def score(W):\n    'only a docstring'",
    ],
)
def test_other_forms_of_the_source_are_refused(source):
    with pytest.raises(LanguageError):
        parse(source)


@pytest.mark.parametrize(
    "body, message",
    [
        ("return W.abs() * x_nrm", r"line 2, column 22: 'x_nrm' is not defined; did you mean 'x_norm'\?"),
        ("return W.sqr()", r"line 2, column 12: 'sqr' is not in the language; did you mean 'sqrt'\?"),
        ("return W.abs(", "line 2, column 17: not Python"),
    ],
)
def test_errors_say_where_and_what_instead(body, message):
    with pytest.raises(LanguageError, match=message):
        parse(function(body))


def test_no_builtins_and_little_torch_in_reach():
    namespace = parse(function("return torch.maximum(W, W)"))._score.__globals__
    assert namespace["__builtins__"] == {}
    assert set(namespace) == {"__builtins__", "range", "torch", "score"}
    assert set(vars(namespace["torch"])) == {"where", "maximum", "minimum"}


FRESH = """
import os, sys, torch
from autoprune.algorithms.language import parse

W = torch.rand(4, 4) + 0.5
for body in sys.argv[1:]:
    if os.fork() == 0:
        parse("def score(W):\\n    return W * (" + body + ")")(W, {})
        os._exit(0)
    if os.wait()[1]:
        sys.exit(body)
"""


def test_every_operation_works_as_the_first_of_its_process():
    """Torch imports some of itself when it is first needed, and a program cannot import (see `language`)."""
    operands = {"m": "W", "r": "W.mean(dim=0)", "c": "W.mean(dim=1, keepdim=True)", "s": "W.mean()"}
    operands |= {"k": "0.5", "e": "1.5", "q": "0.9", "u": "W.mean(dim=0)"}
    bodies = [re.sub(r"\{(\w)\}", lambda m: operands[m[1]], text) for o in OPERATIONS for _, text in o.writings]
    bodies += ["W.clamp(min=0.5)", "W.pow(2)", "(W > 1).float()", "torch.where(W > 1, W, 2)", "2 - W", "W[0:2].mean()"]
    command = [sys.executable, "-c", FRESH, *bodies]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    "body, message",
    [
        ("return W.abs().sum(dim=1)", r"returned float32 \[512\], expected float32 \[512, 768\]"),
        ("return W > 0", "returned bool"),
        ("return 2", "returned a float"),
        ("return x_norm[:, None] * W", r"in `return W \* x_norm"),
        ("a = x_norm[:, None] * x_norm\nreturn W + a.mean()", "larger than W"),
        ("a = W.sum(1, keepdim=True)\nb = a * a.sum(1)[None, :]\nreturn W + b.mean()", "larger than W"),
        ("return W[:, :4] * W", "in `return W"),
        ("return W.sum(dim=2) + W", "Dimension out of range"),
        ("return W * (10 ** 9) ** (10 ** 9)", "out of range"),
        ("return W * (1 / 0)", "division by zero"),
        ("return W * (2).abs()", "attribute"),
        ("return W.clamp()", "in `return W.clamp"),
        ("return W.pow()", "in `return W.pow"),
    ],
)
def test_shapes_are_checked_before_anything_is_computed(body, message):
    program = parse(function(body))
    with pytest.raises(LanguageError, match=message):
        dry_run(program)


def test_call_checks_what_comes_back():
    W, statistics = layer(4, 4)
    with pytest.raises(LanguageError, match="expected float32"):
        parse(function("return x_norm"))(W, statistics)


def test_order_of_operands_does_not_matter_where_it_changes_nothing():
    one = parse(function("a = x_norm * W.abs()\nb = 1 + a / x_std\nreturn torch.maximum(b * 2, a) - a * x_norm"))
    other = parse(function("a = W.abs() * x_norm\nb = a / x_std + 1\nreturn torch.maximum(a, 2 * b) - x_norm * a"))
    assert one.source == other.source
    assert parse(function("return W - x_norm")).source != parse(function("return x_norm - W")).source


def test_constants_to_tune_are_kept_and_run_as_their_value():
    W, statistics = layer()
    program = parse(function("return tune(2, 0.5, 4) * W.abs() - x_norm ** tune(-1, -2, 1)"))
    assert "tune(2.0, 0.5, 4.0)" in program.source and "tune(-1.0, -2.0, 1.0)" in program.source
    assert torch.equal(program(W, statistics), 2 * W.abs() - statistics["x_norm"] ** -1.0)
    for call in ("tune(1)", "tune(1, 2)", "tune(3, 1, 2)", "tune(1, 1, 1)", "tune(W, 1, 2)", "tune(1, 0, high=2)"):
        with pytest.raises(LanguageError, match="tune"):
            parse(function(f"return W * {call}"))
    with pytest.raises(LanguageError, match="cannot be assigned"):
        parse(function("tune = W\nreturn tune"))


ORDERED = {
    "W.quantile(0.3, dim=1, keepdim=True) * W": lambda W: W * W.quantile(0.3, dim=1, keepdim=True),
    "W.median(dim=1, keepdim=True) * W": lambda W: W * (W.sort(1).values[:, 4:5]),  # nine inputs: the fifth
    "W.softmax(dim=1)": lambda W: W.exp() / W.exp().sum(1, keepdim=True),
    "torch.cumsum(W, 0)": lambda W: torch.stack([W[: i + 1].sum(0) for i in range(len(W))]),
    "W.argsort(dim=1).argsort(dim=1).float()": lambda W: (W[:, None, :] < W[:, :, None]).sum(2).float(),
    "(W @ x_norm).unsqueeze(1) * W": lambda W: W * (W * layer()[1]["x_norm"]).sum(1, keepdim=True),
}


@pytest.mark.parametrize("expression", ORDERED)
def test_order_statistics_and_products(expression):
    W, statistics = layer()
    program = parse(function(f"return {expression}"))
    dry_run(program)
    assert parse(program.source) == program
    torch.testing.assert_close(program(W, statistics), ORDERED[expression](W))


@pytest.mark.parametrize("call", ["W.quantile(0.5)", "W.median()", "W.softmax()", "W.cumsum()", "W.argsort()"])
def test_what_needs_a_dimension_says_so(call):
    with pytest.raises(LanguageError, match=r"needs dim=, such as dim=1"):
        parse(function(f"return W * {call}"))


def test_equal_values_are_ranked_by_place_on_every_device():
    W = torch.zeros(2, 40)
    program = parse(function("return W.argsort(dim=1).float() + x_norm * 0"))
    assert torch.equal(program(W, {"x_norm": torch.ones(40)}), torch.arange(40.0).expand(2, 40))


def test_cost_counts_what_is_computed_and_alive():
    cost = dry_run(parse(function("a = W.abs()\nb = a * x_norm\na = b + 1\nreturn a * b")))
    assert cost.operations == pytest.approx(4, abs=0.01) and cost.matrices == 3
    sort = dry_run(parse(function("return W.argsort(dim=1).float()")))
    assert sort.operations == 13 and sort.matrices == 3  # int64 takes two
    with pytest.raises(LanguageError, match="operations per weight"):
        dry_run(parse(function("a = W\nfor _ in range(8):\n" + "    a = a * a + W\n" * 9 + "return a")))
    with pytest.raises(LanguageError, match="alive at a time"):
        names = [f"a{i}" for i in range(20)]
        dry_run(
            parse(
                function(
                    "\n".join(f"{name} = W + {i}" for i, name in enumerate(names)) + "\nreturn " + " + ".join(names)
                )
            )
        )
