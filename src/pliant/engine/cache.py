"""Who may use how much of the KV cache: promises, limits, and sessions parked on disk.

A session is *in flight* while room is promised to it, as an answer does from its prompt to its end,
and *idle* otherwise. What is promised is never taken away. Idle sessions keep their pages as long
as nobody else needs them; then those that were used longest ago go to disk, and come back when they
are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from pliant.engine.parking import Page, Parked
from pliant.engine.seam import Executor
from pliant.errors import ChecksumError, EngineError
from pliant.memory.plan import PackSizes

__all__ = ["Cache", "CacheFull", "ParkedLost"]


class CacheFull(EngineError):
    """No page is left, and none of the sessions that hold them is idle."""


class ParkedLost(EngineError):
    """What was parked cannot be read; the sequence is empty now."""

    def __init__(self, sequence: int, cause: Exception) -> None:
        super().__init__(f"a parked session could not be brought back: {cause}")
        self.sequence = sequence


class _Entry:
    __slots__ = ("length", "parked", "promised", "shares", "used")

    def __init__(self) -> None:
        self.shares = False  # its pages may belong to others too; always in flight
        self.length = 0
        self.promised: int | None = None  # tokens in all; None: idle
        self.parked: Parked | None = None
        self.used = 0


class Cache:
    """The sequences of one executor. Everything here is called with the turn taken.

    context, pages: the most tokens of one sequence, and the most pages of all, as planned
    """

    def __init__(self, executor: Executor, sizes: PackSizes, context: int, pages: int) -> None:
        self.context = context
        self.pages = pages
        self._executor = executor
        self._sizes = sizes
        self._entries: dict[int, _Entry] = {}
        self._clock = 0
        self._sharing = False

    # --- sequences

    def open(self) -> int:
        """A new sequence, idle and empty."""
        sequence = self._executor.open_sequence()
        self._entries[sequence] = _Entry()
        return sequence

    def open_shared(self, pages: Sequence[int]) -> int:
        """A new sequence that begins with whole pages that are in use already.

        It counts as in flight. What it holds is not promised: a step that finds no room is refused.
        """
        sequence = self._executor.open_sequence()
        if pages:
            self._executor.adopt_pages(sequence, list(pages))
        entry = self._entries[sequence] = _Entry()
        entry.length = len(pages) * self._sizes.kv_page_tokens
        entry.shares = self._sharing = True
        return sequence

    def hold(self, sequence: int, first: int, last: int) -> list[int]:
        """Keep pages first .. last - 1 of a sequence, also when it is closed; their numbers."""
        pages = self._executor.pages(sequence)[first:last]
        self._executor.hold_pages(pages)
        return pages

    def drop(self, pages: Sequence[int]) -> None:
        """Give pages back that were kept."""
        self._executor.drop_pages(list(pages))

    @property
    def free(self) -> int:
        """Pages that steps may still take, if nothing is parked."""
        return self.pages - self._shared() - sum(map(self._held, list(self._entries.values())))

    def close(self, sequence: int) -> None:
        """Forget a sequence."""
        entry = self._entries.pop(sequence)
        if entry.parked is not None:
            entry.parked.close()
        self._executor.close_sequence(sequence)

    def close_all(self) -> None:
        """Delete what is parked; the executor goes away with everything else."""
        for entry in self._entries.values():
            if entry.parked is not None:
                entry.parked.close()
        self._entries.clear()

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from `length` on."""
        entry = self._entries[sequence]
        if entry.parked is None:
            self._executor.truncate(sequence, length)
        elif length == 0:
            entry.parked.close()
            entry.parked = None
        entry.length = length

    def reserve(self, sequence: int, tokens: int) -> bool:
        """Promise room for `tokens` tokens in all, until `release`. False: not now."""
        entry = self._entries[sequence]
        before, entry.promised = entry.promised, max(tokens, entry.length)
        if self._make_room(0, {sequence}):
            return True
        entry.promised = before
        return False

    def release(self, sequence: int) -> None:
        """The end of a promise: the sequence is idle. Nothing happens if it was closed."""
        entry = self._entries.get(sequence)
        if entry is not None:
            entry.promised = None

    # --- steps

    def prepare(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Make sure that each sequence is in memory and can get so many tokens more.

        EngineError, and no change, if the context or the cache is full; ParkedLost.
        """
        extra = 0
        for sequence, count in zip(sequences, counts, strict=True):
            entry = self._entries[sequence]
            after = entry.length + count
            if after > self.context:
                raise EngineError(
                    f"the context is full: it holds {self.context} tokens, and {after} were to be "
                    "in it; a larger budget or context holds more"
                )
            if entry.shares:
                extra += self._sizes.pages(after) - self._sizes.pages(entry.length)
            else:
                extra += self._sizes.pages(max(after, entry.promised or 0)) - self._held(entry)
        if not self._make_room(extra, set(sequences)):
            raise CacheFull(
                f"the KV cache is full: it holds {self.pages} pages of "
                f"{self._sizes.kv_page_tokens} tokens for all sessions, and those in use are in "
                "flight; wait for one, or load with more sessions or a larger budget"
            )
        self._clock += 1
        for sequence in sequences:
            entry = self._entries[sequence]
            entry.used = self._clock
            if entry.parked is not None:
                self._bring_back(sequence, entry)

    def stepped(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Count the tokens of a step."""
        for sequence, count in zip(sequences, counts, strict=True):
            self._entries[sequence].length += count

    # --- limits

    def needs(self, *, idle: bool) -> tuple[int, int]:
        """The most tokens of one sequence and the pages of all that a plan must leave.

        With `idle`, those of idle sessions that are in memory are counted too.
        """
        context, pages = 0, self._shared()
        for entry in list(self._entries.values()):  # also asked for without the turn
            if entry.shares:
                context = max(context, entry.length)
            elif entry.promised is not None or (idle and entry.parked is None):
                context = max(context, entry.length, entry.promised or 0)
                pages += self._held(entry)
        return context, pages

    def limit(self, context: int, pages: int) -> None:
        """New limits, which leave what `needs` says without idle ones; parks what is too much.

        EngineError, and the old limits, if it cannot be written.
        """
        before, self.pages = self.pages, pages
        try:
            if not self._make_room(0, ()):
                raise CacheFull(f"the sessions in flight need more than {pages} pages of KV")
        except BaseException:
            self.pages = before
            raise
        self.context = context

    @property
    def parked(self) -> tuple[int, int]:
        """How many sessions are on disk, and how many bytes that takes there."""
        files = [entry.parked for entry in self._entries.values() if entry.parked is not None]
        return len(files), sum(file.bytes for file in files)

    @property
    def in_flight(self) -> int:
        """How many sessions have a promise."""
        return sum(
            entry.promised is not None or entry.shares for entry in list(self._entries.values())
        )

    # --- inside

    def _shared(self) -> int:
        """Pages of sequences that share them, each once, and those that are kept."""
        if not self._sharing:
            return 0
        others = sum(
            self._sizes.pages(entry.length)
            for entry in list(self._entries.values())
            if not entry.shares and entry.parked is None
        )
        return self._executor.kv_pages_used - others

    def _held(self, entry: _Entry) -> int:
        """Pages that count for an entry, besides shared ones."""
        if entry.shares:
            return 0
        if entry.promised is not None:
            return self._sizes.pages(max(entry.length, entry.promised))
        return 0 if entry.parked is not None else self._sizes.pages(entry.length)

    def _make_room(self, extra: int, keep: Collection[int]) -> bool:
        """Park idle sessions until `extra` more pages fit; False if they cannot."""
        spare = self.free - extra
        if spare >= 0:
            return True
        idle = [
            (entry.used, sequence)
            for sequence, entry in self._entries.items()
            if sequence not in keep and entry.promised is None and self._held(entry)
        ]
        if spare + sum(self._held(self._entries[sequence]) for _, sequence in idle) < 0:
            return False
        for _, sequence in sorted(idle):
            if spare >= 0:
                break
            spare += self._held(self._entries[sequence])
            self._park(sequence)
        return True

    def _park(self, sequence: int) -> None:
        entry, size = self._entries[sequence], self._sizes.kv_page_bytes

        def pages() -> Iterator[Page]:
            buffer = np.empty(size, np.uint8)
            for page in range(self._sizes.pages(entry.length)):
                self._executor.take_page(sequence, page, buffer)
                yield buffer

        try:
            entry.parked = Parked(pages(), entry.length, size)
        except OSError as error:
            raise EngineError(
                f"the KV cache of an idle session cannot be written to disk: {error.strerror}; "
                "TMPDIR may name another folder"
            ) from error
        self._executor.truncate(sequence, 0)

    def _bring_back(self, sequence: int, entry: _Entry) -> None:
        parked, entry.parked = entry.parked, None
        assert parked is not None
        tokens, buffer = self._sizes.kv_page_tokens, np.empty(self._sizes.kv_page_bytes, np.uint8)
        try:
            for page in range(self._sizes.pages(entry.length)):
                parked.read(page, buffer)
                count = min(tokens, entry.length - page * tokens)
                self._executor.put_page(sequence, count, buffer)
        except (OSError, ChecksumError) as error:
            self._executor.truncate(sequence, 0)
            entry.length = 0
            raise ParkedLost(sequence, error) from error
        finally:
            parked.close()
