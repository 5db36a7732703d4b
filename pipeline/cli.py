"""The `autoprune` command. Nothing heavy is imported before a command is known, so that help is instant.

Exit codes: 0 done; 1 something failed; 2 what was given cannot be used; 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from autoprune import __version__


def _large_pages() -> None:
    """Has torch ask Linux for pages of 2 MB: on a CPU, touching fresh memory for weights and scores 4 kB at a time is
    up to two thirds of the time that pruning a layer takes. Read when torch is imported; what the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main(arguments: list[str] | None = None) -> int:
    _large_pages()
    # So that what is half-written goes on the way out; searches and comparisons handle signals of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = _parser()
    options = parser.parse_args(arguments)
    from autoprune.models.errors import InputError, Lost

    try:
        return options.run(options) or 0
    except Lost as error:
        print(f"autoprune: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"autoprune: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            f"autoprune: cannot write or read{where}: {error.strerror}; free space or choose another folder",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autoprune",
        description="A language model designs, measures and improves the algorithm that prunes a model.",
    )
    parser.add_argument("--version", action="version", version=f"autoprune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = commands.add_parser("search", help="search for a pruning algorithm")
    search.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml")
    search.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as target.sparsity=0.5")
    search.add_argument(
        "--resume",
        metavar="RUN",
        help="name or folder of a run that was stopped; auto: CONFIG's run, started where there is none",
    )
    search.set_defaults(run=_search)

    plan = commands.add_parser("plan", help="say what a search would need, before anything starts")
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as evaluators.shards=4")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of each GPU; 0: on CPUs; default: this machine's"
    )
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(run=_plan)

    compare = commands.add_parser("compare", help="measure known methods side by side, on models and at sparsities")
    compare.add_argument("config", type=Path, metavar="CONFIG.yaml")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sparsities=[0.5,0.6]")
    compare.set_defaults(run=_compare)

    prune = commands.add_parser("prune", help="prune a model with a known algorithm")
    _model(prune)
    prune.add_argument(
        "--score",
        default="wanda",
        help="magnitude, wanda, ria, pruner-zero, obs-diag, sparsegpt, or a .py file with a score function, such as "
        "those in algorithms/found; with "
        "/UPDATE and +ALLOCATION behind it, as in wanda/cg+sdsa, in place of those options",
    )
    prune.add_argument(
        "--group",
        help="where scores compete: row, matrix, n:m such as 2:4 (n of m are kept), or rectangles such as 16x16; "
        "default: as the score's paper",
    )
    prune.add_argument(
        "--allocation",
        help="uniform (the default for n:m), sdsa (otherwise), owl, dlp, dsa, alphapruning, atp, or "
        "explicit:0.5,0.6,… with one sparsity per block, or a .py file with an allocate function; with @layer behind "
        "the name, per layer; parameters behind a colon: sdsa:tau=0.5,m=0.3",
    )
    prune.add_argument("--update", help="new values for the kept weights: none (the default), sparsegpt or cg")
    prune.add_argument("--sparsity", type=float, help="share of the weights to remove, such as 0.6; n:m says it itself")
    prune.add_argument("--calibration", default="wikipedia-sample[0:40]", help="corpus (see evaluate --help)")
    prune.add_argument("--context", type=int, default=512)
    prune.add_argument("--windows", type=int, default=32, help="windows of calibration text, at most")
    prune.add_argument(
        "--sequential", action="store_true", help="calibrate each block on the output of the pruned blocks before it"
    )
    prune.add_argument("--offload", action="store_true", help="hold one block in memory at a time")
    prune.add_argument("--out", type=Path, required=True)
    prune.set_defaults(run=_prune)

    evaluate = commands.add_parser("evaluate", help="perplexity of a model")
    _model(evaluate)
    evaluate.add_argument(
        "--corpus", required=True, help="bundled name, .txt/.jsonl/.parquet file or hub dataset, then perhaps [a:b]"
    )
    evaluate.add_argument("--context", type=int, default=512, help="tokens per window")
    evaluate.add_argument("--windows", type=int, help="at most so many windows; default: all")
    evaluate.add_argument("--reference", help="dense model, to measure the KL divergence to")
    evaluate.add_argument("--offload", action="store_true", help="hold one block in memory at a time")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=_evaluate)

    zero_shot = commands.add_parser("zeroshot", help="accuracy on multiple-choice tasks, through lm-eval")
    _model(zero_shot)
    zero_shot.add_argument(
        "--tasks",
        default="boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa",
        help="names with commas between; default: the seven that papers on pruning report",
    )
    zero_shot.add_argument("--task-path", type=Path, help="folder with task files of one's own, in lm-eval's format")
    zero_shot.add_argument("--limit", type=int, help="at most so many samples of each task")
    zero_shot.add_argument("--batch-size", type=int, default=8)
    zero_shot.set_defaults(run=_zero_shot)

    models = commands.add_parser("models", help="bundled models and corpora")
    actions = models.add_subparsers(required=True, metavar="list | fetch NAME")
    actions.add_parser("list").set_defaults(run=_models_list)
    fetch = actions.add_parser("fetch")
    fetch.add_argument("name")
    fetch.set_defaults(run=_models_fetch)

    check = commands.add_parser("check", help="say whether a source is in the algorithm language, and what it costs")
    check.add_argument(
        "file", type=Path, metavar="FILE", help="a .py file with score, allocate, or both; - reads from stdin"
    )
    check.add_argument(
        "--sparsity", type=float, default=0.6, help="share of the weights that is pruned on the small test layers"
    )
    check.set_defaults(run=_check)

    status = commands.add_parser("status", help="show how far a search is")
    status.add_argument("folder", metavar="RUN", help="name or folder of a run")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_status)

    lineage = commands.add_parser("lineage", help="show a search's candidates, or the reasoning that led to one")
    lineage.add_argument("folder", metavar="RUN", help="name or folder of a run, also of one that is searching")
    lineage.add_argument(
        "--of", metavar="CANDIDATE", help="the chain of claim, evidence and conclusion down to it; best"
    )
    lineage.add_argument("--operator", help="only candidates of this operator, such as crossover")
    lineage.add_argument("--status", help="only candidates of this status, such as invalid")
    lineage.add_argument("--verdict", help="only candidates whose claim was confirmed, refuted or inconclusive")
    lineage.add_argument("--json", action="store_true", help="as JSON")
    lineage.add_argument("--html", type=Path, metavar="FILE", help="write the page that shows the whole graph")
    lineage.set_defaults(run=_lineage)

    show = commands.add_parser("show", help="print an algorithm that a search found, and how to prune with it")
    show.add_argument("folder", metavar="RUN", help="name or folder of a run, also of one that is searching")
    show.add_argument("candidate", metavar="CANDIDATE", nargs="?", default="best", help="its id; default: best")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=_show)

    register = commands.add_parser("register", help="put a search's pruned model into MLflow's model registry")
    register.add_argument("folder", metavar="RUN", help="name or folder of a finished run")
    register.add_argument("--name", default="", help="of the registered model; default: of the target and the sparsity")
    register.set_defaults(run=_register)

    report = commands.add_parser("report", help="show what a search found")
    report.add_argument("folder", metavar="RUN", help="name or folder of a run")
    report.set_defaults(run=_report)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="bundled name, local folder or hub id")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))


