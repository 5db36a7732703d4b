"""What a person sees while a search runs: lines, and on a terminal a bar below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autoprune.models.perplexity import perplexity


def rates(spent: Mapping[str, float]) -> dict[str, float]:
    """Tokens written per second of generating, and evaluations of any fidelity per hour of evaluating, of what was
    spent (see `ledger.Spent`)."""
    return {
        "tokens_per_second": spent["completion_tokens"] / max(spent["generating"], 1e-9),
        "evaluations_per_hour": 3600 * (spent["evaluations"] + spent["cheap"]) / max(spent["evaluating"], 1e-9),
    }


class ConsoleProgress:
    """Lines with the time of day on stderr; where stderr is a terminal, a bar for what is being counted."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._summary = self._flights = ""

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] ", escape(text), sep="", soft_wrap=True)

    def state(self, facts: Mapping) -> None:
        """What stands beside the bar: the best so far, how fast it goes, and what is left."""
        if not facts["best"]:
            return
        left = [f"{amount:,.0f} {name}" for name, amount in facts["left"].items() if amount is not None]
        found = rates(facts["spent"])
        self._summary = " · ".join(
            [
                f"generation {facts['generation']}/{facts['generations']}",
                f"best {perplexity(facts['best']['nll']):.2f}",
                f"{found['tokens_per_second']:.0f} tok/s",
                f"{found['evaluations_per_hour']:.0f} evaluations/h",
                *([f"left {', '.join(left)}"] if left else []),
            ]
        )

    def flights(self, counts: Sequence[int]) -> None:
        """What stands beside the bar, too: candidates at each shard."""
        self._flights = f"in flight {'+'.join(map(str, counts))} · " if any(counts) else ""

    def step(self, what: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[summary]}[/dim]"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(what, total=total, summary="")
            self._bar.start()
        summary = self._flights + self._summary
        self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total, summary=summary)
        if done >= total:
            self.end()

    def end(self) -> None:
        """Leave the terminal as it was: while a bar is shown its cursor is hidden."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
