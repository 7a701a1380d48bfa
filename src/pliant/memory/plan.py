"""What fits: from sizes and a budget to rungs, context, bits per weight and expected KL.

Pure functions of numbers. Sizes are in bytes, contexts in tokens, KL in nats. "Weights" are the
bytes of resident plies and scales (docs/format.md section 6); "arena" is what their rungs take in
memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pliant.errors import BudgetError, UsageError
from pliant.memory.kv_ages import (
    LEVELS_PER_BIT,
    SLOPE,
    Ages,
    PageBytes,
    Schedule,
    least_rungs,
    make_schedule,
)
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
    is what one takes with r rungs, and `kv_quality[r - 1]` the KL that this is expected to cost
    where all have so many; else they are empty. How many rungs a page has depends on its age and on
    the level; level 0 is exact. `kv_global` and `kv_local_age` are as in `PageBytes`; `kv_chunk`
    are the pages that a chunk of a prompt may fill at once.
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
    kv_global: Sequence[int] = ()
    kv_local_age: int = 0
    kv_chunk: int = 0

    @property
    def rungs(self) -> int:
        """How many rungs there are to load."""
        return len(self.arena) - 1

    def pages(self, context: int) -> int:
        """KV pages that hold `context` tokens of one session."""
        return -(-context // self.kv_page_tokens)

    @property
    def kv_levels(self) -> range:
        """The levels that pages can have; 0 alone if they are exact."""
        if not self.kv_rungs:
            return range(1)
        bits = self._page.bits
        ages = SLOPE * math.log2(max(self.pages(self.context), 1))
        least = math.ceil(LEVELS_PER_BIT * bits[least_rungs(bits)])
        return range(least, math.ceil(LEVELS_PER_BIT * (bits[-1] + ages)) + 1)

    @property
    def _page(self) -> PageBytes:
        whole = (self.kv_page_bytes, *self.kv_rungs[1:])
        return PageBytes(whole, tuple(self.kv_global), self.kv_local_age)

    def schedule(self, level: int) -> Schedule:
        """What pages have at each age."""
        return make_schedule(level, self._page, self.pages(self.context) + 1)

    def kv_bytes(self, level: int, ages: Ages) -> int:
        """Bytes of some sequences. Where pages vary with age, each has one more as it is written:
        exact and whole."""
        schedule = self.schedule(level)
        written = ages.sequences if schedule.varies(len(ages.full)) else ages.partial
        return schedule.bytes(ages.full) + written * self.kv_page_bytes

    def kv_session(self, level: int, tokens: int) -> int:
        """Bytes of one session of so many tokens: `kv_bytes` of it alone."""
        schedule, (full, rest) = self.schedule(level), divmod(tokens, self.kv_page_tokens)
        written = int(rest > 0 or schedule.varies(full))
        return schedule.total(full) + written * self.kv_page_bytes

    def kv_context(self, level: int, size: int) -> int:
        """Tokens of one session that fit into `size` bytes, in whole pages."""
        return max(self.schedule(level).pages_within(size), 0) * self.kv_page_tokens

    def kv_in_chunk(self, level: int, context: int) -> int:
        """Bytes that pages have too many while a chunk of a prompt fills them: coded ones are exact
        besides, and exact ones are whole where the oldest are not."""
        full = max(context // self.kv_page_tokens, 1)
        old = 0 if level else self.schedule(level).oldest(full)
        return self.kv_chunk * (self.kv_page_bytes - old)

    def kv_bits(self, level: int, context: int) -> float:
        """Mean bits of a value, scales included, in the full pages of so many tokens."""
        full = max(min(context, self.context) // self.kv_page_tokens, 1)
        return self.schedule(level).bits(full)

    def kv_divergence(self, level: int, context: int) -> float:
        """The KL that coded pages are expected to cost at the end of a context."""
        if not level:
            return 0.0
        quality = np.asarray(self.kv_quality, np.float64)
        return self.schedule(level).divergence(context // self.kv_page_tokens, quality)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user wants held. None: not stated.

    `memory`: bytes of the whole process. `weights`: bytes of plies and scales. `context`: tokens of
    each of `sessions`. `min_bits`, `max_kl`: the floor of quality. `kv_bits`, `kv_floor`: the most
    and the fewest mean bits of a value in coded pages. `least_context`, `held`: the most tokens of
    one session, and the KV that is promised already, which the plan must not take away; each of
    `held` alone.
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
    held: tuple[Ages, ...] = ()

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

    `kv`: bytes of the KV of all sessions, `kv_chunk` of them what pages have too many while a chunk
    of a prompt fills them; `kv_level`: the level of coded pages, 0 if they are exact; `kv_bits`:
    the mean bits per value in a full context; `kv_kl`: the KL that they are expected to cost there.
    """

    memory: int | None
    rungs: int
    weights: int
    arena: int
    context: int
    sessions: int
    kv: int
    kv_chunk: int
    kv_level: int
    kv_bits: float
    kv_kl: float
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


def _size(point: tuple[int, float]) -> int:
    return point[0]


def expected_kl(quality: Sequence[tuple[int, float]], weights: int) -> float | None:
    """Mean KL divergence to the source, in nats, at `weights` bytes of plies and scales.

    The logarithm is interpolated linearly between the measured points, and carried on with the
    slope of the last two beyond them, up to MOST_KL. None if nothing was measured.
    """
    if not quality:
        return None
    if len(quality) == 1:
        return quality[0][1]
    at = min(max(bisect_right(quality, weights, key=_size), 1), len(quality) - 1)
    (left, low), (right, high) = (
        (x, math.log(max(kl, 1e-9))) for x, kl in quality[at - 1 : at + 1]
    )
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


