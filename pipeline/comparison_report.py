"""What a comparison found, for people and for machines: results.csv, results.md and a picture for each model.

Figures with and without a weight update never share a table, nor a column of the CSV: an update helps every mask.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from autoprune.actors.storage import write_atomic
from autoprune.algorithms.allocation import by_layer
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.comparison import DENSE, Cell, Comparison, Method, Result, Subject, Target
from autoprune.pipeline.lineage import paired_difference
from autoprune.pipeline.plots import comparison_png
from autoprune.pipeline.wording import difference_text

COLUMNS = (
    "model", "score", "update", "group", "allocation", "parameters", "sparsity", "sparsity_achieved", "perplexity",
    "perplexity_updated", "nll", "standard_error", "kl", "kl_standard_error", "dense_perplexity", "fitness_perplexity",
    "pruning_seconds", "forward_seconds", "fallbacks", "dead_inputs", "damped", "dtype", "context", "tokens", "corpus",
    "corpus_sha256", "error",
)  # fmt: skip
AS_MEASURED = (
    "nll", "standard_error", "kl", "kl_standard_error", "pruning_seconds", "forward_seconds", "dead_inputs", "damped",
    "tokens",
)  # fmt: skip
SPARSITY_MISSED = 0.002  # from the target on: whole rows and whole numbers n of m cost a little less
NOTHING, BEST = "–", "best"  # in tables: not measured; what others are set against
KINDS = {False: "Mask only", True: "With weight update"}

Results = dict[str, Result]  # by the cell's key


def perplexity_of(result: Result) -> float:
    return perplexity(result.nll)


def setting_of(result: Result) -> str:
    """The parameters of the allocation that was measured, such as `m=0.3 tau=0.5`."""
    parameters = (result.algorithm or {"allocation": {"parameters": {}}})["allocation"]["parameters"]
    return " ".join(f"{name}={value:g}" for name, value in sorted(parameters.items()))


class Findings:
    """One model's cells, in the order of the configuration, and what is known of them by now."""

    def __init__(self, subject: Subject, cells: Sequence[Cell], results: Results) -> None:
        self.subject = subject
        self.cells = [cell for cell in cells if cell.key in results]
        self._results = {(cell.method, cell.target): results[cell.key] for cell in self.cells}
        self.dense: Result | None = self._results.get((None, None))
        pruned = [cell for cell in cells if cell.method is not None]
        self.methods = list(dict.fromkeys(cell.method for cell in pruned))
        self.targets = list(dict.fromkeys(cell.target for cell in pruned))

    def result(self, method: Method | None, target: Target | None) -> Result | None:
        return self._results.get((method, target))

    def nll(self, method: Method, target: Target) -> float | None:
        """None where it is not measured, or could not be."""
        result = self.result(method, target)
        return None if result is None else result.nll

    def of_kind(self, updated: bool) -> list[Method]:
        return [method for method in self.methods if (method.update != "none") == updated]


def write_tables(folder: Path, config: Comparison, findings: Iterable[Findings]) -> list[Path]:
    """results.csv and results.md of what is known by now; returns their paths."""
    findings = list(findings)
    files = {"results.csv": results_csv(findings), "results.md": results_markdown(config, findings)}
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in files]


def write_plots(folder: Path, findings: Iterable[Findings]) -> list[Path]:
    """perplexity-MODEL.png for each model whose dense row is known and that has two sparsities; returns their paths."""
    paths: list[Path] = []
    for found in findings:
        curves = {KINDS[updated]: _curves(found, updated) for updated in KINDS}
        curves = {kind: own for kind, own in curves.items() if own}
        if found.dense is None or not curves:
            continue
        path = folder / f"perplexity-{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(found.subject.model).name)}.png"
        if path in paths:  # two folders of one name
            path = path.with_stem(f"{path.stem}-{len(paths) + 1}")
        measure = f"ppl_token@{_context(found)}, {found.subject.texts['report'][0]}, {found.subject.dtype}"
        title = f"{Path(found.subject.model).name}: {measure}"
        write_atomic(path, comparison_png(curves, perplexity_of(found.dense), title))
        paths.append(path)
    return paths


