"""Between pages in memory and on disk: idle sessions and answers in files without names, beginnings
in a folder, if there is one, and how fast that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pliant.engine.kinds import ParkReport
from pliant.engine.page_folder import PageFolder
from pliant.engine.parked_page import Page
from pliant.engine.parking import Parked
from pliant.engine.rates import Rates
from pliant.engine.seam import Executor

__all__ = ["Park"]


class Park:
    """Takes pages of an executor to disk and back. Everything is called with the turn taken.

    folder: where beginnings are kept; None: they are not
    rates:  how fast pages are read and prompts computed
    """

    def __init__(
        self,
        executor: Executor,
        folder: PageFolder | None = None,
        rates: Rates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.rates = rates or Rates()
        self.kept = self.lost = 0
        """Pages that were given up: those that are in the folder, and the others."""
        self._executor = executor
        self._tokens = executor.kv_page_tokens
        self._stored = executor.kv_stored_bytes
        self._clock = clock
        self._until = float("inf")

    @contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """For so long pages are written that are given up; later ones are lost."""
        self._until = self._clock() + seconds
        try:
            yield
        finally:
            self._until = float("inf")

    def report(self) -> ParkReport:
        """What was done so far."""
        folder, rates = self.folder, self.rates
        return ParkReport(
            folder=None if folder is None else str(folder.path),
            limit=0 if folder is None else folder.limit,
            bytes=0 if folder is None else folder.bytes,
            kept=self.kept,
            lost=self.lost,
            broken=0 if folder is None else folder.broken,
            read=rates.reads,
            computed=rates.computes,
            bytes_per_second=rates.read.value,
            tokens_per_second=rates.prefill.value,
        )

    # --- sessions and answers

    def store(self, sequence: int, length: int) -> Parked:
        """Write the pages of a sequence of so many tokens. OSError; EngineError without a place."""

        def pages() -> Iterator[tuple[int, int, Page]]:
            left = length
            for number in self._executor.pages(sequence):
                yield min(left, self._tokens), *self._take(number)
                left -= self._tokens

        return Parked(pages(), self._stored)

    def restore(self, sequence: int, parked: Parked, length: int, level: int) -> None:
        """Append pages to a sequence until it has `length` tokens; where the level has fallen since
        they were written, no more of them is read. OSError, PackError."""
        for number in range(len(self._executor.pages(sequence)), -(-length // self._tokens)):
            begin = self._clock()
            page = parked.page(number)
            tokens = min(page.tokens, length - number * self._tokens)
            rungs = min(page.rungs, level)
            data = page.read(rungs)
            self._executor.put_page(sequence, tokens, data, rungs)
            self.rates.read.add(len(data), self._clock() - begin)

    # --- beginnings

    def keep(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Write pages that are about to be given up, and their keys: the last is used next."""
        used = time.time_ns()
        for number, (key, page) in enumerate(reversed(pages)):
            kept = False
            if self.folder is not None and self._clock() < self._until:
                rungs, data = self._take(page)
                kept = self.folder.write(key, rungs, data, used - 1000 * number)
            self.kept += kept
            self.lost += not kept

    def fetch(self, sequence: int, keys: Sequence[bytes], level: int, until: float) -> int:
        """Append the pages `keys` to a sequence that ends with a full one, as far as they are in
        the folder and reading is faster; ends at `until`. Returns how many."""
        folder, count, size = self.folder, 0, self._stored[level]
        if folder is None:
            return 0
        while count < len(keys) and self._clock() < until:
            if not folder.has(keys[count]) or not self.rates.choose(size, self._tokens):
                break
            begin = self._clock()
            data = folder.read(keys[count], level)
            if data is None:
                break
            self._executor.put_page(sequence, self._tokens, data, level)
            self.rates.read.add(size, self._clock() - begin)
            count += 1
        return count

    def used(self, keys: Sequence[bytes]) -> None:
        """Pages that a sequence begins with were used; those that are parked stay for longer."""
        if self.folder is not None:
            self.folder.touch(keys)

    def _take(self, page: int) -> tuple[int, Page]:
        """The rungs of a page, and its bytes as they are stored."""
        rungs = self._executor.page_rungs([page])[0]
        data = np.empty(self._stored[rungs], np.uint8)
        self._executor.take_page(page, data)
        return rungs, data
