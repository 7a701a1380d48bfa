"""A lock that is given in the order in which it was asked for.

The engine steps in a tight loop. With an ordinary lock the loop takes it again at once, and a
thread that wants to change the budget may wait for ever; here it waits for one step, also where
many threads wait to make one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["Turns"]


class Turns:
    """Mutual exclusion, first come, first served; not reentrant. Use it as a context manager."""

    __slots__ = ("_guard", "_taken", "_waiting")

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    @property
    def taken(self) -> bool:
        """Whether somebody has the turn at this moment."""
        return self._taken

    @contextmanager
    def next(self) -> Iterator[None]:
        """As the object itself, but ahead of all who wait already."""
        self._enter(ahead=True)
        try:
            yield
        finally:
            self._leave()

    def __enter__(self) -> None:
        self._enter(ahead=False)

    def _enter(self, *, ahead: bool) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            if ahead:
                self._waiting.appendleft(mine)
            else:
                self._waiting.append(mine)
        try:
            mine.acquire()  # until the one before hands over
        except BaseException:  # Ctrl-C while waiting
            with self._guard:
                if mine in self._waiting:
                    self._waiting.remove(mine)
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
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