def _curves(found: Findings, updated: bool) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(score and update, allocation) → (sparsity, perplexity) points by sparsity; n:m patterns are left out, since one
    is not the same at another sparsity."""
    targets = sorted((target for target in found.targets if not target.pattern), key=lambda target: target.share)
    curves = {}
    for method in found.of_kind(updated):
        points = [(t.share, nll) for t in targets if (nll := found.nll(method, t)) is not None]
        if len(points) > 1:
            curves[method.scoring, method.allocation] = [(share, perplexity(nll)) for share, nll in points]
    return curves


# CSV


def results_csv(findings: Iterable[Findings]) -> str:
    """One row per cell that was measured, or failed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for found in findings:
        for cell in found.cells:
            row = _csv_row(found, cell)
            writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


def _csv_row(found: Findings, cell: Cell) -> dict:
    result = found.result(cell.method, cell.target)
    corpus, sha256 = found.subject.texts["report"]
    row = {
        "model": cell.model,
        "score": DENSE,
        "sparsity": 0.0,
        "dtype": found.subject.dtype,
        "context": _context(found),
        "corpus": corpus,
        "corpus_sha256": sha256,
        "dense_perplexity": perplexity_of(found.dense) if found.dense else None,
        "error": result.error,
    }
    if cell.method is not None:
        row |= {
            "score": cell.method.score,
            "update": cell.method.update,
            "group": cell.algorithm.group,
            "allocation": cell.method.allocation,
            "parameters": setting_of(result),
            "sparsity": cell.target.share,
        }
    if result.error is None:
        updated = cell.method is not None and cell.method.update != "none"
        row |= {"sparsity_achieved": result.sparsity, "fallbacks": len(result.fallbacks)}
        row["perplexity_updated" if updated else "perplexity"] = perplexity_of(result)
        row |= {name: getattr(result, name) for name in AS_MEASURED}
        if result.fitness_nll is not None:
            row["fitness_perplexity"] = perplexity(result.fitness_nll)
    return row


def _context(found: Findings) -> int:
    return found.subject.windows["report"].shape[1]


# Markdown


def results_markdown(config: Comparison, findings: Iterable[Findings]) -> str:
    """Two tables for each model: methods × sparsities, perplexity (KL to the dense model), the best in bold."""
    sections = [f"# {config.name}"]
    for found in findings:
        sections.append(f"## {found.subject.model}")
        if found.dense is None:
            sections.append("The dense model is not measured yet, so there is no table.")
            continue
        sections.append(_header(config, found))
        for updated, title in KINDS.items():
            methods = found.of_kind(updated)
            if methods:
                sections += [f"### {title}", *_table(found, methods)]
    return "\n\n".join(sections) + "\n"


def _header(config: Comparison, found: Findings) -> str:
    subject, dense = found.subject, found.dense
    windows = {name: len(tokens) for name, tokens in subject.windows.items()}
    texts = {name: f"{corpus} ({windows[name]} windows)" for name, (corpus, _) in subject.texts.items()}
    tuned = f"; tuned on {texts['fitness']}" if any(method.tuned for method in found.methods) else ""
    return (
        f"ppl_token@{_context(found)} ± standard error over windows (KL to the dense model, nats per token), "
        f"{subject.dtype}; calibrated on "
        f"{texts['calibration']}{tuned}; measured on {texts['report']}, {dense.tokens:,} tokens; dense perplexity "
        f"{figure(dense.nll)}."
    )


def figure(nll: float) -> str:
    """Perplexity for people."""
    return _digits(perplexity(nll))


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def _figure_of(result: Result) -> str:
    """Perplexity with its standard error over windows, to first order that of the NLL times the perplexity."""
    text, error = figure(result.nll), result.standard_error
    if error is None or not math.isfinite(perplexity_of(result)):
        return text
    return f"{text} ± {_digits(error * perplexity_of(result))}"


def _table(found: Findings, methods: list[Method]) -> list[str]:
    """The table, what stands below it about each sparsity, and the errors that it points at."""
    errors: list[str] = []
    columns = [_column(found, methods, target, errors) for target in found.targets]
    names = [DENSE, *(str(method) for method in methods)]
    head = ["method", *(str(target) for target in found.targets)]
    sections = [_aligned([head, *map(list, zip(names, *columns, strict=True))])]
    paired = [_paired(found, methods, target) for target in found.targets]
    if any(text not in (NOTHING, BEST) for column in paired for text in column):
        sections.append("Nats above the best of the column, paired over the windows:")
        sections.append(_aligned([head, *map(list, zip(names[1:], *paired, strict=True))]))
    lines = [_standing(found, methods, target) for target in found.targets]
    if any(lines):
        sections.append("\n".join(f"- {line}" for line in lines if line))
    notes = [note for method in methods for target in found.targets if (note := _note(found, method, target))]
    if notes:
        sections.append("\n".join(f"- {note}" for note in notes))
    if errors:
        sections.append("\n".join(f"- error {number}: {text}" for number, text in enumerate(errors, start=1)))
    return sections


