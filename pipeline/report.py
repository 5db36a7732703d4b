"""What a search found, for people: report.html and lineage.html, report.md and its pictures, the table in the terminal;
report.json for machines."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from autoprune.actors.storage import write_atomic
from autoprune.algorithms.algorithm import Algorithm, Group
from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.lineage_page import lineage_html
from autoprune.pipeline.plots import REFERENCES, lineage_png, progress_png, sensitivity_png, sparsity_png
from autoprune.pipeline.report_markdown import report_markdown, result_text
from autoprune.pipeline.report_page import report_html
from autoprune.pipeline.run_folder import MODEL
from autoprune.pipeline.wording import (
    algorithm_text,
    cells,
    counts_line,
    goal,
    headers,
    measure_text,
    origin,
    perplexity_text,
    plain,
    rows,
    time_line,
)


def table(summary: dict) -> Table:
    """The methods with their perplexities, dense first, the best found in bold."""
    title = f"{summary['target']} pruned to {goal(summary)} ({summary['dtype']}, mask only)"
    result = Table(title=Text(title))  # a folder's name may have brackets, which are no markup
    for index, header in enumerate(headers(summary)):
        result.add_column(header, justify="left" if index < 2 else "right", overflow="fold")
    for row in rows(summary):
        result.add_row(*cells(row), style="bold" if row["method"] == "best found" else None)
    return result


# Files


def write_report(folder: Path, lineage: Lineage, summary: dict) -> list[Path]:
    """Write report.html, lineage.html, report.md, report.json (summary and best algorithm), best.py and the pictures;
    returns their paths.

    summary: what the driver knows (plain JSON); `best` names a candidate of the lineage that has a fitness.
    """
    best = lineage[summary["best"]]
    references = {
        row["method"]: perplexity(row["fitness_nll"])
        for row in rows(summary)
        if row["method"] in REFERENCES and math.isfinite(perplexity(row["fitness_nll"]))
    }
    about = f"{summary['name']}: {summary['target']} at {goal(summary)} sparsity"
    measure = measure_text(summary)
    files = {
        "report.json": _json(summary | {"algorithm": best.algorithm.to_dict()}),
        "lineage.png": lineage_png(lineage, best.id, f"Lineage of {about}", measure),
        "fitness.png": progress_png(lineage, references, f"Progress of {about}", measure),
    }
    if best.evaluation.block_sparsities and Group.parse(best.algorithm.group).sparsity is None:
        others = _seeds_with_allocation(lineage, best)
        files["sparsity.png"] = sparsity_png(best, others, summary["sparsity"], f"Sparsity per block, {about}")
    files["best.py"] = best_file(lineage, summary, best).encode()
    if summary.get("sensitivity"):
        files["sensitivity.png"] = sensitivity_png(summary["sensitivity"], best, f"Sensitivity per block, {about}")
    markdown = report_markdown(lineage, summary, best, files.keys())
    files["report.md"] = markdown.encode()
    pictures = {name: data for name, data in files.items() if name.endswith(".png")}
    dense = next((row["fitness_nll"] for row in summary["table"] if row["method"] == "dense"), None)
    files["lineage.html"] = lineage_html(lineage, best.id, f"AutoPrune: {about}", dense).encode()
    files["report.html"] = report_html(markdown, pictures, f"AutoPrune: {about}").encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def _json(data: dict) -> bytes:
    """An infinite perplexity has no number in JSON."""
    plain = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return json.dumps(plain, indent=1).encode()


def best_file(lineage: Lineage, summary: dict, best: Candidate) -> str:
    """The best algorithm as a file that `autoprune prune --score` takes, with figures, lineage and command in
    comments."""
    corpora = summary["corpora"]
    alone = f"{summary['target']} to {goal(summary)}"
    targets = [case["name"] for case in summary.get("cases", ())] or [alone]
    lines = [
        f"Found by AutoPrune: {', '.join(targets)}, mask only, {summary['dtype']}; written by {summary['generator']}.",
        f"Fitness split {corpora['fitness']}, report split {corpora['report']}.",
        "",
        f"{'; '.join(headers(summary)[3:5])}:",
        *(
            f"  {row['method']}: {perplexity_text(row['fitness_nll'])}, {perplexity_text(row['report_nll'])}"
            for row in rows(summary)
        ),
        "",
        "Lineage:",
        *(
            f"  {origin(candidate)}: {perplexity_text(candidate.fitness)}. {plain(candidate.hypothesis)}"
            for candidate in lineage.ancestors_path(best.id)
        ),
        "",
        f"Again: {summary['command']}",
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n#\n" + algorithm_text(best.algorithm)


def _seeds_with_allocation(lineage: Lineage, best: Candidate) -> list[Candidate]:
    """One seed for each non-uniform allocation: seeds that share one also share its curve."""
    seeds: dict[str, Candidate] = {}
    for candidate in lineage.evaluated():
        measured = candidate.operator == "seed" and candidate is not best and candidate.evaluation.block_sparsities
        if measured and candidate.algorithm.allocation.name != "uniform":
            seeds.setdefault(str(candidate.algorithm.allocation), candidate)
    return list(seeds.values())


# Terminal


def read_report(folder: Path) -> dict:
    """What report.json in a run's folder holds; InputError where there is none."""
    path = folder / "report.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no finished run (there is no report.json); check the path, or let the search finish"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); run the search again to write it anew") from None


def print_report(folder: Path, console: Console) -> None:
    """Table, counts, time, best algorithm and where everything is; InputError when the run has no report."""
    summary = read_report(folder)
    console.print(table(summary))
    if result := result_text(summary, summary["best"]):
        console.print(result.replace("**", ""), markup=False, highlight=False)
    # Brackets in names and paths are text, not Rich's markup; a path must stay on one line to be copied.
    for line in (f"Candidates: {counts_line(summary)}", f"Time: {time_line(summary)}", f"Best: {summary['best']}"):
        console.print(line, markup=False, highlight=False)
    source = algorithm_text(Algorithm.from_dict(summary["algorithm"]))
    console.print(Syntax(source, "python", background_color="default", word_wrap=True))
    model = folder / MODEL  # the run may have been moved
    places = {"Model": model if model.is_dir() else Path(summary["model"]), "Algorithm": folder / "best.py"}
    places |= {"Report": folder / "report.html", "Lineage": folder / "lineage.html", "Run": folder}
    for name, place in places.items():
        console.print(f"{name}: {place.resolve()}", markup=False, highlight=False, soft_wrap=True)
    lines = [
        f"MLflow: {summary['mlflow']}",
        *([f"and there: {summary['mlflow_run']}"] if "mlflow_run" in summary else []),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