def _most_context(sizes: PackSizes, wish: Wish) -> int:
    return sizes.context if wish.context is None else wish.context


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
    context = least_context(sizes, wish)
    return _plan(sizes, fixed, wish, rungs, context, kv_levels(sizes, wish, context)[0])


def kv_levels(sizes: PackSizes, wish: Wish, context: int) -> list[int]:
    """The levels with which a full context has the wished bits, rising; [0] if pages are exact. Of
    a stated number of bits, the deepest alone. UsageError if there are none."""
    levels = list(sizes.kv_levels)
    if not sizes.kv_rungs:
        return levels
    floor, most = _wished_bits(wish)
    bits = [sizes.kv_bits(level, context) for level in levels]
    within = [level for level, one in zip(levels, bits, strict=True) if floor <= one <= most]
    if not within:
        raise UsageError(
            f"at most {most:g} and at least {floor:g} bits of KV cannot be had: in a context of "
            f"{context} tokens this pack has {bits[0]:.2f} to {bits[-1]:.2f}"
        )
    return within if wish.kv_bits is None else within[-1:]


def _wished_bits(wish: Wish) -> tuple[float, float]:
    """The fewest and the most bits of KV."""
    floor = 0.0 if wish.kv_floor is None else wish.kv_floor
    return floor, 16.0 if wish.kv_bits is None else wish.kv_bits


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
    most_context = _most_context(sizes, wish)
    if wish.memory is None:
        rungs = floor.rungs if wish.weights is not None else sizes.rungs
        level = kv_levels(sizes, wish, most_context)[-1]
        return _plan(sizes, fixed, wish, rungs, most_context, level)
    if floor.total > wish.memory:
        raise BudgetError(_refusal(sizes, wish, floor))
    if wish.kv_bits is not None:
        return next(_plans(sizes, fixed, wish, floor.rungs, reversed(sizes.kv_levels)), floor)
    plans = _plans(sizes, fixed, wish, floor.rungs, sizes.kv_levels)
    if wish.context is not None:
        return min(plans, key=lambda plan: (plan.expected_kl or 0.0, -plan.kv_level), default=floor)
    best = floor
    for best in plans:
        if best.kv_kl <= KV_DIVERGENCE * (best.expected_kl or 0.0):
            break
    return best


def _plans(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    wish: Wish,
    rungs: int,
    levels: Iterable[int],
) -> Iterator[Plan]:
    """The best plan of each of these levels that fits and has the wished bits."""
    assert wish.memory is not None
    room = wish.memory - sum(size for _, size in fixed)
    floor, most = _wished_bits(wish)
    longest = _most_context(sizes, wish)
    for level in levels:
        if level and sizes.kv_bits(level, longest) > most:  # the more tokens, the fewer bits
            continue
        plan = _plan_at(sizes, fixed, wish, level, rungs, room)
        if plan.total <= wish.memory and (not level or floor <= plan.kv_bits <= most):
            yield plan


def _plan_at(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    wish: Wish,
    level: int,
    rungs: int,
    room: int,
) -> Plan:
    """The best plan with KV pages at a level, in `room` bytes for weights and KV; at least
    `rungs` of the weights."""
    most_context = _most_context(sizes, wish)
    least = _plan(sizes, fixed, wish, rungs, least_context(sizes, wish), level)
    if wish.weights is None:
        most = _plan(sizes, fixed, wish, rungs, most_context, level)
        for_kv = max(min(room // KV_SHARE, most.kv), least.kv)
        rungs = max(rungs, bisect_right(sizes.arena, room - for_kv) - 1)
    left = room - sizes.arena[rungs] - sizes.kv_in_chunk(level, most_context)
    context = min(sizes.kv_context(level, left // wish.sessions), most_context)
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


def _held(sizes: PackSizes, wish: Wish, level: int) -> int:
    """Bytes of the KV that is promised already."""
    return max((sizes.kv_bytes(level, ages) for ages in wish.held), default=0)


def _plan(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    wish: Wish,
    rungs: int,
    context: int,
    level: int,
) -> Plan:
    weights, longest = sizes.weights[rungs], max(context, wish.least_context)
    chunk = sizes.kv_in_chunk(level, longest)
    kv = max(sizes.kv_session(level, context) * wish.sessions, _held(sizes, wish, level))
    kl = expected_kl(sizes.quality, weights) if sizes.coded else None
    kv_kl = sizes.kv_divergence(level, longest)
    return Plan(
        memory=wish.memory,
        rungs=rungs,
        weights=weights,
        arena=sizes.arena[rungs],
        context=longest,
        sessions=wish.sessions,
        kv=kv + chunk,
        kv_chunk=chunk,
        kv_level=level,
        kv_bits=sizes.kv_bits(level, longest),
        kv_kl=kv_kl,
        fixed=fixed,
        bits_per_weight=bits_per_weight(weights, sizes.coded),
        expected_kl=kl if kl is None else min(kl + kv_kl, MOST_KL),
    )


def _refusal(sizes: PackSizes, wish: Wish, floor: Plan) -> str:
    assert wish.memory is not None
    rungs = "1 rung" if floor.rungs == 1 else f"{floor.rungs} rungs"
    parts = [*floor.fixed, (f"weights, {rungs}", floor.arena)]
    other = "" if wish.context is None else ", or ask for less context"
    asked = sizes.kv_session(floor.kv_level, least_context(sizes, wish)) * floor.sessions
    if wish.held and _held(sizes, wish, floor.kv_level) >= asked:
        most = max(sum(ages.full) + ages.partial for ages in wish.held)
        kv = f"kv, {most * sizes.kv_page_tokens} tokens in use or promised"
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
