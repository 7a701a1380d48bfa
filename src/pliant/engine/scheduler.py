"""Many answers at once: one thread puts together each step from all that can go on.

A step continues every answer that has been read, and reads on in prompts as far as `Pace` allows.
Answers join and leave between any two steps (Yu et al., Orca, OSDI 2022). The logits of a sequence
do not depend on what else is in a step, so an answer is the same alone and among others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pliant.engine.answers import Answer, Piece, Request
from pliant.engine.model import Model
from pliant.engine.pace import Pace
from pliant.engine.prefixes import Prefixes, page_keys
from pliant.engine.seam import Floats
from pliant.engine.waiting import Waiting
from pliant.errors import BudgetError, BusyError, DeadlineError, EngineError, PliantError

__all__ = ["Counters", "Deliver", "Scheduler", "State"]

Deliver = Callable[[list[tuple[Answer, Piece]]], None]
"""Takes what a step made; called in the scheduler's thread and must not wait."""

MOST_TOKENS = 2**20
"""Tokens of prompts that may wait: 4 bytes for each."""

_ANSWER_COST = 2.0  # of a token of an answer, in tokens of a prompt, when shares are counted


@dataclass(slots=True)
class Counters:
    """What was done since the start."""

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    """Tokens of prompts that were computed, again after a preemption too."""
    cached_tokens: int = 0
    """Tokens of prompts that were found in the cache."""
    answer_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Answers by the way they ended: a finish reason, or `error`."""


@dataclass(frozen=True, slots=True)
class State:
    """What goes on now. Pages are of the KV cache; `kept` are those of finished answers."""

    waiting: int
    running: int
    pages: int
    used: int
    kept: int
    counters: Counters


class Scheduler:
    """Owns the steps of a model. `submit`, `cancel`, `move` and `state` are for any thread."""

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
        self.counters = Counters()
        self.failure: BaseException | None = None
        """What ended the thread, if it ended by mistake."""
        self._deliver = deliver
        self._most_running = most_running
        self._most_waiting = most_waiting
        self._pace = pace or Pace()
        self._waiting = Waiting()
        self._running: list[Answer] = []
        self._prefixes = Prefixes(model._drop_pages)
        self._making: dict[bytes, Answer] = {}  # pages of prompts that are being computed
        self._out: list[tuple[Answer, Piece]] = []
        self._page = model.kv_page_tokens
        self._number = 0
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._new: deque[Answer] = deque()
        self._cancelled: deque[Answer] = deque()
        self._queued = 0  # answers that were submitted and have no place yet,
        self._tokens = 0  # and their tokens
        self._orders: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._held = 0  # calls of `move` that need the cache empty
        self._closing = False  # no new requests
        self._ending = False  # no more steps
        self._moving = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="pliant-steps", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether answers are being made."""
        return self._thread.is_alive() and not self._closing

    # --- for any thread

    def check(self, request: Request) -> None:
        """Refuse a request that can never fit, with the sum: EngineError."""
        wanted = request.max_tokens or 1
        if len(request.prompt) + wanted > self.model.context + 1:
            raise self._too_long(request)  # the last token need not be in the cache

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

    def move(self, memory: int | str | None, *, keep_free: int | str | None = None) -> None:
        """Move to another budget, as Model.move; `auto` as Model.govern.

        Kept prefixes are given up. If answers in work hold more than the new budget has, they wait
        until it holds, and are computed again.
        """

        def go() -> None:
            if memory == "auto":
                self.model.govern(keep_free=keep_free)
            else:
                self.model.move(memory=memory)

        with self._moving:
            self._order(self._forget)
            try:
                go()
            except BudgetError:
                with self._wake:
                    self._held += 1
                try:
                    self._order(self._preempt_all)
                    go()
                finally:
                    with self._wake:
                        self._held -= 1
                        self._wake.notify()

    def state(self) -> State:
        """What goes on now."""
        model = self.model
        with self._wake:
            waiting = self._queued
        pages = model.kv_pages
        return State(
            waiting,
            len(self._running),
            pages,
            pages - model._free_pages,
            self._prefixes.idle,
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
        try:
            while self._wait():
                self._take_leave()
                self._admit()
                self._step()
                self._hand_out()
            self._stop("cancelled")
        except BaseException as error:
            self.failure = error
            self._fail(EngineError(f"the engine failed: {error}"))
            raise
        finally:
            with self._wake:
                self._closing = True
                orders, self._orders = self._orders, deque()
            for _, done in orders:
                done.set()

    def _wait(self) -> bool:
        """Sleep until there is something to do, and take it over; False at the end."""
        with self._wake:
            while True:
                orders, self._orders = self._orders, deque()
                if orders or self._new or self._cancelled or self._ending:
                    break
                idle = not self._running and (self._held > 0 or not len(self._waiting))
                if not idle:
                    break
                if self._closing and not len(self._waiting):
                    return False
                self._wake.wait(self._until_deadline())
                if self._until_deadline() == 0:
                    break
            new, self._new = self._new, deque()
            ended = self._ending
        for order, done in orders:
            order()
            done.set()
        active = {answer.request.key for answer in self._running}
        for answer in new:
            self._waiting.add(answer, active)
        return not ended

    def _until_deadline(self) -> float | None:
        """Seconds to the first deadline of an answer that waits."""
        deadlines = [a.request.deadline for a in self._waiting if a.request.deadline is not None]
        return max(min(deadlines) - self.clock(), 0.0) if deadlines else None

    def _take_leave(self) -> None:
        """Answers go that were cancelled, are late, or have no room in a context that shrank."""
        with self._wake:
            cancelled, self._cancelled = self._cancelled, deque()
        for answer in cancelled:
            if not answer.done:
                self._end(answer, Piece(finish_reason="cancelled"))
        now = self.clock()
        for answer in [*self._running, *self._waiting]:
            deadline = answer.request.deadline
            if deadline is not None and deadline <= now:
                count = len(answer.tokens)
                error = DeadlineError(f"the answer was not done in time: {count} tokens were made")
                self._end(answer, Piece(error=error))
            elif len(answer.ids) > self.model.context + bool(answer.tokens):
                if answer.tokens:
                    self._end(answer, answer.end("context"))
                else:
                    self._end(answer, Piece(error=self._too_long(answer.request)))

    def _admit(self) -> None:
        """Give places to answers whose turn it is, as far as there are pages for their prompts."""
        if self._held:
            return
        rungs = self.model.depth.rungs
        while len(self._waiting):
            answer = self._waiting.next(lambda one: self._ready(one, rungs))
            if answer is None:
                return
            while not self._has_room(answer):
                victim = self._victim()
                if victim is None or victim.request.priority <= answer.request.priority:
                    return
                self._preempt(victim)
            self._begin(answer)

    def _ready(self, answer: Answer, rungs: int) -> bool:
        """Whether its next page is not being computed for another: then it waits for that one."""
        if answer.depth != rungs or len(answer.keys) < len(answer.ids) // self._page:
            answer.depth = rungs
            answer.keys = page_keys(answer.ids, self._page, rungs)
        at = self._prefixes.count(answer.keys)
        return at == len(answer.keys) or answer.keys[at] not in self._making

    def _has_room(self, answer: Answer) -> bool:
        if len(self._running) >= self._most_running:
            return False
        if not self._running:
            return True
        found = self._useful(answer)
        need = self._pages(len(answer.ids)) - len(found)
        # The rest of other prompts, and a page for everyone to go on in.
        for other in self._running:
            held = self._pages(other.fed)
            need += max(self._pages(len(other.ids) + 1) - held, 1)
        idle = self._prefixes.idle - self._prefixes.idle_among(found)
        return need <= self.model._free_pages + idle

    def _useful(self, answer: Answer) -> list[bytes]:
        """The pages of its beginning that are there; its last token must be fed for the logits."""
        keys = answer.keys[: (len(answer.ids) - 1) // self._page]
        return keys[: self._prefixes.count(keys)]

    def _begin(self, answer: Answer) -> None:
        found = self._useful(answer)
        pages = self._prefixes.acquire(found)
        answer.shared = len(found)
        answer.sequence = self.model._open_shared(pages)
        answer.fed = len(found) * self._page
        self.counters.cached_tokens += answer.fed
        if not answer.begun:
            answer.begun = True
            answer.cached = answer.fed
        for key in answer.keys[len(found) :]:
            self._making.setdefault(key, answer)
        self._unqueue(answer)
        self._running.append(answer)

    # --- one step

    def _step(self) -> None:
        parts = self._compose()
        if not parts:
            return
        ids = [answer.ids[answer.fed : answer.fed + count] for answer, count in parts]
        want = [1 if count == answer.todo else 0 for answer, count in parts]
        begin = time.perf_counter()
        try:
            rows, depth = self.model._step(
                [answer.sequence for answer, _ in parts if answer.sequence is not None],
                [count for _, count in parts],
                np.concatenate([np.frombuffer(part, np.int32) for part in ids]),
                want,
            )
        except (EngineError, BudgetError) as error:
            # A budget shrank since the pages were counted, or there is no memory: fewer may run.
            victim = self._victim()
            if victim is None or len(self._running) == 1:
                for answer in list(self._running):
                    self._end(answer, Piece(error=error))
            else:
                self._preempt(victim)
            return
        seconds = time.perf_counter() - begin
        going = sum(want[i] == 1 and parts[i][1] == 1 for i in range(len(parts)))
        read = sum(count for _, count in parts) - going
        self._pace.observe(going, read, seconds)
        self.counters.steps += 1
        self.counters.step_seconds += seconds
        at = 0
        for (answer, count), wanted in zip(parts, want, strict=True):
            if answer.depth != depth.rungs:
                if not answer.tokens and answer.shared and answer.fed == answer.shared * self._page:
                    self._preempt(answer)  # what it found was of another depth: read it anew
                    at += wanted
                    continue
                answer.depth = -1
            fresh = min(count, max(len(answer.request.prompt) - answer.fed, 0))
            self.counters.prompt_tokens += fresh
            self._waiting.charge(answer.request.key, fresh + _ANSWER_COST * (count - fresh))
            answer.fed += count
            answer.track.add(depth)
            self._share(answer)
            if wanted:
                self._choose(answer, rows[at])
                at += 1

    def _compose(self) -> list[tuple[Answer, int]]:
        """Who goes on, with how many tokens, after room was made for them."""
        while self._running:
            going = [answer for answer in self._running if answer.todo == 1]
            need = sum(self._pages(answer.fed + 1) - self._pages(answer.fed) for answer in going)
            short = need - self.model._free_pages
            if short > 0:
                short -= self._prefixes.evict(short)
            if short > 0 and len(self._running) > 1:
                victim = self._victim()
                assert victim is not None
                self._preempt(victim)
                continue
            parts = [(answer, 1) for answer in going]
            parts += self._read_on(len(going), self.model._free_pages - need)
            if parts or len(self._running) == 1:
                # One alone that has no room left is told so by the step.
                return parts or [(self._running[0], 1)]
            victim = self._victim()
            assert victim is not None
            self._preempt(victim)
        return []

    def _read_on(self, going: int, free: int) -> list[tuple[Answer, int]]:
        """Shares of the prompts in work: half for the oldest, the rest for the shortest."""
        reading = [answer for answer in self._running if answer.todo > 1]
        if not reading:
            return []
        allowance = self._pace.allowance(going, len(reading))
        oldest, *others = reading
        others.sort(key=lambda answer: answer.todo)
        left = [(oldest, -(-allowance // 2) if others else allowance)]
        left += [(answer, allowance) for answer in others]
        counts: dict[int, int] = {}
        for answer, most in [*left, (oldest, allowance)]:
            before = counts.get(answer.number, 0)
            count = min(answer.todo - before, most, allowance)
            room = free + self._prefixes.idle
            inside = self._pages(answer.fed + before) * self._page - answer.fed - before
            count = min(count, inside + room * self._page)
            if count < 1:
                continue
            need = self._pages(answer.fed + before + count) - self._pages(answer.fed + before)
            if need > free:
                free += self._prefixes.evict(need - free)
            free -= need
            allowance -= count
            counts[answer.number] = before + count
        return [(a, counts[a.number]) for a in reading if a.number in counts]

    def _share(self, answer: Answer) -> None:
        """Let others find the pages that are full now."""
        full = answer.fed // self._page
        if answer.depth < 0 or answer.sequence is None or answer.shared >= full:
            return
        if len(answer.keys) < full:
            answer.keys = page_keys(answer.ids, self._page, answer.depth, answer.keys)
        first = answer.shared
        pages = self.model._hold_pages(answer.sequence, first, full)
        spare = []
        for key, page in zip(answer.keys[first:full], pages, strict=True):
            if not self._prefixes.insert(key, page):
                spare.append(page)
            if self._making.get(key) is answer:
                del self._making[key]
        if spare:
            self.model._drop_pages(spare)
        answer.shared = full

    def _choose(self, answer: Answer, logits: Floats) -> None:
        room = self.model.context - answer.fed
        try:
            piece = answer.add(answer.choose(logits), self.model.tokenizer, room)
        except PliantError as error:
            piece = Piece(error=error)
        self.counters.answer_tokens += 1
        if piece.last:
            self._end(answer, piece)
        elif piece.text or piece.choices:
            self._out.append((answer, piece))

    # --- leaving

    def _victim(self) -> Answer | None:
        """Who gives way: of the least urgent ones the youngest."""
        return max(self._running, key=lambda a: (a.request.priority, a.number), default=None)

    def _preempt(self, answer: Answer) -> None:
        """Take the place of an answer; it waits, and what it had is computed again."""
        self._give_back(answer)
        self.counters.preemptions += 1
        active = {other.request.key for other in self._running}
        self._waiting.add(answer, active | {answer.request.key})
        with self._wake:
            self._queued += 1
            self._tokens += len(answer.request.prompt)

    def _preempt_all(self) -> None:
        for answer in list(self._running):
            self._preempt(answer)
        self._forget()

    def _forget(self) -> None:
        self._prefixes.evict(len(self._prefixes))

    def _give_back(self, answer: Answer) -> None:
        if answer.sequence is None:
            return
        self._running.remove(answer)
        self._prefixes.release(answer.keys[: answer.shared])
        for key in answer.keys[answer.shared :]:
            if self._making.get(key) is answer:
                del self._making[key]
        self.model._close_sequence(answer.sequence)
        answer.sequence = None
        answer.fed = answer.shared = 0

    def _end(self, answer: Answer, piece: Piece) -> None:
        self._give_back(answer)
        self._unqueue(answer)
        answer.done = True
        reason = piece.finish_reason or "error"
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        self._out.append((answer, piece))

    def _unqueue(self, answer: Answer) -> None:
        if self._waiting.remove(answer):
            with self._wake:
                self._queued -= 1
                self._tokens -= len(answer.request.prompt)

    def _hand_out(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._deliver(out)

    def _stop(self, reason: str) -> None:
        for answer in [*self._running, *self._waiting]:
            self._end(answer, Piece(finish_reason=reason))
        self._forget()
        self._hand_out()

    def _fail(self, error: EngineError) -> None:
        with self._wake:
            answers = [*self._running, *self._waiting, *self._new]
        self._out += [(answer, Piece(error=error)) for answer in answers]
        self._hand_out()

    def _order(self, order: Callable[[], None]) -> None:
        """Have something done between two steps, and wait for it."""
        done = threading.Event()
        with self._wake:
            if not self._thread.is_alive():
                return
            self._orders.append((order, done))
            self._wake.notify()
        done.wait()

    def _too_long(self, request: Request) -> EngineError:
        prompt, wanted = len(request.prompt), request.max_tokens or 1
        return EngineError(
            f"the context holds {self.model.context} tokens, and needed are {prompt + wanted}: "
            f"{prompt} of the prompt and {wanted} of the answer; shorten one of them, or give the "
            "model a larger budget or context"
        )

    def _wait_estimate(self) -> float:
        """Seconds until a place may be free, from the pace so far."""
        ended = sum(self.counters.finished.values())
        if not ended:
            return 1.0
        return min(max(self.counters.step_seconds / ended * self._queued, 1.0), 60.0)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page)
