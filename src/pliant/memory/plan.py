"""What fits: from sizes and a budget to rungs, context, bits per weight and expected KL.

Pure functions of numbers. Sizes are in bytes, contexts in tokens, KL in nats. "Weights" are the
bytes of resident plies and scales (docs/format.md section 6); "arena" is what their rungs take in
memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pliant.errors import BudgetError, UsageError
from pliant.memory.ledger import sum_lines
from pliant.sizes import MIB, format_mb, format_size

__all__ = [
    "KV_SHARE",
    "LEAST_CONTEXT",
    "PackSizes",
    "Plan",
    "Wish",
    "bits_per_weight",
    "expected_kl",
    "floor_rungs",
    "make_plan",
    "rungs_within",
    "smallest",
    "tokens_per_second",
]

LEAST_CONTEXT = 512
"""Tokens that are held when the budget is small and no context was asked for."""

KV_SHARE = 6
"""Without a stated context one part in six of what is left for weights and KV goes to KV."""

MOST_KL = 10.0
"""Expected KL is never said to be more: a model that is so far off guesses blindly."""

STEP_SHARE = 0.6
"""Part of the plain read bandwidth that a step of a small model reaches, for estimates of speed."""

STEP_SECONDS = 2e-4
"""Time of a step that does not depend on the resident bytes, for estimates of speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSizes:
    """What a model takes, apart from what is always there.

    `weights[k]` and `arena[k]` are for the first k rungs; both rise, and have one entry more than
    there are rungs. `coded` counts the weights of the matrices that are coded in plies, `quality`
    has points of (weights, KL), `context` is the longest that the model was made for.
    """

    weights: Sequence[int]
    arena: Sequence[int]
    coded: int
    quality: Sequence[tuple[int, float]]
    context: int
    kv_page_tokens: int
    kv_page_bytes: int

    @property
    def rungs(self) -> int:
        """How many rungs there are to load."""
        return len(self.arena) - 1

    def pages(self, context: int) -> int:
        """KV pages that hold `context` tokens of one session."""
        return -(-context // self.kv_page_tokens)

    def kv(self, context: int, sessions: int) -> int:
        """Bytes of KV for `sessions` sessions of `context` tokens each."""
        return self.pages(context) * sessions * self.kv_page_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants held. None: not stated.

    `memory`: bytes of the whole process. `weights`: bytes of plies and scales. `context`: tokens of
    each of `sessions`. `min_bits`, `max_kl`: the floor of quality. `least_context`, `least_pages`:
    the most tokens of one session and the KV pages of all that are promised already, which the plan
    must not take away.
    """

    memory: int | None = None
    weights: int | None = None
    context: int | None = None
    sessions: int = 1
    min_bits: float | None = None
    max_kl: float | None = None
    least_context: int = 0
    least_pages: int = 0

    def __post_init__(self) -> None:
        if self.sessions < 1:
            raise UsageError(f"sessions must be at least 1, and not {self.sessions}")
        if self.context is not None and self.context < 1:
            raise UsageError(f"the context must be at least 1 token, and not {self.context}")
        if self.min_bits is not None and not 0 <= self.min_bits <= 64:
            raise UsageError(f"min_bits must be from 0 to 64, and not {self.min_bits}")
        if self.max_kl is not None and not self.max_kl > 0:
            raise UsageError(f"max_kl must be above 0, and not {self.max_kl}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is held. `fixed` are the parts that no plan can change, name and bytes."""

    memory: int | None
    rungs: int
    weights: int
    arena: int
    context: int
    sessions: int
    kv_pages: int
    kv: int
    fixed: tuple[tuple[str, int], ...]
    bits_per_weight: float | None
    expected_kl: float | None

    @property
    def total(self) -> int:
        """Bytes of the whole process once its context is full."""
        return sum(size for _, size in self.lines())

    def lines(self) -> tuple[tuple[str, int], ...]:
        """Every part and its bytes."""
        return (*self.fixed, ("weights", self.arena), ("kv", self.kv))


def bits_per_weight(weights: int, coded: int) -> float | None:
    """8 · resident bytes / weights that are coded in plies; None if none are."""
    return 8 * weights / coded if coded else None


def expected_kl(quality: Sequence[tuple[int, float]], weights: int) -> float | None:
    """Mean KL divergence to the source, in nats, at `weights` bytes of plies and scales.

    The logarithm is interpolated linearly between the measured points, and carried on with the
    slope of the last two beyond them, up to MOST_KL. None if nothing was measured.
    """
    if not quality:
        return None
    points = [(size, math.log(max(kl, 1e-9))) for size, kl in quality]
    if len(points) == 1:
        return math.exp(points[0][1])
    at = min(max(bisect_right([size for size, _ in points], weights), 1), len(points) - 1)
    (left, low), (right, high) = points[at - 1], points[at]
    value = low + (high - low) * (weights - left) / (right - left)
    return min(math.exp(min(value, 10.0)), MOST_KL)


def tokens_per_second(weights: int, bandwidth: float) -> float:
    """Estimated decode speed, where plain reading gives `bandwidth` bytes/s.

    A step reads each resident byte once; small matrices reach part of the bandwidth.
    """
    return 1 / (STEP_SECONDS + weights / (bandwidth * STEP_SHARE))


def rungs_within(sizes: PackSizes, weights: int) -> int:
    """The most rungs whose plies and scales take at most `weights` bytes; or BudgetError."""
    rungs = bisect_right(sizes.weights, weights) - 1
    least = min(1, sizes.rungs)
    if rungs < least:
        raise BudgetError(
            f"{format_mb(weights)} of weights are too few: the scales and the first rung of this "
            f"pack take {format_mb(sizes.weights[least])}"
        )
    return rungs


def floor_rungs(sizes: PackSizes, wish: Wish) -> int:
    """The fewest rungs that keep the wished quality; BudgetError if even all of them do not."""
    rungs = min(1, sizes.rungs)
    if wish.min_bits is not None:
        if not sizes.coded:
            raise UsageError("min_bits has no meaning for a pack that is not coded in plies")
        while (bits_per_weight(sizes.weights[rungs], sizes.coded) or 0) < wish.min_bits:
            rungs += 1
            if rungs > sizes.rungs:
                most = bits_per_weight(sizes.weights[-1], sizes.coded)
                raise BudgetError(
                    f"at least {wish.min_bits:g} bits per weight were asked for, and all "
                    f"{sizes.rungs} rungs that are there have {most:.2f}"
                )
    if wish.max_kl is not None:
        if not sizes.quality:
            raise UsageError("max_kl needs a pack with measured quality, and this one has none")
        while (expected_kl(sizes.quality, sizes.weights[rungs]) or 0) > wish.max_kl:
            rungs += 1
            if rungs > sizes.rungs:
                least = expected_kl(sizes.quality, sizes.weights[-1])
                raise BudgetError(
                    f"an expected KL of at most {wish.max_kl:g} was asked for, and with all "
                    f"{sizes.rungs} rungs that are there it is {least:.3g}"
                )
    return rungs


def least_context(sizes: PackSizes, wish: Wish) -> int:
    """Tokens of every session below which no plan goes; UsageError if they cannot be had."""
    if wish.context is None:
        return min(LEAST_CONTEXT, sizes.context)
    if wish.context > sizes.context:
        raise UsageError(
            f"a context of {wish.context} tokens was asked for, and this model was made for at "
            f"most {sizes.context}"
        )
    return wish.context


def smallest(sizes: PackSizes, fixed: tuple[tuple[str, int], ...], wish: Wish) -> Plan:
    """The plan that takes the fewest bytes and grants the wish, whatever `wish.memory` says."""
    rungs = floor_rungs(sizes, wish)
    if wish.weights is not None:
        rungs = _fixed_rungs(sizes, wish, rungs)
    return _plan(sizes, fixed, wish, rungs, least_context(sizes, wish))


def make_plan(sizes: PackSizes, fixed: tuple[tuple[str, int], ...], wish: Wish) -> Plan:
    """The best plan within the wish.

    Without `memory` everything is held, up to the wished weights and context. With it, the context
    is the wished one and the weights get the rest, in whole rungs. If no context was wished, KV
    gets one part in KV_SHARE of what the fixed parts leave, at least LEAST_CONTEXT tokens, the
    weights the rest, and KV what they leave over. Raises BudgetError with the sum if the smallest
    plan is larger than `memory`.
    """
    floor = smallest(sizes, fixed, wish)
    most_context = sizes.context if wish.context is None else wish.context
    if wish.memory is None:
        rungs = floor.rungs if wish.weights is not None else sizes.rungs
        return _plan(sizes, fixed, wish, rungs, most_context)
    if floor.total > wish.memory:
        raise BudgetError(_refusal(sizes, wish, floor))
    room = wish.memory - sum(size for _, size in fixed)
    rungs = floor.rungs
    if wish.weights is None:
        most_kv = sizes.kv(most_context, wish.sessions)
        for_kv = max(min(room // KV_SHARE, most_kv), floor.kv)
        rungs = max(rungs, bisect_right(sizes.arena, room - for_kv) - 1)
    pages = (room - sizes.arena[rungs]) // (sizes.kv_page_bytes * wish.sessions)
    context = min(pages * sizes.kv_page_tokens, most_context)
    return _plan(sizes, fixed, wish, rungs, max(context, least_context(sizes, wish)))


def _fixed_rungs(sizes: PackSizes, wish: Wish, floor: int) -> int:
    assert wish.weights is not None
    rungs = rungs_within(sizes, wish.weights)
    if rungs < floor:
        raise BudgetError(
            f"{format_mb(wish.weights)} of weights were asked for, and the floor of quality that "
            f"was set (min_bits, max_kl) needs {format_mb(sizes.weights[floor])}"
        )
    return rungs


def _plan(
    sizes: PackSizes, fixed: tuple[tuple[str, int], ...], wish: Wish, rungs: int, context: int
) -> Plan:
    weights = sizes.weights[rungs]
    pages = max(sizes.pages(context) * wish.sessions, wish.least_pages)
    return Plan(
        memory=wish.memory,
        rungs=rungs,
        weights=weights,
        arena=sizes.arena[rungs],
        context=max(context, wish.least_context),
        sessions=wish.sessions,
        kv_pages=pages,
        kv=pages * sizes.kv_page_bytes,
        fixed=fixed,
        bits_per_weight=bits_per_weight(weights, sizes.coded),
        expected_kl=expected_kl(sizes.quality, weights) if sizes.coded else None,
    )


def _refusal(sizes: PackSizes, wish: Wish, floor: Plan) -> str:
    assert wish.memory is not None
    rungs = "1 rung" if floor.rungs == 1 else f"{floor.rungs} rungs"
    parts = [*floor.fixed, (f"weights, {rungs}", floor.arena)]
    other = "" if wish.context is None else ", or ask for less context"
    if floor.kv_pages == wish.least_pages:
        kv = f"kv, {floor.kv_pages * sizes.kv_page_tokens} tokens in use or promised"
        other = ", or wait until the answers in progress have ended"
    else:
        kv = f"kv, {least_context(sizes, wish)} tokens"
        kv += "" if floor.sessions == 1 else f" x {floor.sessions} sessions"
    parts.append((kv, floor.kv))
    needed = -(-floor.total // MIB)
    return (
        f"{format_size(wish.memory)} are too little for this model: give at least {needed}MiB"
        f"{other}; needed are\n{sum_lines(tuple(parts))}"
    )
