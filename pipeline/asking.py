"""Ask a run: its candidates, the chain of reasoning that led to one of them, and how to prune with it."""

from __future__ import annotations

import difflib
import json
import shlex
from pathlib import Path

from rich.table import Table
from rich.text import Text

from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.checkpoint import load_checkpoint
from autoprune.pipeline.config import FREE_GROUP, Config
from autoprune.pipeline.lineage import Candidate, Lineage, checkpointed, finite
from autoprune.pipeline.mirror import CHECKPOINT
from autoprune.pipeline.wording import (
    algorithm_text,
    difference_text,
    fitness_text,
    measured_text,
    perplexity_text,
    plain,
)

OPERATORS = ("seed", "explore", "mutate", "crossover", "simplify", "tune", "repair", "improve", "sample")
VERDICTS = ("confirmed", "refuted", "inconclusive")
BEST = "best"  # stands for the id of the best candidate


def stored_lineage(folder: Path) -> Lineage:
    """Of a run, also while it is searching: what its newest checkpoint holds. Raises InputError where there is none."""
    loaded = load_checkpoint(folder / CHECKPOINT)
    if loaded is not None and loaded.generation >= 0:
        return checkpointed(loaded)
    try:
        return Lineage.from_dict(json.loads((folder / "lineage.json").read_text()))
    except FileNotFoundError:
        raise InputError(f"{folder} has no checkpoint yet: let its search measure the seeds") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'lineage.json'} cannot be read ({error}); resume the search to write it anew"
        ) from None


def find(lineage: Lineage, name: str) -> Candidate:
    """By id, or "best". Raises InputError with the nearest ids."""
    if name == BEST and lineage.evaluated():
        return lineage.best()
    if name in lineage:
        return lineage[name]
    near = difflib.get_close_matches(name, [c.id for c in lineage], n=3, cutoff=0.4)
    raise InputError(
        f"no candidate {name!r}: expected {BEST} or an id" + (f", such as {', '.join(near)}" if near else "")
    )


def facts(lineage: Lineage, candidate: Candidate) -> dict:
    """What is known of a candidate, as plain JSON; "against" holds the comparison with each parent."""
    found = {
        "id": candidate.id,
        "generation": candidate.generation,
        "operator": candidate.operator,
        "parents": list(candidate.parents),
        "status": candidate.status,
        "diagnosis": candidate.diagnosis,
        "hypothesis": candidate.hypothesis,
        "regrouped": candidate.regrouped,
        "error": candidate.error,
        "repeats": candidate.repeats,
        "algorithm": algorithm_text(candidate.algorithm) if candidate.algorithm else None,
        "fitness_nll": candidate.fitness if candidate.status == "evaluated" else None,
        "fitness_perplexity": perplexity(candidate.fitness) if candidate.status == "evaluated" else None,
        "fresh_nll": candidate.fresh.nll if candidate.fresh else None,
        "block_sparsities": list(candidate.evaluation.block_sparsities) if candidate.evaluation else [],
        "block_errors": list(candidate.evaluation.block_errors) if candidate.evaluation else [],
    }
    edges = [{"parent": parent, **lineage.edge(parent, candidate.id)} for parent in candidate.parents]
    return found | {"against": [{name: finite(value) for name, value in edge.items()} for edge in edges]}


def reasoning(lineage: Lineage, candidate: Candidate) -> list[dict]:
    """The facts of its ancestors along first parents, the oldest first, and of itself."""
    return [facts(lineage, one) for one in lineage.ancestors_path(candidate.id)]


def reasoning_lines(lineage: Lineage, candidate: Candidate, combined: str = "") -> list[str]:
    """The chain of reasoning for a terminal: claim, evidence, conclusion of each step. combined: see
    `Target.combined`."""
    lines = []
    for number, one in enumerate(lineage.ancestors_path(candidate.id), start=1):
        parents = f" of {' and '.join(one.parents)}" if one.parents else ""
        lines.append(f"{number}. {one.id} ({one.operator}{parents})")
        if one.diagnosis:
            lines.append(f"   Diagnosis:  {plain(one.diagnosis)}")
        lines.append(f"   Claim:      {plain(one.hypothesis) or '(nothing said)'}")
        if one.algorithm is not None:
            lines += [f"   {line}" for line in algorithm_text(one.algorithm).splitlines()]
        if one.status != "evaluated":
            lines.append(f"   Evidence:   none; {one.status}: {plain(one.error or '')}")
            continue
        lines.append(f"   Evidence:   {fitness_text(one.fitness, combined)} on the fitness split")
        for parent in one.parents:
            edge = lineage.edge(parent, one.id)
            if "effect" in edge:
                lines += [f"   Against {parent}: {measured_text(edge)}", f"   Conclusion: {edge['verdict']}"]
    return lines


