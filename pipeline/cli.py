"""The `autoprune` command. Nothing heavy is imported before a command is known, so that help is instant.

Exit codes: 0 done; 1 something failed; 2 what was given cannot be used; 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from autoprune import __version__
from autoprune.pipeline import model_commands, run_commands


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
    search.set_defaults(run=run_commands.search)

    plan = commands.add_parser("plan", help="say what a search would need, before anything starts")
    plan.add_argument("config", type=Path, metavar="CONFIG.yaml")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as evaluators.shards=4")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of each GPU; 0: on CPUs; default: this machine's"
    )
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(run=run_commands.plan)

    compare = commands.add_parser("compare", help="measure known methods side by side, on models and at sparsities")
    compare.add_argument("config", type=Path, metavar="CONFIG.yaml")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sparsities=[0.5,0.6]")
    compare.set_defaults(run=run_commands.compare)

    prune = commands.add_parser("prune", help="prune a model with a known algorithm")
    _model(prune)
    prune.add_argument(
        "--score",
        default="wanda",
        help="magnitude, wanda, ria, pruner-zero, obs-diag, taylor, sparsegpt, or a .py file with a score function, "
        "such as those in algorithms/found; with "
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
    prune.add_argument(
        "--windows", type=int, default=32, help="windows of calibration text, at most, evenly spaced over it"
    )
    prune.add_argument(
        "--sequential", action="store_true", help="calibrate each block on the output of the pruned blocks before it"
    )
    prune.add_argument("--offload", action="store_true", help="hold one block in memory at a time")
    prune.add_argument("--out", type=Path, required=True)
    prune.set_defaults(run=model_commands.prune)

    evaluate = commands.add_parser("evaluate", help="perplexity of a model")
    _model(evaluate)
    evaluate.add_argument(
        "--corpus", required=True, help="bundled name, .txt/.jsonl/.parquet file or hub dataset, then perhaps [a:b]"
    )
    evaluate.add_argument("--context", type=int, default=512, help="tokens per window")
    evaluate.add_argument("--windows", type=int, help="so many, evenly spaced over the text; default: all")
    evaluate.add_argument("--reference", help="dense model, to measure the KL divergence to")
    evaluate.add_argument("--offload", action="store_true", help="hold one block in memory at a time")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=model_commands.evaluate)

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
    zero_shot.set_defaults(run=model_commands.zero_shot)

    models = commands.add_parser("models", help="bundled models and corpora")
    actions = models.add_subparsers(required=True, metavar="list | fetch NAME")
    actions.add_parser("list").set_defaults(run=model_commands.models_list)
    fetch = actions.add_parser("fetch")
    fetch.add_argument("name")
    fetch.set_defaults(run=model_commands.models_fetch)

    check = commands.add_parser("check", help="say whether a source is in the algorithm language, and what it costs")
    check.add_argument(
        "file", type=Path, metavar="FILE", help="a .py file with score, allocate, or both; - reads from stdin"
    )
    check.add_argument(
        "--sparsity", type=float, default=0.6, help="share of the weights that is pruned on the small test layers"
    )
    check.set_defaults(run=model_commands.check)

    status = commands.add_parser("status", help="show how far a search is")
    status.add_argument("folder", metavar="RUN", help="name or folder of a run")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=run_commands.status)

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
    lineage.set_defaults(run=run_commands.lineage)

    show = commands.add_parser("show", help="print an algorithm that a search found, and how to prune with it")
    show.add_argument("folder", metavar="RUN", help="name or folder of a run, also of one that is searching")
    show.add_argument("candidate", metavar="CANDIDATE", nargs="?", default="best", help="its id; default: best")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=run_commands.show)

    register = commands.add_parser("register", help="put a search's pruned model into MLflow's model registry")
    register.add_argument("folder", metavar="RUN", help="name or folder of a finished run")
    register.add_argument("--name", default="", help="of the registered model; default: of the target and the sparsity")
    register.set_defaults(run=run_commands.register)

    report = commands.add_parser("report", help="show what a search found")
    report.add_argument("folder", metavar="RUN", help="name or folder of a run")
    report.add_argument("--json", action="store_true", help="as JSON, what report.json in its folder holds")
    report.set_defaults(run=run_commands.report)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="bundled name, local folder or hub id, perhaps with @revision")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
