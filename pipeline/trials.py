"""What one more statistic would do to a score, measured on the shortest text before a language model is asked: of many
statistics it would try the one that it knows, and a graph of few candidates says nothing of the others."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.scores import NATIVE
from autoprune.algorithms.vocabulary import STATISTICS

# How a statistic x joins what a score returns, m0: as a factor, softened, or as a divisor. As an answer would write it.
FORMS = ("m0 * {x}", "m0 * {x}.sqrt()", "m0 / ({x} + 1e-06)")


@dataclass(frozen=True)
class Trial:
    """One more statistic in a score. form: how, with m0 for what the score returns without it. effect: nats per token
    against the score without it, below 0 where it is better; None before it was measured, or where it cannot be."""

    statistic: str
    form: str
    algorithm: Algorithm
    effect: float | None = None


def trials(parent: Algorithm, statistics: Sequence[str]) -> list[Trial]:
    """Every form with every one of the statistics that the score does not read."""
    if parent.score in NATIVE:
        return []
    function, found = parse(parent.score), []
    for name in statistics:
        for form in FORMS if name not in function.reads else ():
            text = form.format(x=f"{name}.abs()" if STATISTICS[name].signed else name)
            try:
                score = parse(_joined(function.source, name, text)).source
            except LanguageError:  # it was as long as a source may be
                continue
            found.append(Trial(name, text, replace(parent, score=score)))
    return found


def _joined(source: str, name: str, text: str) -> str:
    module = ast.parse(source)
    function = module.body[0]
    function.args.args.append(ast.arg(name))
    returned = function.body[-1].value

    class InPlace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return returned if node.id == "m0" else node

    function.body[-1].value = InPlace().visit(ast.parse(text, mode="eval").body)
    return ast.unparse(ast.fix_missing_locations(module))


def promises(measured: Sequence[Trial]) -> dict[str, float]:
    """The best effect of each statistic, whatever the form."""
    found: dict[str, float] = {}
    for trial in measured:
        if trial.effect is not None:
            found[trial.statistic] = min(trial.effect, found.get(trial.statistic, trial.effect))
    return found


def trial_lines(measured: Sequence[Trial], offered: Sequence[str], most: int) -> list[str]:
    """Lines of a prompt: the best of those that are better, and read what is offered."""
    better = [t for t in measured if t.effect is not None and t.effect < 0 and t.statistic in offered]
    better.sort(key=lambda trial: trial.effect)
    return [f"- {trial.form}: {trial.effect:+.3f}" for trial in better[:most]]