def _column(found: Findings, methods: list[Method], target: Target, errors: list[str]) -> list[str]:
    """The texts of one column, dense first; texts of errors that are new go to the end of `errors`."""
    nlls = [nll for method in methods if (nll := found.nll(method, target)) is not None]
    texts = [_figure_of(found.dense)]
    for method in methods:
        result = found.result(method, target)
        if result is None:
            texts.append(NOTHING)
        elif result.error is not None:
            line = " ".join(result.error.split()).replace("|", "\\|")
            if line not in errors:
                errors.append(line)
            texts.append(f"error {errors.index(line) + 1}")
        else:
            text = f"{_figure_of(result)} ({result.kl:.3f})"
            texts.append(f"**{text}**" if result.nll == min(nlls) else text)
    return texts


def _paired(found: Findings, methods: list[Method], target: Target) -> list[str]:
    """How far each method is from the best of a column. The texts' own difficulty, which is most of the standard error
    of a figure, is the same for both."""
    measured = {m: r for m in methods if (r := found.result(m, target)) and r.error is None}
    best = min(measured.values(), key=lambda result: result.nll, default=None)
    # Of an older cell the windows are not known: where it is the best, nothing can be paired with it.
    results = {m: r for m, r in measured.items() if r.window_nlls and best.window_nlls}
    texts = []
    for method in methods:
        if method not in results:
            texts.append(NOTHING)
        elif results[method] is best:
            texts.append(BEST)
        else:
            texts.append(difference_text(*paired_difference(results[method], best), ""))
    return texts


def _aligned(rows: list[list[str]]) -> str:
    """A Markdown table that can be read as it is: methods to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    rule = [f"{'-' * (width - 1)}{':' if index else '-'}" for index, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _standing(found: Findings, methods: list[Method], target: Target) -> str:
    """`60%: wanda: best owl (150.21), sdsa 3.1% above; …`: under each score that has several allocations, the best of
    them, and how SDSA (its best variant) stands against it; where SDSA is the best, how the best other one stands.
    Empty where there is nothing to say.
    """
    parts = []
    for scoring in dict.fromkeys(method.scoring for method in methods):
        nlls = {m.allocation: found.nll(m, target) for m in methods if m.scoring == scoring}
        ranked = sorted((name for name in nlls if nlls[name] is not None), key=nlls.__getitem__)
        if len(ranked) < 2:
            continue
        best = ranked[0]
        text = f"{scoring}: best {best} ({figure(nlls[best])})"
        own = [name for name in ranked if _is_sdsa(name)]
        others = [name for name in ranked if not _is_sdsa(name)]
        rival = own[0] if own and best != own[0] else others[0] if own and others else None
        if rival is not None:
            text += f", {rival} {_above(nlls[rival] - nlls[best])}"
        parts.append(text)
    return f"{target}: {'; '.join(parts)}." if parts else ""


def _note(found: Findings, method: Method, target: Target) -> str:
    """What a reader of the figure must know: patterns that are not the column's everywhere, another sparsity than the
    column's, weights that had to be treated otherwise. Empty where there is nothing."""
    result = found.result(method, target)
    if result is None or result.error is not None:
        return ""
    parts = []
    if target.pattern and max(result.block_sparsities) - min(result.block_sparsities) > 1e-6:
        unit = "layer" if by_layer(method.algorithm(target).allocation) else "block"
        parts.append(f"not {target.pattern} everywhere: the allocation gives each {unit} its own n of {target.m}")
    if abs(result.sparsity - target.share) > SPARSITY_MISSED:
        parts.append(f"{result.sparsity:.2%} achieved")
    if result.fallbacks:
        parts.append(f"{len(result.fallbacks)} experts saw too little text and were pruned by magnitude")
    if result.dead_inputs:
        parts.append(f"{result.dead_inputs} inputs were zero for every token")
    if result.damped:
        parts.append(f"the Hessian of {result.damped} layers needed more damping than usual")
    return f"{method} at {target}: {'; '.join(parts)}." if parts else ""


def _is_sdsa(allocation: str) -> bool:
    return re.split("[@:]", allocation)[0] == "sdsa"


def _above(nats: float) -> str:
    """How far a perplexity is above one that is lower by so many nats."""
    return f"{100 * math.expm1(nats):.1f}% above" if nats < math.log(10) else f"{perplexity(nats):.0f} times as high"