def _run_folder(name: str) -> Path:
    """A run by folder, or by name in runs/."""
    from autoprune.models.errors import InputError

    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError(f"no run {name!r}: expected a run's folder, or a name in {Path('runs').resolve()}")


def _latest_run() -> str:
    """The run in `runs` whose journal was written last."""
    from autoprune.models.errors import InputError

    journals = sorted(Path("runs").glob("*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
    if not journals:
        raise InputError(f"no run to resume in {Path('runs').resolve()}: give a CONFIG.yaml, or --resume RUN")
    return str(journals[-1].parent)


def _search(options: argparse.Namespace) -> int:
    from autoprune.models.errors import InputError, Lost
    from autoprune.pipeline.config import load_config
    from autoprune.pipeline.launch import Stopped, run_search
    from autoprune.pipeline.run_folder import begun

    resume = options.resume
    if resume == "auto" and options.config is not None:
        # The same command starts a run and goes on with it, as a job that is tried again needs it.
        config = load_config(options.config, options.set)
        resume = begun(config)
    elif resume and options.config is not None and not Path(resume).exists() and not (Path("runs") / resume).exists():
        config = load_config(options.config, options.set)  # its folder may be gone, and its storage not
        if resume != config.name or not begun(config):
            raise InputError(f"no run {resume!r}: expected a run's folder, or the name of one in {options.config}")
    elif resume:
        if resume == "auto":
            resume = _latest_run()
        # The run may have been moved, or be named from another folder: it is where it was found.
        folder = _run_folder(resume).resolve()
        place = [f"name={folder.name}", f"runs={folder.parent}"]
        config = load_config(options.config or folder / "config.yaml", [*options.set, *place])
    elif options.config is None:
        raise InputError("nothing to search: give a CONFIG.yaml, such as configs/demo.yaml, or --resume RUN")
    else:
        config = load_config(options.config, options.set)

    from autoprune.pipeline.progress import ConsoleProgress

    progress = ConsoleProgress()
    try:
        folder = run_search(config, bool(resume), progress)
    except Lost as error:
        raise Lost(f"{error}; go on with: autoprune search --resume {config.folder}") from error
    except Stopped as stopped:
        progress.say(f"stopped by {stopped}; go on with: autoprune search --resume {config.folder}")
        return 143 if str(stopped) == "SIGTERM" else 130
    _print_report(folder)
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Exit code 1 where something does not fit."""
    from dataclasses import asdict

    import torch

    from autoprune.models.errors import InputError
    from autoprune.pipeline.config import load_config
    from autoprune.pipeline.planning import GIB, machine_gib, plan, plan_lines

    memory = options.gpu_memory
    if memory is not None and memory < 0:
        raise InputError(f"--gpu-memory is {memory:g}: expected 0 or more GiB")
    if memory is None:
        memory = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 0.0
    config = load_config(options.config, options.set)
    found = plan(config, memory, None if memory else machine_gib())
    print(json.dumps(asdict(found), indent=1) if options.json else "\n".join(plan_lines(found, config)))
    return 1 if found.problems else 0


def _compare(options: argparse.Namespace) -> int:
    from autoprune.pipeline.compare import CONFIG_FILE, run_comparison
    from autoprune.pipeline.comparison import load_comparison
    from autoprune.pipeline.launch import Stopped
    from autoprune.pipeline.progress import ConsoleProgress

    config = load_comparison(options.config, options.set)
    progress = ConsoleProgress()
    try:
        folder = run_comparison(config, progress.say)
    except Stopped as stopped:
        progress.say(f"stopped by {stopped}; go on with: autoprune compare {config.folder / CONFIG_FILE}")
        return 143 if str(stopped) == "SIGTERM" else 130
    print((folder / "results.md").read_text(), end="")
    for name in ("results.md", "results.csv"):
        progress.say(f"written: {folder / name}")
    return 0


def _prune(options: argparse.Namespace) -> None:
    from collections import Counter
    from dataclasses import replace

    from autoprune.algorithms.algorithm import Group
    from autoprune.models.errors import InputError
    from autoprune.models.pruning import prune
    from autoprune.pipeline.population import baseline, read_allocation, read_score
    from autoprune.pipeline.progress import ConsoleProgress

    own = options.score.endswith(".py")
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
        print(f"{len(fallbacks)} experts saw too few tokens and were pruned by magnitude: {', '.join(fallbacks[:5])}")
    dead = sum(layer.get("dead_inputs", 0) for layer in sidecar["layers"].values())
    if dead:
        print(
            f"{dead} inputs were zero for every token of the calibration text: their weights were pruned first, or by "
            "column where all scores are equal"
        )
    damped = [name for name, layer in sidecar["layers"].items() if "damping" in layer]
    if damped:
        print(f"{len(damped)} layers needed more damping for their Hessian than usual: {', '.join(damped[:5])}")


def _check(options: argparse.Namespace) -> None:
    from autoprune.algorithms.algorithm import Algorithm
    from autoprune.algorithms.cost import dry_run
    from autoprune.algorithms.language import LanguageError, parse
    from autoprune.algorithms.probe import probe, probe_allocation
    from autoprune.models.errors import InputError
    from autoprune.models.pruning import check_sparsity
    from autoprune.pipeline.population import read_functions

    check_sparsity(options.sparsity)
    functions, said = read_functions(options.file), []
    try:
        if "score" in functions:
            score = functions["score"]
            cost = dry_run(parse(score.text))
            said += [score.text, f"reads: {', '.join(('W', *score.reads))}"]
            work, held = f"{cost.operations:.1f} operations per weight", f"{cost.matrices:.1f} matrices of W's size"
            said.append(f"cost: {work}; {held} at a time")
            for group in ("row", "matrix"):
                said.append(f"masks by {group}: {probe(Algorithm(score.text, group), options.sparsity).mask_hash}")
        if "allocate" in functions:
            allocation = functions["allocate"]
            said += [allocation.text, f"reads: {', '.join((*allocation.reads, 'sparsity'))}"]
            said.append(f"retentions: {probe_allocation(allocation.text)}")
    except LanguageError as error:
        raise InputError(f"{options.file}: {error}") from None
    print("\n".join(said))


def _evaluate(options: argparse.Namespace) -> None:
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
            f"nll {result.nll:.6f} ± {result.standard_error or 0:.4f} nats per token, {result.tokens} tokens in "
            f"{result.windows} windows, {result.dtype}"
        )
        if result.kl is not None:
            error = result.kl_standard_error or 0
            print(
                f"{result.reference}: {result.reference_perplexity:.4f} on the same tokens; KL divergence to it "
                f"{result.kl:.6f} ± {error:.4f} nats per token"
            )


def _zero_shot(options: argparse.Namespace) -> None:
    from autoprune.models.zeroshot import mean, zero_shot
    from autoprune.pipeline.progress import ConsoleProgress

    results = zero_shot(
        options.model, options.tasks.split(","), options.limit, options.batch_size, options.dtype,
        task_path=options.task_path, progress=ConsoleProgress().say,
    )  # fmt: skip
    for result in results:
        print(result)
    print(f"mean of {len(results)}: {mean(results):.4f}")


def _models_list(options: argparse.Namespace) -> None:
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


def _models_fetch(options: argparse.Namespace) -> None:
    from autoprune.models.bundled import fetch

    print(fetch(options.name, check_hashes=True))


def _status(options: argparse.Namespace) -> None:
    import json

    from autoprune.pipeline.status import read_status, status_lines

    facts = read_status(_run_folder(options.folder))
    print(json.dumps(facts, indent=1) if options.json else "\n".join(status_lines(facts)))


def _lineage(options: argparse.Namespace) -> None:
    from rich.console import Console

    from autoprune.models.errors import InputError
    from autoprune.pipeline.asking import (
        OPERATORS,
        VERDICTS,
        chosen,
        facts,
        find,
        reasoning,
        reasoning_lines,
        stored_lineage,
        table,
    )
    from autoprune.pipeline.config import one_of
    from autoprune.pipeline.lineage import STATUSES

    folder = _run_folder(options.folder)
    lineage = stored_lineage(folder)
    filters = options.operator, options.status, options.verdict
    kinds = (OPERATORS, STATUSES, VERDICTS)
    for name, value, known in zip(("operator", "status", "verdict"), filters, kinds, strict=True):
        if value is not None:
            one_of(f"--{name}", value, known)
    if options.html is not None:
        if options.of or options.json or any(filters):
            raise InputError("--html writes the whole graph: leave out the other options")
        from autoprune.pipeline.checkpoint import write_atomic
        from autoprune.pipeline.lineage_page import lineage_html

        write_atomic(options.html, lineage_html(lineage, find(lineage, "best").id, folder.resolve().name).encode())
        print(options.html)
        return
    if options.of is not None:
        if any(filters):
            raise InputError("--of shows one candidate's ancestors: leave out --operator, --status and --verdict")
        candidate = find(lineage, options.of)
        chain = reasoning(lineage, candidate)
        print(json.dumps(chain, indent=1) if options.json else "\n".join(reasoning_lines(lineage, candidate)))
        return
    candidates = chosen(lineage, *filters)
    if options.json:
        print(json.dumps([facts(lineage, candidate) for candidate in candidates], indent=1))
        return
    # Whoever reads it from a pipe wants a line for each candidate.
    Console(highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table(lineage, candidates))


def _show(options: argparse.Namespace) -> None:
    from autoprune.pipeline.asking import find, shown, shown_text, stored_lineage
    from autoprune.pipeline.config import load_config

    folder = _run_folder(options.folder)
    lineage = stored_lineage(folder)
    found = shown(lineage, find(lineage, options.candidate), load_config(folder / "config.yaml"))
    print(json.dumps(found, indent=1) if options.json else shown_text(found), end="\n" if options.json else "")


def _register(options: argparse.Namespace) -> None:
    from autoprune.pipeline.registering import register

    print(register(_run_folder(options.folder), options.name))


def _report(options: argparse.Namespace) -> None:
    _print_report(_run_folder(options.folder))


def _print_report(folder: Path) -> None:
    from rich.console import Console

    from autoprune.pipeline.report import print_report

    print_report(folder, Console())
