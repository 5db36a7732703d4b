"""Commands that need no search: pruning and measuring a model, checking a source. Nothing heavy is imported before
one is run."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path


def prune(options: argparse.Namespace) -> None:
    from collections import Counter
    from dataclasses import replace

    from autoprune.algorithms.algorithm import Group
    from autoprune.models.errors import InputError
    from autoprune.models.pruning import prune
    from autoprune.pipeline.population import baseline, read_allocation, read_score
    from autoprune.pipeline.progress import ConsoleProgress

    own = options.score.endswith(".py")
    if not own and re.search(r"\.py[/+]", options.score):
        raise InputError(
            f"--score {options.score}: behind a file stands nothing more; it takes --allocation owl and --update cg, "
            "or a line `# allocation: owl` in it"
        )
    algorithm, spread = read_score(Path(options.score)) if own else (baseline(options.score), False)
    says = {sign for sign in "/+" if sign in options.score and not own}
    for sign, option, value in (("/", "--update", options.update), ("+", "--allocation", options.allocation)):
        if sign in says and value is not None:
            raise InputError(f"--score {options.score} and {option} {value} say the same thing twice: leave one out")
    sparsity = options.sparsity
    try:
        group = Group.parse(options.group or algorithm.group)
    except ValueError as error:
        raise InputError(str(error)) from None
    if group.kind == "n:m" and sparsity is None:
        sparsity = 1 - group.first / group.second
    allocation = options.allocation or ("uniform" if group.kind == "n:m" else "sdsa")
    in_file = spread and options.allocation is None
    algorithm = replace(
        algorithm,
        group=options.group or algorithm.group,
        allocation=algorithm.allocation if "+" in says or in_file else read_allocation(allocation),
        update=options.update or algorithm.update,
    )
    if sparsity is None:
        raise InputError("no --sparsity: give the share of the weights to remove, such as 0.6")
    sidecar = prune(
        options.model, algorithm, sparsity, options.calibration, options.out,
        context=options.context, windows=options.windows, dtype=options.dtype,
        sequential=options.sequential, offload=options.offload, progress=ConsoleProgress().say,
    )  # fmt: skip
    achieved = sidecar["sparsity"]["achieved"]
    print(f"{options.out}: {achieved:.4%} of the weights of {len(sidecar['layers'])} linear layers pruned")
    if algorithm.allocation.values:
        shift = sidecar["sparsity"]["planned"][0][0] - algorithm.allocation.values[0]
        print(
            f"explicit sparsities: the first is {shift:+.4f} from what was given, so that all together meet the target"
        )
    if group.kind == "n:m":
        kept = Counter(round((1 - share) * group.second) for block in sidecar["sparsity"]["planned"] for share in block)
        if len(kept) > 1:
            counts = ", ".join(f"{n} in {kept[n]} layers" for n in sorted(kept))
            print(
                f"of every {group.second} weights are kept: {counts}; --allocation uniform keeps {group.first} in all"
            )
    fallbacks = [name for name, layer in sidecar["layers"].items() if "fallback" in layer]
    if fallbacks:
        print(f"{len(fallbacks)} experts saw too little text and were pruned by magnitude: {', '.join(fallbacks[:5])}")
    dead = sum(layer.get("dead_inputs", 0) for layer in sidecar["layers"].values())
    if dead:
        print(
            f"{dead} inputs were zero for every token of the calibration text: a score that reads inputs prunes their "
            "weights first, or by column where all scores are equal"
        )
    damped = [name for name, layer in sidecar["layers"].items() if "damping" in layer]
    if damped:
        print(f"{len(damped)} layers needed more damping for their Hessian than usual: {', '.join(damped[:5])}")


def check(options: argparse.Namespace) -> None:
    from autoprune.algorithms.algorithm import Algorithm
    from autoprune.algorithms.cost import dry_run
    from autoprune.algorithms.language import LanguageError, parse
    from autoprune.algorithms.probe import probe, probe_allocation
    from autoprune.models.errors import InputError
    from autoprune.models.pruning import check_sparsity
    from autoprune.pipeline.population import functions_in, read_source, score_in

    check_sparsity(options.sparsity)
    text, said = read_source(options.file), []
    functions = functions_in(options.file, text)
    try:
        if "score" in functions:
            score = functions["score"]
            cost = dry_run(parse(score.text))
            said += [score.text, f"reads: {', '.join(('W', *score.reads))}"]
            work, held = f"{cost.operations:.1f} operations per weight", f"{cost.matrices:.1f} matrices of W's size"
            said.append(f"cost: {work}; {held} at a time")
            for group in ("row", "matrix"):
                said.append(f"masks by {group}: {probe(Algorithm(score.text, group), options.sparsity).mask_hash}")
            algorithm, spread = score_in(options.file, text)
            said.append(f"group: {algorithm.group}")
            said.append(f"allocation: {algorithm.allocation if spread else 'not in the file, so that of --allocation'}")
        if "allocate" in functions:
            allocation = functions["allocate"]
            said += [allocation.text, f"reads: {', '.join((*allocation.reads, 'sparsity'))}"]
            said.append(f"retentions: {probe_allocation(allocation.text)}")
    except LanguageError as error:
        raise InputError(f"{options.file}: {error}") from None
    print("\n".join(said))


def evaluate(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from autoprune.models.pruning import evaluate

    result = evaluate(
        options.model, options.corpus, options.context, options.windows, options.dtype,
        reference=options.reference, offload=options.offload,
    )  # fmt: skip
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"ppl_token@{result.context} of {result.model} on {result.corpus}: {result.perplexity:.4f}\n"
            f"nll {_with_error(result.nll, result.standard_error)} nats per token, {result.tokens} tokens in "
            + (f"{result.windows} windows" if result.windows > 1 else "one window: no standard error")
            + f", {result.dtype}"
        )
        if result.kl is not None:
            print(
                f"{result.reference}: {result.reference_perplexity:.4f} on the same tokens; {result.model} is "
                f"{_with_error(result.difference, result.difference_standard_error, '+')} nats from it, paired; "
                f"KL divergence to it {_with_error(result.kl, result.kl_standard_error)} nats per token"
            )


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    """error: None where a single window says nothing of it."""
    return f"{value:{sign}.6f}" + ("" if error is None else f" ± {error:.4f}")


def zero_shot(options: argparse.Namespace) -> None:
    from autoprune.models.zeroshot import mean, zero_shot
    from autoprune.pipeline.progress import ConsoleProgress

    results = zero_shot(
        options.model, options.tasks.split(","), options.limit, options.batch_size, options.dtype,
        task_path=options.task_path, progress=ConsoleProgress().say,
    )  # fmt: skip
    for result in results:
        print(result)
    print(f"mean of {len(results)}: {mean(results):.4f}")


def models_list(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from autoprune.models.bundled import available

    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("name", "kind", "download", "here", "licence"):
        table.add_column(header, no_wrap=True)
    for entry in available():
        size = f"{entry.download_bytes / 1e6:,.0f} MB"
        table.add_row(entry.name, entry.kind, size, "yes" if entry.on_disk() else "no", entry.licence)
    console = Console(highlight=False)
    console.print(table)
    for entry in available():
        console.print(f"\n{entry.name}: {entry.origin}", markup=False, soft_wrap=True)


def models_fetch(options: argparse.Namespace) -> None:
    from autoprune.models.bundled import fetch

    print(fetch(options.name, check_hashes=True))
