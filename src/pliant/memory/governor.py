"""The governor: sets the budget by itself, from signs of memory pressure.

`decide` is a pure rule, from what is seen to a new budget. `Governor` is the thread that looks,
asks the rule, and moves the model. docs/memory.md has the rule in words.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pliant.errors import PliantError
from pliant.memory.pressure import Signals, Sources, Trigger
from pliant.sizes import GIB, MIB, format_size

__all__ = ["Decision", "Governed", "Governor", "Policy", "State", "decide", "default_keep_free"]


def default_keep_free(total: int) -> int:
    """What is kept free if nothing was said: a sixteenth of all, from 64 MiB to 2 GiB."""
    return min(max(total // 16, 64 * MIB), 2 * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How the governor weighs. Sizes in bytes, times in seconds.

    keep_free: what other programs shall be able to take at any moment
    slack:     the budget is set so much lower than `keep_free` asks, and rises only if twice as
               much is there: noise below it moves nothing
    calm:      growth begins when there has been room for so long
    dwell:     after a change of direction it does not change back to growth for so long
    pace:      time between two steps of growth, or two for stalls
    grade:     a step of growth is at most this part of the whole range; as much goes for stalls
    some, full: stalls in percent from which the budget shrinks
    period:    the model looks so often, stalls or not
    """

    keep_free: int
    slack: int = 16 * MIB
    calm: float = 10.0
    dwell: float = 60.0
    pace: float = 2.0
    grade: float = 1 / 8
    some: float = 10.0
    full: float = 5.0
    period: float = 0.25

    @classmethod
    def keeping(cls, keep_free: int | None, seen: Signals) -> Policy:
        """The usual one; `keep_free` None: a part of what there is."""
        return cls(keep_free=default_keep_free(seen.total) if keep_free is None else keep_free)

    def allowed(self, seen: Signals) -> int:
        """The largest budget, in bytes; may be negative. Our own share is not pressure: with this
        budget full, `keep_free` would just be free."""
        return seen.resident + seen.available - self.keep_free

    def first(self, seen: Signals) -> int:
        """The largest budget to begin with, in bytes; may be negative."""
        return self.allowed(seen) - self.slack


@dataclass(frozen=True, slots=True)
class State:
    """What the rule remembers. Times are those of `now` in `decide`.

    direction: of the last move: -1, 1, or 0 before the first
    rooms:     the least room for the budget since `window`, and in the window of `calm` seconds
               before it
    """

    direction: int = 0
    turned: float = float("-inf")
    moved: float = float("-inf")
    calm_since: float | None = None
    window: float = 0.0
    rooms: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Decision:
    """A new budget in bytes, and why."""

    budget: int
    why: str


def decide(
    policy: Policy, state: State, seen: Signals, now: float, budget: int, floor: int, most: int
) -> tuple[State, Decision | None]:
    """The state after a look, and a new budget or None.

    `budget` is the present one, in bytes of the whole process; `floor` and `most` bound it. It
    shrinks at once and as far as needed; it grows in steps, when there was room for some time. The
    direction changes at most twice in `dwell` seconds, whatever is seen: growth after a shrink
    waits for `dwell` seconds since the direction changed last.
    """
    allowed = policy.allowed(seen)
    near = seen.own_stalls or seen.available < 2 * policy.keep_free + policy.slack
    stalled = near and (seen.some >= policy.some or seen.full >= policy.full)
    want: int | None = None
    why = ""
    if allowed < budget:
        want = allowed - policy.slack
        why = _room(policy, seen)
    elif stalled and now - state.moved >= policy.pace:
        part = policy.grade * (2 if seen.full >= policy.full else 1)
        want = budget - max(int((most - floor) * part), 1)
        why = f"programs wait for memory {seen.some:.0f} % of the time, all {seen.full:.0f} %"
    if want is not None:
        state = replace(state, calm_since=None)
        target = max(min(want, most), floor)
        if target >= budget:
            return state, None
        turned = now if state.direction != -1 else state.turned
        return State(-1, turned, now), Decision(target, why)

    room = allowed - 2 * policy.slack
    if stalled or min(room, most) <= budget:
        return replace(state, calm_since=None), None
    if state.calm_since is None:
        state = replace(state, calm_since=now, window=now, rooms=(room, room))
    elif now - state.window >= policy.calm:
        state = replace(state, window=now, rooms=(room, state.rooms[0]))
    else:
        state = replace(state, rooms=(min(room, state.rooms[0]), state.rooms[1]))
    assert state.calm_since is not None
    if (
        now - state.calm_since < policy.calm
        or now - state.moved < policy.pace
        or (state.direction != 1 and now - state.turned < policy.dwell)
    ):
        return state, None
    step = max(int((most - floor) * policy.grade), 1)
    target = min(budget + step, *state.rooms, most)
    if target <= budget:
        return state, None
    turned = now if state.direction != 1 else state.turned
    why = f"{_room(policy, seen)} for {now - state.calm_since:.0f} s"
    return replace(state, direction=1, turned=turned, moved=now), Decision(target, why)


