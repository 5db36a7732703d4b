"""A language model's whole answer: thoughts, group, allocation and functions, also where it is less than orderly.

Under a grammar an answer is whole unless it was cut at the token limit. Without one, code stands in fences, between
prose, without its return: what can be used is used, and `Proposal.salvaged` says what had to be mended. Nothing of an
answer is run here: whether it is worth anything is for the probe to say, in an evaluator.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from autoprune.algorithms.algorithm import GROUPS, Algorithm, Allocation
from autoprune.algorithms.given import in_full
from autoprune.algorithms.grammar import PARTS
from autoprune.algorithms.language import parse
from autoprune.algorithms.operations import OPERATIONS
from autoprune.algorithms.reader import FORMS, NotPythonError, canonical, python
from autoprune.algorithms.rules import DEFAULTS, written_out
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS

SDSA = Allocation("sdsa", dict(DEFAULTS["sdsa"]))

NOBODY = Algorithm("", "row", SDSA)  # the parent of an answer that must say everything

Bounds = dict[str, tuple[float, float]]


def sdsa_bounds(statistics: Collection[str]) -> Bounds:
    """What an answer may choose for SDSA, where these statistics are offered: lowest and highest; what it does not name
    is the rule's default."""
    taylor = {"taylor": (0.0, 1.0)} if "g_rms" in statistics else {}
    return {"tau": (0.1, 4.0), "m": (0.0, 0.95), "depth": (0.0, 0.9)} | taylor


MAX_THOUGHT = 400  # characters of a diagnosis or hypothesis
MAX_ANSWER = 100_000  # characters
MAX_DEFINITIONS = 16  # functions that are looked at
MAX_LINES = 400  # of a function
MAX_CUT = 5  # lines that are given up to find the last whole statement

# What an answer may need. fences: code in ``` lines; prose: lines that are none of the form's; cut: the tail was given
# up, back to the last whole statement; no return: the last expression, or a local, is returned.
SALVAGES = ("fences", "prose", "cut", "no return")
REDUCTIONS = frozenset(operation.name for operation in OPERATIONS if "keepdim" in operation.parameters)

T = TypeVar("T")

# A label at the beginning of a line; markup and a number may stand before it.
_LABEL = r"^(?:[^\w\n]|\d+[.)])*{name}[*_ \t]*:[*_ \t]*(.*)$"
_LABELS = ("Diagnosis", "Hypothesis", "Group", "Allocation")
CUT = "the answer was cut before a statement of the function ended; write less"


@dataclass(frozen=True)
class Proposal:
    """What a language model's answer says: one sentence each of diagnosis and hypothesis ("" if missing).

    salvaged: those of SALVAGES that the answer needed.
    """

    diagnosis: str
    hypothesis: str
    algorithm: Algorithm
    salvaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Definition:
    """A function as it stands in an answer. last: nothing follows it."""

    name: str
    source: str
    last: bool


def _labelled(text: str, name: str) -> list[str]:
    """What stands after `name:` at the beginning of lines, the last first; markup around it is dropped."""
    found = re.findall(_LABEL.format(name=name), text, re.IGNORECASE | re.MULTILINE)
    return [line.strip() for line in reversed(found) if line.strip()]


def _thought(text: str, name: str) -> str:
    line = next(iter(_labelled(text, name)), "")
    printable = "".join(character if character.isprintable() else " " for character in line)
    return " ".join(printable.split())[:MAX_THOUGHT]


def _readable(read: Callable[[str], T], lines: list[str], default: T) -> T:
    """The first of the lines that can be read, or the default without any; where none can, the refusal of the first."""
    if not lines:
        return default
    error = None
    for line in lines:
        try:
            return read(line)
        except LanguageError as refusal:
            error = error or refusal
    raise error


def _group(line: str) -> str:
    found = re.search(rf"\b({'|'.join(GROUPS)})s?\b", line.lower())
    if not found:
        raise LanguageError(f"the group is '{line[:80]}', expected {' or '.join(GROUPS)}")
    return found[1]


def _allocation(line: str, offered: Bounds) -> Allocation:
    plain = re.sub(r"[`*,()]", " ", line.partition("#")[0]).lower().strip().rstrip(".")
    name, *settings = re.sub(r"\s*=\s*", "=", plain).split() or [""]
    if name == "uniform" and not settings:
        return Allocation("uniform")
    parameters = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        low, high = offered.get(key, (1, 0))
        if not re.fullmatch(r"\d*\.?\d+", value) or not low <= float(value) <= high:
            name = ""
        else:
            parameters[key] = float(f"{float(value):.6g}")  # as `Allocation` writes them
    if name != "sdsa":
        bounds = " ".join(f"{key}={low:g}…{high:g}" for key, (low, high) in offered.items())
        raise LanguageError(f"the allocation is '{line[:80]}', expected 'uniform' or 'sdsa {bounds}'")
    return Allocation("sdsa", written_out("sdsa", parameters))


