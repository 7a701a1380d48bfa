"""What pages of the KV cache have at each age, and what that takes. docs/kv.md.

The *age* of a page is how many pages later the token is that sees it; the first page of a sequence
has the age 0, whatever comes. A *level* is the bits of a value in a page of the age 1, in eighths.
Each time the age doubles a page loses SLOPE bits: it adds less to the error of an answer then, so
it may be coarser. Local layers, those with a window, see only pages up to some age: older ones need
not be *whole*. Pure functions of numbers; sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "LEVELS_PER_BIT",
    "SLOPE",
    "Ages",
    "Form",
    "PageBytes",
    "Schedule",
    "age_of",
    "fresh",
    "least_rungs",
    "make_schedule",
]

LEVELS_PER_BIT = 8

SLOPE = 0.375
"""Bits that a value loses each time its age doubles."""

SLACK = 4
"""Pages are kept as if they were so many pages younger: a conversation may go back a little."""

_LEAST_BITS = 2.25
"""No page has fewer, where rungs are so fine: two plies alone are far worse."""

_SHARE = -1.5
"""Exponent of the age in what an error of a page adds to that of an answer, for expectations."""


class Form(NamedTuple):
    """What a page has: rungs (0: it is exact), and whether that is of all layers, or of those
    without a window alone."""

    rungs: int
    whole: bool


@dataclass(frozen=True, slots=True)
class PageBytes:
    """Bytes of a page: exact, and with 1, 2, ... rungs if pages are coded. `global_only`: the same
    without local layers; empty if layers are all of one kind. `local_age`: the largest age at which
    local layers see a page."""

    whole: tuple[int, ...]
    global_only: tuple[int, ...] = ()
    local_age: int = 0

    @property
    def bits(self) -> list[float]:
        """Of a value, scales included: 16 in an exact page, and with 1, 2, ... rungs."""
        return [16 * size / self.whole[0] for size in self.whole]


@dataclass(frozen=True, slots=True)
class Ages:
    """Some sequences: how many full pages of each age they have, those that they share once, how
    many pages are partly filled, and how many sequences there are."""

    full: tuple[int, ...] = ()
    partial: int = 0
    sequences: int = 0

    def __add__(self, other: Ages) -> Ages:
        """Both, sharing nothing."""
        long, short = sorted((self.full, other.full), key=len, reverse=True)
        full = tuple(a + b for a, b in zip(long, short, strict=False)) + long[len(short) :]
        return Ages(full, self.partial + other.partial, self.sequences + other.sequences)


def fresh(tokens: int, page_tokens: int) -> Ages:
    """One sequence that shares nothing."""
    full = tokens // page_tokens
    return Ages((1,) * full, int(tokens % page_tokens > 0), int(tokens > 0))


def age_of(number: int, newest: int) -> int:
    """The age of page `number` of a sequence for the tokens of page `newest`."""
    return newest - number if number else 0


def least_rungs(bits: Sequence[float]) -> int:
    """The fewest rungs that a coded page may have; `bits` as in `PageBytes`."""
    return next((r for r, one in enumerate(bits) if r and one >= _LEAST_BITS), 1)


class Schedule:
    """The pages of one level.

    seen, kept: uint8 [ages]: rungs that are used, and that are in memory; 0: exact
    whole_age:  up to which pages in memory are whole; None: at any
    """

    __slots__ = ("_bits", "_bytes", "_session", "_total", "kept", "seen", "whole_age")

    def __init__(self, seen: npt.NDArray[np.uint8], page: PageBytes) -> None:
        self.seen = seen
        ages = np.arange(len(seen))
        self.kept = seen[np.where(ages > 0, np.maximum(ages - SLACK, 1), 0)]
        self.whole_age = page.local_age + SLACK if page.global_only else None
        self._bytes = np.array(page.whole, np.int64)[self.kept]
        self._bits = np.cumsum(16 * self._bytes / page.whole[0])
        if self.whole_age is not None:
            old = ages > self.whole_age
            self._bytes[old] = np.array(page.global_only, np.int64)[self.kept[old]]
        self._total = np.concatenate(([0], np.cumsum(self._bytes)))
        varies = (self.kept > 0) | (self._bytes != page.whole[0])
        self._session = self._total + page.whole[0] * np.append(False, varies)

    def form(self, age: int) -> Form:
        """What a page of an age has in memory."""
        whole = self.whole_age is None or age <= self.whole_age
        return Form(int(self.kept[min(age, len(self.kept) - 1)]), whole)

    def varies(self, full: int) -> bool:
        """Whether the oldest of so many full pages has another form than when it was written."""
        full = min(full, len(self._bytes))
        return bool(self._session[full] > self._total[full])

    def total(self, full: int) -> int:
        """Bytes of `full` full pages of a sequence."""
        return int(self._total[full])

    def bits(self, full: int) -> float:
        """Mean bits of a value, scales included, over so many pages; each counts the same, whole or
        not, so a number says as much of the depth with windows as without."""
        return float(self._bits[full - 1]) / full

    def pages_within(self, size: int) -> int:
        """Full pages of a sequence that fit into `size` bytes, with one as it is written where they
        vary."""
        return int(np.searchsorted(self._session, size, "right")) - 1 if size >= 0 else -1

    def bytes(self, full: tuple[int, ...]) -> int:
        """Bytes of so many full pages of each age; older ones are as the oldest."""
        counts = np.asarray(full, np.int64)
        known = len(self._bytes)
        return int(counts[:known] @ self._bytes[: len(counts)]) + int(
            counts[known:].sum() * self._bytes[-1]
        )

    def oldest(self, full: int) -> int:
        """Bytes of the oldest of `full` full pages; 1 at least."""
        return int(self._bytes[min(full, len(self._bytes)) - 1])

    def divergence(self, full: int, quality: npt.NDArray[np.float64]) -> float:
        """The KL that is expected after `full` full pages; `quality[rungs - 1]`: where all pages
        have so many."""
        last = max(min(full, len(self.seen)), 2)
        shares = np.arange(1, last) ** _SHARE
        return float(shares @ quality[self.seen[1:last] - 1] / shares.sum())


@lru_cache(maxsize=512)
def make_schedule(level: int, page: PageBytes, ages: int) -> Schedule:
    """The schedule of a level, 0 if all pages are exact; `ages`: how many are told apart."""
    rungs = np.zeros(max(ages, 2), np.uint8)
    if level:
        bits = np.array(page.bits[1:])
        due = level / LEVELS_PER_BIT - SLOPE * np.log2(np.maximum(np.arange(len(rungs)), 1))
        deep = np.searchsorted(bits, due + 1e-9, "right")
        rungs = np.clip(deep, least_rungs(page.bits), len(bits)).astype(np.uint8)
    return Schedule(rungs, page)
