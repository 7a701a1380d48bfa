"""What the engine reports: plain values, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Depth", "DepthTrack", "GenerationResult", "ParkReport", "Report"]


@dataclass(frozen=True, slots=True)
class Depth:
    """How much of the model steps use: rungs, bytes of plies and scales, and what that means.

    `bits_per_weight` is None for a model without coded matrices, `expected_kl` (nats) also if the
    pack has no measurements. `kv_level` is the level of coded KV pages, 0 if they are exact, and
    `kv_bits` the mean bits of a value in a full context, scales included; what fewer than 16 cost
    is in `expected_kl`.
    """

    rungs: int
    weights: int
    bits_per_weight: float | None
    expected_kl: float | None
    kv_bits: float = 16.0
    kv_level: int = 0

    @property
    def state(self) -> int:
        """A number for the rungs of weights and the level of KV: what is made at one is the same
        every time."""
        return self.rungs << 16 | self.kv_level


class DepthTrack:
    """The depths that the steps of one answer were made with."""

    __slots__ = ("_bits", "_first", "_kl", "_kl_highest", "_kv_lowest", "_lowest", "_steps")

    def __init__(self) -> None:
        self._steps = 0
        self._first: Depth | None = None
        self._lowest: Depth | None = None
        self._kl_highest: float | None = None
        self._kv_lowest = 16.0
        # Sums of differences to the first step: means are exact where nothing changed.
        self._bits = self._kl = 0.0

    def add(self, depth: Depth) -> None:
        """Count one step."""
        self._steps += 1
        if self._first is None or self._lowest is None:
            self._first = self._lowest = depth
        self._bits += (depth.bits_per_weight or 0.0) - (self._first.bits_per_weight or 0.0)
        self._kl += (depth.expected_kl or 0.0) - (self._first.expected_kl or 0.0)
        if depth.weights < self._lowest.weights:
            self._lowest = depth
        if depth.expected_kl is not None:
            self._kl_highest = max(self._kl_highest or 0.0, depth.expected_kl)
        self._kv_lowest = min(self._kv_lowest, depth.kv_bits)

    def values(self) -> dict[str, Any]:
        """The quality fields of a result."""
        first, low = self._first, self._lowest
        bits = first.bits_per_weight if first else None
        kl = first.expected_kl if first else None
        return {
            "bits_per_weight": bits if bits is None else bits + self._bits / self._steps,
            "bits_per_weight_lowest": low.bits_per_weight if low else None,
            "expected_kl": kl if kl is None else kl + self._kl / self._steps,
            "expected_kl_highest": self._kl_highest,
            "kv_bits_lowest": self._kv_lowest,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """One answer, and what it was made with.

    `finish_reason`: `eos` (the model ended it), `stop` (a stop text came), `length` (max_tokens),
    `context` (no room for more), `cancelled`, or None while it goes on. `bits_per_weight` and
    `expected_kl` are means over the steps; `..._lowest` and `..._highest` are those of the worst
    step, and differ from the mean if the budget moved meanwhile; `kv_bits_lowest` are the fewest
    bits that a full page of the KV cache had in a step. Times are in seconds.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str | None
    seed: int
    bits_per_weight: float | None
    bits_per_weight_lowest: float | None
    expected_kl: float | None
    expected_kl_highest: float | None
    kv_bits_lowest: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Speed of reading the prompt, without what was known already; None if nothing was read."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prefill_seconds if read > 0 and self.prefill_seconds > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the steps after the prompt, each of one token; None if there was none."""
        steps = self.decode_steps
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """All fields and both speeds, as plain values."""
        return {
            **asdict(self),
            "tokens": list(self.tokens),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkReport:
    """Pages of the KV cache that went to disk or were given up.

    `folder` (None: there is none) takes up to `limit` bytes, and has `bytes`. Of pages that were
    kept for reuse and had to go, `kept` are there and `lost` are not: they do not come back.
    `broken` ones could not be used. For `read` pages of beginnings and sessions
    reading was expected to be faster than computing, for `computed` ones it was not; where that is
    so in a beginning, its first such page is counted. It goes by the rates that were measured:
    `bytes_per_second` of reading, `tokens_per_second` of prompts.
    """

    folder: str | None
    limit: int
    bytes: int
    kept: int
    lost: int
    broken: int
    read: int
    computed: int
    bytes_per_second: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The state of a model. All sizes in bytes.

    `ledger` has for each owner what it holds and what of it is in memory; `free` + the sum of what
    is held = `total`. `matrices` has the mean depth in plies of each coded matrix. `in_flight` are
    the sessions with an answer in progress; of `parked` ones the KV is on disk, `parked_bytes`.
    """

    pack: str
    budget: int | None
    resident: int
    peak: int
    total: int
    free: int
    ledger: dict[str, tuple[int, int]]
    rungs: int
    rungs_available: int
    rungs_of_pack: int
    weights: int
    bits_per_weight: float | None
    expected_kl: float | None
    kv_bits: float
    context: int
    sessions: int
    in_flight: int
    parked: int
    parked_bytes: int
    park: ParkReport
    threads: int
    isa: str
    matrices: dict[str, float] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {
            **asdict(self),
            "ledger": {
                name: {"held": held, "touched": touched}
                for name, (held, touched) in self.ledger.items()
            },
        }
