"""The report of a search as Markdown: result, algorithm, how it was found, cost, how to reproduce it, and caveats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from autoprune.algorithms.algorithm import Group
from autoprune.algorithms.formula import allocation_formula, read_symbols, score_formula
from autoprune.pipeline.lineage import Candidate, Lineage, noise_bound, paired_difference
from autoprune.pipeline.wording import (
    algorithm_text,
    cells,
    combined,
    counts_line,
    difference_text,
    fitness_text,
    goal,
    headers,
    measured_text,
    origin,
    perplexity_text,
    plain,
    rows,
    time_line,
)

MOST_CLAIMS = 5  # that are told of each verdict, those with the largest effects
DENSEST = 3  # blocks that are named


def report_markdown(lineage: Lineage, summary: dict, best: Candidate, pictures: Collection[str]) -> str:
    """summary: as `conclusion` makes it. pictures: names of the files that lie beside the report."""
    densest = _densest(summary, best)
    sections = [
        f"# {summary['name']}: pruning {summary['target']} to {goal(summary)}",
        result_text(summary, best.id),
        _table(summary),
        f"## The best algorithm: {best.id}\n\n```python\n{algorithm_text(best.algorithm)}```",
        _formula(best),
        "## Where it prunes" if densest else "",
        densest,
        _picture("Sparsity of each block", "sparsity.png", pictures),
        _picture("What pruning each block costs", "sensitivity.png", pictures),
        "## How it was found\n\n" + "\n\n".join(_chain(lineage, summary, best)),
        _picture("Lineage: generation against perplexity", "lineage.png", pictures),
        _picture("Progress: perplexity against evaluations", "fitness.png", pictures),
        _claims(lineage),
        _cost(lineage, summary),
        f"## Again\n\nThe search:\n\n```sh\n{summary['command']}\n```",
        _prune(summary),
        "## How to read these numbers\n\n" + "\n".join(f"- {line}" for line in _caveats(lineage, summary, best)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def result_text(summary: dict, best: str) -> str:
    """The one sentence that people look for: better than what, by how much, and how sure that is."""
    gain = summary.get("gain")
    if not gain or gain["rival"] is None:
        return ""
    where = f" ({summary['cases'][0]['name']})" if summary.get("cases") else ""
    if best == f"seed-{gain['rival']}":
        return (
            f"No candidate was better than **{gain['rival']}**, the best of the baselines on the report split{where}."
        )
    below = 100 * (1 - math.exp(gain["nats"]))
    size = f"{below:.1f}% below" if below > 0 else f"{-below:.1f}% above"
    sure, verdict = "", " One window says nothing of the noise."
    if gain["error"] is not None:
        sure = f" ({difference_text(gain['nats'], gain['error'])}, paired over {gain['windows']} windows)"
        beyond = abs(gain["nats"]) > noise_bound(gain["error"], gain["windows"])
        verdict = "" if beyond else " **That is within the noise.**"
    return (
        f"On text that no search saw{where}, the perplexity of **{best}** is **{size} {gain['rival']}**, the best of "
        f"the baselines there{sure}.{verdict}"
    )


def _picture(title: str, name: str, pictures: Collection[str]) -> str:
    return f"![{title}]({name})" if name in pictures else ""


def _formula(best: Candidate) -> str:
    lines = score_formula(best.algorithm.score)
    if not lines:
        return ""
    meaning = "; ".join(f"$`{symbol}`$: {text}" for symbol, text in read_symbols(best.algorithm.score).items())
    group = {"row": "in each row", "matrix": "in each matrix", "n:m": f"in each group of {best.algorithm.group}"}
    group = group.get(Group.parse(best.algorithm.group).kind, f"by {best.algorithm.group}")
    text = "\n\n".join(f"```math\n{line}\n```" for line in lines)
    text = f"As a formula, the lowest scores {group} going first:\n\n{text}\n\n{meaning}."
    shares = allocation_formula(best.algorithm.allocation)
    if shares:
        layers = best.algorithm.allocation.per == "layer"
        unit = "a linear layer, of one of the $`B`$ blocks" if layers else "a block of $`B`$"
        units = f"$`b`$: {unit}; $`r_b`$: its retention, up to a factor; $`s`$: the sparsity"
        if not best.algorithm.allocation.source:
            units += (
                r"; $`\gamma_b`$: the skewness of |W| in it, at most 1.75 times the median; the exponent is at most 2"
            )
            units += "; $`t_l`$: a layer's mean of |W| times its gradient" if "t_l" in shares[0] else ""
        text += "\n\n" + "\n\n".join(f"```math\n{line}\n```" for line in shares) + f"\n\n{units}."
    return text


def _densest(summary: dict, best: Candidate) -> str:
    """Which blocks keep most, and what the measurements say of them."""
    shares, group = best.evaluation.block_sparsities, Group.parse(best.algorithm.group)
    if group.kind == "n:m":
        text = f"In every block alike, of every {group.second} consecutive weights of a row {group.first} are kept."
    elif not shares or max(shares) - min(shares) < 0.005:
        return "All blocks keep the same share." if shares else ""
    else:
        order = sorted(range(len(shares)), key=shares.__getitem__)[:DENSEST]
        text = "Kept densest: " + ", ".join(f"block {b} ({100 * (1 - shares[b]):.0f}% kept)" for b in order) + "."
    cost = summary.get("sensitivity")
    if cost:
        worst = sorted(range(len(cost)), key=lambda b: -cost[b])[:DENSEST]
        text += " Pruned alone, these cost most: " + ", ".join(f"block {b} ({cost[b]:+.3f} nats)" for b in worst) + "."
    return text


def _table(summary: dict) -> str:
    lines = [headers(summary), ["---", "---", "---:", "---:", "---:", "---:"], *(cells(row) for row in rows(summary))]
    note = (
        f"Perplexity per token over windows of {summary['context']} tokens; {summary['dtype']}; mask only: no weight "
        f"that was kept has been changed. Fitness split: {summary['corpora']['fitness']}. "
        f"Report split: {summary['corpora']['report']}."
    )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}"
    return text + _cases(summary)


def _cases(summary: dict) -> str:
    """Every case on the report split, where there are several."""
    cases = summary.get("cases")
    if not cases:
        return ""
    lines = [["report split", *(case["name"] for case in cases)], ["---", *("---:" for _ in cases)]]
    lines += [
        [method, *(perplexity_text(case["report_nll"][method]) for case in cases)] for method in cases[0]["report_nll"]
    ]
    return "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _quote(text: str) -> str:
    """The model's own words on one line, with nothing in them that Markdown or HTML would act on."""
    words = plain(text) or "(nothing said)"
    return "".join(f"\\{character}" if character in r"\`*_[]<>#|!$~" else character for character in words)