def chosen(lineage: Lineage, operator: str | None, status: str | None, verdict: str | None) -> list[Candidate]:
    """Candidates in proposal order, of what is given: the verdict is that against the first parent."""
    return [
        c
        for c in lineage
        if operator in (None, c.operator)
        and status in (None, c.status)
        and (verdict is None or (c.parents and lineage.edge(c.parents[0], c.id)["verdict"] == verdict))
    ]


def table(lineage: Lineage, candidates: list[Candidate], combined: str = "") -> Table:
    """One line for each candidate: what it descends from, what became of it, and its claim. combined: see
    `Target.combined`."""
    result = Table(box=None, padding=(0, 2, 0, 0))
    measured = f"× dense ({combined})" if combined else "perplexity"
    for header in ("candidate", "operator", "of", "status", measured, "Δ nats", "verdict", "claim, or error"):
        result.add_column(header, justify="right" if header in (measured, "Δ nats") else "left", overflow="fold")
    for one in candidates:
        edge = lineage.edge(one.parents[0], one.id) if one.parents else {}
        effect = difference_text(edge["effect"], edge["effect_error"], "") if "effect" in edge else ""
        nll = perplexity_text(one.fitness) if one.status == "evaluated" else ""
        verdict = edge.get("verdict", "") if "effect" in edge else ""
        words = plain(one.error or "") if one.status in ("invalid", "failed", "poison") else plain(one.hypothesis)
        said = f"repeats {one.repeats}" if one.repeats else words
        cells = (one.id, one.operator, ", ".join(one.parents), one.status, nll, effect, verdict, said)
        # Brackets in what a model wrote are text, not Rich's markup.
        result.add_row(*map(Text, cells))
    return result


def prune_command(config: Config, model: str, score: str, out: str) -> str:
    """The command that prunes the target as the search did. score: a file that holds the algorithm."""
    target, data = config.target, config.data
    goal = ["--sparsity", f"{target.sparsity}"] if target.group == FREE_GROUP else ["--group", target.group]
    return shlex.join(
        [
            "autoprune",
            "prune",
            "--model",
            model,
            "--score",
            score,
            *goal,
            "--calibration",
            data.calibration,
            "--context",
            str(data.context),
            "--windows",
            str(data.calibration_windows),
            "--dtype",
            target.dtype,
            "--out",
            out,
        ]  # fmt: skip
    )


def shown(lineage: Lineage, candidate: Candidate, config: Config) -> dict:
    """What `autoprune show` prints: facts, and the command that prunes with it, for a file of its own name."""
    if candidate.algorithm is None:
        raise InputError(
            f"{candidate.id} has no algorithm: its answer could not be read ({plain(candidate.error or '')})"
        )
    command = prune_command(config, config.target.model, f"{candidate.id}.py", f"pruned-{candidate.id}")
    return facts(lineage, candidate) | {"command": command, "combined": config.target.combined}


def shown_text(found: dict) -> str:
    """A file that `autoprune prune --score` takes: the algorithm, and in comments what it is and how to use it."""
    nll, parents = found["fitness_nll"], found["parents"]
    lines = [f"{found['id']} ({found['operator']}{' of ' + ', '.join(parents) if parents else ''})"]
    measured = "" if nll is None else fitness_text(nll, found["combined"])
    lines.append(f"{measured[0].upper()}{measured[1:]} on the fitness split" if measured else found["status"])
    lines += [f"Claim: {plain(found['hypothesis'])}"] if found["hypothesis"] else []
    lines.append(f"In a file {found['id']}.py: {found['command']}")
    return "\n".join(f"# {line}" for line in lines) + "\n" + found["algorithm"]
