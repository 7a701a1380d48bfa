"""What the benchmarks of a moving budget share: load, answers without end, and statistics."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import pliant
from pliant.sizes import MIB

__all__ = ["TOLERANCE", "Answers", "Others", "summary"]

TOLERANCE = 8 * MIB


class Others:
    """The part of all processors that other programs use, from here on."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
        return (
            (sum(fields) - fields[3] - fields[4]) / ticks,
            time.process_time(),
            sum(fields) / ticks,
        )

    def part(self) -> float:
        """From 0 to 1."""
        busy, mine, total = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        return max(busy - mine, 0) / max(total, 1e-9)


class Answers:
    """Sequences that are continued in common steps, each with the likeliest token, without end."""

    def __init__(self, model: pliant.Model, count: int, length: int) -> None:
        self.model = model
        self.length = length
        self.steps: list[tuple[float, float]] = []
        self.finished: list[int] = []
        self.error: BaseException | None = None
        self._count = count
        self._stop = threading.Event()
        self._go_on = threading.Event()
        self._go_on.set()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Answers:
        self._thread.start()
        while len(self.steps) < 20 and self.error is None:
            time.sleep(0.01)
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._go_on.set()
        self._thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No steps meanwhile, but for one that has begun."""
        self._go_on.clear()
        try:
            time.sleep(0.5)
            yield
        finally:
            self._go_on.set()

    def _run(self) -> None:
        try:
            sessions = [self.model.session() for _ in range(self._count)]
            tokens = []
            for number, session in enumerate(sessions):
                assert session.reserve(self.length)
                # Different lengths, so that they do not all end at once.
                prompt = [number + 3] * (1 + number * self.length // self._count // 2)
                tokens.append(int(session.feed(prompt).argmax()))
            while not self._stop.is_set():
                self._go_on.wait()
                begin = time.monotonic()
                rows = self.model.step_all(sessions, tokens)
                self.steps.append((begin, time.monotonic()))
                tokens = rows.argmax(-1).tolist()
                for session in sessions:
                    if len(session) >= self.length:
                        self.finished.append(len(session))
                        session.rewind([*session.tokens[:2], 0])
            for session in sessions:
                session.close()
        except BaseException as error:  # noqa: BLE001 - told by whoever waits
            self.error = error

    def speed(self, begin: float, end: float) -> float:
        """Steps a second between two moments, counted by their parts inside."""
        part = sum(
            (min(b, end) - max(a, begin)) / (b - a) for a, b in self.steps if b > begin and a < end
        )
        return part / (end - begin)

    def seconds(self, begin: float, end: float) -> float:
        """The median time of a step."""
        return statistics.median([b - a for a, b in self.steps if b >= begin and a <= end] or [0])


def summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    each = np.array(times or [0.0]) * 1e3
    values = (np.median(each), np.quantile(each, 0.99), each.max())
    return dict(zip(("median", "p99", "most"), map(float, values), strict=True))
