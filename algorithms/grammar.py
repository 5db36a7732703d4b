"""The grammar that holds a language model's answer: GBNF, staged (a name is usable once it is defined) and typed.

A local's letter is its type (`m0`, `r0`, `c0`; in an allocation `u0`: see `algorithms.operations`); scalars are written
where they are used.
A state counts the locals of each type that stand above the current line; every state has its own rules, so an
undefined name or a wrong shape cannot be written. A line is one operation whose operands are names, or one small
operation on names: lines stay short, and what is larger goes through a local.

Statistics are offered by name (see `algorithms.vocabulary`). A matrix among them, such as g_rms, is never the first
operand of a line that makes a matrix: that one is W or a local, so every local matrix and every score depends on W.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.algorithms.operations import OPERATIONS, TYPES
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, SIGNED_SUMMARIES, STATISTICS, SUMMARIES

TAUS = (0.25, 0.5, 0.75, 1, 1.5, 2)
SLACKS = tuple(i / 10 for i in range(1, 10))
DEPTHS = tuple(i / 10 for i in range(9))
TAYLORS = (0, 0.25, 0.5, 0.75, 1)
FACTORS = (0.1, 0.25, 0.5, 0.75, 2, 3)
EXPONENTS = (0.25, 0.5, 0.75, 1.5, 2)
SHARES = (0.5, 0.9, 0.99)
# A constant that is left to be tuned: its value until then, lowest and highest.
MARKED_FACTOR, MARKED_EXPONENT = "tune(0.7, 0.1, 4)", "tune(0.7, 0.25, 3)"

# Types that a local of a score may have.
LOCALS = "mrc"
# What stands for the scores of parents (see `algorithms.given`).
GIVEN = ("S", "T")
# What an allocation returns: above 0, whatever the operand is, short of an overflow.
RETENTIONS = (
    "1 + {k} * {u}",
    "1 / ({u} + {k})",
    "({u} + 1e-6) ** {e}",
    "(1 + {k} * {u}) ** ({k} * sparsity / (1 - sparsity))",
)

WEIGHTS = ("W.abs()", "W.square()")  # the matrices that can be read before any local exists, statistics apart

State = tuple[int, ...]


@dataclass(frozen=True)
class Ref:
    """The text of another rule."""

    rule: str


@dataclass(frozen=True)
class Words:
    """Between `least` and `most` words of at most `longest` printable ASCII characters, a space between them.

    Counted in words and not in characters: a hundred characters of which any may be the last are a hundred states, and
    took nine tenths of the time that the whole grammar took to compile.
    """

    least: int
    most: int
    longest: int


Item = str | Ref | Words
Alternatives = tuple[tuple[Item, ...], ...]
Rules = dict[str, Alternatives]

CONSTANTS: dict[str, Item] = {"k": Ref("k"), "e": Ref("e"), "q": Ref("q")}
LATER = "later m"  # among operands: what stands for every matrix of a writing but the first, where that differs


def _items(text: str, operands: dict[str, Item]) -> tuple[Item, ...]:
    """A writing cut at its placeholders, each replaced by its operand."""
    items: list[Item] = []
    for i, part in enumerate(re.split(r"\{(\w)\}", text)):
        if i % 2:
            items.append(operands[part])
            if part == "m":
                operands = operands | {"m": operands.get(LATER, operands["m"])}
        elif part:
            items.append(part)
    return tuple(items)


def _atoms(kind: str, statistics: Sequence[str]) -> tuple[str, ...]:
    """The statistics of a type, as operands that are never negative."""
    return tuple(
        f"{name}.abs()" if STATISTICS[name].signed else name for name in statistics if STATISTICS[name].type == kind
    )


def _placeholders(text: str) -> list[str]:
    return [name for name in re.findall(r"\{(\w)\}", text) if name in TYPES]


def _is_suffix(text: str) -> bool:
    """Whether the writing is one operand and a method call: then the call is a rule that all states share."""
    return len(_placeholders(text)) == 1 and text.startswith(f"{{{text[1]}}}.")


WRITINGS = tuple(writing for operation in OPERATIONS for writing in operation.writings)
SUFFIXES = {
    (result, operand): tuple(text for r, text in WRITINGS if r == result and _is_suffix(text) and text[1] == operand)
    for result, operand in itertools.product(TYPES, TYPES)
}
OTHERS = {result: tuple(text for r, text in WRITINGS if r == result and not _is_suffix(text)) for result in TYPES}
# Products and powers: in parentheses, they may be operands themselves.
FACTORED = {result: tuple(t for t in OTHERS[result] if re.fullmatch(r"\{\w\} \*\*? \{\w\}", t)) for result in TYPES}
# What may be returned: the first operand is the newest matrix, so another one, not a scalar, must have a say; else the
# weights would be ranked as that matrix ranks them.
SCORES = tuple(text for text in OTHERS["m"] if set(_placeholders(text)[1:]) - {"s"})


def _choice(values: tuple[float, ...]) -> Alternatives:
    return tuple((f"{value:g}",) for value in values)


# Of an algorithm: with SDSA's parameters, or with a function, as its allocation.
PARTS = ("group", "allocation", "score")
WRITTEN_PARTS = ("group", "allocate", "score")


def _shared_rules(max_locals: int, parts: tuple[str, ...], statistics: tuple[str, ...], given: int) -> Rules:
    root: tuple[Item, ...] = ("Diagnosis: ", Ref("sentence"), "\nHypothesis: ", Ref("sentence"))
    if "group" in parts:
        root += ("\nGroup: ", Ref("group"))
    if "allocation" in parts:
        root += ("\nAllocation: sdsa tau=", Ref("tau"), " m=", Ref("slack"), " depth=", Ref("depth"))
        root += (" taylor=", Ref("taylor")) if "g_rms" in statistics else ()
    if "allocate" in parts:
        root += ("\ndef allocate(profile, sparsity):", Ref("allocate0"))
    if "score" in parts:
        lines = "".join(f"\n    m{place} = {name}" for place, name in enumerate(GIVEN[:given]))
        root += (f"\ndef score({', '.join(('W', *statistics))}):{lines}", Ref(f"body{given}00m"))
    rules: Rules = {
        "root": (root,),
        "sentence": ((Words(4, 15, 18),),),
        "group": (("row",), ("matrix",)),
        "tau": _choice(TAUS),
        "slack": _choice(SLACKS),
        "depth": _choice(DEPTHS),
        "taylor": _choice(TAYLORS),
        "k": (*_choice(FACTORS), (MARKED_FACTOR,)),
        "e": (*_choice(EXPONENTS), (MARKED_EXPONENT,)),
        "q": _choice(SHARES),
    }
    for kind, count in itertools.product(LOCALS, range(max_locals + 1)):
        # Where scores are given, everything is built on them, or they would be left aside.
        weights = () if given else WEIGHTS
        atoms = weights if kind == "m" else _atoms(kind, statistics)
        names = atoms + tuple(f"{kind}{i}" for i in range(count))
        if names:
            rules[f"name-{kind}{count}"] = tuple((name,) for name in names)
        rules[f"name-any{count}"] = ((Ref(f"name-m{count}"),), (Ref("name-given"),))
    rules["name-given"] = tuple((name,) for name in _atoms("m", statistics))
    for (result, operand), texts in SUFFIXES.items():
        if texts:
            rules[f"{operand}-to-{result}"] = tuple(_items(text[3:], CONSTANTS) for text in texts)
    return rules


def _operand_rule(result: str, names: dict[str, Item]) -> Alternatives:
    """A name, a small operation on one name, a power, or a product of two names.

    names: by type, the rule of its names; left out where there are none.
    """
    alternatives: list[tuple[Item, ...]] = [(names[result],)] if result in names else []
    alternatives += [(names[o], Ref(f"{o}-to-{result}")) for o in names if SUFFIXES.get((result, o))]
    alternatives += [
        _items(f"({text})", names | CONSTANTS)
        for text in FACTORED[result]
        if all(placeholder in names for placeholder in _placeholders(text))
    ]
    return tuple(alternatives)


def _combinations(texts: tuple[str, ...], operands: dict[str, Item], prescribed: dict[str, Item]) -> Alternatives:
    """The writings on operands. prescribed: by type, a name that must stand as the first operand of that type."""
    alternatives: list[tuple[Item, ...]] = []
    for text in texts:
        if prescribed.keys() <= set(_placeholders(text)):
            items = list(_items(text, operands))
            for kind, name in prescribed.items():
                items[items.index(operands[kind])] = name
            alternatives.append(tuple(items))
    return tuple(alternatives)


def _line_rule(
    result: str, texts: tuple[str, ...], operands: dict[str, Item], prescribed: dict[str, Item]
) -> Alternatives:
    """Method calls on one operand, and the writings."""
    calls = tuple(
        (prescribed.get(o, operands[o]), Ref(f"{o}-to-{result}"))
        for o in TYPES
        if o in operands and SUFFIXES[result, o] and prescribed.keys() <= {o}
    )
    return calls + _combinations(texts, operands, prescribed)


def _state_rules(state: State, max_locals: int, statistics: tuple[str, ...]) -> Rules:
    """The operands that this state's names allow, and its lines.

    No local is defined in vain: a row or column is used by the very next line (`body…r` is what may follow a
    row), and the returned score is built on the newest matrix, so every score reads W.
    With a matrix statistic there are three rules of matrix operands: `m…` on W and locals, `given…` on statistics, and
    `any…`, either of them.
    """
    tag = "".join(map(str, state))
    counts = dict(zip(LOCALS, state, strict=True))
    given = bool(_atoms("m", statistics))
    names: dict[str, Item] = {"m": Ref(f"name-m{counts['m']}")}
    names |= {kind: Ref(f"name-{kind}{counts[kind]}") for kind in "rc" if counts[kind] or _atoms(kind, statistics)}
    operands: dict[str, Item] = {kind: Ref(f"{kind}{tag}") for kind in TYPES} | CONSTANTS
    rules: Rules = {}
    reduced_names, reduced = names, operands  # what rows, columns and scalars are made of
    if given:
        reduced_names, reduced = names | {"m": Ref(f"name-any{counts['m']}")}, operands | {"m": Ref(f"any{tag}")}
        rules[f"given{tag}"] = _operand_rule("m", names | {"m": Ref("name-given")})
        rules[f"any{tag}"] = ((operands["m"],), (Ref(f"given{tag}"),))
        names = names | {LATER: reduced_names["m"] if counts["m"] else Ref("name-given")}
        operands = operands | {LATER: reduced["m"] if counts["m"] else Ref(f"given{tag}")}
    rules |= {f"{kind}{tag}": _operand_rule(kind, names if kind == "m" else reduced_names) for kind in TYPES}
    # Without another matrix, an operation on two matrices has nothing but W to work on: all of its ranks are W's.
    two = bool(counts["m"]) or given
    usable = {kind: tuple(text for text in OTHERS[kind] if two or text.count("{m}") < 2) for kind in LOCALS}
    scores = tuple(text for text in SCORES if text in usable["m"])
    newest: Item = f"m{counts['m'] - 1}" if counts["m"] else names["m"]
    for pending in ("m", *(kind for kind in "rc" if counts[kind])):
        prescribed: dict[str, Item] = {} if pending == "m" else {pending: f"{pending}{counts[pending] - 1}"}
        rules[f"return{tag}{pending}"] = _combinations(scores, operands, prescribed | {"m": newest})
        body: list[tuple[Item, ...]] = [("\n    return ", Ref(f"return{tag}{pending}"))]
        for i, kind in enumerate(LOCALS):
            line = _line_rule(kind, usable[kind], operands if kind == "m" else reduced, prescribed)
            if line and sum(state) < max_locals:
                after = "".join(str(count + (i == j)) for j, count in enumerate(state))
                name = f"line-{kind}{tag}{pending}"
                rules[name] = line
                body.append((f"\n    {kind}{state[i]} = ", Ref(name), Ref(f"body{after}{kind}")))
        rules[f"body{tag}{pending}"] = tuple(body)
    return rules


def _allocate_rules(max_locals: int, summaries: tuple[str, ...]) -> Rules:
    """The body of `allocate`: each line is built on the line before, so none is in vain."""
    atoms = [f"profile.{name}.abs()" if name in SIGNED_SUMMARIES else f"profile.{name}" for name in summaries]
    rules: Rules = {}
    for count in range(max_locals + 1):
        names: dict[str, Item] = {"u": Ref(f"name-u{count}")}
        operands: dict[str, Item] = {"u": Ref(f"u{count}"), "s": Ref(f"s{count}")} | CONSTANTS
        newest: dict[str, Item] = {"u": f"u{count - 1}"} if count else {}
        rules[f"name-u{count}"] = tuple((name,) for name in [*atoms, *(f"u{i}" for i in range(count))])
        rules[f"u{count}"] = _operand_rule("u", names)
        rules[f"s{count}"] = (*_operand_rule("s", names), ("sparsity",))
        rules[f"retention{count}"] = _combinations(RETENTIONS, operands, newest)
        body: Alternatives = (("\n    return ", Ref(f"retention{count}")),)
        if count < max_locals:
            rules[f"line-u{count}"] = _line_rule("u", OTHERS["u"], operands, newest)
            body += ((f"\n    u{count} = ", Ref(f"line-u{count}"), Ref(f"allocate{count + 1}")),)
        rules[f"allocate{count}"] = body
    return rules


def answer_rules(
    max_locals: int = 3,
    parts: tuple[str, ...] = PARTS,
    statistics: tuple[str, ...] = DEFAULT_STATISTICS,
    given: int = 0,
) -> Rules:
    """The grammar as data: each rule's alternatives, each a sequence of literals, references and words."""
    rules = _shared_rules(max_locals, parts, statistics, given) | _allocate_rules(max_locals, tuple(SUMMARIES))
    for state in itertools.product(range(max_locals + 1), repeat=len(LOCALS)):
        if sum(state) <= max_locals:
            rules |= _state_rules(state, max_locals, statistics)
    used, queue = {"root"}, ["root"]
    while queue:
        for alternative in rules[queue.pop()]:
            new = {item.rule for item in alternative if isinstance(item, Ref)} - used
            used |= new
            queue += sorted(new)
    return {name: alternatives for name, alternatives in rules.items() if name in used}


