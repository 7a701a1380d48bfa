"""What a running model holds: plan, ledger, rungs and KV cache, and how all of it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from pliant.engine.build import RungFiles
from pliant.engine.cache import Cache, Keep
from pliant.engine.kinds import Depth
from pliant.engine.page_folder import PageFolder
from pliant.engine.park import Park
from pliant.engine.seam import Executor
from pliant.engine.turns import Turns
from pliant.engine.weights import Weights
from pliant.errors import BudgetError, EngineError
from pliant.memory.budget import system_limit
from pliant.memory.ledger import Ledger
from pliant.memory.plan import (
    MOST_KL,
    PackSizes,
    Plan,
    Wish,
    floor_rungs,
    make_plan,
    smallest,
)

__all__ = ["Change", "Fixed", "Holdings"]

Fixed = tuple[tuple[str, int], ...]

_PARKING = 0.01
"""Seconds that a change of the budget may take to write pages that it gives up."""

_RESERVED = ("logits", "margin", "weights", "kv")  # not in memory at first


class Change:
    """A new budget that was accepted. What had to shrink has shrunk; what grows may still be read.

    plan: what holds at the end
    """

    __slots__ = ("_done", "_error", "_grow", "_holds", "plan")

    def __init__(self, plan: Plan, grow: Callable[[], bool] | None) -> None:
        """`grow` reads and publishes, and says whether it was the last word; None: all is done."""
        self.plan = plan
        self._grow = grow
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._holds = grow is None
        if grow is None:
            self._done.set()

    def run(self) -> None:
        """Do the rest in this thread. An error is raised here, and by `wait`."""
        if self._grow is None or self._done.is_set():
            return
        try:
            self._holds = self._grow()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._grow = None  # it knows the model, which may go before this
            self._done.set()

    def start(self) -> Change:
        """Do the rest in a thread of its own; returns itself."""
        if not self._done.is_set():
            threading.Thread(target=self._quietly, name="pliant-grow", daemon=True).start()
        return self

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the end. True: the plan holds; False: a newer change took over.

        Raises what made it fail, after which the state from before holds: ChecksumError, PackError
        or OSError; EngineError if it takes longer than `seconds`.
        """
        if not self._done.wait(seconds):
            raise EngineError(f"the model still grows after {seconds} s")
        if self._error is not None:
            raise self._error
        return self._holds

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self._done.is_set()

    @property
    def error(self) -> BaseException | None:
        """What made it fail, if it did."""
        return self._error

    def _quietly(self) -> None:
        try:
            self.run()
        except Exception:  # noqa: BLE001 - `wait` and `error` have it
            return


