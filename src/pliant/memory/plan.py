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
    "MOST_KL",
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

KV_DIVERGENCE = 0.1
"""Part of the expected KL that coded KV may add where the bits of KV are free."""

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

    A KV page takes `kv_page_bytes` as long as it is exact. If full pages are coded, `kv_rungs[r]`
    is what one takes with r rungs, `kv_quality[r - 1]` the KL that this is expected to cost, and
    `kv_chunk` the exact pages that a chunk of a prompt may fill at once; else they are empty.
    """

    weights: Sequence[int]
    arena: Sequence[int]
    coded: int
    quality: Sequence[tuple[int, float]]
    context: int
    kv_page_tokens: int
    kv_page_bytes: int
    kv_rungs: Sequence[int] = ()
    kv_quality: Sequence[float] = ()
    kv_chunk: int = 0

    @property
    def rungs(self) -> int:
        """How many rungs there are to load."""
        return len(self.arena) - 1

    def pages(self, context: int) -> int:
        """KV pages that hold `context` tokens of one session."""
        return -(-context // self.kv_page_tokens)

    def kv(self, context: int, sessions: int) -> int:
        """Bytes of exact KV for `sessions` sessions of `context` tokens each."""
        return self.pages(context) * sessions * self.kv_page_bytes

    @property
    def kv_levels(self) -> range:
        """The numbers of rungs that coded pages can have; 0 alone if pages are exact."""
        return range(1, len(self.kv_rungs)) if self.kv_rungs else range(1)

    def page_bytes(self, level: int) -> int:
        """Bytes of a full page with `level` rungs; 0: exact."""
        return self.kv_rungs[level] if level else self.kv_page_bytes

    def kv_bits(self, level: int) -> float:
        """Bits per value of a full page, scales included."""
        return 16 * self.page_bytes(level) / self.kv_page_bytes

    def tail(self, level: int) -> int:
        """What the newest page of a sequence, which is exact, takes beyond a coded one, in pages
        of that level."""
        return -(-self.kv_page_bytes // self.page_bytes(level)) - 1 if level else 0

    def exact_bytes(self, level: int, sequences: int) -> int:
        """Bytes of exact pages beside coded ones: the newest of each sequence, and those that a
        chunk fills. None where all are exact."""
        tails = sequences * self.tail(level) * self.page_bytes(level)
        return tails + self.kv_chunk * self.kv_page_bytes

    def kv_divergence(self, level: int) -> float:
        """The KL that coded pages are expected to cost, all of them being coded."""
        return self.kv_quality[level - 1] if level else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants held. None: not stated.

    `memory`: bytes of the whole process. `weights`: bytes of plies and scales. `context`: tokens of
    each of `sessions`. `min_bits`, `max_kl`: the floor of quality. `kv_bits`, `kv_floor`: the most
    and the fewest bits of a value in coded pages. `least_context`, `least_pages`, `least_tails`:
    the most tokens of one session, and the KV pages and the sequences of all that are promised
    already, which the plan must not take away.
    """

    memory: int | None = None
    weights: int | None = None
    context: int | None = None
    sessions: int = 1
    min_bits: float | None = None
    max_kl: float | None = None
    kv_bits: float | None = None
    kv_floor: float | None = None
    least_context: int = 0
    least_pages: int = 0
    least_tails: int = 0

    def __post_init__(self) -> None:
        if self.sessions < 1:
            raise UsageError(f"sessions must be at least 1, and not {self.sessions}")
        if self.context is not None and self.context < 1:
            raise UsageError(f"the context must be at least 1 token, and not {self.context}")
        if self.min_bits is not None and not 0 <= self.min_bits <= 64:
            raise UsageError(f"min_bits must be from 0 to 64, and not {self.min_bits}")
        if self.max_kl is not None and not self.max_kl > 0:
            raise UsageError(f"max_kl must be above 0, and not {self.max_kl}")
        for name, bits in (("kv_bits", self.kv_bits), ("kv_floor", self.kv_floor)):
            if bits is not None and not 1 <= bits <= 16:
                raise UsageError(f"{name} must be from 1 to 16, and not {bits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is held. `fixed` are the parts that no plan can change, name and bytes.

    `kv_level`: rungs of coded KV pages, 0 if they are exact; `kv_bits`: bits per value that they
    have. `kv_pages` counts pages of that level, and `kv_tail` how many of them the newest page of a
    sequence is worth besides its own.
    """

    memory: int | None
    rungs: int
    weights: int
    arena: int
    context: int
    sessions: int
    kv_pages: int
    kv: int
    kv_level: int
    kv_bits: float
    kv_tail: int
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
    return _plan(sizes, fixed, wish, rungs, least_context(sizes, wish), kv_levels(sizes, wish)[0])


def kv_levels(sizes: PackSizes, wish: Wish) -> list[int]:
    """How many rungs coded pages may have, rising; [0] if pages are exact. UsageError if none."""
    levels = list(sizes.kv_levels)
    if not sizes.kv_rungs:
        return levels
    most = 16.0 if wish.kv_bits is None else wish.kv_bits
    levels = [level for level in levels if sizes.kv_bits(level) <= most]
    if wish.kv_bits is not None:
        levels = levels[-1:]  # the wish is no limit
    floor = 0.0 if wish.kv_floor is None else wish.kv_floor
    within = [level for level in levels if sizes.kv_bits(level) >= floor]
    if not within:
        least, top = sizes.kv_bits(1), sizes.kv_bits(len(sizes.kv_rungs) - 1)
        raise UsageError(
            f"at most {most:g} and at least {floor:g} bits of KV cannot be had: this pack has "
            f"{least:.2f} to {top:.2f}"
        )
    return within


def make_plan(sizes: PackSizes, fixed: tuple[tuple[str, int], ...], wish: Wish) -> Plan:
    """The best plan within the wish.

    Without `memory` everything is held, up to the wished weights and context. With it, the context
    is the wished one and the weights get the rest, in whole rungs. If no context was wished, KV
    gets one part in KV_SHARE of what the fixed parts leave, at least LEAST_CONTEXT tokens, the
    weights the rest, and KV what they leave over.

    If pages are coded and their bits were not stated, they have those with which the expected KL of
    weights and KV together is least; without a stated context, the fewest that add no more than a
    tenth to that of the weights. Raises BudgetError with the sum if the smallest plan is larger
    than `memory`.
    """
    floor = smallest(sizes, fixed, wish)
    levels = kv_levels(sizes, wish)
    most_context = sizes.context if wish.context is None else wish.context
    if wish.memory is None:
        rungs = floor.rungs if wish.weights is not None else sizes.rungs
        return _plan(sizes, fixed, wish, rungs, most_context, levels[-1])
    if floor.total > wish.memory:
        raise BudgetError(_refusal(sizes, wish, floor))
    room = wish.memory - sum(size for _, size in fixed)
    plans = [
        plan
        for level in levels
        if (plan := _plan_at(sizes, fixed, wish, level, floor.rungs, room)).total <= wish.memory
    ]
    if wish.context is None:
        for plan in plans:
            if sizes.kv_divergence(plan.kv_level) <= KV_DIVERGENCE * (plan.expected_kl or 0.0):
                return plan
        return plans[-1]
    return min(plans, key=lambda plan: (plan.expected_kl or 0.0, -plan.kv_level))


def _plan_at(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    wish: Wish,
    level: int,
    rungs: int,
    room: int,
) -> Plan:
    """The best plan with KV pages of `level` rungs, in `room` bytes for weights and KV; at least
    `rungs` of the weights."""
    most_context = sizes.context if wish.context is None else wish.context
    least = _plan(sizes, fixed, wish, rungs, least_context(sizes, wish), level)
    if wish.weights is None:
        most = _plan(sizes, fixed, wish, rungs, most_context, level)
        for_kv = max(min(room // KV_SHARE, most.kv), least.kv)
        rungs = max(rungs, bisect_right(sizes.arena, room - for_kv) - 1)
    left = room - sizes.arena[rungs] - sizes.exact_bytes(level, _sequences(wish))
    pages = max(left, 0) // (sizes.page_bytes(level) * wish.sessions)
    context = min(pages * sizes.kv_page_tokens, most_context)
    return _plan(sizes, fixed, wish, rungs, max(context, least_context(sizes, wish)), level)


def _fixed_rungs(sizes: PackSizes, wish: Wish, floor: int) -> int:
    assert wish.weights is not None
    rungs = rungs_within(sizes, wish.weights)
    if rungs < floor:
        raise BudgetError(
            f"{format_mb(wish.weights)} of weights were asked for, and the floor of quality that "
            f"was set (min_bits, max_kl) needs {format_mb(sizes.weights[floor])}"
        )
    return rungs


def _sequences(wish: Wish) -> int:
    """Sequences whose newest page is in memory."""
    return max(wish.sessions, wish.least_tails)


def _plan(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    wish: Wish,
    rungs: int,
    context: int,
    level: int,
) -> Plan:
    weights = sizes.weights[rungs]
    pages = max(sizes.pages(context) * wish.sessions, wish.least_pages)
    exact = sizes.exact_bytes(level, _sequences(wish))
    kl = expected_kl(sizes.quality, weights) if sizes.coded else None
    return Plan(
        memory=wish.memory,
        rungs=rungs,
        weights=weights,
        arena=sizes.arena[rungs],
        context=max(context, wish.least_context),
        sessions=wish.sessions,
        kv_pages=pages + _sequences(wish) * sizes.tail(level),
        kv=pages * sizes.page_bytes(level) + exact,
        kv_level=level,
        kv_bits=sizes.kv_bits(level),
        kv_tail=sizes.tail(level),
        fixed=fixed,
        bits_per_weight=bits_per_weight(weights, sizes.coded),
        expected_kl=kl if kl is None else min(kl + sizes.kv_divergence(level), MOST_KL),
    )


def _refusal(sizes: PackSizes, wish: Wish, floor: Plan) -> str:
    assert wish.memory is not None
    rungs = "1 rung" if floor.rungs == 1 else f"{floor.rungs} rungs"
    parts = [*floor.fixed, (f"weights, {rungs}", floor.arena)]
    other = "" if wish.context is None else ", or ask for less context"
    pages = sizes.pages(least_context(sizes, wish)) * floor.sessions
    if wish.least_pages >= pages:
        kv = f"kv, {wish.least_pages * sizes.kv_page_tokens} tokens in use or promised"
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
