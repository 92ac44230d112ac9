"""The progress bar of long work: rate and remaining time, quiet where nobody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(
    title: str, total: float | None, unit: str, *, hourly: bool = False, show: bool = True
) -> Iterator[Callable[[float], None]]:
    """Show progress on the error stream while the block runs, when that is a terminal.

    Args:
        title: What is being done.
        total: All the work, in ``unit``; None when unknown.
        unit: Such as ``bases`` or ``records``.
        hourly: Whether the rate is said an hour, not a second.
        show: False for no bar at all.

    Yields:
        A function that takes the work done since its last call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate = si(task.speed * (3600 if hourly else 1)) if task.speed else "-"
            return Text(f"{rate} {unit}/{'h' if hourly else 's'}", style="progress.data.speed")

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda amount: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if total else "{task.completed:,.0f}"),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, total=progress.tasks[0].completed)  # totals are estimates


def si(value: float) -> str:
    """Write a number with three digits and k, M or G."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"
