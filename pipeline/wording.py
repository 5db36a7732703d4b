"""How algorithms and figures are put in words: the same in the terminal, in reports and in MLflow."""

from __future__ import annotations

import math

from autoprune.algorithms.algorithm import Algorithm
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.config import FREE_GROUP
from autoprune.pipeline.lineage import Candidate

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


def fitness_text(nll: float | None, combined: str) -> str:
    """A measurement on the fitness split. combined: see `Target.combined`; of several cases it is in nats above the
    dense models."""
    text = perplexity_text(nll)
    return f"{text} × dense, {of_cases(combined)}" if combined else f"perplexity {text}"


def of_cases(combined: str) -> str:
    """What of several cases a fitness is: no case has the worst one itself, where windows differ in which is worst."""
    return f"{combined} of all cases" + (", window by window" if combined == "worst" else "")


def difference_text(effect: float, error: float, unit: str = " nats") -> str:
    return f"{effect:+.4f} ± {error:.4f}{unit}" if math.isfinite(error) else f"{effect:+.4f}{unit}"


def measured_text(edge: dict) -> str:
    """What was measured against a parent."""
    text = difference_text(edge["effect"], edge["effect_error"])
    if math.isfinite(edge.get("mask_distance", math.nan)):
        text += f"; {100 * edge['mask_distance']:.1f}% of the probe's mask changed"
    if "most_improved_block" in edge:
        better, worse = edge["most_improved_block"], edge["most_worsened_block"]
        text += (
            f"; the error of the hidden states fell most (or rose least) at block {better}, and rose most (or fell "
            f"least) at block {worse}"
        )
    return text


def plain(text: str) -> str:
    """The model's own words on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def goal(summary: dict) -> str:
    """What was pruned to: a share, or n:m."""
    group = summary.get("group", FREE_GROUP)  # reports of earlier versions do not have it
    return f"{100 * summary['sparsity']:g}%" if group == FREE_GROUP else group


def rows(summary: dict) -> list[dict]:
    """The table's rows, dense first: a pruned figure means nothing without it."""
    return sorted(summary["table"], key=lambda row: row["method"] != "dense")


def combined(summary: dict) -> str:
    """As `Target.combined`."""
    return summary["config"]["target"]["combine"] if summary.get("cases") else ""


def measure_text(summary: dict) -> str:
    """What a candidate's fitness is, as a perplexity."""
    among = f" × dense, {of_cases(combined(summary))}," if summary.get("cases") else ""
    return f"perplexity{among} on the fitness split"


def headers(summary: dict) -> list[str]:
    measure = f"ppl_token@{summary['context']}"
    if summary.get("cases"):
        among = f"{of_cases(combined(summary))}, × dense"
        first = f"{measure}, report split, {summary['cases'][0]['name']}"
        measures = [f"{measure}, fitness split, {among}", first]
    else:
        measures = [f"{measure}, fitness split", f"{measure}, report split"]
    return ["method", "candidate", "sparsity", *measures, "above the best found, nats"]


def cells(row: dict) -> list[str]:
    sparsity, above = f"{100 * row['sparsity']:.1f}%", row.get("above_best")
    return [
        row["method"],
        "seed" if (row["candidate"] or "").startswith("seed-") else row["candidate"] or "–",  # the method is its name
        sparsity,
        perplexity_text(row["fitness_nll"]),
        perplexity_text(row["report_nll"]),
        (f"{above[0]:+.3f}" + (f" ± {above[1]:.3f}" if above[1] is not None else "")) if above else "–",
    ]


def origin(candidate: Candidate, mark: str = "") -> str:
    parents = f" of {', '.join(candidate.parents)}" if candidate.parents else ""
    return f"{mark}{candidate.id}{mark} ({candidate.operator}{parents})"


def counts_line(summary: dict) -> str:
    text = ", ".join(f"{summary['counts'][name]} {name}" for name in COUNTS if name in summary["counts"])
    salvaged = [f"{count} with {kind}" for kind, count in summary.get("salvaged", {}).items() if count]
    return text + (f"; mended before reading: {', '.join(salvaged)}" if salvaged else "")


def time_line(summary: dict) -> str:
    times, tokens = summary["seconds"], summary["tokens"]
    parts = ", ".join(f"{duration(times[name])} {name}" for name in ("generating", "evaluating", "waiting"))
    return f"{duration(times['total'])} ({parts}); {tokens['prompt']:,} prompt + {tokens['completion']:,} new tokens"
