"""What is asked of the scheduler, and an answer in the making."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pliant.engine.generation import Stops
from pliant.engine.kinds import DepthTrack
from pliant.engine.sampling import Sampling
from pliant.engine.seam import Floats, Tokenizer, TokenStream
from pliant.errors import PliantError, UsageError

__all__ = ["MOST_LOGPROBS", "Answer", "Choice", "Constraint", "Piece", "Request"]

MOST_LOGPROBS = 20
"""Likeliest tokens that may be asked for beside each token."""

_MOST_PRIORITY = 100


class Constraint(Protocol):
    """What an answer must look like. Used by one answer."""

    def allowed(self) -> npt.NDArray[np.uint8]:
        """The tokens that may come next: one bit for each, low bits first. Those that end the
        answer are among them where it may end."""

    def take(self, token: int) -> None:
        """A token was chosen; it does not end the answer."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer that is wanted. UsageError for values that have no meaning.

    `max_tokens` None: until the model ends or the context is full. `top_logprobs`: None for no
    logarithms of probabilities, or how many of the likeliest tokens are listed beside the chosen
    one. `key`: who asks; keys get equal shares of the work. `priority`: a lower one goes first.
    `deadline`: when the answer must be done, on the clock of the scheduler.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    eos: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    key: str = ""
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, and not {self.max_tokens}")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_LOGPROBS:
            raise UsageError(
                f"top_logprobs must be from 0 to {MOST_LOGPROBS}, and not {self.top_logprobs}"
            )
        if not -_MOST_PRIORITY <= self.priority <= _MOST_PRIORITY:
            raise UsageError(
                f"priority must be from -{_MOST_PRIORITY} to {_MOST_PRIORITY}, and not "
                f"{self.priority}"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, and what the model thought of it: natural logarithms of probabilities, before
    temperature, penalties and constraints. `top` has the likeliest tokens, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step added to an answer. The last has a `finish_reason` (as in GenerationResult) or an
    `error`."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish_reason: str | None = None
    error: PliantError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(slots=True, eq=False)
class Answer:
    """An answer in the making. Belongs to the scheduler's thread; others read `request`, and what
    there is once the last piece has come, and set `cancelled` through `Scheduler.cancel`."""

    request: Request
    number: int
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    cached: int = 0
    """Tokens of the prompt that were found in the cache when it was read for the first time."""
    track: DepthTrack = field(default_factory=DepthTrack)
    done: bool = False
    # In the cache:
    sequence: int | None = None
    ids: array[int] = field(default_factory=lambda: array("i"))
    """Prompt and answer; 4 bytes each, because many may wait."""
    fed: int = 0
    """How many of `ids` are in the cache."""
    state: int = -1
    """`Depth.state` in which all of that was computed; -1 once it was several."""
    keys: list[bytes] = field(default_factory=list)
    """Digests of the whole pages of `ids`, as far as they were needed."""
    shared: int = 0
    """How many pages, from the first on, others may use too."""
    begun: bool = False
    """Whether it ever had a place."""
    again: bool = False
    """Whether what it had was given up once."""
    fetching: bool = False
    """Whether what follows may be parked in a folder, and was not looked for yet."""
    # Of its text:
    stops: Stops = field(init=False)
    stream: TokenStream | None = None

    def __post_init__(self) -> None:
        self.ids = array("i", self.request.prompt)
        self.stops = Stops(self.request.stop)

    @property
    def todo(self) -> int:
        """Tokens that must be fed before the next one can be chosen."""
        return len(self.ids) - self.fed

    def choose(self, logits: Floats) -> Choice:
        """The next token. `logits`: float32 [vocabulary], which is changed."""
        request, prompt = self.request, len(self.request.prompt)
        logs = None if request.top_logprobs is None else _log_probabilities(logits)
        if request.constraint is not None:
            bits = np.unpackbits(request.constraint.allowed(), bitorder="little")
            logits[bits[: len(logits)] == 0] = -np.inf
            logits[len(bits) :] = -np.inf
        history = np.array(self.ids, np.int32) if request.sampling.penalties else None
        token = request.sampling.choose(logits, len(self.ids), history, prompt)
        if logs is None:
            return Choice(token)
        top = _largest(logs, request.top_logprobs or 0)
        return Choice(token, float(logs[token]), tuple((i, float(logs[i])) for i in top))

    def add(self, choice: Choice, tokenizer: Tokenizer, room: int) -> Piece:
        """The piece that a chosen token makes. `room`: tokens that the context still takes."""
        request, token = self.request, choice.token
        if token in request.eos:
            return self.end("eos")
        if self.stream is None:
            self.stream = tokenizer.stream()
        self.tokens.append(token)
        self.ids.append(token)
        if request.constraint is not None:
            request.constraint.take(token)
        text = self.stops.push(self.stream.push(token))
        if self.stops.stopped:
            return Piece(text, (choice,), "stop")
        reason = None
        if request.constraint is not None and request.constraint.complete:
            reason = "eos"
        elif request.max_tokens is not None and len(self.tokens) >= request.max_tokens:
            reason = "length"
        elif room < 1:
            reason = "context"
        if reason is None:
            return Piece(text, (choice,))
        rest = self.end(reason)
        return Piece(text + rest.text, (choice,), rest.finish_reason)

    def end(self, reason: str) -> Piece:
        """The last piece: the text that was held back."""
        text = "" if self.stream is None else self.stream.flush()
        text = self.stops.push(text)
        return Piece(text + self.stops.flush(), (), "stop" if self.stops.stopped else reason)


def _log_probabilities(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    logs: Floats = shifted - np.float32(math.log(np.exp(shifted, dtype=np.float64).sum()))
    return logs


def _largest(values: Floats, count: int) -> list[int]:
    """The places of the largest values, best first, the lowest place among equals."""
    if not count:
        return []
    found = np.argpartition(-values, min(count, len(values) - 1))[:count]
    order: list[int] = found[np.lexsort((found, -values[found]))].tolist()
    return order
