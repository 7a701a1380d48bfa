"""The governor of a model: what the rule of `pliant.memory.governor` moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pliant.engine.holdings import Holdings
from pliant.errors import BudgetError
from pliant.memory.governor import Governor, Policy
from pliant.memory.plan import PackSizes, Wish, make_plan, smallest
from pliant.memory.pressure import Sources
from pliant.sizes import format_size

__all__ = ["Steering", "first_budget", "steer"]


def first_budget(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    wish: Wish,
    keep_free: int | None,
    sources: Sources,
) -> int:
    """The budget to load with, in bytes; BudgetError if even the smallest plan is too much."""
    seen, floor = sources.read(), smallest(sizes, fixed, wish)
    policy = Policy.keeping(keep_free, seen)
    room = policy.first(seen)
    if room < floor.total:
        raise BudgetError(
            f"{format_size(seen.available)} of memory are available ({seen.bound}), and "
            f"{format_size(policy.keep_free)} are to be kept free: that leaves "
            f"{format_size(max(room, 0))}, and the smallest plan of this model needs "
            f"{format_size(floor.total)}: give a smaller keep-free size, or end other programs"
        )
    return min(room, make_plan(sizes, fixed, replace(wish, memory=None)).total)


class Steering:
    """What the governor sees of a model and does to it."""

    __slots__ = ("_check", "_holdings", "_most")

    def __init__(self, holdings: Holdings, check: Callable[[], None]) -> None:
        """`check` raises if the model was closed."""
        self._holdings = holdings
        self._check = check
        self._most = holdings.plan_for(replace(holdings.wish, memory=None)).total

    def current(self) -> int:
        """The budget in bytes."""
        self._check()
        return self._holdings.wish.memory or self._holdings.plan.total

    def bounds(self) -> tuple[int, int]:
        """The smallest budget that is possible now, and the largest that has a use."""
        self._give_up_after_an_error()
        return self._holdings.least().total, self._most

    def busy(self) -> bool:
        """Whether an earlier growth is still read."""
        return self._holdings.change is not None and not self._holdings.change.done

    def move(self, budget: int) -> str:
        """Go there; the rungs of a growth follow in the background."""
        change = self._holdings.move(self._holdings.limits(budget, None), self._check).start()
        plan = change.plan
        bits = plan.bits_per_weight
        quality = "plain weights" if bits is None else f"{bits:.2f} bits/weight"
        return f"{quality}, context {plan.context}"

    def _give_up_after_an_error(self) -> None:
        """What could not be read once is not asked for again, until somebody says so."""
        change = self._holdings.change
        if change is not None and change.error is not None:
            self._most = min(self._most, self.current())


def steer(
    holdings: Holdings,
    check: Callable[[], None],
    *,
    keep_free: int | None,
    log: Callable[[str], None] | None,
    sources: Sources | None,
) -> Governor:
    """A governor that has begun, and has moved the model to where it should be now."""
    sources = sources or Sources()
    seen, steering = sources.read(), Steering(holdings, check)
    policy = Policy.keeping(keep_free, seen)
    floor, most = steering.bounds()
    first = max(min(policy.first(seen), most), floor)
    if first != holdings.wish.memory:
        steering.move(first)
    return Governor(steering, policy, sources=sources, log=log).start()
