"""What a person sees while a step runs: one bar a step, with time left; or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shortstack.progress import Display, OnProgress, Quiet

if TYPE_CHECKING:
    from rich.console import Console


class Terminal:
    """A Display with rich bars on standard error, so that standard output can be piped."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[OnProgress]:
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=None)

            def show(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            yield show
            # Whatever the step reported last, it has ended well.
            total = bars.tasks[0].total or 1
            bars.update(task, completed=total, total=total)

    def note(self, text: str) -> None:
        self.console.print(f"  [dim]{text}", highlight=False)


def display(quiet: bool) -> Display:
    if quiet:
        return Quiet()
    from rich.console import Console

    return Terminal(Console(stderr=True))
