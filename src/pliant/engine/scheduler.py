"""Many answers at once: one thread puts together each step from all that can go on.

A step continues every answer that has been read, and reads on in prompts as far as `Pace` allows.
Answers join and leave between any two steps (Yu et al., Orca, OSDI 2022). The logits of a sequence
do not depend on what else is in a step, so an answer is the same alone and among others.

Pages come from `pliant.engine.cache`, as those of sessions do. The thread has the turn while it
lets answers in and makes a step, so a budget changes between two steps. Where it takes pages away,
those who gave way are found here, wait, and are computed again; where it gives more, they go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pliant.engine.answers import Answer, Piece, Request
from pliant.engine.cache import Cache
from pliant.engine.model import Model
from pliant.engine.pace import Pace
from pliant.engine.prefixes import page_keys
from pliant.engine.seam import Floats
from pliant.engine.turns import StepGivenUp
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
        self.counters = Counters()
        self.failure: BaseException | None = None
        """What ended the thread, if it ended by mistake."""
        self._deliver = deliver
        self._most_running = most_running
        self._most_waiting = most_waiting
        self._pace = pace or Pace()
        self._waiting = Waiting()
        self._running: list[Answer] = []
        self._making: dict[bytes, Answer] = {}  # pages of prompts that are being computed
        self._out: list[tuple[Answer, Piece]] = []
        self._page = model._cache.page_tokens
        self._number = 0
        self._freed = False  # since others who wait for room were told
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

    def state(self) -> State:
        """What goes on now."""
        cache = self.model._cache
        with self._wake:
            waiting = self._queued
        return State(
            waiting,
            len(self._running),
            cache.pages,
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

    @property
    def _cache(self) -> Cache:
        """Used with the turn only."""
        return self.model._cache

    def _run(self) -> None:
        watchers = self.model._line.watchers
        watchers.append(self._room)
        try:
            while self._wait():
                with self.model._turn():
                    self._find_displaced()
                    self._take_leave()
                    self._admit()
                    self._step()
                self._hand_out()
            with self.model._turn():
                self._stop()
            self._hand_out()
        except BaseException as error:
            self.failure = error
            self._fail(EngineError(f"the engine failed: {error}"))
            raise
        finally:
            watchers.remove(self._room)
            with self._wake:
                self._closing = True

    def _room(self) -> None:
        """In any thread: there may be more room."""
        with self._wake:
            self._rooms += 1
            self._wake.notify()

    def _wait(self) -> bool:
        """Sleep until there is something to do, and take it over; False at the end."""
        with self._wake:
            while not (self._new or self._cancelled or self._ending):
                stuck = not len(self._waiting) or self._stuck == self._rooms
                if self._running or not stuck:
                    break
                if self._closing and not len(self._waiting):
                    return False
                self._wake.wait(self._until_deadline())
                if self._until_deadline() == 0:
                    break
            new, self._new = self._new, deque()
            ended = self._ending
        active = {answer.request.key for answer in self._running}
        for answer in new:
            self._waiting.add(answer, active)
        return not ended

    def _until_deadline(self) -> float | None:
        """Seconds to the first deadline of an answer that waits."""
        deadlines = [a.request.deadline for a in self._waiting if a.request.deadline is not None]
        return max(min(deadlines) - self.clock(), 0.0) if deadlines else None

    def _find_displaced(self) -> None:
        """A smaller budget may have taken the pages of some; they wait."""
        for answer in list(self._running):
            if answer.sequence is not None and not self._cache.holds(answer.sequence):
                self._put_back(answer)

    def _take_leave(self) -> None:
        """Answers go that were cancelled, are late, or have no room in a context that shrank before
        they had begun."""
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
            elif not answer.begun and len(answer.ids) > self._cache.context:
                self._end(answer, Piece(error=self._too_long(answer.request)))

    def _admit(self) -> None:
        """Give places to answers whose turn it is, as far as there are pages for their prompts.

        Who waits in a thread of its own, for a session, goes first.
        """
        with self._wake:
            self._stuck = self._rooms
        rungs = self.model.depth.rungs
        while len(self._waiting) and not len(self.model._line):
            answer = self._waiting.next(lambda one: self._ready(one, rungs))
            if answer is None:
                return
            try:
                while not self._begin(answer):
                    victim = self._victim()
                    if victim is None and not self._cache.in_flight:
                        raise self._too_long(answer.request)
                    if victim is None or victim.request.priority <= answer.request.priority:
                        return
                    self._preempt(victim)
            except EngineError as error:  # also where idle sessions cannot be written to disk
                self._end(answer, Piece(error=error))

    def _ready(self, answer: Answer, rungs: int) -> bool:
        """Whether its next page is not being computed for another: then it waits for that one."""
        if answer.depth != rungs or len(answer.keys) < len(answer.ids) // self._page:
            answer.depth = rungs
            answer.keys = page_keys(answer.ids, self._page, rungs)
        at = self._cache.prefixes.count(answer.keys)
        return at == len(answer.keys) or answer.keys[at] not in self._making

    def _begin(self, answer: Answer) -> bool:
        """Let an answer in; False: there is no place, or no room."""
        if len(self._running) >= self._most_running:
            return False
        if answer.sequence is None:
            answer.sequence = self._cache.open()
        # Its last token must be fed for the logits.
        known = answer.keys[: (len(answer.ids) - 1) // self._page]
        request, most = answer.request, self._cache.context
        if request.max_tokens is not None:
            most = min(most, len(request.prompt) + request.max_tokens - 1)
        found = self._cache.admit(
            answer.sequence,
            min(len(answer.ids) + self._page, most),  # and a page to go on in
            known,
            claim=0 if request.max_tokens is None else most,
            rank=(request.priority, answer.number),
        )
        if found is None:
            return False
        answer.shared = found
        answer.fed = found * self._page
        self.counters.cached_tokens += answer.fed
        if not answer.begun:
            answer.begun = True
            answer.cached = answer.fed
        for key in answer.keys[found:]:
            self._making.setdefault(key, answer)
        self._unqueue(answer)
        self._running.append(answer)
        return True

    # --- one step

    def _step(self) -> None:
        parts = self._compose()
        if not parts:
            return
        ids = [answer.ids[answer.fed : answer.fed + count] for answer, count in parts]
        want = [1 if count == answer.todo else 0 for answer, count in parts]
        begin = time.perf_counter()
        try:
            rows, depth = self.model._step_in_turn(
                [answer.sequence for answer, _ in parts if answer.sequence is not None],
                [count for _, count in parts],
                np.concatenate([np.frombuffer(part, np.int32) for part in ids]),
                want,
            )
        except StepGivenUp:
            return  # the budget moves first, and then it is put together anew
        except (EngineError, BudgetError) as error:
            # There is no memory: fewer may run.
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
        """Who goes on, with how many tokens. The room for them is theirs: for prompts from the
        beginning, for answers page by page."""
        for answer in [answer for answer in self._running if answer.todo == 1]:
            try:
                while answer in self._running and not self._may_go_on(answer):
                    victim = self._victim()
                    if victim is None or self._cache.in_flight == 1:
                        self._end(answer, answer.end("context"))
                    else:
                        self._preempt(victim)
            except EngineError as error:  # idle sessions cannot be written to disk
                self._end(answer, Piece(error=error))
        going = [answer for answer in self._running if answer.todo == 1]
        return [(answer, 1) for answer in going] + self._read_on(len(going))

    def _may_go_on(self, answer: Answer) -> bool:
        assert answer.sequence is not None
        wanted = answer.fed + 1
        if self._cache.promised(answer.sequence) >= wanted:
            return True
        wanted = min(self._pages(wanted) * self._page, self._cache.context)
        return self._cache.reserve(answer.sequence, wanted)

    def _read_on(self, going: int) -> list[tuple[Answer, int]]:
        """Shares of the prompts in work: half for the oldest, the rest for the shortest."""
        reading = [answer for answer in self._running if answer.todo > 1]
        if not reading:
            return []
        allowance = self._pace.allowance(going, len(reading))
        oldest, *others = reading
        others.sort(key=lambda answer: answer.todo)
        shares = [(oldest, -(-allowance // 2) if others else allowance)]
        shares += [(answer, allowance) for answer in (*others, oldest)]
        counts: dict[int, int] = {}
        for answer, most in shares:
            before = counts.get(answer.number, 0)
            count = min(answer.todo - before, most, allowance)
            if count > 0:
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
        self._cache.share(answer.sequence, answer.keys[:full])
        for key in answer.keys[answer.shared : full]:
            if self._making.get(key) is answer:
                del self._making[key]
        answer.shared = full

    def _choose(self, answer: Answer, logits: Floats) -> None:
        room = self._cache.context - answer.fed
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
        assert answer.sequence is not None
        self._cache.give_way(answer.sequence)
        self._put_back(answer)

    def _put_back(self, answer: Answer) -> None:
        """An answer without pages waits again."""
        self._take_out(answer)
        self.counters.preemptions += 1
        active = {other.request.key for other in self._running}
        self._waiting.add(answer, active | {answer.request.key})
        with self._wake:
            self._queued += 1
            self._tokens += len(answer.request.prompt)

    def _take_out(self, answer: Answer) -> None:
        if answer in self._running:
            self._running.remove(answer)
            for key in answer.keys[answer.shared :]:
                if self._making.get(key) is answer:
                    del self._making[key]
            answer.fed = answer.shared = 0
            self._freed = True

    def _end(self, answer: Answer, piece: Piece) -> None:
        self._take_out(answer)
        self._unqueue(answer)
        if answer.sequence is not None:
            self._cache.close(answer.sequence)
            answer.sequence = None
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
        """After a turn: what was made, and that there is more room."""
        if self._freed:
            self._freed = False
            self.model._line.wake()
        if self._out:
            out, self._out = self._out, []
            self._deliver(out)

    def _stop(self) -> None:
        for answer in [*self._running, *self._waiting]:
            self._end(answer, Piece(finish_reason="cancelled"))
        self._cache.forget()

    def _fail(self, error: EngineError) -> None:
        with self._wake:
            answers = [*self._running, *self._waiting, *self._new]
        self._out += [(answer, Piece(error=error)) for answer in answers]
        self._hand_out()

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