def _without_thinking(text: str) -> str:
    """Without what stands between <think> and </think>, or to the end where that is missing."""
    kept, *thinking = text.split("<think>")
    return kept + "".join(part.partition("</think>")[2] for part in thinking)


def _extent(lines: Sequence[str]) -> int:
    """How many of the lines are the function that begins with the first of them: what Python says, if what stands
    there up to the next fence is Python; otherwise up to a line that is not indented."""
    fence = next((i for i, line in enumerate(lines) if line.lstrip().startswith("```")), len(lines))
    try:
        function = python(textwrap.dedent("\n".join(lines[:fence]))).body[0]
    except LanguageError:
        pass
    else:
        return function.end_lineno
    indent = len(lines[0]) - len(lines[0].lstrip())
    open_brackets = 0
    for count, line in enumerate(lines[:fence]):
        code = line.partition("#")[0]
        if count > 0 and code.strip() and len(code) - len(code.lstrip()) <= indent and open_brackets <= 0:
            return count
        open_brackets += len(re.findall(r"[(\[{]", code)) - len(re.findall(r"[)\]}]", code))
    return fence


def _split(text: str) -> tuple[list[str], list[_Definition], list[str]]:
    """An answer's lines outside of functions, its functions, and which of "fences" and "prose" it has."""
    lines, outside, found, index = text.rstrip().split("\n"), [], [], 0
    while index < len(lines):
        match = re.match(r"[ \t]*def[ \t]+(score|allocate)\b", lines[index])
        if match is None or len(found) == MAX_DEFINITIONS:
            outside.append(lines[index])
            index += 1
            continue
        count = _extent(lines[index : index + MAX_LINES])
        source = textwrap.dedent("\n".join(lines[index : index + count]))
        index += count
        found.append(_Definition(match[1], source, index == len(lines)))
    fences = [line for line in outside if line.lstrip().startswith("```")]
    form = re.compile(_LABEL.format(name=f"(?:{'|'.join(_LABELS)})"), re.IGNORECASE)
    others = [line for line in outside if not form.match(line) and line not in fences]
    prose = any(line.strip() not in ("", "import torch") for line in others)
    return outside, found, ["fences"] * bool(fences) + ["prose"] * prose


def _parsed(lines: list[str], name: str) -> ast.FunctionDef:
    body = python("\n".join(lines)).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].name != name:
        raise LanguageError(f"expected `{FORMS[name]}` and nothing beside it")
    return body[0]


def _whole(lines: list[str], name: str, last: bool) -> tuple[ast.FunctionDef, bool]:
    """The function in these lines, and whether its tail had to be given up because the answer ended in it."""
    error, left, returned = None, list(lines), False
    for given_up in range(MAX_CUT if last else 1):
        if not left:
            break
        try:
            function = _parsed(left, name)
        except NotPythonError as refusal:
            error = error or refusal
            if returned:  # what is wrong stands above a whole line with the return: a slip, not a cut
                raise error from None
            returned = left.pop().lstrip().startswith("return")
            continue
        count = len(function.body)
        while last and function.body and _is_stump(function.body[-1], _locals(function)):
            function.body.pop()
        if not function.body:
            break
        return function, given_up > 0 or len(function.body) < count
    raise LanguageError(CUT) if last else error


