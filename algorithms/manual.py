"""What people and models are told of the language, made from the tables that reader and grammar are made from.

People: `python -m autoprune.algorithms.manual > docs/language.md`. Models that decode without a grammar: `brief`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from autoprune.algorithms import cost, grammar, reader, translator
from autoprune.algorithms.operations import NEED_DIM, OPERATIONS, Operation
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS, SUMMARIES
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS as PROJECT

HEAD = """# The algorithm language

A score function gives every weight of a linear layer a number; in each comparison group the lowest are pruned:

    def score(W, x_norm):
        m0 = W.abs() * x_norm
        c0 = m0.mean(dim=1, keepdim=True)
        return m0 / (c0 + 1e-6)

It is Python to look at, and nothing of Python but what stands on this page: `autoprune check FILE` says whether a
source is in the language, what it reads and what it costs. This page is made from the tables that the reader and the
decoding grammar are made from (`make docs`).

- The first parameter is `W`, float32 [out, in]; the others name the statistics that are read, in any order.
- The body is assignments `name = expression`, loops `for _ in range(N)` with N a literal, and one final `return` of a
  float32 tensor of W's shape. Inputs are never assigned to; any other names will do.
- Values are broadcast as in torch; `[None, :]`, `[:, None]`, slices and integers are the only subscripts.
- Numbers are floats. `tune(0.5, 0.1, 2)` runs as 0.5, and says that between 0.1 and 2 it may be moved.
- A method can also be written `torch.NAME(x, …)`; a leading `import torch`, a docstring and annotations are dropped.
- Beside the score, or alone, a source may hold `allocate(profile, sparsity)`, which returns the retention of each unit
  (decoder blocks, or linear layers where the allocation is per layer), float64 [units]; only ratios count, since the
  budget is met afterwards. It reads summaries as `profile.NAME`.
- Equal programs have one canonical text: names, spacing, order of parameters, lines without effect and the order of
  the operands of `+`, `*`, `maximum` and `minimum` do not matter.
