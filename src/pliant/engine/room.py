"""Who has which pages of the KV cache, who was promised some, and what all of them need.

Only numbers: nothing is changed here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum

from pliant.engine.parking import Parked
from pliant.engine.prefixes import Prefixes
from pliant.engine.seam import Executor
from pliant.memory.kv_ages import Ages, Form, age_of, fresh
from pliant.memory.plan import PackSizes

__all__ = ["MOST_LEVEL", "Entry", "Keep", "Rank", "Room"]

Rank = tuple[int, int]
"""Which answers give way first: those with the largest."""

MOST_LEVEL = 2**16
"""Above any level."""


class Keep(Enum):
    """What a smaller budget leaves in memory, in the order in which it is tried."""

    SESSIONS = "sessions"  # all that open sessions and answers have, but not kept prefixes
    ANSWERS = "answers"  # what is in flight; the rest goes to disk
    LEAST = "least"  # what was promised to sessions, and one answer at a time


class Entry:
    """What is known of a sequence."""

    __slots__ = (
        *("claim", "first", "keys", "known", "length", "level", "parked", "promised", "rank"),
        *("rest", "state", "used", "was"),
    )

    def __init__(self) -> None:
        self.length = 0
        self.promised: int | None = None  # tokens in all; None: idle
        self.parked: Parked | None = None
        self.rest: Parked | None = None  # has more rungs of the pages from `first` on
        self.first = 0
        self.used = 0
        self.state = -1  # in which all of it was computed; -1: there is none
        self.level = MOST_LEVEL  # its pages are as deep as at this level, if that of the cache is
        self.was = 0  # the level at which it was parked
        self.keys: list[bytes] = []  # its first pages, which others may use too
        self.known: list[bytes] = []  # the same while it is parked, when they may have gone
        # Of an answer:
        self.rank: Rank | None = None  # None: a session
        self.claim = 0  # tokens that it may have in the end

    @property
    def here(self) -> bool:
        """Whether it takes memory, or was promised some."""
        return self.promised is not None or (self.parked is None and self.length > 0)

    def close_files(self) -> None:
        """Delete what is on disk."""
        for file in (self.parked, self.rest):
            if file is not None:
                file.close()
        self.parked = self.rest = None


def _tokens(entry: Entry) -> int:
    """Tokens that an entry has, or was promised."""
    return max(entry.length, entry.promised or 0)


class Room:
    """The sequences of one executor, and the limits that they share.

    context, bytes: the most tokens of one sequence, and the most bytes of all, as planned; what
    pages take is counted at the end of what was promised, where they are oldest. The core itself
    gives up what they have beyond that when it comes to the limit. level: of coded pages, 0 if all
    are exact.
    """

    def __init__(self, executor: Executor, sizes: PackSizes, prefixes: Prefixes) -> None:
        self.context = self.bytes = self.level = 0
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
    def used_bytes(self) -> int:
        """What these take."""
        return self._executor.kv_used_bytes

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

    def needs(self, keep: Keep) -> tuple[int, tuple[Ages, ...]]:
        """The most tokens of one sequence, and what a plan must leave: each of these alone."""
        entries = list(self._entries.values())  # also asked for without the turn
        answers = [entry for entry in entries if entry.rank is not None]
        sessions = [entry for entry in entries if entry.rank is None and entry.promised is not None]
        least = Ages()
        for entry in sessions:
            least += fresh(_tokens(entry), self.page_tokens)
        largest = max((max(_tokens(entry), entry.claim) for entry in answers), default=0)
        least += fresh(largest, self.page_tokens)
        counted = answers + sessions
        if keep is Keep.SESSIONS:
            counted += [entry for entry in entries if entry.here]
        context = max((max(_tokens(entry), entry.claim) for entry in counted), default=0)
        if keep is Keep.LEAST:
            return context, (least,)
        kept = self._in_memory({}) if keep is Keep.SESSIONS else self._in_flight({})
        return context, (least, self._ages(kept))

    # --- inside

    def _in_memory(self, wanted: Mapping[int, int]) -> dict[int, int]:
        """The tokens that sequences have or were promised, without those on disk; those of `wanted`
        have as many as it says, at least."""
        return {
            sequence: max(_tokens(entry), wanted.get(sequence, 0))
            for sequence, entry in self._entries.items()
            if entry.here or sequence in wanted
        }

    def _in_flight(self, wanted: Mapping[int, int], keep: Collection[int] = ()) -> dict[int, int]:
        """The same of those that were promised something, or are in `wanted` or `keep`."""
        return {
            sequence: tokens
            for sequence, tokens in self._in_memory(wanted).items()
            if self._entries[sequence].promised is not None
            or sequence in wanted
            or sequence in keep
        }

    def _ages(self, tokens: Mapping[int, int]) -> Ages:
        """Of sequences with so many tokens each."""
        full, partial = self._executor.kv_ages(list(tokens), list(tokens.values()))
        return Ages(tuple(full), partial, sum(map(bool, tokens.values())))

    def _over(self, tokens: Mapping[int, int], kept: list[int]) -> int:
        """Bytes that sequences with so many tokens each, and the pages `kept`, have too many. There
        are also no more pages than for the longest context of each session that was planned."""
        ages = self._ages(tokens)
        taken = self._sizes.kv_bytes(self.level, ages) + self._executor.kv_bytes(kept)
        pages = sum(ages.full) + ages.partial + len(kept) - self._executor.kv_pages_total
        return max(taken - self.bytes, pages * self._sizes.kv_page_bytes)

    def _forms(self, length: int, level: int) -> Callable[[int], Form]:
        """What pages of a sequence of so many tokens keep, by their number."""
        schedule, newest = self._sizes.schedule(level), length // self.page_tokens
        return lambda number: schedule.form(age_of(number, newest))

    def _usable(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of the pages `keys` that are kept and that a sequence can begin with."""
        known = list(keys[: self.prefixes.count(keys)])
        return known[: self._executor.kv_usable(self.prefixes.pages(known))]

    def _usable_parked(self, parked: Parked, length: int) -> int:
        """As the core's `truncate`, of what is on disk: how many of so many tokens are left."""
        full = length // self.page_tokens
        if length % self.page_tokens and parked.form(full) != Form(0, whole=True):
            length = full * self.page_tokens
        forms = [parked.form(number) for number in range(full)]
        while not self._deep(forms[:full], full, self.level):
            full -= 1
            length = full * self.page_tokens
        return length

    def _level_within(self, sequence: int) -> int:
        """The highest level, up to that which holds, whose rungs all pages of a sequence have."""
        if not self.level:
            return 0
        pages = self._executor.pages(sequence)
        rungs = self._executor.page_rungs(pages)
        forms = list(map(Form, rungs, self._executor.page_whole(pages)))
        newest = self._executor.length(sequence) // self.page_tokens
        levels = range(self._sizes.kv_levels[0], self.level + 1)
        at = bisect_left(levels, x=True, key=lambda level: not self._deep(forms, newest, level))
        return levels[max(at - 1, 0)]

    def _deep(self, forms: Sequence[Form], newest: int, level: int) -> bool:
        """Whether pages have what is seen of them from page `newest` on."""
        seen, local = self._sizes.schedule(level).seen, self._sizes.kv_local_age
        return all(
            (not form.rungs or form.rungs >= seen[age]) and (form.whole or age > local)
            for form, age in ((form, age_of(number, newest)) for number, form in enumerate(forms))
        )