def _gbnf(item: Item) -> str:
    if isinstance(item, Ref):
        return item.rule
    if isinstance(item, Words):
        word = f"[!-~]{{1,{item.longest}}}"
        return f'{word} (" " {word}){{{item.least - 1},{item.most - 1}}}'
    return '"' + item.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


@functools.cache
def answer_grammar(
    max_locals: int = 3,
    parts: tuple[str, ...] = PARTS,
    statistics: tuple[str, ...] = DEFAULT_STATISTICS,
    given: int = 0,
) -> str:
    """GBNF text of the whole answer, as `answers.parse_answer` reads it; starts at `root`.

    max_locals: how many lines may stand above a return, 0 to 9. parts: which of PARTS, or of WRITTEN_PARTS, the
    answer holds; the others stay as they are. statistics: names in STATISTICS that the score
    may read, in the order of its parameters. given: how many of the names in GIVEN the score begins with, each a
    line; the weights themselves are not read then.
    """
    if not given <= max_locals <= 9:
        raise ValueError(f"max_locals is {max_locals}, expected {given} to 9")
    lines = (
        f"{name} ::= " + " | ".join(" ".join(map(_gbnf, alternative)) for alternative in alternatives)
        for name, alternatives in answer_rules(max_locals, parts, statistics, given).items()
    )
    return "\n".join(lines) + "\n"
