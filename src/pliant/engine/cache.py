"""The one owner of the KV cache: sequences, promises, pages kept for reuse, sessions on disk.

A sequence is *in flight* while room is promised to it, as an answer does from its prompt to its
end, and *idle* otherwise. What is promised is never taken by others. Idle sequences keep their
pages as long as nobody needs the room: then those that were used longest ago go to disk, and come
back when they are used. Pages that are kept for reuse and that nobody uses go before any of them.

Two kinds go through here. A *session* holds what it was promised, whatever comes. An *answer* of
the scheduler is promised its prompt and a page to go on in, and may be set aside: then it is idle
as sessions are, keeps its claim on the context, and goes on later with what it had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from pliant.engine.park import Forms, Park
from pliant.engine.prefixes import Prefixes
from pliant.engine.room import MOST_LEVEL, Entry, Keep, Rank, Room
from pliant.engine.seam import Executor
from pliant.errors import EngineError, PackError
from pliant.memory.plan import PackSizes, Plan
from pliant.sizes import format_size

__all__ = ["RESUME", "Cache", "CacheFull", "Keep", "ParkedLost", "Rank"]

RESUME = 0.25
"""Seconds that a session waits until it goes on, where all of it would take longer."""

_MOST_PARKED = 4 * 2**30
"""Bytes that answers may take on disk. What would be more is computed again."""


class CacheFull(EngineError):
    """No page is left, and none of the sessions that hold them is idle."""


class ParkedLost(EngineError):
    """What was parked cannot be read, or is computed faster; the sequence is empty now."""

    def __init__(self, sequence: int, cause: object) -> None:
        super().__init__(f"what was parked could not be brought back: {cause}")
        self.sequence = sequence


class Cache(Room):
    """The sequences of one executor. Everything here is called with the turn taken.

    park: the way to disk and back
    """

    def __init__(
        self,
        executor: Executor,
        sizes: PackSizes,
        plan: Plan,
        park: Park | None = None,
        state: Callable[[], int] = lambda: 0,
    ) -> None:
        """`state`: `Depth.state` of the steps that are made now."""
        self.park = park or Park(executor)
        super().__init__(executor, sizes, Prefixes(executor.drop_pages, self.park.keep))
        self._state = state
        self._clock = self._most = 0
        self.level = plan.kv_level
        self._tell_ages()
        self.limit(plan)

    # --- sequences

    def open(self) -> int:
        """A new sequence, idle and empty."""
        sequence = self._executor.open_sequence()
        self._entries[sequence] = Entry()
        return sequence

    def close(self, sequence: int) -> None:
        """Forget a sequence; what it shared is kept for reuse."""
        entry = self._entries.pop(sequence)
        entry.close_files()
        self._executor.close_sequence(sequence)
        self.prefixes.release(entry.keys)

    def close_all(self) -> None:
        """Delete what is parked, and keep for later what can be; the executor goes away with
        everything else."""
        for entry in self._entries.values():
            entry.close_files()
            self.prefixes.release(entry.keys)
        self._entries.clear()
        self.forget()
        self._state = int  # it knows who owns this, and both would wait for the collector

    def truncate(self, sequence: int, length: int) -> int:
        """Forget the tokens of a session from `length` on; inside a page that is coded or that
        others may use, all of that page.

        Returns how many are left.
        """
        entry = self._entries[sequence]
        if length < len(entry.keys) * self.page_tokens:
            length -= length % self.page_tokens
        if entry.parked is None:
            length = self._executor.truncate(sequence, length)
            full = length // self.page_tokens
            self.prefixes.release(entry.keys[full:])
            del entry.keys[full:]
            if entry.rest is not None:
                entry.rest.cut(full)
        else:
            length = self._usable_parked(entry.parked, length)
            del entry.known[length // self.page_tokens :]
        if length == 0:
            entry.close_files()
            entry.level = MOST_LEVEL
        entry.length = length
        return length

    def begin(self, sequence: int, keys: Sequence[bytes]) -> int:
        """Let an empty sequence begin with as many of the pages `keys` as are kept in memory and
        have all rungs that it will see; returns how many. `keys` are those of the state that holds
        now."""
        entry = self._entries[sequence]
        entry.keys = self._usable(keys)
        self._executor.adopt_pages(sequence, self.prefixes.acquire(entry.keys))
        entry.length = len(entry.keys) * self.page_tokens
        entry.state = self._state()
        return len(entry.keys)

    def fetch(self, sequence: int, keys: Sequence[bytes], seconds: float) -> int:
        """Go on with those of the pages `keys` that follow and are parked in a folder, if reading
        them is faster than computing; stops after so many seconds. EngineError as in `limit`.

        `keys` are those of the state that holds now, and all there is of the sequence is named by
        the first of them. Returns how many pages came.
        """
        entry, tokens = self._entries[sequence], self.page_tokens
        at, until = len(entry.keys), time.monotonic() + seconds
        if entry.length != at * tokens:
            return 0
        if not self._make_room({sequence: len(keys) * tokens}):
            return 0
        self._executor.limit_kv(self._most)  # gives up what nobody needs any more
        most = self._forms(0, self.level)(0).rungs  # a page has no more when it is coded
        try:
            count = self.park.fetch(sequence, keys[at:], most, until, self._most)
            # Pages that lost something before they were parked may be of no use yet; those from
            # before are older now, and need no more.
            usable = self._executor.kv_usable(self._executor.pages(sequence))
            if usable < at + count:
                count = max(usable - at, 0)
                self._executor.truncate(sequence, (at + count) * tokens)
        finally:
            entry.length = self._executor.length(sequence)
            self._executor.limit_kv(self._most)
        if count:
            entry.state = self._state()
            self.share(sequence, keys[: at + count])
            self.park.used(keys[: at + count])
        return count

    def reserve(self, sequence: int, tokens: int) -> bool:
        """Promise room for `tokens` tokens in all, until `release`. False: not now."""
        entry = self._entries[sequence]
        before, entry.promised = entry.promised, max(tokens, entry.length)
        if self._make_room({sequence: entry.promised}):
            return True
        entry.promised = before
        return False

    def release(self, sequence: int) -> None:
        """The end of a promise: the sequence is idle. Nothing happens if it was closed."""
        entry = self._entries.get(sequence)
        if entry is not None:
            entry.promised = None

    # --- answers

    def admit(
        self, sequence: int, tokens: int, keys: Sequence[bytes], *, claim: int, rank: Rank
    ) -> int | None:
        """Let an empty sequence be an answer: promise room for `tokens` tokens, and begin with as
        many of the pages `keys` as are kept.

        `claim`: tokens that it may have in the end, below which no budget takes the context.
        Returns how many pages it begins with; None, and no change: there is no room now.
        EngineError as in `limit`.
        """
        entry = self._entries[sequence]
        before = entry.rank, entry.claim
        entry.rank, entry.claim = rank, max(claim, tokens)
        begun, found = self.begin(sequence, keys), None
        try:
            if self.reserve(sequence, tokens):
                found = begun
        finally:
            if found is None:
                self.give_way(sequence)
                entry.rank, entry.claim = before
        return found

    def share(self, sequence: int, keys: Sequence[bytes]) -> None:
        """Let others find the first pages of a sequence, which are full; `keys` names all those.
        Nothing happens if they were not all computed in the state that holds now."""
        entry = self._entries[sequence]
        if entry.state != self._state():
            return
        first = len(entry.keys)
        pages = self._executor.pages(sequence)[first : len(keys)]
        self._executor.hold_pages(pages)
        for key, page in zip(keys[first:], pages, strict=True):
            if not self.prefixes.insert(key, page):
                self._executor.drop_pages([page])
            entry.keys.append(key)

    def set_aside(self, sequence: int) -> None:
        """End the promise of an answer until `resume`; its claim stays."""
        entry = self._entries[sequence]
        entry.claim = max(entry.claim, entry.length)
        entry.promised = None
        self._clock += 1
        entry.used = self._clock

    def resume(self, sequence: int, tokens: int) -> bool:
        """Promise room for `tokens` tokens in all to an answer that was set aside, and bring back
        what is on disk. False, and no change: there is no room now. ParkedLost."""
        entry = self._entries[sequence]
        if entry.parked is None:
            return self.reserve(sequence, tokens)
        entry.keys = self._usable(entry.known)
        self._executor.adopt_pages(sequence, self.prefixes.acquire(entry.keys))
        try:
            if self.reserve(sequence, tokens):
                self._bring_back(sequence, entry)
                return True
        except BaseException:
            entry.promised = None
            raise
        finally:
            if entry.promised is None:
                self._executor.truncate(sequence, 0)
                self.prefixes.release(entry.keys)
                entry.keys = []
        return False

    def give_way(self, sequence: int) -> None:
        """Forget what an answer has, until it is admitted again; its claim stays."""
        self.set_aside(sequence)
        self._empty(sequence)

    def level_of(self, sequence: int) -> int:
        """The level at which the pages of a sequence are at least as deep; 0: all is exact."""
        return min(self._entries[sequence].level, self.level)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, in memory or on disk."""
        return self._entries[sequence].length

    def holds(self, sequence: int) -> bool:
        """Whether a sequence is in flight; an answer that was set aside is not."""
        return self._entries[sequence].promised is not None

    def promised(self, sequence: int) -> int:
        """Tokens that are promised to a sequence in all."""
        return self._entries[sequence].promised or 0

    def forget(self) -> None:
        """Give up all pages that are kept for reuse and that nobody uses."""
        self.prefixes.evict(self.prefixes.idle)

    # --- steps

    def prepare(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Make sure that each sequence is in memory and can get so many tokens more.

        EngineError, and no change, if the context or the cache is full; ParkedLost.
        """
        wanted = {}
        for sequence, count in zip(sequences, counts, strict=True):
            entry = self._entries[sequence]
            after = entry.length + count
            if after > self.context:
                raise EngineError(
                    f"the context is full: it holds {self.context} tokens, and {after} were to be "
                    "in it; a larger budget or context holds more"
                )
            if after > self._counted(entry):
                wanted[sequence] = after
        if wanted and not self._make_room(wanted, sequences):
            raise CacheFull(
                f"the KV cache is full: it has {format_size(self.bytes)} for all sessions, and "
                "those in use are in flight; wait for one, or load with a larger budget"
            )
        self._clock += 1
        for sequence in sequences:
            entry = self._entries[sequence]
            entry.used = self._clock
            if entry.parked is not None:
                self._bring_back(sequence, entry)
            elif entry.rest is not None and entry.level < self.level:
                self._deepen(sequence, entry)

    def stepped(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Count the tokens of a step."""
        state = self._state()
        for sequence, count in zip(sequences, counts, strict=True):
            entry = self._entries[sequence]
            if entry.state != state:
                entry.state = -1 if entry.length else state
            entry.length += count

    # --- limits

    def limit(self, plan: Plan) -> None:
        """New limits, which leave what `needs` says of the least.

        Pages lose rungs where the level falls. What is too much goes: kept prefixes, then what is
        idle to disk, then answers are set aside, the largest rank first. EngineError, and the old
        limits but for the level, if a session cannot be written.
        """
        before, self.bytes, self._most = (self.bytes, self._most), plan.kv - plan.kv_chunk, plan.kv
        self._set_level(plan.kv_level)
        try:
            while not self._make_room({}):
                found = [
                    (entry.rank, sequence)
                    for sequence, entry in self._entries.items()
                    if entry.rank is not None and entry.promised is not None
                ]
                if not found:
                    raise CacheFull(
                        f"the sessions in flight need more than {format_size(self.bytes)} of KV"
                    )
                self.set_aside(max(found)[1])
        except BaseException:
            self.bytes, self._most = before
            raise
        self._executor.limit_kv(self._most)
        self.context = plan.context

    # --- inside

    def _set_level(self, level: int) -> None:
        """From now on pages are coded, and seen, at this level; what is deeper than that goes."""
        if level == self.level:
            return
        if level < self.level:
            self._unshare()
        before, self.level = self.level, level
        self._tell_ages()
        for entry in self._entries.values():
            if entry.parked is None and entry.length >= self.page_tokens:
                entry.level = min(entry.level, before, level)

    def _tell_ages(self) -> None:
        schedule = self._sizes.schedule(self.level)
        ages = schedule.seen.tolist(), schedule.kept.tolist()
        self._executor.set_kv_ages(*ages, schedule.whole_age)

    def _forms_of_use(self, entry: Entry) -> tuple[Forms, Forms]:
        """What is of use of parked pages now, and at the level that they are from."""
        levels = self.level, max(self.level, entry.was)
        now, ever = (self._forms(entry.length, level) for level in levels)
        return now, ever

    def _make_room(self, wanted: Mapping[int, int], keep: Collection[int] = ()) -> bool:
        """Give up kept prefixes and park what is idle until all in memory has room, and sequences
        of so many tokens as `wanted` says; False, and no change, if that is not enough."""

        def over() -> int:
            return self._over(self._in_memory(wanted), self.prefixes.idle_pages())

        if over() <= 0:
            return True
        if self._over(self._in_flight(wanted, keep), []) > 0:
            return False
        idle = [
            (entry.used, sequence)
            for sequence, entry in self._entries.items()
            if entry.here
            and entry.promised is None
            and sequence not in wanted
            and sequence not in keep
        ]
        idle.sort(reverse=True)
        while (size := over()) > 0:
            if not self.prefixes.evict(-(-size // self._sizes.kv_page_bytes)):
                self._park(idle.pop()[1])
        return True

    def _counted(self, entry: Entry) -> int:
        """How many tokens a sequence may have without any more room: what was promised to it, and
        the rest of the page that it goes on in."""
        if entry.parked is not None:
            return entry.promised or 0
        return max(entry.promised or 0, -(-entry.length // self.page_tokens) * self.page_tokens)

    def _park(self, sequence: int) -> None:
        """Write a sequence to disk. An answer that cannot be written is emptied; EngineError for a
        session."""
        entry = self._entries[sequence]
        answer = entry.rank is not None
        size = self._sizes.kv_session(self.level, entry.length)
        if answer and self.parked[1] + size > _MOST_PARKED:
            self._empty(sequence)
            return

        try:
            entry.parked = self.park.store(sequence, entry.length, entry.rest)
        except (OSError, EngineError) as error:
            if answer:
                self._empty(sequence)
                return
            if isinstance(error, EngineError):
                raise
            raise EngineError(
                f"the KV cache of an idle session cannot be written to disk: {error.strerror}; "
                "TMPDIR may name another folder"
            ) from error
        entry.rest, entry.was = None, max(self.level, entry.was if entry.rest else 0)
        self._executor.truncate(sequence, 0)
        self.prefixes.release(entry.keys)
        entry.known, entry.keys = entry.keys, []

    def _unshare(self) -> None:
        """All pages lose rungs, and are not what their keys say any more."""
        for entry in self._entries.values():
            self.prefixes.release(entry.keys)
            entry.keys = []
            if entry.parked is None:
                entry.state = -1
        self.forget()

    def _empty(self, sequence: int) -> None:
        entry = self._entries[sequence]
        entry.close_files()
        self._executor.truncate(sequence, 0)
        self.prefixes.release(entry.keys)
        entry.keys, entry.known, entry.length, entry.level = [], [], 0, MOST_LEVEL

    def _bring_back(self, sequence: int, entry: Entry) -> None:
        parked, entry.first = entry.parked, len(entry.keys)
        assert parked is not None
        pure = entry.state == self._state()
        if pure:  # computing it again would give the same
            pages = len(parked) - entry.first
            tokens = entry.length - entry.first * self.page_tokens
            if not self.park.rates.choose(parked.bytes * pages // len(parked), tokens, pages):
                self._empty(sequence)
                raise ParkedLost(sequence, "computing it again is expected to be faster")
        # What an answer of the scheduler says must not depend on whom it gave way to.
        seconds = RESUME if entry.rank is None else math.inf
        try:
            now, ever = self._forms_of_use(entry)
            whole = self.park.restore(sequence, parked, entry.length, now, ever, seconds)
        except (OSError, PackError) as error:
            self._empty(sequence)
            raise ParkedLost(sequence, error) from error
        known, entry.known = entry.known, []
        if whole:
            entry.close_files()
        else:
            entry.parked, entry.rest = None, parked
            parked.cut(entry.length // self.page_tokens)
        entry.level = self._level_within(sequence)
        if whole and pure:
            self.share(sequence, known)
        else:
            entry.state = -1

    def _deepen(self, sequence: int, entry: Entry) -> None:
        """Bring back more of a sequence that goes on with a part of what it had."""
        assert entry.rest is not None
        try:
            done = self.park.deepen(sequence, entry.rest, entry.first, *self._forms_of_use(entry))
        except (OSError, PackError):
            done = True  # it stays as it is, and its answers say so
        entry.level = self._level_within(sequence)
        if done:
            entry.close_files()