def _room(policy: Policy, seen: Signals) -> str:
    """What is available, beside what is to be kept free."""
    gap = seen.available - policy.keep_free
    return (
        f"{format_size(seen.available)} available ({seen.bound}), {format_size(abs(gap))} "
        f"{'more' if gap >= 0 else 'less'} than is to be kept free"
    )


class Governed(Protocol):
    """What a governor needs of a model."""

    def current(self) -> int:
        """The budget in bytes."""
        ...

    def bounds(self) -> tuple[int, int]:
        """The smallest budget that is possible now, and the largest that has a use."""
        ...

    def busy(self) -> bool:
        """Whether an earlier growth is still read."""
        ...

    def move(self, budget: int) -> str:
        """Go there, at once if it shrinks; says in a few words what that means."""
        ...


class Governor:
    """Looks, decides and moves, in a thread of its own, until it is closed."""

    def __init__(
        self,
        model: Governed,
        policy: Policy,
        *,
        sources: Sources | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.policy = policy
        self._model = model
        self._sources = sources or Sources()
        self._log = log
        self._state = State()
        self._seen: Signals | None = None
        self._said: str | None = None
        self._lines: deque[str] = deque(maxlen=32)
        self._directions: deque[float] = deque(maxlen=32)
        self._lock = threading.Lock()
        stall = self._sources.stall_file
        self._trigger = Trigger(None if stall is None else stall[0])
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pliant-governor", daemon=True)

    def start(self) -> Governor:
        """Begin; returns itself."""
        self._thread.start()
        return self

    def close(self) -> None:
        """End it; the budget stays where it is. Nothing happens the second time."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._trigger.wake()
        if self._thread.is_alive():
            self._thread.join()
        self._trigger.close()

    def look(self, now: float) -> Decision | None:
        """Look once, and move if the rule says so; `now` in seconds of any clock."""
        with self._lock:
            if self._closed:
                return None
            self._seen = seen = self._sources.read()
            budget, (floor, most) = self._model.current(), self._model.bounds()
            before = self._state
            self._state, decision = decide(
                self.policy, before, seen, now, budget, floor, max(most, floor)
            )
            if decision is None:
                if self.policy.allowed(seen) < budget <= floor:
                    self._once(
                        f"{_room(self.policy, seen)}, and nothing left to give: "
                        f"{format_size(budget)} is the least that is possible now"
                    )
                return None
            if decision.budget > budget and self._model.busy():
                self._state = before
                return None
            try:
                outcome = self._model.move(decision.budget)
            except (PliantError, OSError) as error:
                # Try again as if it had been done: not at once, and from the same budget.
                self._once(f"cannot go to {format_size(decision.budget)}: {error}")
                return None
            if self._state.turned != before.turned:
                self._directions.append(now)
            self._said = None
            self._say(
                f"{decision.why}: budget {format_size(budget)} -> {format_size(decision.budget)}, "
                f"{outcome}"
            )
            return decision

    def report(self) -> dict[str, Any]:
        """What it sees and did, ready for JSON."""
        seen, now = self._seen, time.monotonic()
        return {
            "keep_free": self.policy.keep_free,
            "trigger": self._trigger.armed,
            "available": None if seen is None else seen.available,
            "bound": None if seen is None else seen.bound,
            "stalled_some": None if seen is None else seen.some,
            "stalled_full": None if seen is None else seen.full,
            "direction": self._state.direction,
            "turns_in_last_minute": sum(now - then < 60 for then in self._directions),
            "moves": list(self._lines),
        }

    def _run(self) -> None:
        while not self._closed:
            self._trigger.wait(self.policy.period)
            try:
                self.look(time.monotonic())
            except PliantError:
                return  # the model was closed

    def _once(self, text: str) -> None:
        key = text.rpartition(", ")[2]  # without what was seen, which always differs a little
        if self._said != key:
            self._said = key
            self._say(text)

    def _say(self, text: str) -> None:
        self._lines.append(text)
        if self._log is not None:
            self._log(text)
