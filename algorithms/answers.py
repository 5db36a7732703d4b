"""A language model's whole answer: thoughts, group, allocation and functions, also where it is less than orderly.

Under a grammar an answer is whole unless it was cut at the token limit. Without one, code stands in fences, between
prose, without its return: what can be used is used, and `Proposal.salvaged` says what had to be mended.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from autoprune.algorithms.algorithm import GROUPS, Algorithm, Allocation
from autoprune.algorithms.cost import dry_run
from autoprune.algorithms.language import parse, parse_allocation
from autoprune.algorithms.reader import FORMS, NotPythonError, canonical, functions
from autoprune.algorithms.rules import DEFAULTS
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS

# What an answer may choose for SDSA: lowest and highest; where it names none, the rule's default holds.
SDSA_BOUNDS = {"tau": (0.1, 4.0), "m": (0.0, 0.95), "depth": (0.0, 0.9)}
SDSA = Allocation("sdsa", dict(DEFAULTS["sdsa"]))

MAX_THOUGHT = 400  # characters of a diagnosis or hypothesis
MAX_CUT = 20  # lines that are given up to find the last whole statement

# What an answer may need. fences: code in ``` lines; prose: lines that are none of the form's; cut: the tail was given
# up, back to the last whole statement; no return: the last value of a fitting shape is returned.
SALVAGES = ("fences", "prose", "cut", "no return")

_LABEL = r"^[^\w\n]*{name}[*_ \t]*:[*_ \t]*(.*)$"
_LABELS = ("Diagnosis", "Hypothesis", "Group", "Allocation")


@dataclass(frozen=True)
class Proposal:
    """What a language model's answer says: one sentence each of diagnosis and hypothesis ("" if missing).

    salvaged: those of SALVAGES that the answer needed.
    """

    diagnosis: str
    hypothesis: str
    algorithm: Algorithm
    salvaged: tuple[str, ...] = ()


def _line(text: str, name: str) -> str:
    """What stands after `name:`, at its last occurrence at the beginning of a line; markup around it is dropped."""
    found = re.findall(_LABEL.format(name=name), text, re.IGNORECASE | re.MULTILINE)
    return found[-1].strip() if found else ""


def _thought(text: str, name: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in _line(text, name))
    return " ".join(printable.split())[:MAX_THOUGHT]


def _allocation(line: str, default: Allocation) -> Allocation:
    if not line:
        return default
    name, *settings = re.sub(r"[`*,]", " ", line).split() or [""]
    if name == "uniform" and not settings:
        return Allocation("uniform")
    parameters = dict(SDSA.parameters)
    for setting in settings:
        key, _, value = setting.partition("=")
        low, high = SDSA_BOUNDS.get(key, (1, 0))
        if not re.fullmatch(r"\d*\.?\d+", value) or not low <= float(value) <= high:
            name = ""
        else:
            parameters[key] = float(value)
    if name != "sdsa":
        bounds = " ".join(f"{key}={low:g}…{high:g}" for key, (low, high) in SDSA_BOUNDS.items())
        raise LanguageError(f"the allocation is '{line[:80]}', expected 'uniform' or 'sdsa {bounds}'")
    return Allocation("sdsa", parameters)


def _extent(lines: list[str]) -> int:
    """How many of the lines are the function that begins with the first of them."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    open_brackets = 0
    for count, line in enumerate(lines):
        outside = line.strip() and len(line) - len(line.lstrip()) <= indent and open_brackets <= 0
        if count > 0 and (outside or line.lstrip().startswith("```")):
            return count
        open_brackets += len(re.findall(r"[(\[{]", line)) - len(re.findall(r"[)\]}]", line))
    return len(lines)


def _split(text: str) -> tuple[str, dict[str, str], list[str], bool]:
    """An answer's head, above its functions; the first function of each name; what needed salvage; and whether the
    last of these functions runs to the end of the text."""
    lines, found, at_end = text.split("\n"), {}, False
    head, rest, index = [], [], 0
    while index < len(lines):
        match = re.match(r"[ \t]*def[ \t]+(score|allocate)\b", lines[index])
        if match is None or match[1] in found:
            (rest if found else head).append(lines[index])
            index += 1
            continue
        count = _extent(lines[index:])
        found[match[1]] = textwrap.dedent("\n".join(lines[index : index + count]))
        index += count
        at_end = index == len(lines)
    salvaged = []
    fences = [line for line in lines if line.lstrip().startswith("```")]
    if fences:
        salvaged.append("fences")
    labels = _LABEL.format(name=f"(?:{'|'.join(_LABELS)})")
    others = [line for line in head if not re.match(labels, line, re.IGNORECASE)] + rest
    if any(line.strip() not in ("", "import torch") and line not in fences for line in others):
        salvaged.append("prose")
    return "\n".join(head), found, salvaged, at_end


