"""What a search found, for people: report.md with its pictures, the table in the terminal, report.json for machines."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from autoprune.actors.storage import write_atomic
from autoprune.algorithms.algorithm import Algorithm
from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.lineage import Candidate, Lineage, paired_difference
from autoprune.pipeline.plots import REFERENCES, lineage_png, progress_png, sparsity_png

COUNTS = ("answers", "usable", "invalid", "repeated", "screened", "surplus", "evaluated", "failed", "poison")


def algorithm_text(algorithm: Algorithm) -> str:
    """The whole algorithm as one readable source file: group and allocation in a comment above the score function, and
    an allocation of its own above that."""
    head = f"# group: {algorithm.group}\n# allocation: {algorithm.allocation}\n"
    functions = filter(None, (algorithm.allocation.source.strip(), algorithm.score.strip()))
    return head + "\n\n\n".join(functions) + "\n"


def perplexity_text(nll: float | None) -> str:
    """For people: more digits where they mean something."""
    if nll is None:
        return "–"
    value = perplexity(nll)
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _rows(summary: dict) -> list[dict]:
    """The table's rows, dense first: a pruned figure means nothing without it."""
    return sorted(summary["table"], key=lambda row: row["method"] != "dense")


def _cells(row: dict) -> list[str]:
    sparsity = f"{100 * row['sparsity']:.1f}%"
    return [
        row["method"],
        row["candidate"] or "–",
        sparsity,
        perplexity_text(row["fitness_nll"]),
        perplexity_text(row["report_nll"]),
    ]


def _headers(summary: dict) -> list[str]:
    measure = f"ppl_token@{summary['context']}"
    if summary.get("cases"):
        combined = f"{summary['config']['target']['combine']} of all cases, × dense"
        first = f"{measure}, report split, {summary['cases'][0]['name']}"
        return ["method", "candidate", "sparsity", f"{measure}, fitness split, {combined}", first]
    return ["method", "candidate", "sparsity", f"{measure}, fitness split", f"{measure}, report split"]


def table(summary: dict) -> Table:
    """The methods with their perplexities, dense first, the best found in bold."""
    result = Table(
        title=f"{summary['target']} pruned to {100 * summary['sparsity']:g}% ({summary['dtype']}, mask only)"
    )
    for index, header in enumerate(_headers(summary)):
        result.add_column(header, justify="left" if index < 2 else "right")
    for row in _rows(summary):
        result.add_row(*_cells(row), style="bold" if row["method"] == "best found" else None)
    return result


