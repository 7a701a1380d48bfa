"""One answer, token by token."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pliant.engine.cache import CacheFull
from pliant.engine.kinds import DepthTrack, GenerationResult
from pliant.engine.sampling import Sampling
from pliant.engine.session import PIECE, Session
from pliant.errors import UsageError

if TYPE_CHECKING:
    from pliant.engine.model import Model

__all__ = ["Generation", "Stops"]


class Stops:
    """Holds back text that may be the beginning of a stop text, and ends before the first one."""

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop text must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be given out now."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            out, self._held, self.stopped = self._held[: min(found)], "", True
            return out
        keep = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), keep, -1):
                if self._held.endswith(stop[:size]):
                    keep = size
                    break
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        out, self._held = self._held, ""
        return out


class Generation:
    """An iterator over the text of an answer, in pieces of whole characters.

    `result` says at any time what there is so far. Leaving the loop early cancels the answer: its
    memory is given back when the object is closed or collected. Used by one thread at a time; only
    `cancel` may be called from anywhere.
    """

    __slots__ = (
        "_cached",
        "_cancelled",
        "_decode",
        "_model",
        "_pieces",
        "_prefill",
        "_prompt",
        "_reason",
        "_sampling",
        "_steps",
        "_text",
        "_tokens",
        "_track",
    )

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int | None,
        stop: Sequence[str],
        eos: frozenset[int],
        session: Session | None,
    ) -> None:
        """For Model.generate, which has checked the arguments."""
        self._model = model
        self._prompt = list(prompt)
        self._sampling = sampling
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._track = DepthTrack()
        self._reason: str | None = None
        self._prefill = self._decode = 0.0
        self._cached = self._steps = 0
        self._cancelled = False
        self._pieces = self._run(max_tokens, Stops(stop), eos, session)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text.append(piece)
        return piece

    def close(self) -> None:
        """End the answer here. Nothing happens if it has ended."""
        self._pieces.close()
        if self._reason is None:
            self._reason = "cancelled"
            self._model.last = self.result

    def cancel(self) -> None:
        """End the answer after the step in progress, also while the prompt is read."""
        self._cancelled = True

    @property
    def result(self) -> GenerationResult:
        """What there is so far; the whole answer once `finish_reason` is not None."""
        return GenerationResult(
            text="".join(self._text),
            tokens=tuple(self._tokens),
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            finish_reason=self._reason,
            seed=self._sampling.seed,
            **self._track.values(),
            prefill_seconds=self._prefill,
            decode_seconds=self._decode,
            decode_steps=self._steps,
        )

    def _run(
        self, max_tokens: int | None, stops: Stops, eos: frozenset[int], given: Session | None
    ) -> Generator[str, None, None]:
        model = self._model
        session = model.session() if given is None else given
        try:
            # The last token of an answer is not fed.
            tokens = len(self._prompt) + (max_tokens or 1) - 1
            if not model._admit(session.sequence, tokens, lambda: self._cancelled):
                self._reason = "cancelled"
                return
            begin = time.perf_counter()
            at = self._cached = session.rewind(self._prompt)
            while at < len(self._prompt) and not self._cancelled:
                logits = session.feed(self._prompt[at : at + PIECE], self._track)
                at += PIECE
            self._prefill = time.perf_counter() - begin
            stream = model.tokenizer.stream()
            history = None
            while True:
                if self._cancelled:
                    self._reason = "cancelled"
                    break
                if self._sampling.penalties:
                    history = np.array(self._prompt + self._tokens, np.int32)
                position = len(self._prompt) + len(self._tokens)
                token = self._sampling.choose(logits, position, history, len(self._prompt))
                if token in eos:
                    self._reason = "eos"
                    break
                self._tokens.append(token)
                text = stops.push(stream.push(token))
                if text:
                    yield text
                if stops.stopped:
                    self._reason = "stop"
                    return
                if max_tokens is not None and len(self._tokens) >= max_tokens:
                    self._reason = "length"
                    break
                if session.room < 1:
                    self._reason = "context"
                    break
                begin = time.perf_counter()
                try:
                    logits = session.feed([token], self._track)
                except CacheFull:  # more than max_tokens promised
                    self._reason = "context"
                    break
                self._decode += time.perf_counter() - begin
                self._steps += 1
            text = stops.push(stream.flush()) + stops.flush()
            if text:
                yield text
        finally:
            session.release()
            if given is None:
                session.close()
            if self._reason is not None:
                model.last = self.result
