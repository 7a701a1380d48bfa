"""How deep coded pages of the KV cache are at each age, and what that takes. docs/kv.md.

The *age* of a page is how many pages later the token is that sees it; the first page of a sequence
has the age 0, whatever comes. A *level* is the bits of a value in a page of the age 1, in eighths.
Each time the age doubles a page loses SLOPE bits: it adds less to the error of an answer then, so
it may be coarser. Pure functions of numbers; sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = [
    "LEVELS_PER_BIT",
    "SLOPE",
    "Ages",
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
"""Pages are kept as deep as if they were so many pages younger: a chunk of a prompt that is in
progress sees them so, and a conversation may go back a little."""

_LEAST_BITS = 2.25
"""No page has fewer, where rungs are so fine: two plies alone are far worse."""

_SHARE = -1.5
"""Exponent of the age in what an error of a page adds to that of an answer, for expectations."""


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
    """The fewest rungs that a page may have; `bits[r]`: of a value with r rungs."""
    return next((r for r, one in enumerate(bits) if r and one >= _LEAST_BITS), 1)


class Schedule:
    """The pages of one level.

    seen, kept: uint8 [ages]: rungs that are used, and that are in memory
    """

    __slots__ = ("_bytes", "_total", "kept", "seen")

    def __init__(self, seen: npt.NDArray[np.uint8], rung_bytes: npt.NDArray[np.int64]) -> None:
        self.seen = seen
        ages = np.arange(len(seen))
        self.kept = seen[np.where(ages > 0, np.maximum(ages - SLACK, 1), 0)]
        self._bytes = rung_bytes[self.kept]
        self._total = np.concatenate(([0], np.cumsum(self._bytes)))

    def total(self, full: int) -> int:
        """Bytes of a sequence of `full` full pages."""
        return int(self._total[full])

    def pages_within(self, size: int) -> int:
        """Full pages of a sequence that fit into `size` bytes."""
        return int(np.searchsorted(self._total, size, "right")) - 1 if size >= 0 else -1

    def bytes(self, full: tuple[int, ...]) -> int:
        """Bytes of so many full pages of each age; older ones are as the oldest."""
        counts = np.asarray(full, np.int64)
        known = len(self._bytes)
        return int(counts[:known] @ self._bytes[: len(counts)]) + int(
            counts[known:].sum() * self._bytes[-1]
        )

    def divergence(self, full: int, quality: npt.NDArray[np.float64]) -> float:
        """The KL that is expected after `full` full pages; `quality[rungs - 1]`: where all pages
        have so many."""
        last = max(min(full, len(self.seen)), 2)
        shares = np.arange(1, last) ** _SHARE
        return float(shares @ quality[self.seen[1:last] - 1] / shares.sum())


@lru_cache(maxsize=512)
def make_schedule(level: int, rung_bytes: tuple[int, ...], page_bytes: int, ages: int) -> Schedule:
    """The schedule of a level.

    `rung_bytes[r]`: a page of r rungs; `page_bytes`: an exact one; `ages`: how many are told apart.
    """
    sizes = np.array(rung_bytes, np.int64)
    bits = 16 * sizes / page_bytes
    due = level / LEVELS_PER_BIT - SLOPE * np.log2(np.maximum(np.arange(max(ages, 2)), 1))
    least, most = least_rungs(bits.tolist()), len(sizes) - 1
    rungs = np.clip(np.searchsorted(bits, due + 1e-9, "right") - 1, least, most)
    return Schedule(rungs.astype(np.uint8), sizes)
