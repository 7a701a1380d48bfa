"""A line of those who wait for room, first come, first served."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["PATIENCE", "Line"]

PATIENCE = 5.0
"""Seconds that somebody waits for room while nothing moves."""

_LOOK = 0.02  # seconds between two looks where nobody says that there may be room


class Line:
    """Only the first in it may take what there is, so a large wish is not passed by small ones.

    progress: counts whatever will make room at last; who waits looks whether it still rises
    """

    __slots__ = ("_moved", "_places", "progress", "watchers")

    def __init__(self) -> None:
        self.progress = 0
        self.watchers: list[Callable[[], None]] = []
        """Called by `wake`, in its thread."""
        self._places: deque[object] = deque()
        self._moved = threading.Condition()

    def __len__(self) -> int:
        return len(self._places)

    def wait(self, take: Callable[[], bool], cancelled: Callable[[], bool]) -> bool:
        """Until `take` succeeds, which is True, or `cancelled` says so, which is False.

        TimeoutError if nothing moves for PATIENCE seconds: what is waited for may belong to the
        thread that waits.
        """
        place = object()
        self._places.append(place)
        seen, since = self.progress, time.monotonic()
        try:
            while not cancelled():
                if self._places[0] is place and take():
                    return True
                with self._moved:
                    self._moved.wait(_LOOK)
                if self.progress != seen:
                    seen, since = self.progress, time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    raise TimeoutError
            return False
        finally:
            self._places.remove(place)
            self.wake()

    def wake(self) -> None:
        """There may be room."""
        with self._moved:
            self._moved.notify_all()
        for watcher in list(self.watchers):
            watcher()