def _counts_line(summary: dict) -> str:
    text = ", ".join(f"{summary['counts'][name]} {name}" for name in COUNTS if name in summary["counts"])
    salvaged = [f"{count} with {kind}" for kind, count in summary.get("salvaged", {}).items() if count]
    return text + (f"; mended before reading: {', '.join(salvaged)}" if salvaged else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _time_line(summary: dict) -> str:
    times, tokens = summary["seconds"], summary["tokens"]
    parts = ", ".join(f"{_duration(times[name])} {name}" for name in ("generating", "evaluating", "waiting"))
    return f"{_duration(times['total'])} ({parts}); {tokens['prompt']:,} prompt + {tokens['completion']:,} new tokens"


# Files


def write_report(folder: Path, lineage: Lineage, summary: dict) -> list[Path]:
    """Write report.md, report.json (summary and best algorithm), best.py and the pictures; returns their paths.

    summary: what the driver knows (plain JSON); `best` names a candidate of the lineage that has a fitness.
    """
    best = lineage[summary["best"]]
    references = {
        row["method"]: perplexity(row["fitness_nll"])
        for row in _rows(summary)
        if row["method"] in REFERENCES and math.isfinite(perplexity(row["fitness_nll"]))
    }
    about = f"{summary['name']}: {summary['target']} at {100 * summary['sparsity']:g}% sparsity"
    files = {
        "report.json": json.dumps(summary | {"algorithm": best.algorithm.to_dict()}, indent=1).encode(),
        "lineage.png": lineage_png(lineage, best.id, f"Lineage of {about}"),
        "fitness.png": progress_png(lineage, references, f"Progress of {about}"),
    }
    if best.evaluation.block_sparsities:
        others = _seeds_with_allocation(lineage, best)
        files["sparsity.png"] = sparsity_png(best, others, summary["sparsity"], f"Sparsity per block, {about}")
    files["best.py"] = best_file(lineage, summary, best).encode()
    files["report.md"] = _markdown(lineage, summary, best, "sparsity.png" in files).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def best_file(lineage: Lineage, summary: dict, best: Candidate) -> str:
    """The best algorithm as a file that `autoprune prune --score` takes, with figures, lineage and command in
    comments."""
    corpora = summary["corpora"]
    alone = f"{summary['target']} to {100 * summary['sparsity']:g}%"
    targets = [case["name"] for case in summary.get("cases", ())] or [alone]
    lines = [
        f"Found by AutoPrune: {', '.join(targets)}, mask only, {summary['dtype']}; written by {summary['generator']}.",
        f"Fitness split {corpora['fitness']}, report split {corpora['report']}.",
        "",
        f"{'; '.join(_headers(summary)[3:])}:",
        *(
            f"  {row['method']}: {perplexity_text(row['fitness_nll'])}, {perplexity_text(row['report_nll'])}"
            for row in _rows(summary)
        ),
        "",
        "Lineage:",
        *(
            f"  {_origin(candidate)}: {perplexity_text(candidate.fitness)}. {plain(candidate.hypothesis)}"
            for candidate in lineage.ancestors_path(best.id)
        ),
        "",
        f"Again: {summary['command']}",
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n#\n" + algorithm_text(best.algorithm)


def _origin(candidate: Candidate, mark: str = "") -> str:
    parents = f" of {', '.join(candidate.parents)}" if candidate.parents else ""
    return f"{mark}{candidate.id}{mark} ({candidate.operator}{parents})"


def plain(text: str) -> str:
    """The model's own words on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _seeds_with_allocation(lineage: Lineage, best: Candidate) -> list[Candidate]:
    """One seed for each non-uniform allocation: seeds that share one also share its curve."""
    seeds: dict[str, Candidate] = {}
    for candidate in lineage.evaluated():
        measured = candidate.operator == "seed" and candidate is not best and candidate.evaluation.block_sparsities
        if measured and candidate.algorithm.allocation.name != "uniform":
            seeds.setdefault(str(candidate.algorithm.allocation), candidate)
    return list(seeds.values())


def _markdown(lineage: Lineage, summary: dict, best: Candidate, with_sparsity: bool) -> str:
    sections = [
        f"# {summary['name']}: pruning {summary['target']} to {100 * summary['sparsity']:g}%",
        _markdown_table(summary),
        f"## The best algorithm: {best.id}\n\n```python\n{algorithm_text(best.algorithm)}```",
        "![Sparsity of each block](sparsity.png)" if with_sparsity else "",
        "## How it was found\n\n" + "\n\n".join(_chain(lineage, best)),
        "![Lineage: generation against perplexity](lineage.png)",
        "![Progress: perplexity against evaluations](fitness.png)",
        f"## Cost\n\n- Candidates: {_counts_line(summary)}.\n- Time: {_time_line(summary)}.\n"
        f"- Algorithms written by: {summary['generator']}; prompts {summary.get('prompts', 'unknown')}.",
        f"## Again\n\n```sh\n{summary['command']}\n```\n\nThe pruned model: `{summary['model']}`.",
        "## How to read these numbers\n\n" + "\n".join(f"- {line}" for line in _caveats(lineage, summary, best)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _markdown_table(summary: dict) -> str:
    lines = [_headers(summary), ["---", "---", "---:", "---:", "---:"], *(_cells(row) for row in _rows(summary))]
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
    words = " ".join(text.split()) or "(nothing said)"
    return "".join(f"\\{character}" if character in r"\`*_[]<>#|!" else character for character in words)


def _chain(lineage: Lineage, best: Candidate) -> list[str]:
    """The ancestors of the best, oldest first: what was diagnosed, claimed, measured, and what came of the claim."""
    steps, path = [], lineage.ancestors_path(best.id)
    for parent, child in zip([None, *path], path, strict=False):
        lines = [_origin(child, mark="**"), ""]
        if child.diagnosis or child.hypothesis:
            lines += [f"- Diagnosis: {_quote(child.diagnosis)}", f"- Hypothesis: {_quote(child.hypothesis)}"]
        if child.regrouped:
            lines.append(f"- Compared by {child.algorithm.group}, unlike its answer: better on the probe's text")
        if child.status != "evaluated":  # a repaired candidate descends from a broken one
            lines.append(f"- Measured: nothing; {child.status}: {_quote(child.error or '')}")
        else:
            lines.append(f"- Measured: perplexity {perplexity_text(child.fitness)}")
            if parent is not None and parent.status == "evaluated":
                edge = lineage.edge(parent.id, child.id)
                lines += [f"- Against {parent.id}: {measured_text(edge)}", f"- Verdict: {edge['verdict']}"]
        steps.append("\n".join(lines))
    return steps


def difference_text(effect: float, error: float, unit: str = " nats") -> str:
    return f"{effect:+.4f} ± {error:.4f}{unit}" if math.isfinite(error) else f"{effect:+.4f}{unit}"


def measured_text(edge: dict) -> str:
    """What was measured against a parent."""
    text = difference_text(edge["effect"], edge["effect_error"])
    if math.isfinite(edge.get("mask_distance", math.nan)):
        text += f"; {100 * edge['mask_distance']:.1f}% of the probe's mask changed"
    if "most_improved_block" in edge:
        better, worse = edge["most_improved_block"], edge["most_worsened_block"]
        text += f"; the error of the hidden states fell most at block {better} and least (or rose) at block {worse}"
    return text


def _noise(lineage: Lineage, summary: dict, best: Candidate) -> str:
    """The best against the strongest baseline that the lineage also measured, window by window."""
    rows = [row["candidate"] for row in _rows(summary) if row["candidate"] not in (None, best.id)]
    measured = [lineage[name] for name in rows if name in lineage and lineage[name].status == "evaluated"]
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
    corpora = summary["corpora"]
    return [
        f"Splits: calibration ({corpora['calibration']}) gave the statistics, the fitness split "
        f"({corpora['fitness']}) chose the winner, and the report split ({corpora['report']}) was seen by neither.",
        _noise(lineage, summary, best),
        f"Compare only with figures of the same text, context ({summary['context']} tokens), dtype "
        f"({summary['dtype']}) and dense row; word-normalised perplexities are another quantity.",
        "GCoT and SDSA are our reconstruction: only the abstract of arXiv 2511.15390 was public, and their details "
        "here are our own.",
        "Baselines are written from their published formulas, with the same calibration statistics and budget.",
        "The zeros are unstructured: the exported model has its original size and speed until a sparse format or "
        "kernel is used.",
    ]


# Terminal


def print_report(folder: Path, console: Console) -> None:
    """Table, counts, time, best algorithm and where everything is; InputError when the run has no report."""
    path = folder / "report.json"
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no finished run (there is no report.json); check the path, or let the search finish"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); run the search again to write it anew") from None
    console.print(table(summary))
    # Brackets in names and paths are text, not Rich's markup; a path must stay on one line to be copied.
    for line in (f"Candidates: {_counts_line(summary)}", f"Time: {_time_line(summary)}", f"Best: {summary['best']}"):
        console.print(line, markup=False, highlight=False)
    source = algorithm_text(Algorithm.from_dict(summary["algorithm"]))
    console.print(Syntax(source, "python", background_color="default", word_wrap=True))
    places = {"Model": Path(summary["model"]), "Algorithm": folder / "best.py"}
    places |= {"Report": folder / "report.md", "Run": folder}
    for name, place in places.items():
        console.print(f"{name}: {place.resolve()}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"MLflow: {summary['mlflow']}", markup=False, highlight=False, soft_wrap=True)
