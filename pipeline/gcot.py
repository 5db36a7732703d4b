"""Graph-driven Chain-of-Thought (our reconstruction): a prompt is a chain of reasoning read off the lineage graph.

It walks from the oldest ancestor of a focal candidate down to it; at each step it sets the best and the worst other
child beside it; each becomes a numbered step *claim → evidence → conclusion*. The answer is asked for in the order
diagnosis, hypothesis, algorithm. Two plain prompts stand beside it, which GCoT is measured against.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoprune.actors.messages import Messages
from autoprune.algorithms.algorithm import Group
from autoprune.algorithms.answers import sdsa_bounds
from autoprune.algorithms.grammar import GIVEN, PARTS
from autoprune.algorithms.rules import DEFAULTS
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS, SUMMARIES
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.pipeline.config import FREE_GROUP
from autoprune.pipeline.lineage import Candidate, Lineage

Count = Callable[[Messages], int]

VERSION = "v4"  # of the templates, the folder that they lie in: what a prompt says is part of what a search was
PATH_LIMIT = 5  # ancestors told of, the nearest
KNOWN_LIMIT = 10  # algorithms listed as written already; more would crowd out the reasoning
FAILURE_LIMIT = 5  # changes told of that came to nothing, the newest

# The lines of an answer, by part (see `grammar`).
FORMS = {
    "group": "Group: row",
    "allocation": "Allocation: sdsa " + " ".join(f"{name}={value:g}" for name, value in DEFAULTS["sdsa"].items()),
    "allocate": "def allocate(profile, sparsity):\n    u0 = <expression>\n    return <expression>",
    "score": "def score({parameters}):\n    m0 = <expression>\n    return <expression>",
}


@dataclass(frozen=True)
class Setting:
    """What holds for every prompt of a search.

    dense: NLL of the unpruned model. parts: of an algorithm that are designed (see `grammar`), in order. statistics:
    names in STATISTICS that the answer is told of. diverse: whether prompts name what exists and what failed. cases:
    where fitness is of several models or sparsities, what they are; combine: what is made of them. count: tokens of a
    prompt; limit: how many it may have, and repair: how many more where an answer and its error are in it.
    given: how many of the parents' scores the answer builds on by name (see `algorithms.given`). group: the n:m that
    all prune by, or FREE_GROUP.
    """

    dense: float
    sparsity: float
    count: Count
    limit: int
    parts: tuple[str, ...] = PARTS
    statistics: tuple[str, ...] = DEFAULT_STATISTICS
    diverse: bool = True
    cases: tuple[str, ...] = ()
    combine: str = ""
    repair: int = 0
    given: int = 0
    group: str = FREE_GROUP


@functools.cache
def template(name: str) -> str:
    return (Path(__file__).parent / "prompts" / VERSION / f"{name}.txt").read_text().rstrip("\n")


def build_prompt(
    lineage: Lineage,
    task: str,
    parents: tuple[str, ...],
    setting: Setting,
    lessons: Sequence[str] = (),
    trials: Sequence[str] = (),
) -> Messages:
    """The prompt for a task: explore, crossover (either may have _allocate behind it), mutate_score (_alone: without
    its group), mutate_allocation, mutate_allocate, simplify. (role, text) messages of at most setting.limit tokens.
    lessons: lines of what the whole graph says (see `lessons`). trials: lines of what was tried of the first parent
    (see `trials`).

    What is too much is dropped: the oldest evidence first, never the parents; then the oldest failures; the lessons;
    the worst of what is listed as known; the trials. What is left then is longer than the limit. A function of its
    arguments alone.
    """
    system = _system(setting)
    steps = _walk(lineage, parents)
    known = lineage.evaluated()[:KNOWN_LIMIT] if setting.diverse else []
    failures = lineage.failures(parents[0])[-FAILURE_LIMIT:] if setting.diverse else []
    lessons, trials = list(lessons), list(trials)
    tasks = [task, *([f"given{setting.given}"] if setting.given else [])]
    while True:
        numbers = {candidate.id: number for number, candidate in enumerate(steps, start=1)}
        focal, partner = numbers[parents[0]], numbers[parents[-1]]
        sections = [
            _head(setting),
            # The same for every prompt of a generation, and therefore early: the server computes a common beginning
            # once.
            _section("known", [f"- {c.fitness:.3f}: {_one_line(c)}" for c in known]),
            _section("lessons", lessons),
            _lines(["How we got here:", *(_step(lineage, c, numbers, setting) for c in steps)]),
            _section("trials", trials, focal=focal),
            _section("failures", [_failure(lineage, parents[0], c) for c in failures], focal=focal),
            _lines([*(template(name).format(focal=focal, partner=partner) for name in tasks), template("order")]),
        ]
        messages = (("system", system), ("user", "\n\n".join(filter(None, sections))))
        old = next((candidate for candidate in steps if candidate.id not in parents), None)
        if setting.count(messages) <= setting.limit or not (old or failures or lessons or known or trials):
            return messages
        if old:
            steps.remove(old)
        elif failures:
            failures = failures[1:]
        elif lessons:
            lessons = []
        elif known:
            known = known[:-1]
        else:
            trials = []


def plain_prompt(candidates: Sequence[Candidate], task: str, setting: Setting) -> Messages:
    """A list of algorithms, best first, each with its fitness, and the wish for a better one (topk, fixed). What is too
    much is dropped from its end."""
    count = len(candidates)
    while True:
        listing = _lines(
            f"Fitness {c.fitness:.3f}. {_settings(c, setting)}\n{_code(c, setting)}" for c in candidates[:count]
        )
        user = f"{_head(setting)}\n\n{template(task).format(listing=listing)}\n{template('order')}"
        messages = (("system", _system(setting)), ("user", user))
        if setting.count(messages) <= setting.limit or count == 1:
            return messages
        count -= 1


def repair_prompt(messages: Messages, answer: str, error: str, setting: Setting) -> Messages | None:
    """The prompt of an answer, the answer, and why it cannot be used; None where that is longer than the limit."""
    repair = (*messages, ("assistant", answer), ("user", template("repair").format(error=error)))
    return repair if setting.count(repair) <= setting.limit + setting.repair else None


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(texts)


def _section(name: str, lines: list[str], **words: object) -> str:
    return template(name).format(lines=_lines(lines), **words) if lines else ""


def _head(setting: Setting) -> str:
    if setting.cases:
        return template("head_cases").format(cases="; ".join(setting.cases), combine=f"the {setting.combine}")
    return template("head").format(sparsity=f"{setting.sparsity:.0%}", dense=f"{setting.dense:.3f}")


@functools.lru_cache(maxsize=64)
def _system(setting: Setting) -> str:
    shapes = {"r": "[in]", "m": "[out, in]"}
    statistics = _lines(f"{n}: {STATISTICS[n].description}, {shapes[STATISTICS[n].type]}." for n in setting.statistics)
    allocation, forms = template("allocation_given"), dict(FORMS)
    if "allocation" in setting.parts and "taylor" in sdsa_bounds(setting.statistics):
        allocation = template("allocation_sdsa_taylor")
        forms["allocation"] += " taylor=0"
    elif "allocation" in setting.parts:
        allocation = template("allocation_sdsa")
    elif "allocate" in setting.parts:
        summaries = _lines(f"profile.{name}: {description}." for name, description in SUMMARIES.items())
        allocation = template("allocation_written").format(summaries=summaries)
    lines = "".join(f"\n    m{place} = {name}" for place, name in enumerate(GIVEN[: setting.given]))
    forms["score"] = forms["score"].replace(":\n    m0 = <expression>", f":{lines}") if lines else forms["score"]
    if "score" not in setting.parts:
        allocation += "\n" + template("score_given")
    form = _lines(forms[part] for part in setting.parts).format(parameters=", ".join(("W", *setting.statistics)))
    group = template("group_free")
    if setting.group != FREE_GROUP:
        pattern = Group.parse(setting.group)
        group = template("group_nm").format(kept=pattern.first, of=pattern.second)
    return template("system").format(statistics=statistics, group=group, allocation=allocation, form=form)


def _walk(lineage: Lineage, parents: tuple[str, ...]) -> list[Candidate]:
    """The measured candidates that the prompt speaks of, in proposal order, which is topological."""
    chosen = set(parents)
    for ancestor in lineage.ancestors_path(parents[0])[-PATH_LIMIT:]:
        chosen |= {ancestor.id, *(contrast.id for contrast in lineage.contrast(ancestor.id))}
    return [candidate for candidate in lineage if candidate.id in chosen and candidate.status == "evaluated"]


def _written(candidate: Candidate, setting: Setting) -> str:
    """An allocation as a function, where this search has functions written and it can be shown as one."""
    allocation = candidate.algorithm.allocation
    usual = allocation.per == "block" and allocation.parameters == DEFAULTS.get(allocation.name)
    if "allocate" in setting.parts and usual:
        return WRITTEN_ALLOCATIONS.get(allocation.name, allocation.source)
    return allocation.source


def _settings(candidate: Candidate, setting: Setting) -> str:
    written = _written(candidate, setting)
    allocation = "as written" if written else candidate.algorithm.allocation
    return f"Group: {candidate.algorithm.group}. Allocation: {allocation}."


def _code(candidate: Candidate, setting: Setting) -> str:
    return "\n".join(filter(None, (_written(candidate, setting).strip(), candidate.algorithm.score.strip())))


def _step(lineage: Lineage, candidate: Candidate, numbers: dict[str, int], setting: Setting) -> str:
    """One numbered step: claim, algorithm, evidence, conclusion."""
    sources = [str(numbers[parent]) for parent in candidate.parents if parent in numbers]
    origin = f" ({candidate.operator} of {' and '.join(sources)})" if sources else ""
    text = [
        f"{numbers[candidate.id]}.{origin} Claim: {candidate.hypothesis or 'none given'}",
        f"   {_settings(candidate, setting)}",
        "   " + _code(candidate, setting).replace("\n", "\n   "),
        f"   Evidence: fitness {candidate.fitness:.3f}{_moved(lineage, candidate)}{_damage(candidate)}.",
        f"   Conclusion: {_conclusion(lineage, candidate)}",
    ]
    return "\n".join(text)


def _moved(lineage: Lineage, candidate: Candidate) -> str:
    if not candidate.parents:
        return ""
    edge = lineage.edge(candidate.parents[0], candidate.id)
    if "effect" not in edge:
        return ""
    text = f", {edge['effect']:+.3f} ± {edge['effect_error']:.3f} against its parent"
    if not math.isnan(edge.get("mask_distance", math.nan)):
        text += f"; {edge['mask_distance']:.0%} of the mask differs"
    return text


def _damage(candidate: Candidate) -> str:
    """The two blocks in which the relative error of the hidden states grows most."""
    errors = candidate.evaluation.block_errors
    if not errors:
        return ""
    growth = [after - before for before, after in zip((0.0, *errors), errors, strict=False)]
    worst = sorted(range(len(growth)), key=growth.__getitem__, reverse=True)[:2]
    blocks = " and ".join(f"{block} (+{growth[block]:.2f})" for block in worst)
    return f"; the error grows most in blocks {blocks} of {len(growth)}"


def _conclusion(lineage: Lineage, candidate: Candidate) -> str:
    if not candidate.parents:
        return "a known baseline."
    verdict = lineage.edge(candidate.parents[0], candidate.id)["verdict"]
    return {
        "confirmed": "the claim is confirmed.",
        "refuted": "the claim is refuted.",
        "inconclusive": "no difference beyond the noise.",
    }.get(verdict, f"{verdict}.")


def _failure(lineage: Lineage, parent: str, child: Candidate) -> str:
    if child.status == "invalid":
        return f"- refused: {child.error}"
    if child.status in ("failed", "poison"):
        return f"- {_one_line(child)}: {child.error}"
    if child.status == "screened":
        return f"- {_one_line(child)}: worse at first sight"
    return f"- {_one_line(child)}: {lineage.edge(parent, child.id)['effect']:+.3f}"


def _one_line(candidate: Candidate) -> str:
    algorithm = candidate.algorithm
    allocation = _body(algorithm.allocation.source) or algorithm.allocation
    return f"{_body(algorithm.score)} [{algorithm.group}, {allocation}]"


def _body(source: str) -> str:
    return "; ".join(line.strip() for line in source.strip().splitlines()[1:])
