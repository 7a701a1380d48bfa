"""A lock that is given in the order in which it was asked for.

The engine steps in a tight loop. With an ordinary lock the loop takes it again at once, and a
thread that wants to change the budget may wait for ever; here it waits for one step, also where
many threads wait to make one. And where that is too long, the step is told to hurry.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["StepGivenUp", "Turns"]


class StepGivenUp(Exception):
    """A step ended without effect, since somebody is in a hurry. Leave the turn, and try again."""


class Turns:
    """Mutual exclusion, first come, first served; not reentrant. Use it as a context manager.

    hurry: called with True when somebody in a hurry begins to wait, and with False when nobody does
           any more; from any thread
    """

    __slots__ = ("_ahead", "_guard", "_hurried", "_taken", "_waiting", "hurry")

    def __init__(self, hurry: Callable[[bool], None]) -> None:
        self.hurry = hurry
        self._guard = threading.Lock()
        self._taken = False
        self._ahead: deque[threading.Lock] = deque()
        self._waiting: deque[threading.Lock] = deque()
        self._hurried: set[threading.Lock] = set()

    @property
    def taken(self) -> bool:
        """Whether somebody has the turn at this moment."""
        return self._taken

    @contextmanager
    def next(self, *, hurry: bool = False) -> Iterator[None]:
        """As the object itself, but ahead of those who are not; whoever has the turn may be told
        to `hurry`."""
        self._enter(self._ahead, hurry=hurry)
        try:
            yield
        finally:
            self._leave()

    def __enter__(self) -> None:
        self._enter(self._waiting)

    def _enter(self, line: deque[threading.Lock], *, hurry: bool = False) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            line.append(mine)
            if hurry:
                self._hurried.add(mine)
                self.hurry(True)
        try:
            mine.acquire()  # until the one before hands over
        except BaseException:  # Ctrl-C while waiting
            with self._guard:
                if mine in line:
                    line.remove(mine)
                    self._arrived(mine)
                    raise
            self._leave()  # the turn had just come
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        with self._guard:
            line = self._ahead or self._waiting
            if line:
                first = line.popleft()
                self._arrived(first)
                first.release()
            else:
                self._taken = False

    def _arrived(self, one: threading.Lock) -> None:
        """It does not wait any more."""
        if one in self._hurried:
            self._hurried.remove(one)
            if not self._hurried:
                self.hurry(False)
