"""Between pages in memory and on disk: idle sessions and answers in files without names, beginnings
in a folder, if there is one, and how fast that is."""

from __future__ import annotations

import math
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
from pliant.memory.kv_ages import Form

__all__ = ["DEEPEN", "FETCH", "Park"]


FETCH = 0.02
"""Seconds of a turn in which pages of beginnings are read."""

DEEPEN = 0.01
"""Seconds of a step in which more of such a session is read; a page is in any case."""


Forms = Callable[[int], Form]
"""What of a page, by its number in the sequence."""


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

    def store(self, sequence: int, length: int, rest: Parked | None = None) -> Parked:
        """Write the pages of a sequence of so many tokens. OSError; EngineError without a place.

        `rest`: what its first pages came from and was not given up. They are there already, and
        what could not be read of them yet is kept.
        """
        parked = Parked(self._stored) if rest is None else rest
        there = len(parked)
        try:
            pages = self._executor.pages(sequence)[there:]
            for page in pages:
                tokens = min(length - len(parked) * self._tokens, self._tokens)
                parked.append(tokens, *self._take(page))
        except BaseException:
            parked.cut(there)
            if rest is None:
                parked.close()
            raise
        return parked

    def restore(
        self,
        sequence: int,
        parked: Parked,
        length: int,
        now: Forms,
        ever: Forms,
        seconds: float = math.inf,
    ) -> bool:
        """Append pages to a sequence until it has `length` tokens, each with what is of use `now`.
        OSError, PackError.

        Returns whether nothing is left to read that is `ever` of use. Pages that are coded come
        with fewer rungs if reading all of these takes longer than `seconds`.
        """
        start = self._clock()
        first, count = len(self._executor.pages(sequence)), -(-length // self._tokens)
        top = max((now(number).rungs for number in range(first, count)), default=0)
        most = self._affordable(parked, range(first, count), now, top, seconds)
        complete = True
        for number in range(first, count):
            begin = self._clock()
            page, due = parked.page(number), now(number)
            tokens = min(page.tokens, length - number * self._tokens)
            rungs = min(page.form.rungs, due.rungs, most)
            data = page.read(rungs)
            self._executor.put_page(sequence, tokens, data, rungs, page.form.whole)
            if page.form.whole and not due.whole:
                self._executor.shallow(self._executor.pages(sequence)[-1], rungs, whole=False)
            self.rates.read.add(len(data), self._clock() - begin)
            complete = complete and rungs >= min(page.form.rungs, ever(number).rungs)
        left = start + seconds - self._clock()
        if most < top and left > 0:  # it was faster than expected
            return self.deepen(sequence, parked, first, now, ever, left)
        return complete

    def _affordable(
        self, parked: Parked, pages: range, now: Forms, top: int, seconds: float
    ) -> int:
        """How many of up to `top` rungs of pages can be read in so many seconds; at least one, if
        they are coded."""
        rate = self.rates.read.value
        if rate is None:
            return top
        wanted = [(parked.form(number), now(number).rungs) for number in pages]
        for most in range(top, 1, -1):
            sizes = (self._stored[form.whole][min(form.rungs, r, most)] for form, r in wanted)
            if sum(sizes) <= rate * seconds:
                return most
        return min(top, 1)

    def deepen(
        self,
        sequence: int,
        rest: Parked,
        first: int,
        now: Forms,
        ever: Forms,
        seconds: float = DEEPEN,
    ) -> bool:
        """For so long, and one page in any case, read on in pages that came with fewer rungs, from
        page `first` of the sequence on. Returns as `restore`. OSError, PackError."""
        pages = self._executor.pages(sequence)[: len(rest)]
        have, until = self._executor.page_rungs(pages), self._clock() + seconds
        numbers, forms = range(first, len(pages)), [rest.form(n) for n in range(len(pages))]
        due = {number: min(forms[number].rungs, now(number).rungs) for number in numbers}
        wanted = [
            (rung, number)
            for rung in range(2, max(due.values(), default=0) + 1)
            for number in due
            if have[number] < rung <= due[number]
        ]
        for rung, number in wanted:
            begin = self._clock()
            data = rest.page(number).read(rung, above=rung - 1)
            self._executor.deepen_page(pages[number], data, rung, forms[number].whole)
            have[number] = rung
            end = self._clock()
            self.rates.read.add(len(data), end - begin)
            if end >= until:
                break
        return all(have[n] >= min(forms[n].rungs, ever(n).rungs) for n in numbers)

    # --- beginnings

    def keep(self, pages: Sequence[tuple[bytes, int]]) -> None:
        """Write pages that are about to be given up, and their keys: the last is used next."""
        used = time.time_ns()
        for number, (key, page) in enumerate(reversed(pages)):
            kept = False
            if self.folder is not None and self._clock() < self._until:
                when = used - 1000 * number
                kept = self.folder.touch(key, when, self._form(page))
                if not kept:
                    kept = self.folder.write(key, *self._take(page), when)
            self.kept += kept
            self.lost += not kept

    def fetch(
        self, sequence: int, keys: Sequence[bytes], most: int, until: float, limit: int
    ) -> int:
        """Append the pages `keys` to a sequence that ends with a full one, as far as they are in
        the folder and reading is faster, with at most so many rungs. After a page in any case it
        ends at `until`, or when all in memory take more than `limit` bytes, where the sequence
        could go on. Returns how many."""
        folder, count, size = self.folder, 0, self._stored[True][most]
        if folder is None:
            return 0
        executor = self._executor

        def enough() -> bool:
            if self._clock() < until and executor.kv_used_bytes <= limit:
                return False
            pages = executor.pages(sequence)  # those that gave something up need others behind them
            return executor.kv_usable(pages) == len(pages)

        while count < len(keys) and not (count and enough()):
            if not folder.has(keys[count]) or not self.rates.choose(size, self._tokens):
                break
            begin = self._clock()
            found = folder.read(keys[count], most)
            if found is None:
                break
            form, data = found
            executor.put_page(sequence, self._tokens, data, form.rungs, form.whole)
            self.rates.read.add(len(data), self._clock() - begin)
            count += 1
        return count

    def used(self, keys: Sequence[bytes]) -> None:
        """Pages that a sequence begins with were used. They stay for longer, where they are parked,
        and those behind others go before them."""
        now = time.time_ns()
        for number, key in enumerate(keys):
            if self.folder is not None:
                self.folder.touch(key, now - 1000 * number)

    def _form(self, page: int) -> Form:
        """What a page has."""
        return Form(self._executor.page_rungs([page])[0], self._executor.page_whole([page])[0])

    def _take(self, page: int) -> tuple[Form, Page]:
        """What a page has, and its bytes as they are stored."""
        form = self._form(page)
        data = np.empty(self._stored[form.whole][form.rungs], np.uint8)
        self._executor.take_page(page, data)
        return form, data
