"""Progress bars: the library reports `(stage, done, total)`, people see a bar with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, int, int | None], None]


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Yield the callback; bars go to standard error, one line per stage where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _one_line_per_stage(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, total=total)
            display.update(tasks[stage], completed=done, total=total)

        yield report


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner for a step that cannot say how far it is; silent where standard error is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as display:
        display.add_task(what, total=None)
        yield


def _one_line_per_stage(console: Console) -> Report:
    seen: set[str] = set()

    def report(stage: str, done: int, total: int | None) -> None:
        if stage not in seen:
            seen.add(stage)
            console.print(
                f"{stage} …" if total is None else f"{stage} … ({total} steps)", highlight=False, markup=False
            )

    return report
