"""Graph-driven Chain-of-Thought (our reconstruction): a prompt is a chain of reasoning read off the lineage graph.

It walks from the oldest ancestor of a focal candidate down to it; at each step it sets the best and the worst other
child beside it; each becomes a numbered step *claim → evidence → conclusion*. The answer is asked for in the order
diagnosis, hypothesis, algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from autoprune.algorithms.rules import DEFAULTS
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS, SUMMARIES
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.pipeline.lineage import Candidate, Lineage

Messages = tuple[tuple[str, str], ...]

SYSTEM = """You design pruning algorithms for language models. The `score` function gives every weight of a linear \
layer a number; in each comparison group the lowest scores are pruned. Nothing is retrained.
W: weights [out, in].
{statistics}Group: row (weights of one output compete) or matrix (all weights of the layer compete).
{allocation}
Answer in exactly this form, without what the task tells you to leave out:
Diagnosis: <what limits the candidate, at most 15 words>
Hypothesis: <what you change and why the error will fall, at most 15 words>
Group: row
{form}
def score({parameters}):
    m0 = <expression>
    return <expression>"""

# Of the allocation, by what is written of it: what it is, and the form of the answer.
ALLOCATION = {
    "sdsa": "Allocation: how the budget is spread over the blocks. tau: lower = more weight on skewed blocks; m: share "
    "of the budget that follows skewness, 0 is uniform; depth: how much more early blocks keep than late ones.",
    "written": "The `allocate` function gives every block a number; blocks keep weights in proportion to it. "
    "profile.NAME has one number per block, w being its weights and A the products |w| * x_norm:\n"
    + "\n".join(f"profile.{name}: {description}." for name, description in SUMMARIES.items()),
}
FORM = {
    "sdsa": "Allocation: sdsa tau=0.5 m=0.3 depth=0.2",
    "written": "def allocate(profile, sparsity):\n    u0 = <expression>\n    return <expression>",
}

TASKS = {
    "explore": "Task (explore): write an algorithm of a different kind than every one above: other statistics, "
    "another normalisation, or another way to combine them.",
    "mutate score": "Task (mutate): change the score function of step {focal} in the one respect that the evidence "
    "says is worst. Group and allocation stay: leave them out of the answer.",
    "mutate allocation": "Task (mutate): change tau, m and depth of step {focal}, so that the blocks with the most "
    "error keep more. Group and function stay: leave them out of the answer.",
    "mutate allocate": "Task (mutate): change the allocate function of step {focal}, so that the blocks with the most "
    "error keep more. Group and score stay: leave them out of the answer.",
    "crossover": "Task (crossover): join what works in step {focal} with what works in step {partner}.",
}

PATH_LIMIT = 5  # ancestors told of, the nearest
KNOWN_LIMIT = 10  # algorithms listed as written already; more would crowd out the reasoning


def build_prompt(
    lineage: Lineage,
    task: str,
    parents: tuple[str, ...],
    dense_nll: float,
    sparsity: float,
    limit: int,
    statistics: Sequence[str] = DEFAULT_STATISTICS,
    allocation: str = "sdsa",
) -> Messages:
    """The prompt for one of TASKS: (role, text) messages of at most `limit` characters, of which the oldest evidence
    is dropped first, but never the parents. statistics: names in STATISTICS that the answer is told of. allocation: a
    key of ALLOCATION. A function of its arguments alone."""
    system = _system(statistics, allocation)
    head = [
        f"{sparsity:.0%} of the weights are pruned. Fitness: mean negative log-likelihood of the pruned model in nats "
        f"per token, lower is better; the dense model has {dense_nll:.3f}.",
        "",
        "Measured so far, best first; do not write these again:",
        # The same for every prompt of a generation, and therefore first: the server computes a common beginning once.
        *(f"- {c.fitness:.3f}: {_one_line(c)}" for c in lineage.evaluated()[:KNOWN_LIMIT]),
        "",
        "How we got here:",
    ]
    steps = _walk(lineage, parents)
    while True:
        numbers = {candidate.id: number for number, candidate in enumerate(steps, start=1)}
        asked = TASKS[task].format(focal=numbers[parents[0]], partner=numbers[parents[-1]])
        chain = [_step(lineage, candidate, numbers, allocation == "written") for candidate in steps]
        user = "\n".join([*head, *chain, "", asked, "Give the diagnosis, the hypothesis, then the algorithm."])
        oldest = next((candidate for candidate in steps if candidate.id not in parents), None)
        if len(system) + len(user) <= limit or oldest is None:
            return (("system", system), ("user", user))
        steps.remove(oldest)


def _system(statistics: Sequence[str], allocation: str) -> str:
    """What holds for every prompt of a search that offers these statistics and has this of an allocation written."""
    shapes = {"r": "[in]", "m": "[out, in]"}
    lines = (f"{name}: {STATISTICS[name].description}, {shapes[STATISTICS[name].type]}.\n" for name in statistics)
    return SYSTEM.format(
        statistics="".join(lines),
        allocation=ALLOCATION[allocation],
        form=FORM[allocation],
        parameters=", ".join(("W", *statistics)),
    )


def _walk(lineage: Lineage, parents: tuple[str, ...]) -> list[Candidate]:
    """The candidates that the prompt speaks of, in proposal order, which is topological."""
    chosen = {}
    for ancestor in lineage.ancestors_path(parents[0])[-PATH_LIMIT:]:
        chosen[ancestor.id] = ancestor
        measured = sorted(
            (c for c in lineage.children(ancestor.id) if c.status == "evaluated" and c.id not in parents),
            key=lambda c: c.fitness,
        )
        for contrast in {c.id: c for c in measured[:1] + measured[-1:]}.values():
            chosen[contrast.id] = contrast
    for partner in parents[1:]:
        chosen[partner] = lineage[partner]
    return [candidate for candidate in lineage if candidate.id in chosen]


def _step(lineage: Lineage, candidate: Candidate, numbers: dict[str, int], written: bool) -> str:
    """One numbered step: claim, algorithm, evidence, conclusion. written: allocations are functions in this search, so
    a rule is shown as one where it can be."""
    number = numbers[candidate.id]
    sources = [str(numbers[parent]) for parent in candidate.parents if parent in numbers]
    origin = f" ({candidate.operator} of {' and '.join(sources)})" if sources else ""
    allocation = candidate.algorithm.allocation
    source = allocation.source
    if written and allocation.per == "block" and allocation.parameters == DEFAULTS.get(allocation.name):
        source = WRITTEN_ALLOCATIONS.get(allocation.name, "")
    functions = filter(None, (source.strip(), candidate.algorithm.score.strip()))
    code = "\n".join(functions).replace("\n", "\n   ")
    text = [
        f"{number}.{origin} Claim: {candidate.hypothesis or 'none given'}",
        f"   Group: {candidate.algorithm.group}. Allocation: {'as written' if source else allocation}.",
        f"   {code}",
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


def _one_line(candidate: Candidate) -> str:
    algorithm = candidate.algorithm
    allocation = _body(algorithm.allocation.source) or algorithm.allocation
    return f"{_body(algorithm.score)} [{algorithm.group}, {allocation}]"


def _body(source: str) -> str:
    return "; ".join(line.strip() for line in source.strip().splitlines()[1:])
