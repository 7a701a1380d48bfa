"""Many answers at once: one thread puts together each step from all that can go on.

A step continues every answer that has been read, and reads on in prompts as far as `Pace` allows.
Answers join and leave between any two steps (Yu et al., Orca, OSDI 2022). The logits of a sequence
do not depend on what else is in a step, so an answer is the same alone and among others.

The thread has the turn while it lets answers in and makes a step, so a budget changes between two
steps. What it does then is in `pliant.engine.work`; here is how it is asked, woken and ended.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pliant.engine.answers import Answer, Piece, Request
from pliant.engine.model import Model
from pliant.engine.pace import Pace
from pliant.engine.work import Counters, Work, too_long
from pliant.errors import BusyError, EngineError

__all__ = ["Counters", "Deliver", "Scheduler", "State"]

Deliver = Callable[[list[tuple[Answer, Piece]]], None]
"""Takes what a step made; called in the scheduler's thread and must not wait."""

MOST_TOKENS = 2**20
"""Tokens of prompts that may wait: 4 bytes for each."""


@dataclass(frozen=True, slots=True)
class State:
    """What goes on now. `kv` are the bytes of the KV cache that the budget allows, and `kv_used`
    those that are taken; `pages` are in memory, `kept` of them those of finished answers."""

    waiting: int
    running: int
    kv: int
    kv_used: int
    pages: int
    kept: int
    counters: Counters


class Scheduler:
    """Makes many answers at once. `submit`, `cancel` and `state` are for any thread."""

    def __init__(
        self,
        model: Model,
        deliver: Deliver,
        *,
        most_running: int = 16,
        most_waiting: int = 256,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most_running`: answers in a step; the model must have been loaded for as many.
        `most_waiting`: answers in the queue; more are refused with a BusyError."""
        self.model = model
        self.clock = clock
        self.failure: BaseException | None = None
        """What ended the thread, if it ended by mistake."""
        self._deliver = deliver
        self._most_waiting = most_waiting
        self._work = Work(
            model, most_running=most_running, pace=pace or Pace(), queued=self._count_queued
        )
        self._number = 0
        self._stuck = -1  # `_rooms` when an answer was not let in
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._new: deque[Answer] = deque()
        self._cancelled: deque[Answer] = deque()
        self._queued = 0  # answers that were submitted and have no place yet,
        self._tokens = 0  # and their tokens
        self._rooms = 0  # how often there may have been more room
        self._closing = False  # no new requests
        self._ending = False  # no more steps
        self._thread = threading.Thread(target=self._run, name="pliant-steps", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._work.counters

    @property
    def alive(self) -> bool:
        """Whether answers are being made."""
        return self._thread.is_alive() and not self._closing

    # --- for any thread

    def check(self, request: Request) -> None:
        """Refuse a request that can never fit, with the sum: EngineError."""
        wanted = request.max_tokens or 1
        if len(request.prompt) + wanted > self.model.context + 1:
            raise too_long(request, self.model.context)  # the last token need not be in the cache

    def submit(self, requests: Sequence[Request]) -> list[Answer]:
        """Queue requests, all or none. BusyError if they have no room, EngineError if one can
        never fit or the scheduler has ended."""
        for request in requests:
            self.check(request)
        with self._wake:
            if self._closing or self.failure is not None:
                raise EngineError("the engine is stopping, and takes no more requests")
            if self._queued + len(requests) > self._most_waiting:
                raise BusyError(
                    f"{self._queued} requests wait already, and {self._most_waiting} may: try "
                    "again later",
                    self._wait_estimate(),
                )
            tokens = sum(len(request.prompt) for request in requests)
            if self._tokens + tokens > MOST_TOKENS:
                raise BusyError(
                    f"requests of {self._tokens} tokens wait already, and {MOST_TOKENS} may: try "
                    "again later",
                    self._wait_estimate(),
                )
            answers = []
            for request in requests:
                self._number += 1
                answers.append(Answer(request, self._number))
            self._new.extend(answers)
            self._queued += len(answers)
            self._tokens += tokens
            self._wake.notify()
        return answers

    def cancel(self, answer: Answer) -> None:
        """End an answer after the step in progress; its last piece says `cancelled`."""
        with self._wake:
            if not answer.cancelled:
                answer.cancelled = True
                self._cancelled.append(answer)
                self._wake.notify()

    def state(self) -> State:
        """What goes on now."""
        cache = self.model._cache
        with self._wake:
            waiting = self._queued
        return State(
            waiting,
            len(self._work.running),
            cache.bytes,
            cache.used_bytes,
            cache.used,
            cache.prefixes.idle,
            self.counters,
        )

    def close(self, patience: float = 0.0) -> None:
        """Take no more requests, finish what is there for up to `patience` seconds, cancel the
        rest, and end the thread. The model stays open."""
        end = self.clock() + patience
        with self._wake:
            self._closing = True
            self._wake.notify()
        while self._thread.is_alive() and self.clock() < end:
            self._thread.join(min(0.05, patience))
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # --- the thread

    def _run(self) -> None:
        watchers = self.model._line.watchers
        watchers.append(self._room)
        try:
            while self._wait():
                with self.model._turn():
                    self._one_turn()
                self._hand_out()
            with self.model._turn():
                self._work.stop()
            self._hand_out()
        except BaseException as error:
            self.failure = error
            self._fail(EngineError(f"the engine failed: {error}"))
            raise
        finally:
            watchers.remove(self._room)
            with self._wake:
                self._closing = True

    def _one_turn(self) -> None:
        self._work.find_displaced()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, deque()
        self._work.take_leave(cancelled, self.clock())
        with self._wake:
            self._stuck = self._rooms
        self._work.admit()
        self._work.step()

    def _room(self) -> None:
        """In any thread: there may be more room."""
        with self._wake:
            self._rooms += 1
            self._wake.notify()

    def _count_queued(self, answer: Answer, change: int) -> None:
        with self._wake:
            self._queued += change
            self._tokens += change * len(answer.request.prompt)

    def _wait(self) -> bool:
        """Sleep until there is something to do, and take it over; False at the end."""
        waiting = self._work.waiting
        with self._wake:
            while not (self._new or self._cancelled or self._ending):
                stuck = not len(waiting) or self._stuck == self._rooms
                if self._work.running or not stuck:
                    break
                if self._closing and not len(waiting):
                    return False
                self._wake.wait(self._until_deadline())
                if self._until_deadline() == 0:
                    break
            new, self._new = self._new, deque()
            ended = self._ending
        self._work.add(new)
        return not ended

    def _until_deadline(self) -> float | None:
        """Seconds to the first deadline of an answer that waits."""
        requests = [answer.request for answer in self._work.waiting]
        deadlines = [one.deadline for one in requests if one.deadline is not None]
        return max(min(deadlines) - self.clock(), 0.0) if deadlines else None

    def _hand_out(self) -> None:
        """After a turn: what was made, and that there is more room."""
        work = self._work
        if work.freed:
            work.freed = False
            self.model._line.wake()
        if work.out:
            out, work.out = work.out, []
            self._deliver(out)

    def _fail(self, error: EngineError) -> None:
        work = self._work
        with self._wake:
            answers = [*work.running, *work.waiting, *self._new]
        work.out += [(answer, Piece(error=error)) for answer in answers]
        self._hand_out()

    def _wait_estimate(self) -> float:
        """Seconds until a place may be free, from the pace so far."""
        counters = self.counters
        ended = sum(counters.finished.values())
        if not ended:
            return 1.0
        return min(max(counters.step_seconds / ended * self._queued, 1.0), 60.0)