def _locals(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """What each local is assigned at last, in the order of these assignments; loops are passed over."""
    found: dict[str, ast.expr] = {}
    for node in function.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        found.pop(name, None)
        found[name] = value
    return found


def _is_stump(node: ast.stmt, known: Collection[str]) -> bool:
    """Whether a last statement is what cutting leaves of one, such as `retu`."""
    match node:
        case ast.Return(value=None) | ast.Expr(value=ast.Constant() | ast.Attribute()):
            return True
        case ast.Expr(value=ast.Name(id=name)):
            return name not in known
    return False


def _is_wide(node: ast.AST, wide: Collection[str]) -> bool:
    """Whether an expression has the shape of a matrix (of an allocation: of the units), as far as its text tells."""
    match node:
        case ast.Name(id=name):
            return name in wide
        case ast.Call(func=ast.Attribute(attr=name)) if name in REDUCTIONS:
            return False
        case ast.Subscript() | ast.BinOp(op=ast.MatMult()):
            return False
    return any(_is_wide(child, wide) for child in ast.iter_child_nodes(node))


def _returning(lines: list[str], function: ast.FunctionDef) -> str:
    """The function's text up to its last statement, and a return: of that expression, or of the last local that has as
    many numbers as what is asked for."""
    last = function.body[-1]
    lines = lines[: last.end_lineno]
    if isinstance(last, ast.Expr):
        line = lines[last.lineno - 1].encode()
        line = line[: last.col_offset] + b"return " + line[last.col_offset :]
        return "\n".join([*lines[: last.lineno - 1], line.decode(), *lines[last.lineno :]])
    found = _locals(function)
    if not found:
        raise LanguageError(f"{function.name} must end with its only return")
    wide = {name for name, one in STATISTICS.items() if one.type == "m"} | {"W", "profile"}
    for name, value in found.items():
        if _is_wide(value, wide):
            wide.add(name)
    name = next((name for name in reversed(found) if name in wide), list(found)[-1])
    if last.lineno == function.lineno:
        return "\n".join(lines) + f"; return {name}"
    return "\n".join([*lines, " " * function.body[0].col_offset + f"return {name}"])


def _mended(definition: _Definition, cut: bool, given: Mapping[str, str]) -> tuple[str, list[str]]:
    """The canonical text of a function, and what it needed. cut: its last line is not known to be whole."""
    name, lines = definition.name, definition.source.split("\n")
    if cut:
        lines.pop()
    function, trimmed = _whole(lines, name, definition.last)
    salvaged = ["cut"] * (cut or trimmed)
    if isinstance(function.body[-1], ast.Return):
        whole = "\n".join(lines[: function.body[-1].end_lineno])
    else:
        whole, salvaged = _returning(lines, function), [*salvaged, "no return"]
    return canonical(in_full(whole, given) if given else whole)[name].text, salvaged


def _read(
    name: str, definitions: list[_Definition], cut: bool, given: Mapping[str, str] | None = None
) -> tuple[str, list[str]]:
    """The last function of the name that can be read: what stands before it was quoted or thought better of."""
    error = LanguageError(f"the answer holds no line `{FORMS[name]}`; it was cut, or the function never written")
    for place, definition in enumerate(reversed([d for d in definitions if d.name == name])):
        try:
            return _mended(definition, cut and definition.last, given or {})
        except LanguageError as refusal:
            error = refusal if place == 0 else error
    raise error


def parse_answer(
    text: str,
    parts: Collection[str] = PARTS,
    parent: Algorithm = NOBODY,
    statistics: Collection[str] = DEFAULT_STATISTICS,
    cut: bool = False,
    given: Mapping[str, str] | None = None,
) -> Proposal:
    """Read an answer of the form that `grammar.answer_grammar` enforces, and less orderly ones.

    parts: what is asked for (see `grammar`); anything else is the parent's, whatever the answer says of it, as are
    group and allocation where it says nothing. A part that is asked for alone must be there, and so must a score.
    Code fences, markup, thinking and prose are skipped; the thoughts may be missing. Of several functions or labels of
    one name the last that can be read counts. A function without a return returns its last expression, or its last
    local that can be a score; one that was cut ends with its last whole statement. statistics: those that the score may
    read; one that is only listed as a parameter does no harm. cut: the answer ended at the token limit.
    given: scores that the answer may build on, by name (see `algorithms.given`).
    Raises LanguageError where a part is missing, where nothing of it is left, where it is outside the language, or
    where it reads a statistic that is not offered.
    """
    if len(text) > MAX_ANSWER:
        raise LanguageError(f"the answer has {len(text)} characters, at most {MAX_ANSWER} are read")
    text = _without_thinking(text.replace("\r\n", "\n").replace("\r", "\n"))
    lines, definitions, salvaged = _split(text)
    cut = cut and "\n" not in text[len(text.rstrip()) :]  # a line that was ended is whole
    if cut and lines and not any(definition.last for definition in definitions):
        lines, salvaged = lines[:-1], [*salvaged, "cut"]
    outside, algorithm = "\n".join(lines), parent
    if "score" in parts:
        score, mended = _read("score", definitions, cut, given)
        missing = [name for name in parse(score).reads if name not in statistics]
        if missing:
            offered = ", ".join(("W", *statistics))
            raise LanguageError(f"the score reads {', '.join(missing)}: not offered here; offered are {offered}")
        algorithm, salvaged = replace(algorithm, score=score), salvaged + mended
    if "group" in parts:
        algorithm = replace(algorithm, group=_readable(_group, _labelled(outside, "Group"), parent.group))
    if "allocate" in parts and (len(parts) == 1 or any(d.name == "allocate" for d in definitions)):
        source, mended = _read("allocate", definitions, cut)
        algorithm, salvaged = replace(algorithm, allocation=Allocation("written", source=source)), salvaged + mended
    if "allocation" in parts:
        found = _labelled(outside, "Allocation")
        if len(parts) == 1 and not found:
            reason = "it was cut at the token limit" if cut else "expected one such as `Allocation: sdsa tau=1 m=0.6`"
            raise LanguageError(f"the answer holds no whole allocation: {reason}")
        offered = sdsa_bounds(statistics)
        chosen = _readable(lambda line: _allocation(line, offered), found, parent.allocation)
        algorithm = replace(algorithm, allocation=chosen)
    kinds = tuple(kind for kind in SALVAGES if kind in salvaged)
    return Proposal(_thought(outside, "Diagnosis"), _thought(outside, "Hypothesis"), algorithm, kinds)