"""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *escaped)]


def _shape(tensor: torch.Tensor) -> str:
    names = {5: "out", 7: "in", 1: "1"}
    text = f"[{', '.join(names[size] for size in tensor.shape)}]"
    return text + {torch.bool: " (true or false)", torch.int64: " (whole numbers)"}.get(tensor.dtype, "")


def calls(operation: Operation) -> Iterator[tuple[str, str]]:
    """Ways to write an operation, each with what it makes of a matrix: run on tensors without data."""
    W, x = torch.empty(5, 7, device="meta"), torch.empty(7, device="meta")
    space = {"torch": torch, "W": W, "x": x}
    name, parameters = operation.name, operation.parameters
    if operation.form == "operator":
        texts = [f"W {name} {'x' if name == '@' else 'W'}"]
    elif operation.form == "function":
        texts = [f"torch.{name}({'W > 0, ' if 'condition' in parameters else ''}W, W)"]
    elif "dim" in parameters:
        first = "0.5, " if "q" in parameters else ""
        keeps = ", keepdim=True" if "keepdim" in parameters else ""
        texts = [f"W.{name}({first}dim=0)", f"W.{name}({first}dim=1{keeps})"]
        if name not in NEED_DIM:
            texts.append(f"W.{name}()")
        if name == "unsqueeze":
            texts = ["x.unsqueeze(dim=0)", "W.sum(dim=1).unsqueeze(dim=1)"]
    else:
        arguments = {"exponent": "2", "min": "min=0", "max": "max=1"}
        texts = [f"W.{name}({', '.join(arguments[parameter] for parameter in parameters)})"]
    for text in texts:
        value = eval(text.replace(".median(", ".quantile(0.5, "), space)  # texts from above, never a candidate's
        yield text, _shape(value)


@functools.cache
def brief(allocates: bool) -> str:
    """The language in a few lines, for a prompt. allocates: the answer may hold `allocate` beside `score`."""
    signs = " ".join(operation.name for operation in OPERATIONS if operation.form == "operator")
    ways = [way for o in OPERATIONS if o.form != "operator" for way in list(calls(o))[: 2 if o.name == "mean" else 1]]
    operations = ", ".join(f"{text} {shape}" for text, shape in ways)
    units = " In `allocate` every value has one number per block, or is a number." if allocates else ""
    return (
        "A function's lines are `name = expression`; the last is its only `return`. Write plain text without code "
        "fences, and nothing after the function. No imports, no `if`, no `while`, no other functions. With a matrix W "
        f"[out, in] and a row x [in] there are the operators {signs}, the subscripts [:, None] and [None, :], and: "
        f"{operations}. Where dim=0 stands, dim=1, keepdim=True gives a column [out, 1].{units} The score has W's "
        "shape and is finite: guard divisions as in x / (y + 1e-6)."
    )


def _indented(name: str, source: str) -> str:
    return "".join(f"    {line}\n" for line in (f"# {name}", *source.splitlines()))


def page() -> str:
    statistics = [
        (f"`{name}`", "[out, in]" if one.type == "m" else "[in]", one.description, "yes" if usual else "")
        for name, one in STATISTICS.items()
        for usual in [name in DEFAULT_STATISTICS]
    ]
    operations = [
        ("<br>".join(f"`{text}`" for text, _ in ways), "<br>".join(shape for _, shape in ways), operation.doc)
        for operation in OPERATIONS
        for ways in [list(calls(operation))]
    ]
    lines = [
        HEAD,
        "## Inputs",
        "",
        "`W` is [out, in], the weights. Beside it, made only where an algorithm reads them:",
        "",
        *_table(("name", "shape", "what", "offered to a search by default"), statistics),
        "",
        "An allocation reads summaries, `profile.NAME`, float64 [units], w being weights and A = |w|·x_norm:",
        "",
        *_table(("name", "what"), [(f"`{name}`", text) for name, text in SUMMARIES.items()]),
        "",
        "## Operations",
        "",
        "Of W [out, in] and a row x [in] as examples; rows, columns [out, 1] and scalars may do what a matrix may.",
        "",
        *_table(("written", "shape", "gives"), operations),
        "",
        "## Bounds",
        "",
        f"- A source has at most {reader.MAX_SOURCE:,} characters and {reader.MAX_NODES:,} syntax nodes, nested "
        f"{reader.MAX_DEPTH} deep; a loop takes at most {translator.MAX_TURNS} turns and does not nest; a literal is "
        f"at most {translator.MAX_NUMBER:g} in size.",
        f"- No value has more numbers than W. At most {cost.MAX_OPERATIONS} operations are made per weight, of which "
        f"a sort counts as {cost.SORT}, and at most {cost.MAX_MATRICES} matrices of W's size are alive at a time.",
        "- On small layers, scores must be finite, differ within a comparison group, be the same twice, and leave "
        "their inputs as they were.",
        "",
        "## Allocations that the project brings",
        "",
        "They do what the rules of the same name do, to rounding, as long as no unit meets a bound:",
        "",
        *(_indented(name, source) for name, source in PROJECT.items()),
        "## What a search writes",
        "",
        "A model that decodes under the grammar writes this language with names that tell types: `m0` a matrix, `r0` "
        "a row, `c0` a column, and in an allocation `u0` one number per unit. "
        "A line may name only what stands above it, so nothing undefined is read. Some of its "
        "rules, as they hold when one matrix and one row have been defined:",
        "",
        *(f"    {line}" for line in _excerpt()),
        "",
    ]
    return "\n".join(lines)


def _excerpt() -> list[str]:
    """Rules of one state of the grammar, as they are given to the decoder."""
    wanted = ("name-m1", "name-r1", "m-to-c", "m110", "r110", "return110m", "k", "e")
    rules = dict(line.split(" ::= ", 1) for line in grammar.answer_grammar(3).splitlines())
    return [f"{name} ::= {rules[name]}" for name in wanted if name in rules]


if __name__ == "__main__":
    print(page(), end="")
