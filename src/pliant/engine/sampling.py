"""How the next token is chosen: options, checked once, and the call into the core."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pliant.engine.seam import Floats
from pliant.errors import UsageError

__all__ = ["Sampling", "new_seed"]


def new_seed() -> int:
    """A seed that was not used before, in 53 bits, so that JSON carries it unchanged."""
    return int.from_bytes(os.urandom(7), "little") >> 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Options of one answer. UsageError for values that have no meaning.

    First `logit_bias` is added and the penalties apply, then the temperature; then only the tokens
    with at least `min_p` times the largest probability are kept, of these the `top_k` likeliest,
    of these the likeliest whose probabilities add up to `top_p`. At temperature 0 the largest logit
    wins, and the lowest id among equals. `repetition_penalty` divides positive and multiplies
    negative logits of all tokens before (Keskar et al., CTRL, 2019); `presence_penalty` and
    `frequency_penalty` are subtracted for tokens of the answer, once and for each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 1000)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise UsageError("top_p must be above 0; for the likeliest token set temperature=0")
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        _integer("top_k", self.top_k, 2**31)
        _integer("seed", self.seed, 2**64)
        for token, value in self.logit_bias.items():
            _integer("a token of logit_bias", token, 2**31)
            _number("logit_bias", value, -math.inf, math.inf)

    @property
    def penalties(self) -> bool:
        """Whether the choice depends on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def choose(
        self, logits: Floats, position: int, history: npt.NDArray[np.int32] | None, prompt: int
    ) -> int:
        """The id of the next token.

        `logits`: float32 [vocabulary], writable. `position`: how many tokens are before it; with
        the seed it makes the random number, so the same tokens come whatever else runs. `history`:
        int32 [tokens], prompt and answer, the answer from `prompt` on; needed for penalties.
        """
        from pliant._core import sample

        return sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            position=position,
            repetition=self.repetition_penalty,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
            history=history if self.penalties else None,
            prompt=prompt,
            bias=list(self.logit_bias.items()),
        )


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, and not {value!r}")


def _integer(name: str, value: object, end: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
        raise UsageError(f"{name} must be an integer from 0 to {end - 1}, and not {value!r}")
