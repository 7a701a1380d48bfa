"""Who has how many pages of the KV cache, who was promised some, and what all of them need.

Only numbers: nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from pliant.engine.parking import Parked
from pliant.engine.prefixes import Prefixes
from pliant.engine.seam import Executor
from pliant.memory.plan import PackSizes, Plan

__all__ = ["MOST_RUNGS", "Entry", "Keep", "Rank", "Room"]

Rank = tuple[int, int]
"""Which answers give way first: those with the largest."""

MOST_RUNGS = 2**16
"""More than any page has."""


class Keep(Enum):
    """What a smaller budget leaves in memory, in the order in which it is tried."""

    SESSIONS = "sessions"  # all that open sessions and answers have, but not kept prefixes
    ANSWERS = "answers"  # what is in flight; the rest goes to disk
    LEAST = "least"  # what was promised to sessions, and one answer at a time


class Entry:
    """What is known of a sequence."""

    __slots__ = (
        *("claim", "first", "keys", "known", "length", "level", "parked", "promised", "rank"),
        *("rest", "state", "used"),
    )

    def __init__(self) -> None:
        self.length = 0
        self.promised: int | None = None  # tokens in all; None: idle
        self.parked: Parked | None = None
        self.rest: Parked | None = None  # has more rungs of the pages from `first` on
        self.first = 0
        self.used = 0
        self.state = -1  # in which all of it was computed; -1: there is none
        self.level = MOST_RUNGS  # its pages have at least so many rungs, if the cache has
        self.keys: list[bytes] = []  # its first pages, which others may use too
        self.known: list[bytes] = []  # the same while it is parked, when they may have gone
        # Of an answer:
        self.rank: Rank | None = None  # None: a session
        self.claim = 0  # tokens that it may have in the end

    def close_files(self) -> None:
        """Delete what is on disk."""
        for file in (self.parked, self.rest):
            if file is not None:
                file.close()
        self.parked = self.rest = None


class Room:
    """The sequences of one executor, and the limits that they share.

    context, pages: the most tokens of one sequence, and the most pages of all, as planned. If full
    pages are coded, these are pages of the `level` that holds now, and the newest page of a
    sequence, which is exact, counts as `tail` more.
    """

    def __init__(
        self, executor: Executor, sizes: PackSizes, plan: Plan, prefixes: Prefixes
    ) -> None:
        self.context = plan.context
        self.pages = plan.kv_pages
        self.tail = plan.kv_tail
        self.level = plan.kv_level
        self.page_tokens = sizes.kv_page_tokens
        self.prefixes = prefixes
        self._executor = executor
        self._sizes = sizes
        self._entries: dict[int, Entry] = {}

    @property
    def used(self) -> int:
        """Pages in memory, those that are kept for reuse included."""
        return self._executor.kv_pages_used

    @property
    def parked(self) -> tuple[int, int]:
        """How many sessions and answers are on disk, and how many bytes that takes there."""
        every = list(self._entries.values())
        files = [file for entry in every for file in (entry.parked, entry.rest) if file is not None]
        return sum(entry.parked is not None for entry in every), sum(file.bytes for file in files)

    @property
    def in_flight(self) -> int:
        """How many sessions and answers have a promise."""
        return sum(entry.promised is not None for entry in list(self._entries.values()))

    def needs(self, keep: Keep) -> tuple[int, int, int]:
        """The most tokens of one sequence, and the pages and the sequences of all, that a plan must
        leave; here pages are those that tokens are in, exact or not."""
        context = promised = largest = 0
        sessions, answers, idle = 0, 0, 0
        for entry in list(self._entries.values()):  # also asked for without the turn
            tokens = max(entry.length, entry.promised or 0, entry.claim)
            flies = entry.promised is not None
            answers += entry.rank is not None and flies
            if entry.rank is not None:
                largest = max(largest, self._sizes.pages(tokens))
            elif flies:
                promised += self._sizes.pages(max(entry.length, entry.promised or 0))
                sessions += 1
            if not flies and entry.parked is None and entry.length:
                idle += 1
            if (
                entry.rank is None
                and not flies
                and (keep is not Keep.SESSIONS or entry.parked is not None)
            ):
                continue
            context = max(context, tokens)
        least, tails = promised + largest, sessions + (largest > 0)
        if keep is Keep.LEAST:
            return context, least, tails
        if keep is Keep.SESSIONS:
            count = sessions + answers + idle
            taken = self._taken() - self.prefixes.idle - count * self.tail
        else:
            count = sessions + answers
            taken = self._needed(()) - count * self.tail
        return context, max(taken, least), max(count, tails)

    # --- inside

    def _pages(self, tokens: int) -> int:
        """Pages that count for `tokens` tokens of a sequence."""
        return self._sizes.pages(tokens) + (self.tail if tokens else 0)

    def _held(self, entry: Entry) -> int:
        """Pages that count for an entry."""
        if entry.promised is not None:
            return self._pages(max(entry.length, entry.promised))
        return 0 if entry.parked is not None else self._pages(entry.length)

    def _taken(self) -> int:
        """Pages in memory, each once, and those that were promised and are not there yet."""
        taken = self._executor.kv_pages_used
        for entry in list(self._entries.values()):
            taken += self._to_come(entry) + self._own_tail(entry)
        return taken

    def _own_tail(self, entry: Entry) -> int:
        return self.tail if entry.length and entry.parked is None else 0

    def _to_come(self, entry: Entry) -> int:
        """Pages that were promised to an entry and are not there yet."""
        if entry.promised is None:
            return 0
        there = len(entry.keys) if entry.parked is not None else self._pages(entry.length)
        return self._held(entry) - there

    def _needed(self, keep: Collection[int]) -> int:
        """What `_taken` would be with nothing kept for reuse, and with everything idle on disk that
        is not among `keep`."""
        pages, others = set[int](), 0
        for sequence, entry in self._entries.items():
            if sequence in keep or entry.promised is not None:
                pages.update(self._executor.pages(sequence))
                pages.update(self.prefixes.pages(entry.keys))
                others += self._to_come(entry) + self._own_tail(entry)
        return len(pages) + others
