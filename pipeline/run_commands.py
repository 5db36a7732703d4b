"""Commands of searches and comparisons: from `search` to `report`. Nothing heavy is imported before one is run."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path


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


def search(options: argparse.Namespace) -> int:
    from autoprune.models.errors import InputError, Lost, TakenOver
    from autoprune.pipeline.config import load_config
    from autoprune.pipeline.config_reading import setting
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
        place = [setting("name", folder.name), setting("runs", str(folder.parent))]
        config = load_config(options.config or folder / "config.yaml", [*options.set, *place])
    elif options.config is None:
        raise InputError("nothing to search: give a CONFIG.yaml, such as configs/demo.yaml, or --resume RUN")
    else:
        config = load_config(options.config, options.set)

    from autoprune.pipeline.progress import ConsoleProgress

    progress = ConsoleProgress()
    again = shlex.join(["autoprune", "search", "--resume", str(config.folder)])
    try:
        try:
            folder = run_search(config, bool(resume), progress)
        finally:
            progress.end()
    except Lost as error:
        if isinstance(error, TakenOver) or not (config.folder / "config.yaml").exists():  # it had not begun
            raise
        raise Lost(f"{error}; go on with: {again}") from error
    except Stopped as stopped:
        progress.say(f"stopped by {stopped}; go on with: {again}")
        return 143 if str(stopped) == "SIGTERM" else 130
    _print_report(folder)
    return 0


def plan(options: argparse.Namespace) -> int:
    """Exit code 1 where something does not fit."""
    from dataclasses import asdict

    import torch

    from autoprune.models.errors import InputError
    from autoprune.pipeline.config import load_config
    from autoprune.pipeline.launch import for_cpus
    from autoprune.pipeline.planning import GIB, machine_gib, plan, plan_lines

    memory, gpus = options.gpu_memory, None
    if memory is not None and not 0 <= memory < math.inf:
        raise InputError(f"--gpu-memory is {memory:g}: expected 0 or more GiB")
    if memory is None:
        gpus = 0 if for_cpus() or not torch.cuda.is_available() else torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory / GIB if gpus else 0.0
    config = load_config(options.config, options.set)
    here = not memory or gpus is not None  # that is, all actors on this machine
    found = plan(config, memory, machine_gib() if here else None, gpus)
    print(json.dumps(asdict(found), indent=1) if options.json else "\n".join(plan_lines(found, config)))
    return 1 if found.problems else 0


def compare(options: argparse.Namespace) -> int:
    """Exit code 1 where a cell failed."""
    from autoprune.pipeline.compare import CONFIG_FILE, run_comparison
    from autoprune.pipeline.comparison import load_comparison
    from autoprune.pipeline.launch import Stopped
    from autoprune.pipeline.progress import ConsoleProgress

    config = load_comparison(options.config, options.set)
    progress = ConsoleProgress()
    try:
        run = run_comparison(config, progress.say)
    except Stopped as stopped:
        again = shlex.join(["autoprune", "compare", str(config.folder / CONFIG_FILE)])
        progress.say(f"stopped by {stopped}; go on with: {again}")
        return 143 if str(stopped) == "SIGTERM" else 130
    folder = run.config.folder
    print((folder / "results.md").read_text(), end="")
    for name in ("results.md", "results.csv"):
        progress.say(f"written: {folder / name}")
    if run.failed:
        progress.say(f"{run.failed} of {len(run.results)} cells failed")
    return 1 if run.failed else 0


def status(options: argparse.Namespace) -> None:
    import json

    from autoprune.pipeline.status import read_status, status_lines

    facts = read_status(_run_folder(options.folder))
    print(json.dumps(facts, indent=1) if options.json else "\n".join(status_lines(facts)))


def lineage(options: argparse.Namespace) -> None:
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
    from autoprune.pipeline.config import load_config
    from autoprune.pipeline.config_reading import one_of
    from autoprune.pipeline.lineage import STATUSES

    folder = _run_folder(options.folder)
    lineage, combined = stored_lineage(folder), load_config(folder / "config.yaml").target.combined
    filters = options.operator, options.status, options.verdict
    kinds = (OPERATORS, STATUSES, VERDICTS)
    for name, value, known in zip(("operator", "status", "verdict"), filters, kinds, strict=True):
        if value is not None:
            one_of(f"--{name}", value, known)
    if options.html is not None:
        if options.of or options.json or any(filters):
            raise InputError("--html writes the whole graph: leave out the other options")
        if not options.html.parent.is_dir():
            raise InputError(f"there is no folder {options.html.parent}: make it, or choose another --html")
        from autoprune.pipeline.checkpoint import write_atomic
        from autoprune.pipeline.lineage_page import lineage_html

        dense = 0.0 if combined else None  # fitness of several cases is above the dense models
        page = lineage_html(lineage, find(lineage, "best").id, folder.resolve().name, dense)
        write_atomic(options.html, page.encode())
        print(options.html)
        return
    if options.of is not None:
        if any(filters):
            raise InputError("--of shows one candidate's ancestors: leave out --operator, --status and --verdict")
        candidate = find(lineage, options.of)
        chain = reasoning(lineage, candidate)
        print(json.dumps(chain, indent=1) if options.json else "\n".join(reasoning_lines(lineage, candidate, combined)))
        return
    candidates = chosen(lineage, *filters)
    if options.json:
        print(json.dumps([facts(lineage, candidate) for candidate in candidates], indent=1))
        return
    if not candidates:
        print("no candidate")
        return
    # Whoever reads it from a pipe wants a line for each candidate.
    Console(highlight=False, width=None if sys.stdout.isatty() else 10_000).print(table(lineage, candidates, combined))


def show(options: argparse.Namespace) -> None:
    from autoprune.pipeline.asking import find, shown, shown_text, stored_lineage
    from autoprune.pipeline.config import load_config

    folder = _run_folder(options.folder)
    lineage = stored_lineage(folder)
    found = shown(lineage, find(lineage, options.candidate), load_config(folder / "config.yaml"))
    print(json.dumps(found, indent=1) if options.json else shown_text(found), end="\n" if options.json else "")


def register(options: argparse.Namespace) -> None:
    from autoprune.pipeline.registering import register

    print(register(_run_folder(options.folder), options.name))


def report(options: argparse.Namespace) -> None:
    folder = _run_folder(options.folder)
    if options.json:
        from autoprune.pipeline.report import read_report

        print(json.dumps(read_report(folder), indent=1))
    else:
        _print_report(folder)


def _print_report(folder: Path) -> None:
    from rich.console import Console

    from autoprune.pipeline.report import print_report

    print_report(folder, Console())
