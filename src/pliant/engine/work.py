"""Answers in work and those that wait for a place, and the steps in which all of them go on.

Pages come from `pliant.engine.cache`, as those of sessions do. An answer that must give way to
others, or to a smaller budget, is set aside: it waits, and goes on where it was. Its keys and
values stay in memory as long as nobody needs the room, and go to disk then (after Shen et al.,
FastSwitch, 2024). Only what cannot be kept is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pliant.engine.answers import Answer, Piece, Request
from pliant.engine.cache import Cache, ParkedLost
from pliant.engine.model import Model
from pliant.engine.pace import Pace, shares
from pliant.engine.park import FETCH
from pliant.engine.prefixes import page_keys
from pliant.engine.seam import Floats
from pliant.engine.turns import StepGivenUp
from pliant.engine.waiting import Waiting
from pliant.errors import BudgetError, DeadlineError, EngineError, PliantError

__all__ = ["Counters", "Work", "too_long"]

_ANSWER_COST = 2.0  # of a token of an answer, in tokens of a prompt, when shares are counted


@dataclass(slots=True)
class Counters:
    """What was done since the start."""

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    """Tokens of prompts that were computed, also where it was for the second time."""
    cached_tokens: int = 0
    """Tokens of prompts that were found in the cache."""
    read_tokens: int = 0
    """Tokens of prompts that were read from the folder where beginnings are parked."""
    answer_tokens: int = 0
    preemptions: int = 0
    """Answers that were set aside, or had to begin again."""
    resumed_tokens: int = 0
    """Tokens of prompts and answers that were there when an answer went on, in memory or on disk.
    """
    finished: dict[str, int] = field(default_factory=dict)
    """Answers by the way they ended: a finish reason, or `error`."""


class Work:
    """Belongs to the thread that steps, which has the turn whenever it calls something here.

    waiting, running: answers without a place and with one
    out: what was made and not handed out yet
    freed: whether room was given back since somebody set it to False
    """

    def __init__(
        self,
        model: Model,
        *,
        most_running: int,
        pace: Pace,
        queued: Callable[[Answer, int], None],
    ) -> None:
        """`queued` is called with 1 when an answer comes back into the queue, and with -1 when one
        leaves it."""
        self.counters = Counters()
        self.waiting = Waiting()
        self.running: list[Answer] = []
        self.out: list[tuple[Answer, Piece]] = []
        self.freed = False
        self._model = model
        self._most_running = most_running
        self._pace = pace
        self._queued = queued
        self._making: dict[bytes, Answer] = {}  # pages of prompts that are being computed
        self._page = model._cache.page_tokens

    @property
    def _cache(self) -> Cache:
        return self._model._cache

    def add(self, answers: Sequence[Answer]) -> None:
        """New answers wait."""
        active = {answer.request.key for answer in self.running}
        for answer in answers:
            self.waiting.add(answer, active)

    def find_displaced(self) -> None:
        """A smaller budget may have set some aside; they wait."""
        for answer in list(self.running):
            if answer.sequence is not None and not self._cache.holds(answer.sequence):
                self._put_back(answer)

    def take_leave(self, cancelled: Sequence[Answer], now: float) -> None:
        """Answers go that were cancelled, are late, or have no room in a context that shrank before
        they had begun."""
        for answer in cancelled:
            if not answer.done:
                self._end(answer, Piece(finish_reason="cancelled"))
        for answer in [*self.running, *self.waiting]:
            deadline = answer.request.deadline
            if deadline is not None and deadline <= now:
                count = len(answer.tokens)
                error = DeadlineError(f"the answer was not done in time: {count} tokens were made")
                self._end(answer, Piece(error=error))
            elif not answer.begun and len(answer.ids) > self._cache.context:
                self._end(answer, Piece(error=too_long(answer.request, self._model.context)))

    def stop(self) -> None:
        """Cancel everything, and keep nothing for reuse."""
        for answer in [*self.running, *self.waiting]:
            self._end(answer, Piece(finish_reason="cancelled"))
        self._cache.forget()

    # --- places

    def admit(self) -> None:
        """Give places to answers whose turn it is, as far as there are pages for their prompts.

        Who waits in a thread of its own, for a session, goes first.
        """
        state = self._model.depth.state
        while len(self.waiting) and not len(self._model._line):
            answer = self.waiting.next(lambda one: self._ready(one, state))
            if answer is None:
                return
            try:
                while not self._begin(answer):
                    victim = self._victim()
                    if victim is None and not self._cache.in_flight:
                        raise too_long(answer.request, self._model.context)
                    if victim is None or victim.request.priority <= answer.request.priority:
                        return
                    self._set_aside(victim)
            except ParkedLost:
                continue  # it is empty now, and looked at anew
            except EngineError as error:  # also where idle sessions cannot be written to disk
                self._end(answer, Piece(error=error))

    def _ready(self, answer: Answer, state: int) -> bool:
        """Whether its next page is not being computed for another: then it waits for that one."""
        if self._kept(answer):
            return True
        if answer.state != state or len(answer.keys) < len(answer.ids) // self._page:
            answer.state = state
            answer.keys = page_keys(answer.ids, self._page, state)
        at = self._cache.prefixes.count(answer.keys)
        return at == len(answer.keys) or answer.keys[at] not in self._making

    def _begin(self, answer: Answer) -> bool:
        """Let an answer in; False: there is no place, or no room."""
        if len(self.running) >= self._most_running:
            return False
        request, most = answer.request, self._cache.context
        if request.max_tokens is not None:
            most = min(most, len(request.prompt) + request.max_tokens - 1)
        tokens = min(len(answer.ids) + self._page, most)  # and a page to go on in
        if answer.sequence is None:
            answer.sequence = self._cache.open()
        if self._kept(answer):
            if not self._cache.resume(answer.sequence, tokens):
                return False
            self.counters.resumed_tokens += answer.fed
        else:
            # Its last token must be fed for the logits.
            known = answer.keys[: (len(answer.ids) - 1) // self._page]
            claim = 0 if request.max_tokens is None else most
            rank = request.priority, answer.number
            found = self._cache.admit(answer.sequence, tokens, known, claim=claim, rank=rank)
            if found is None:
                return False
            answer.shared = found
            answer.fed = found * self._page
            self.counters.cached_tokens += answer.fed
            answer.fetching = self._model._parks
            answer.again = answer.begun
            if not answer.begun:
                answer.begun = True
                answer.cached = answer.fed
        if answer.state == self._model.depth.state:
            for key in answer.keys[answer.shared :]:
                self._making.setdefault(key, answer)
        self._unqueue(answer)
        self.running.append(answer)
        return True

    def _kept(self, answer: Answer) -> bool:
        """Whether an answer that waits was set aside with something to go on from."""
        return answer.sequence is not None and self._cache.length(answer.sequence) > 0

    # --- one step

    def step(self) -> None:
        """Make one, if there is anything to do."""
        parts = self._compose()
        if not parts:
            return
        ids = [answer.ids[answer.fed : answer.fed + count] for answer, count in parts]
        want = [1 if count == answer.todo else 0 for answer, count in parts]
        begin = time.perf_counter()
        try:
            rows, depths = self._model._step_in_turn(
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
            if victim is None or len(self.running) == 1:
                for answer in list(self.running):
                    self._end(answer, Piece(error=error))
            else:
                self._set_aside(victim)
            return
        seconds = time.perf_counter() - begin
        going = sum(want[i] == 1 and parts[i][1] == 1 for i in range(len(parts)))
        read = sum(count for _, count in parts) - going
        self._pace.observe(going, read, seconds)
        self.counters.steps += 1
        self.counters.step_seconds += seconds
        at = 0
        for (answer, count), wanted, depth in zip(parts, want, depths, strict=True):
            if answer.state != depth.state:
                if not answer.tokens and answer.shared and answer.fed == answer.shared * self._page:
                    self._start_over(answer)  # what it found was of another depth
                    at += wanted
                    continue
                answer.state = -1
            fresh = min(count, max(len(answer.request.prompt) - answer.fed, 0))
            self.counters.prompt_tokens += fresh
            self.waiting.charge(answer.request.key, fresh + _ANSWER_COST * (count - fresh))
            answer.fed += count
            answer.track.add(depth)
            self._share(answer)
            if wanted:
                self._choose(answer, rows[at])
                at += 1

    def _compose(self) -> list[tuple[Answer, int]]:
        """Who goes on, with how many tokens. The room for them is theirs: for prompts from the
        beginning, for answers page by page."""
        for answer in [answer for answer in self.running if answer.todo == 1]:
            try:
                while answer in self.running and not self._may_go_on(answer):
                    victim = self._victim()
                    if victim is None or self._cache.in_flight == 1:
                        self._end(answer, answer.end("context"))
                    else:
                        self._set_aside(victim)
            except EngineError as error:  # idle sessions cannot be written to disk
                self._end(answer, Piece(error=error))
        self._fetch([answer for answer in self.running if answer.fetching])
        going = [answer for answer in self.running if answer.todo == 1]
        reading = [answer for answer in self.running if answer.todo > 1 and not answer.fetching]
        counts = [1] * len(going)
        if reading:
            allowance = self._pace.allowance(len(going), len(reading))
            counts += shares([answer.todo for answer in reading], allowance)
        every = zip([*going, *reading], counts, strict=True)
        return [(answer, count) for answer, count in every if count]

    def _fetch(self, answers: Sequence[Answer]) -> None:
        """For a short while, read what was parked of the pages that answers begin with; who does
        not come to an end goes on with that in the next turn."""
        end = time.perf_counter() + FETCH
        for answer in answers:
            seconds = end - time.perf_counter()
            if seconds <= 0:
                return
            assert answer.sequence is not None
            at, known = answer.shared, answer.keys[: (len(answer.ids) - 1) // self._page]
            count = 0
            if answer.state == self._model.depth.state:
                count = self._cache.fetch(answer.sequence, known, seconds)
            answer.shared += count
            answer.fetching = 0 < count < len(known) - at
            self._made(answer, answer.keys[at : answer.shared])
            answer.fed += count * self._page
            self.counters.read_tokens += count * self._page
            if not answer.again:
                answer.cached += count * self._page

    def _made(self, answer: Answer, keys: Sequence[bytes]) -> None:
        """Pages of an answer are there; nobody waits for them any more."""
        for key in keys:
            if self._making.get(key) is answer:
                del self._making[key]

    def _may_go_on(self, answer: Answer) -> bool:
        assert answer.sequence is not None
        wanted = answer.fed + 1
        if self._cache.promised(answer.sequence) >= wanted:
            return True
        wanted = min(-(-wanted // self._page) * self._page, self._cache.context)
        return self._cache.reserve(answer.sequence, wanted)

    def _share(self, answer: Answer) -> None:
        """Let others find the pages that are full now."""
        full = answer.fed // self._page
        if answer.state < 0 or answer.sequence is None or answer.shared >= full:
            return
        if len(answer.keys) < full:
            answer.keys = page_keys(answer.ids, self._page, answer.state, answer.keys)
        self._cache.share(answer.sequence, answer.keys[:full])
        self._made(answer, answer.keys[answer.shared : full])
        answer.shared = full

    def _choose(self, answer: Answer, logits: Floats) -> None:
        room = self._cache.context - answer.fed
        try:
            piece = answer.add(answer.choose(logits), self._model.tokenizer, room)
        except PliantError as error:
            piece = Piece(error=error)
        self.counters.answer_tokens += 1
        if piece.last:
            self._end(answer, piece)
        elif piece.text or piece.choices:
            self.out.append((answer, piece))

    # --- leaving

    def _victim(self) -> Answer | None:
        """Who gives way: of the least urgent ones the youngest."""
        return max(self.running, key=lambda a: (a.request.priority, a.number), default=None)

    def _set_aside(self, answer: Answer) -> None:
        """Take the place of an answer; it goes on later."""
        assert answer.sequence is not None
        self._cache.set_aside(answer.sequence)
        self._put_back(answer)

    def _start_over(self, answer: Answer) -> None:
        """Forget what an answer has; it waits, and that is computed again."""
        assert answer.sequence is not None
        self._cache.give_way(answer.sequence)
        self._put_back(answer)

    def _put_back(self, answer: Answer) -> None:
        """An answer without a promise waits again."""
        self._take_out(answer)
        answer.fetching = False
        self.counters.preemptions += 1
        active = {other.request.key for other in self.running}
        self.waiting.add(answer, active | {answer.request.key})
        self._queued(answer, 1)

    def _take_out(self, answer: Answer) -> None:
        if answer in self.running:
            self.running.remove(answer)
            self._made(answer, answer.keys[answer.shared :])
            self.freed = True

    def _end(self, answer: Answer, piece: Piece) -> None:
        self._take_out(answer)
        self._unqueue(answer)
        if answer.sequence is not None:
            self._cache.close(answer.sequence)
            answer.sequence = None
        answer.done = True
        reason = piece.finish_reason or "error"
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        self.out.append((answer, piece))

    def _unqueue(self, answer: Answer) -> None:
        if self.waiting.remove(answer):
            self._queued(answer, -1)


def too_long(request: Request, context: int) -> EngineError:
    """The error of a request that never fits into `context` tokens, with the sum."""
    prompt, wanted = len(request.prompt), request.max_tokens or 1
    return EngineError(
        f"the context holds {context} tokens, and needed are {prompt + wanted}: "
        f"{prompt} of the prompt and {wanted} of the answer; shorten one of them, or give the "
        "model a larger budget or context"
    )