def _returning(function: ast.FunctionDef) -> Iterator[str]:
    """The function's source with a return at its end: of its last expression, else of each local, the last first."""
    *before, last = function.body
    if isinstance(last, ast.Expr):
        values = [last.value]
    else:
        before, stored = function.body, [n.targets[0] for n in function.body if isinstance(n, ast.Assign)]
        names = [target.id for target in reversed(stored) if isinstance(target, ast.Name)]
        values = [ast.Name(name, ast.Load()) for name in dict.fromkeys(names)]
    for value in values:
        function.body = [*before, ast.Return(value)]
        yield ast.unparse(ast.fix_missing_locations(function))


def _whole(function: ast.FunctionDef) -> ast.FunctionDef | None:
    """Without what cutting left of a last statement, such as `retu`; None where nothing is left."""
    while function.body:
        match function.body[-1]:
            case ast.Return(value=None) | ast.Expr(value=ast.Name() | ast.Constant() | ast.Attribute()):
                function.body.pop()
            case _:
                return function
    return None


def _mended(source: str, name: str, at_end: bool, cut: bool) -> tuple[str, list[str]]:
    """The canonical text of a function, and what it needed. Raises LanguageError."""
    salvaged: list[str] = []
    lines = source.rstrip().split("\n")
    if cut and not source.endswith("\n"):  # whether the last line is whole cannot be known
        lines, salvaged = lines[:-1], ["cut"]
    function, limit = None, max(0, len(lines) - MAX_CUT)
    while function is None:
        try:
            if not lines:
                raise NotPythonError("nothing is left")
            function = next(one for one in functions("\n".join(lines)) if one.name == name)
        except NotPythonError:
            if not at_end:
                raise
            if len(lines) <= limit:
                raise LanguageError("the answer was cut before a statement of the function ended; write less") from None
            lines, salvaged = lines[:-1], ["cut"]
    if at_end:
        count = len(function.body)
        function = _whole(function)
        if function is None:
            raise LanguageError("the answer was cut before a statement of the function ended; write less")
        if len(function.body) < count:
            salvaged = ["cut"]
    if isinstance(function.body[-1], ast.Return):
        return canonical(ast.unparse(function) if salvaged else source)[name].text, salvaged
    error = LanguageError(f"{name} must end with its only return")
    for text in _returning(function):
        try:
            if name == "score":
                dry_run(parse(text))
            return canonical(text)[name].text, [*salvaged, "no return"]
        except LanguageError as refusal:
            error = refusal
    raise error


def parse_answer(
    text: str,
    group: str = "row",
    allocation: Allocation = SDSA,
    statistics: Collection[str] = DEFAULT_STATISTICS,
    allocates: bool = False,
    cut: bool = False,
) -> Proposal:
    """Read an answer of the form that `grammar.answer_grammar` enforces, and less orderly ones.

    Code fences, markup, and prose before and after are skipped; the thoughts may be missing; group and allocation are
    what holds where the answer names none. Of several functions of one name the first counts. A function without a
    return returns its last expression, or the last local that can be a score; one that was cut ends with its last
    whole statement. statistics: those that the score may read; one that is only listed as a parameter does no harm.
    allocates: a function `allocate(profile, sparsity)` is the allocation; otherwise it is passed over. cut: the answer
    ended at the token limit.
    Raises LanguageError where there is no score, where nothing of it is left, where it is outside the language, or
    where it reads a statistic that is not offered.
    """
    head, found, salvaged, at_end = _split(text.replace("\r\n", "\n"))
    if "score" not in found:
        raise LanguageError("the answer holds no line `def score(W, …):`; it was cut, or the function never written")
    texts: dict[str, str] = {}
    for name in FORMS:
        if name in found and (name == "score" or allocates):
            last = at_end and name == list(found)[-1]
            texts[name], mended = _mended(found[name], name, last, cut and last)
            salvaged += mended
    program = parse(texts["score"])
    missing = [name for name in program.reads if name not in statistics]
    if missing:
        offered = ", ".join(("W", *statistics))
        raise LanguageError(f"the score reads {', '.join(missing)}: not offered here; offered are {offered}")
    named = _line(head, "Group")
    match = re.search(rf"\b({'|'.join(GROUPS)})\b", named.lower())
    if named and not match:
        raise LanguageError(f"the group is '{named[:80]}', expected {' or '.join(GROUPS)}")
    if "allocate" in texts:
        chosen = Allocation("written", source=parse_allocation(texts["allocate"]).source)
    else:
        chosen = _allocation(_line(head, "Allocation"), allocation)
    algorithm = Algorithm(program.source, match[1] if match else group, chosen)
    kinds = tuple(kind for kind in SALVAGES if kind in salvaged)
    return Proposal(_thought(head, "Diagnosis"), _thought(head, "Hypothesis"), algorithm, kinds)