def _chain(lineage: Lineage, summary: dict, best: Candidate) -> list[str]:
    """The ancestors of the best, oldest first: what was diagnosed, claimed, measured, and what came of the claim."""
    steps, path = [], lineage.ancestors_path(best.id)
    for parent, child in zip([None, *path], path, strict=False):
        lines = [origin(child, mark="**"), ""]
        if child.diagnosis or child.hypothesis:
            lines += [f"- Diagnosis: {_quote(child.diagnosis)}", f"- Hypothesis: {_quote(child.hypothesis)}"]
        if child.regrouped:
            lines.append(f"- Compared by {child.algorithm.group}, unlike its answer: better on the probe's text")
        if child.status != "evaluated":  # a repaired candidate descends from a broken one
            lines.append(f"- Measured: nothing; {child.status}: {_quote(child.error or '')}")
        else:
            lines.append(f"- Measured: {fitness_text(child.fitness, combined(summary))}")
            if parent is not None and parent.status == "evaluated":
                edge = lineage.edge(parent.id, child.id)
                lines += [f"- Against {parent.id}: {measured_text(edge)}", f"- Verdict: {edge['verdict']}"]
        steps.append("\n".join(lines))
    return steps


def _noise(lineage: Lineage, summary: dict, best: Candidate) -> str:
    """The best against the strongest baseline that the lineage also measured, window by window."""
    names = [row["candidate"] for row in rows(summary) if row["candidate"] not in (None, best.id)]
    measured = [lineage[name] for name in names if name in lineage and lineage[name].status == "evaluated"]
    windows = len(best.evaluation.window_nlls)
    measured = [c for c in measured if len(c.evaluation.window_nlls) == windows]
    advice = "The candidate with the lowest fitness is partly the luckiest one: believe the report split."
    if not measured:
        return f"Noise: the fitness split has {windows} windows. {advice}"
    rival = min(measured, key=lambda c: c.fitness)
    difference = difference_text(*paired_difference(best.evaluation, rival.evaluation))
    return (
        f"Noise: on the fitness split, {best.id} − {rival.id} = {difference} (standard error over {windows} windows, "
        f"paired). {advice}"
    )


