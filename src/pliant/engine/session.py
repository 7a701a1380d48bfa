"""One sequence of tokens in the KV cache, continued from where a new prompt differs from it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pliant.engine.cache import ParkedLost
from pliant.engine.kinds import DepthTrack
from pliant.engine.prefixes import page_keys
from pliant.engine.seam import Floats
from pliant.errors import EngineError
from pliant.store.closing import Closing

if TYPE_CHECKING:
    from pliant.engine.model import Model

__all__ = ["PIECE", "Session"]

PIECE = 256
"""Tokens of a prompt in one step: the budget can change in between."""


class Session(Closing):
    """Keeps the keys and values of a conversation, so that only what is new is computed.

    Used by one thread at a time. Close it, or use it as a context manager, to give its memory back.
    """

    __slots__ = ("_keys", "_model", "_sequence", "_state", "tokens")

    def __init__(self, model: Model) -> None:
        self._model = model
        with model._turn() as cache:
            self._sequence: int | None = cache.open()
        self.tokens: list[int] = []
        """The tokens whose keys and values are in the cache."""
        # Only where pages stay for later: the keys of those that are full, and of which state.
        self._keys: list[bytes] = []
        self._state = -1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sequence(self) -> int:
        """The number of its sequence in the executor; EngineError once it is closed."""
        if self._sequence is None:
            raise EngineError("this session was closed; open a new one")
        return self._sequence

    @property
    def room(self) -> int:
        """How many more tokens fit into the context."""
        return self._model.context - len(self.tokens)

    def close(self) -> None:
        """Forget everything. Nothing happens the second time."""
        if self._sequence is not None:
            self._model._close_sequence(self._sequence)
            self._sequence = None
            self.tokens.clear()

    def reserve(self, tokens: int) -> bool:
        """Promise room for `tokens` tokens in all, until `release`; False: there is none now.

        With a promise the session is in flight: no smaller budget takes its room, and it is not
        parked. `Model.generate` does this by itself.
        """
        return self._model._reserve(self.sequence, tokens)

    def release(self) -> None:
        """End the promise: from now on the KV may go to disk when others need the room."""
        if self._sequence is not None:
            self._model._release(self._sequence)

    def compute_again(self) -> None:
        """Fill an empty cache with the tokens that were in it."""
        tokens, self.tokens, self._keys = self.tokens, [], []
        for start in range(0, len(tokens), PIECE):
            self._step(tokens[start : start + PIECE], 0, None)

    def rewind(self, ids: Sequence[int]) -> int:
        """Keep of the cache only what agrees with `ids`, and at least leave its last token to feed.

        If nothing does, begin with what is kept for later, where there is a place for that. Returns
        how many tokens are there.
        """
        common = 0
        for mine, other in zip(self.tokens, ids[:-1], strict=False):
            if mine != other:
                break
            common += 1
        if common < len(self.tokens):
            with self._model._turn() as cache:
                common = cache.truncate(self.sequence, common)
                del self._keys[common // cache.page_tokens :]
            del self.tokens[common:]
        if not self.tokens and self._model._parks:
            common = self._model._begin(self.sequence, ids[:-1])
            self.tokens.extend(ids[:common])
        return common

    def feed(self, ids: Sequence[int], track: DepthTrack | None = None) -> Floats:
        """Append tokens; float32 [vocabulary], the logits after the last of them.

        EngineError if they do not fit; what was appended before the error stays.
        """
        for start in range(0, len(ids) - PIECE, PIECE):
            self._step(ids[start : start + PIECE], 0, track)
        row: Floats = self._step(ids[(len(ids) - 1) // PIECE * PIECE :], 1, track)[0]
        return row

    def feed_all(self, ids: Sequence[int], piece: int) -> Iterator[Floats]:
        """Append tokens and give the logits after each: float32 [at most piece, vocabulary]."""
        for start in range(0, len(ids), piece):
            yield self._step(ids[start : start + piece], 2, None)

    def states_all(self, ids: Sequence[int], track: DepthTrack | None = None) -> Iterator[Floats]:
        """Append tokens and give the hidden state of each: float32 [at most PIECE, hidden]."""
        for start in range(0, len(ids), PIECE):
            yield self._step(ids[start : start + PIECE], None, track)

    def _step(
        self, ids: Sequence[int], want: Literal[0, 1, 2] | None, track: DepthTrack | None
    ) -> Floats:
        array, wanted = np.array(ids, np.int32), None if want is None else [want]
        try:
            rows, (depth,) = self._model._step([self.sequence], [len(ids)], array, wanted)
        except ParkedLost:
            self.compute_again()
            rows, (depth,) = self._model._step([self.sequence], [len(ids)], array, wanted)
        self.tokens.extend(ids)
        if self._model._parks:
            self._share(depth.state)
        if track is not None:
            track.add(depth)
        return rows

    def _share(self, state: int) -> None:
        """Name the pages that are full, so that whoever begins alike finds them."""
        page = self._model._cache.page_tokens
        if state == self._state and len(self._keys) == len(self.tokens) // page:
            return
        known = self._keys if state == self._state else []
        self._keys = page_keys(array("i", self.tokens), page, state, known)
        self._state = state
        self._model._share(self.sequence, self._keys)
