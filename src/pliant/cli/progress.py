"""A progress bar with the time left, on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Bar", "progress_bar"]


class Bar(Protocol):
    """Told how far the work is."""

    def __call__(self, what: str, done: float | None) -> None:
        """`what` is being done; `done` is the part of it from 0 to 1, None: not known."""
        ...


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Bar]:
    """A bar for each thing that is done, one after the other.

    Where standard error is no terminal each thing is named once, in a line of its own.
    """
    if quiet:
        yield lambda what, done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {}
        current = ""

        def update(what: str, done: float | None) -> None:
            nonlocal current
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=None)
            if current not in ("", what):
                progress.update(tasks[current], total=1.0, completed=1.0)
            current = what
            if done is not None:
                progress.update(tasks[what], total=1.0, completed=min(max(done, 0.0), 1.0))

        yield update
        if current:
            progress.update(tasks[current], total=1.0, completed=1.0)


class _Lines:
    """A line when something begins, and one each 30 seconds while it goes on."""

    def __init__(self) -> None:
        self._what = ""
        self._begin = self._next = 0.0

    def __call__(self, what: str, done: float | None) -> None:
        from pliant.cli.common import say

        now = time.monotonic()
        if what != self._what:
            say(f"{what} ...")
            self._what, self._begin, self._next = what, now, now + 30
        elif now >= self._next and done:
            left = (now - self._begin) * (1 - done) / done
            say(f"{what}: {100 * done:.0f} %, {left:.0f} s left")
            self._next = now + 30
