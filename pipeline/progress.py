"""What a person sees while a search runs: lines, and a bar on a terminal."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ConsoleProgress:
    """Lines with the time of day on stderr; where stderr is a terminal, a bar for what is being counted."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] ", escape(text), sep="", soft_wrap=True)

    def step(self, what: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(what, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total)
        if done >= total:
            self._bar.stop()
            self._bar = None