def _caveats(lineage: Lineage, summary: dict, best: Candidate) -> list[str]:
    corpora, group = summary["corpora"], best.algorithm.group
    patterned = Group.parse(group).kind == "n:m"
    count = summary.get("looks", 1)
    looks = [
        f"The report split was looked at {count} times, once for each winner that this search has had: whoever stopped "
        "because of what it said has chosen by it. Measure the last one on other text."
    ]
    return [
        f"Splits: calibration ({corpora['calibration']}) gave the statistics, the fitness split "
        f"({corpora['fitness']}) chose the winner, and the report split ({corpora['report']}) was seen by neither.",
        *(looks if count > 1 else []),
        _noise(lineage, summary, best),
        f"Compare only with figures of the same text, context ({summary['context']} tokens), dtype "
        f"({summary['dtype']}) and dense row; word-normalised perplexities are another quantity.",
        f"{'GCoT is' if patterned else 'GCoT and SDSA are'} our reconstruction: only the abstract of arXiv 2511.15390 "
        f"was public, and {'its' if patterned else 'their'} details here are our own.",
        "Baselines are written from their published formulas, with the same calibration statistics and sparsity; their "
        "parameters are as given, not tuned: `autoprune compare` tunes them.",
        f"The zeros are {group if patterned else 'unstructured'}: the exported model has its original size and speed "
        "until a sparse format or kernel is used.",
    ]


def _claims(lineage: Lineage) -> str:
    """What was claimed, and what the measurements said: how often each verdict fell, and the clearest of each."""
    found = []
    for child in lineage:
        edge = lineage.edge(child.parents[0], child.id) if child.parents else {}
        if "effect" in edge and child.operator != "tune":
            found.append((edge["verdict"], edge["effect"], edge["effect_error"], child))
    if not found:
        return ""
    counts = Counter(verdict for verdict, *_ in found)
    text = "## Claims\n\n" + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) + "."
    for verdict, sign in (("confirmed", 1), ("refuted", -1)):
        clearest = sorted((f for f in found if f[0] == verdict), key=lambda f: sign * f[1])[:MOST_CLAIMS]
        if clearest:
            lines = [
                f"- {child.id} of {child.parents[0]} ({difference_text(effect, error)}): {_quote(child.hypothesis)}"
                for _, effect, error, child in clearest
            ]
            text += f"\n\n{verdict.capitalize()}, the clearest first:\n\n" + "\n".join(lines)
    return text


def _cost(lineage: Lineage, summary: dict) -> str:
    counts, answers = summary["counts"], max(1, summary["counts"]["answers"])
    tokens = sum(c.tokens for c in lineage if c.status == "invalid")
    all_tokens = max(1, summary["tokens"]["prompt"] + summary["tokens"]["completion"])
    lines = [
        f"Candidates: {counts_line(summary)}.",
        f"Invalid answers took {100 * counts['invalid'] / answers:.1f}% of the answers and "
        f"{100 * tokens / all_tokens:.1f}% of the tokens.",
        f"Time: {time_line(summary)}.",
        f"Evaluators computed for {summary['gpu_seconds']:,.0f} s." if summary.get("gpu_seconds") else "",
        f"Algorithms written by: {summary['generator']}; prompts {summary.get('prompts', 'unknown')}.",
    ]
    return "## Cost\n\n" + "\n".join(f"- {line}" for line in lines if line)


def _prune(summary: dict) -> str:
    text = f"The pruned model is in `{summary['model']}`."
    if "prune_command" in summary:
        text = f"The model alone, without a search:\n\n```sh\n{summary['prune_command']}\n```\n\n{text}"
    return text