class Holdings:
    """Divides the budget of one model, and moves it.

    plan:    what is held for what, once the change in progress, if any, is done
    wish:    the limits that it came from
    ledger:  who holds how many bytes
    """

    def __init__(
        self,
        executor: Executor,
        files: RungFiles,
        turns: Turns,
        *,
        sizes: PackSizes,
        fixed: Fixed,
        wish: Wish,
        moved: Callable[[], None] = lambda: None,
        folder: PageFolder | None = None,
    ) -> None:
        """`moved` is called after each change of the limits: there may be more room. `folder`:
        where pages that are given up stay for later."""
        self.plan: Plan = make_plan(sizes, fixed, wish)
        self.wish = wish
        self.ledger = Ledger(self._total(wish, self.plan))
        self.weights = Weights(executor, files, sizes, turns)
        executor.reserve_kv(sizes.pages(sizes.context) * wish.sessions)
        park = Park(executor, folder)
        self.cache = Cache(executor, sizes, self.plan, park, lambda: self.depth.state)
        self.change: Change | None = None
        """The newest change."""
        self._executor = executor
        self._sizes = sizes
        self._fixed = fixed
        self._turns = turns
        self._moved = moved
        self._settled = (self.plan, wish)
        # What `depth` was made of last.
        self._depth = self.weights.depth, (0, 0), self.weights.depth
        for owner, size in self.plan.lines():
            self.ledger.hold(owner, size, touched=0 if owner in _RESERVED else None)

    def load(
        self, check: Callable[[], None], *, early: bool, log: Callable[[str], None] | None
    ) -> None:
        """Read the rungs of the plan, before anything else runs.

        `early`: only those of the floor of quality that was stated, if one was; the others follow
        beside the first steps, as after a change of the budget. `check` is called at their end,
        and `log` with a line if they cannot be read.
        """
        plan, wish, sizes = self.plan, self.wish, self._sizes
        first = plan.rungs
        if early and (wish.min_bits is not None or wish.max_kl is not None):
            first = floor_rungs(sizes, wish)
        with self._turns:
            ticket = self.weights.limit(plan.rungs)
        self.weights.grow(first, ticket, alone=True)
        if first < plan.rungs:
            # What holds if the others cannot be read.
            least = replace(wish, weights=sizes.weights[first])
            self._settled = make_plan(sizes, self._fixed, least), least

            def rest() -> bool:
                try:
                    return self._grow(plan, wish, ticket, check)
                except Exception as error:
                    check()  # a model that was closed meanwhile stays at nothing
                    if log is not None:
                        log(f"the model stays at its floor of quality: {error}")
                    raise

            self.change = Change(plan, rest).start()

    def close(self) -> None:
        """End a growth in progress, close files, delete what is parked; no step may come after."""
        self.weights.close()
        self.cache.close_all()

    @property
    def depth(self) -> Depth:
        """What steps use now, of weights and KV."""
        weights, kv = self.weights.depth, (self.cache.level, self.cache.context)
        if self._depth[0] is not weights or self._depth[1] != kv:
            self._depth = weights, kv, self._depth_at(self.cache.level)
        return self._depth[2]

    def depth_of(self, sequence: int) -> Depth:
        """What steps of a sequence use, whose pages may be shallower than the level says."""
        level = self.cache.level_of(sequence)
        return self.depth if level == self.cache.level else self._depth_at(level)

    def _depth_at(self, level: int) -> Depth:
        weights = self.weights.depth
        if not level:
            return weights
        kl, sizes, context = weights.expected_kl, self._sizes, self.cache.context
        if kl is not None:
            kl = min(kl + sizes.kv_divergence(level, context), MOST_KL)
        bits = sizes.kv_bits(level, context)
        return replace(weights, expected_kl=kl, kv_bits=bits, kv_level=level)

    def limits(self, memory: int | None, weights: int | None) -> Wish:
        """The wish with other limits."""
        return replace(self.wish, memory=memory, weights=weights)

    def plan_for(self, wish: Wish) -> Plan:
        """The plan that an empty model would have."""
        return make_plan(self._sizes, self._fixed, wish)

    def least(self) -> Plan:
        """The smallest plan that leaves sessions what was promised to them, and an answer of the
        scheduler room to end, one after the other."""
        wish = replace(self.wish, weights=None)
        return smallest(self._sizes, self._fixed, self._needs(wish, Keep.LEAST))

    def move(self, wish: Wish, check: Callable[[], None]) -> Change:
        """Go to the best plan within `wish`; BudgetError, and no change, if there is none.

        Everything that shrinks has shrunk when this returns, at the boundary of one step: rungs and
        kept prefixes are dropped, idle sessions parked, answers have given way if they must, and
        the kernel has the memory. `check` is called first.
        """
        with self._turns.next(hurry=True), self.cache.park.hurried(_PARKING):
            check()
            plan = self._best(wish)
            grows = plan.rungs > self.weights.depth.rungs
            if (plan.rungs, plan.kv_level) != (self.weights.depth.rungs, self.cache.level):
                self.cache.forget()  # pages of another depth are never used again
            # What was there before must leave room for what comes; both limits hold meanwhile.
            self.cache.limit(self._meanwhile(plan) if grows else plan)
            ticket = self.weights.limit(plan.rungs)
            self._executor.trim_kv()
            kv = min(plan.kv, self.ledger.owners()["kv"][0]) if grows else plan.kv
            self.ledger.move({"weights": plan.arena, "kv": kv}, self._total(wish, plan))
            self.plan, self.wish = plan, wish

            def grow() -> bool:
                return self._grow(plan, wish, ticket, check)

            if not grows:
                self._settled = plan, wish
            self.change = change = Change(plan, grow if grows else None)
        self._moved()
        return change

    def refresh(self, tokenizer: int) -> None:
        """Tell the ledger what is in memory; `tokenizer` bytes of that part are not, being mapped.

        Called with the turn taken.
        """
        parts = self._executor.memory()
        for owner in ("weights", "kv"):
            self.ledger.touch(owner, parts.get(owner, 0))
        held = self.ledger.owners().get("tokenizer")
        if held is not None:
            self.ledger.touch("tokenizer", held[0] - tokenizer)

    # --- inside

    def _grow(self, plan: Plan, wish: Wish, ticket: int, check: Callable[[], None]) -> bool:
        try:
            if not self.weights.grow(plan.rungs, ticket):
                return False
        except BaseException:
            self._settle(plan, *self._settled, check=None)
            raise
        return self._settle(plan, plan, wish, check=check)

    def _settle(
        self, mine: Plan, plan: Plan, wish: Wish, *, check: Callable[[], None] | None
    ) -> bool:
        """The end of a growth to `mine`: from now on `plan` holds, unless another took over."""
        with self._turns.next(), self.cache.park.hurried(_PARKING):
            if self.plan is not mine:
                return False
            if check is not None:
                check()
            self.cache.limit(plan)
            self.cache.forget()  # the depth is another
            self.ledger.move({"weights": plan.arena, "kv": plan.kv}, self._total(wish, plan))
            self.plan, self.wish = plan, wish
            self._settled = plan, wish
        self._moved()
        return True

    def _best(self, wish: Wish) -> Plan:
        """Keeps as much as it can of what is open: weights go to their floor before that does."""
        for keep in (Keep.SESSIONS, Keep.ANSWERS):
            with suppress(BudgetError):
                return make_plan(self._sizes, self._fixed, self._needs(wish, keep))
        return make_plan(self._sizes, self._fixed, self._needs(wish, Keep.LEAST))

    def _needs(self, wish: Wish, keep: Keep) -> Wish:
        context, held = self.cache.needs(keep)
        return replace(wish, least_context=context, held=held)

    def _meanwhile(self, plan: Plan) -> Plan:
        """The KV limits until the rungs of `plan` are read: no more than before or after."""
        now = self.plan
        if plan.kv < now.kv or (plan.kv == now.kv and plan.kv_level <= now.kv_level):
            now = plan
        return replace(now, context=min(self.cache.context, plan.context))

    @staticmethod
    def _total(wish: Wish, plan: Plan) -> int:
        return wish.memory or max(system_limit(), plan.total)
