"""Many answers at once: the same as alone, no page lost, fair, bounded, and never stopped."""

from __future__ import annotations

import math
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from fakes import AlwaysRead
from pliant.engine.answers import Answer, Piece, Request
from pliant.engine.pace import Pace, shares
from pliant.engine.prefixes import Prefixes, page_keys
from pliant.engine.sampling import Sampling
from pliant.engine.scheduler import Scheduler
from pliant.engine.waiting import Waiting
from pliant.errors import (
    BudgetError,
    BusyError,
    ChecksumError,
    DeadlineError,
    EngineError,
    UsageError,
)
from pliant.sizes import parse_size
from tiny import roomy, write_tiny_pack

PAGE = 32
WAIT = 60.0


class Desk:
    """Collects what a scheduler delivers."""

    def __init__(self) -> None:
        self.pieces: dict[int, list[Piece]] = {}
        self.order: list[int] = []  # numbers of answers as they end
        self._done = threading.Condition()
        self.each: Callable[[Answer, Piece], None] = lambda answer, piece: None

    def deliver(self, out: list[tuple[Answer, Piece]]) -> None:
        with self._done:
            for answer, piece in out:
                self.pieces.setdefault(answer.number, []).append(piece)
                self.each(answer, piece)
                if piece.last:
                    self.order.append(answer.number)
            self._done.notify_all()

    def wait(self, *answers: Answer) -> None:
        def ended() -> bool:
            return all(self.last(answer) is not None for answer in answers)

        with self._done:
            assert self._done.wait_for(ended, WAIT), "an answer never ended"

    def last(self, answer: Answer) -> Piece | None:
        pieces = self.pieces.get(answer.number)
        return pieces[-1] if pieces and pieces[-1].last else None

    def text(self, answer: Answer) -> str:
        return "".join(piece.text for piece in self.pieces[answer.number])


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(tmp_path_factory.mktemp("scheduler") / "tiny.pack", least=2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four times the least context: with one session there are 16 to 64 pages."""
    folder = tmp_path_factory.mktemp("scheduler")
    return write_tiny_pack(folder / "wide.pack", least=2, context=2048)


@pytest.fixture
def model(pack: Path) -> Iterator[pliant.Model]:
    with pliant.load(pack, sessions=4, answers=16, chat=False) as loaded:
        loaded._holdings.cache.park.rates = AlwaysRead()
        yield loaded


def limited(model: pliant.Model, pages: int) -> None:
    """Give all answers together only so many pages."""
    model._holdings.cache.bytes = pages * model._executor.kv_page_bytes


def small(model: pliant.Model) -> int:
    """Bytes of a budget with all weights, and 16 pages."""
    return model.plan.total - model.plan.kv + 16 * model._executor.kv_page_bytes


def request(prompt: Any, tokens: int | None = 20, **options: Any) -> Request:
    sampling = {
        name: options.pop(name)
        for name in ("temperature", "seed", "repetition_penalty", "logit_bias")
        if name in options
    }
    ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    return Request(prompt=ids, sampling=Sampling(**sampling), max_tokens=tokens, **options)


def alone(model: pliant.Model, wanted: Request) -> tuple[int, ...]:
    """The tokens of a request that has the model to itself, without the scheduler."""
    sampling = wanted.sampling
    generation = model.generate(
        wanted.prompt,
        max_tokens=wanted.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        ignore_eos=not wanted.eos,
    )
    for _ in generation:
        pass
    return generation.result.tokens


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, 250) for _ in range(count)]


# --- the same as alone, and nothing left behind


@pytest.mark.parametrize("pages", [64, 14])
def test_answers_are_the_same_as_alone_whatever_comes_and_goes(
    model: pliant.Model, pages: int
) -> None:
    limited(model, pages)  # 14: few enough that answers are preempted
    rng = random.Random(5)
    beginnings = [random_ids(rng, 70) for _ in range(3)]
    wanted = []
    for number in range(40):
        start = rng.choice(beginnings) if rng.random() < 0.6 else []
        wanted.append(
            request(
                start + random_ids(rng, rng.randrange(1, 150)),
                rng.randrange(1, 120),
                temperature=rng.choice([0.0, 1.0]),
                seed=number,
                repetition_penalty=rng.choice([1.0, 1.2]),
                priority=rng.choice([-1, 0, 0]),
                key=rng.choice("abc"),
            )
        )
    expected = [alone(model, one) for one in wanted]
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=12, pace=Pace(least=8, most=64))
    left, answers = [], scheduler.submit(wanted[:20])
    scheduler.start()
    for number, one in enumerate(wanted):
        if number >= 20:
            answers += scheduler.submit([one])
        answer = answers[number]
        if number % 5 == 4:
            left.append(answer)
            threading.Timer(rng.random() * 0.05, scheduler.cancel, [answer]).start()
    desk.wait(*answers)
    for answer, tokens in zip(answers, expected, strict=True):
        last = desk.last(answer)
        assert last is not None
        if answer in left and last.finish_reason == "cancelled":
            assert tuple(answer.tokens) == tokens[: len(answer.tokens)]
        else:
            assert (last.finish_reason, tuple(answer.tokens)) == ("length", tokens)
    if pages == 14:
        assert scheduler.counters.preemptions > 0
        assert scheduler.counters.resumed_tokens > 0
    assert scheduler.counters.cached_tokens > 0
    state = scheduler.state()
    assert (state.waiting, state.running) == (0, 0)
    assert state.pages == state.kept  # finished answers hold nothing but prefixes
    scheduler.close()
    assert model._executor.kv_pages_used == 0
    assert not model._holdings.cache._entries


def test_a_shared_beginning_is_computed_once(model: pliant.Model) -> None:
    rng = random.Random(1)
    beginning = random_ids(rng, 10 * PAGE)
    wanted = [request(beginning + random_ids(rng, 5), 2, key=str(i % 3)) for i in range(10)]
    expected = [alone(model, one) for one in wanted]
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    answers = scheduler.submit(wanted)  # all wait while the first reads
    scheduler.start()
    desk.wait(*answers)
    assert [tuple(answer.tokens) for answer in answers] == expected
    assert scheduler.counters.prompt_tokens == 10 * PAGE + 10 * 5
    assert [answer.cached for answer in answers] == [0] + [10 * PAGE] * 9
    # A conversation goes on where it ended, the answer included.
    first = request(random_ids(rng, 40), 60)
    answer = scheduler.submit([first])[0]
    desk.wait(answer)
    again = scheduler.submit([request([*answer.ids, 7, 8, 9], 3)])[0]
    desk.wait(again)
    assert again.cached == 3 * PAGE
    assert tuple(again.tokens) == alone(model, again.request)
    scheduler.close()
    assert model._executor.kv_pages_used == 0


def test_prefixes_of_another_depth_are_not_used(model: pliant.Model) -> None:
    rng = random.Random(2)
    wanted = request(random_ids(rng, 100), 8)
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    scheduler.start()
    desk.wait(*scheduler.submit([wanted]))
    rungs = model.depth.rungs
    model.resize(weights=model.plan.weights // 2)
    assert model.depth.rungs < rungs
    expected = alone(model, wanted)
    answer = scheduler.submit([wanted])[0]
    desk.wait(answer)
    assert answer.cached == 0
    assert tuple(answer.tokens) == expected
    scheduler.close()


def test_who_leaves_gives_pages_back_within_one_step(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    held: list[int] = []
    steps: list[int] = []

    def leave(answer: Answer, piece: Piece) -> None:
        if len(answer.tokens) == 3 and not piece.last:
            scheduler.cancel(answer)
            steps.append(scheduler.counters.steps)
        elif piece.last:
            held.append(model._executor.kv_pages_used)
            steps.append(scheduler.counters.steps)

    desk.each = leave
    scheduler.start()
    answer = scheduler.submit([request("x" * 20, None)])[0]
    desk.wait(answer)
    assert desk.last(answer) == Piece(finish_reason="cancelled")
    assert held == [0]  # no whole page, so nothing is kept
    assert steps[1] - steps[0] <= 1
    scheduler.close()


def test_a_waiting_answer_can_be_cancelled(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=1)
    answers = scheduler.submit([request("abc", 30), request("abd", 30)])
    scheduler.cancel(answers[1])
    scheduler.start()
    desk.wait(*answers)
    assert answers[1].tokens == []
    assert len(answers[0].tokens) == 30
    assert scheduler.counters.finished == {"cancelled": 1, "length": 1}
    scheduler.close()


# --- limits


def test_what_can_never_fit_is_refused_with_the_sum(model: pliant.Model) -> None:
    scheduler = Scheduler(model, Desk().deliver)
    with pytest.raises(EngineError, match=r"holds 512 tokens, and needed are 520: 500 .* 20 "):
        scheduler.submit([request([5] * 500, 20)])
    scheduler.check(request([5] * 500, 13))
    scheduler.check(request([5] * 512, None))
    with pytest.raises(EngineError):
        scheduler.check(request([5] * 513, None))


def test_the_queue_is_bounded(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=1, most_waiting=3)
    answers = scheduler.submit([request("a", 3)] * 2)
    with pytest.raises(BusyError, match="2 requests wait already, and 3 may") as caught:
        scheduler.submit([request("b", 3)] * 2)
    assert caught.value.retry_after >= 1
    scheduler.start()
    desk.wait(*answers)
    desk.wait(*scheduler.submit([request("b", 3)] * 3))
    scheduler.close()
    with pytest.raises(EngineError, match="stopping"):
        scheduler.submit([request("c", 3)])


def test_the_tokens_in_the_queue_are_bounded(
    model: pliant.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pliant.engine.scheduler.MOST_TOKENS", 500)
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    answers = scheduler.submit([request([5] * 400, 3)])
    with pytest.raises(BusyError, match="400 tokens wait already, and 500 may"):
        scheduler.submit([request([5] * 101, 3)])
    scheduler.start()
    desk.wait(*answers, *scheduler.submit([request([5] * 100, 3)]))
    desk.wait(*scheduler.submit([request([5] * 400, 3)]))
    scheduler.close()
    assert (scheduler._queued, scheduler._tokens) == (0, 0)


def test_an_answer_that_is_late_ends(model: pliant.Model) -> None:
    desk = Desk()
    now = [0.0]
    scheduler = Scheduler(model, desk.deliver, most_running=1, clock=lambda: now[0])

    def pass_time(answer: Answer, piece: Piece) -> None:
        now[0] += 1.0

    desk.each = pass_time
    answers = scheduler.submit(
        [request("ab", 100, deadline=10.0), request("cd", 5, deadline=5.0), request("ef", 5)]
    )
    scheduler.start()
    desk.wait(*answers)
    for late in answers[:2]:
        last = desk.last(late)
        assert last is not None
        assert isinstance(last.error, DeadlineError)
    assert 0 < len(answers[0].tokens) < 12
    assert answers[1].tokens == []
    assert len(answers[2].tokens) == 5
    scheduler.close()


def test_priorities_and_shares_decide_who_is_next(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=1)
    many = scheduler.submit([request([9 + i], 10, key="many") for i in range(6)])
    few = scheduler.submit([request([50 + i], 10, key="few") for i in range(2)])
    urgent = scheduler.submit([request([70], 10, key="many", priority=-5)])
    scheduler.start()
    desk.wait(*many, *few, *urgent)
    place = {number: at for at, number in enumerate(desk.order)}
    assert place[urgent[0].number] == 0
    assert max(place[answer.number] for answer in few) <= 4
    scheduler.close()


def test_an_urgent_answer_takes_the_place_of_another(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=1)
    plain = request("plain", 200, temperature=1.0, seed=3)
    expected = alone(model, plain)
    urgent: list[Answer] = []

    def interrupt(answer: Answer, piece: Piece) -> None:
        if len(answer.tokens) == 50 and not urgent:
            urgent.extend(scheduler.submit([request("urgent", 5, priority=-1)]))

    desk.each = interrupt
    scheduler.start()
    slow = scheduler.submit([plain])[0]
    desk.wait(slow)
    assert desk.order == [urgent[0].number, slow.number]
    assert tuple(slow.tokens) == expected
    assert scheduler.counters.preemptions == 1
    scheduler.close()


def test_a_keyed_turn_is_fair_after_an_idle_time() -> None:
    waiting = Waiting()

    def put(number: int, key: str) -> Answer:
        answer = Answer(request("x", 1, key=key), number)
        waiting.add(answer, set())
        return answer

    first = put(1, "a")
    waiting.charge("a", 1000)
    late = put(2, "b")  # has not saved up 1,000 tokens meanwhile
    assert waiting.next(lambda _: True) is first
    waiting.charge("b", 1)
    assert waiting.next(lambda _: True) is first
    waiting.charge("a", 2)
    assert waiting.next(lambda _: True) is late
    assert waiting.remove(late)
    assert not waiting.remove(late)


# --- set aside


def crowd(
    model: pliant.Model, fed: list[int] | None = None
) -> tuple[Scheduler, list[Answer], list[int], list[tuple[int, ...]]]:
    """Four answers that need more pages than there are: what they made, how many were seen on disk
    at once, and what they make alone. `fed` gets the tokens of each step."""
    limited(model, 16)
    wanted = [request([i + 3] * 90, 200, seed=i, temperature=1.0) for i in range(4)]
    expected = [alone(model, one) for one in wanted]
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    parked: list[int] = []

    def look(answer: Answer, piece: Piece) -> None:
        parked.append(model._holdings.cache.parked[0])

    desk.each = look
    stepped = model._holdings.cache.stepped

    def count(sequences: Any, counts: Any) -> None:
        if fed is not None:
            fed.append(sum(counts))
        stepped(sequences, counts)

    model._holdings.cache.stepped = count  # type: ignore[method-assign]
    answers = scheduler.submit(wanted)
    scheduler.start()
    desk.wait(*answers)
    scheduler.close()
    assert model._executor.kv_pages_used == 0
    assert model._holdings.cache.parked == (0, 0)
    return scheduler, answers, parked, expected


def test_who_is_set_aside_goes_to_disk_and_comes_back_without_computing(
    model: pliant.Model,
) -> None:
    fed: list[int] = []
    scheduler, answers, parked, expected = crowd(model, fed)
    counters = scheduler.counters
    assert max(parked) >= 1
    assert counters.preemptions > 0
    assert counters.resumed_tokens >= 90
    assert counters.prompt_tokens == 4 * 90  # each prompt once
    assert sum(fed) == 4 * (90 + 199)  # and each token once, but for the last of each answer
    assert [tuple(answer.tokens) for answer in answers] == expected


def test_who_is_set_aside_stays_in_memory_where_there_is_room(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=1)
    plain = request("plain" * 20, 60, temperature=1.0, seed=3)
    expected = alone(model, plain)
    urgent: list[Answer] = []
    seen: list[tuple[int, int]] = []

    def interrupt(answer: Answer, piece: Piece) -> None:
        if len(answer.tokens) == 50 and not urgent:
            urgent.extend(scheduler.submit([request("urgent", 5, priority=-1)]))
        seen.append(model._holdings.cache.parked)

    desk.each = interrupt
    scheduler.start()
    slow = scheduler.submit([plain])[0]
    desk.wait(slow)
    assert desk.order == [urgent[0].number, slow.number]
    assert tuple(slow.tokens) == expected
    assert scheduler.counters.resumed_tokens >= 100 + 49
    assert scheduler.counters.prompt_tokens == 100 + len("urgent")
    assert set(seen) == {(0, 0)}
    scheduler.close()


@pytest.mark.parametrize("trouble", ["full", "unwritable", "damaged"])
def test_what_disk_does_not_keep_is_computed_again(
    model: pliant.Model, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    if trouble == "full":
        monkeypatch.setattr("pliant.engine.cache._MOST_PARKED", 0)
    elif trouble == "unwritable":

        def refuse(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pliant.engine.parking._nameless", refuse)
    else:

        def break_(*_: Any) -> Any:
            raise ChecksumError("it is not as it was written")

        monkeypatch.setattr("pliant.engine.parked_page.ParkedPage.read", break_)
    scheduler, answers, _, expected = crowd(model)
    assert scheduler.counters.preemptions > 0
    assert scheduler.counters.prompt_tokens > 4 * 90
    assert scheduler.counters.finished == {"length": 4}
    assert [tuple(answer.tokens) for answer in answers] == expected


def test_what_is_set_aside_can_be_cancelled(model: pliant.Model) -> None:
    limited(model, 16)
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    first, second = [request([i + 3] * 90, 300, seed=i) for i in range(2)]

    def leave(answer: Answer, piece: Piece) -> None:
        if model._holdings.cache.parked[0]:
            scheduler.cancel(answers[1])

    desk.each = leave
    answers = scheduler.submit([first, second])
    scheduler.start()
    desk.wait(*answers)
    assert scheduler.counters.finished == {"length": 1, "cancelled": 1}
    scheduler.close()
    assert model._executor.kv_pages_used == 0
    assert model._holdings.cache.parked == (0, 0)


# --- budgets


def test_a_budget_moves_while_answers_are_made(pack: Path) -> None:
    much = f"{roomy(300)}MiB"
    with pliant.load(pack, memory=much, sessions=4, answers=16, chat=False) as model:
        desk = Desk()
        scheduler = Scheduler(model, desk.deliver)
        scheduler.start()
        answers = scheduler.submit([request([i + 3] * 100, 200, seed=i) for i in range(8)])
        with pytest.raises(BudgetError):
            model.resize(memory="1MiB")
        least = model.plan.total - model.plan.kv - model.plan.arena
        for size in (least + 1_000_000, much, least + 800_000, None):
            assert model.move(memory=size).wait(WAIT)
            assert model.budget == (None if size is None else parse_size(size))
        desk.wait(*answers)
        assert [len(answer.tokens) for answer in answers] == [200] * 8
        scheduler.close()
        assert model._executor.kv_pages_used == 0


def test_a_smaller_budget_makes_answers_give_way_and_a_larger_one_lets_them_in(wide: Path) -> None:
    with pliant.load(wide, answers=16, chat=False) as model:
        weights = model.plan.weights  # the depth stays, so every text must too
        wanted = [request([i + 3] * 60, 300, seed=i, temperature=1.0) for i in range(6)]
        expected = [alone(model, one) for one in wanted]
        desk = Desk()
        scheduler = Scheduler(model, desk.deliver)
        moves: list[tuple[int, int]] = []
        later: list[int] = []

        def look(answer: Answer, piece: Piece) -> None:
            at = sum(len(answer.tokens) for answer in answers)
            if not moves and at > 300 and scheduler.state().running == 6:
                model.resize(memory=small(model), weights=weights)
                moves.append((model._executor.kv_used_bytes, model.plan.kv))
            elif len(moves) == 1 and at > 900:
                moves.append((scheduler.state().running, scheduler.state().waiting))
                model.resize(memory=None, weights=weights)
            elif len(moves) == 2:
                later.append(scheduler.state().running)

        desk.each = look
        answers = scheduler.submit(wanted)
        scheduler.start()
        desk.wait(*answers)
        (used, kv), few = moves
        # At once: 512 tokens, the least context.
        assert used <= kv == 16 * model._executor.kv_page_bytes
        assert few[0] < 6
        assert few[1] > 0
        assert max(later) > few[0]
        assert scheduler.counters.preemptions > 0
        assert [tuple(answer.tokens) for answer in answers] == expected
        assert scheduler.counters.finished == {"length": 6}
        scheduler.close()


def test_more_room_lets_more_in_at_once(wide: Path) -> None:
    with pliant.load(wide, answers=16, chat=False) as model:
        weights = model.plan.weights
        model.resize(memory=small(model), weights=weights)
        desk = Desk()
        scheduler = Scheduler(model, desk.deliver)
        running: list[int] = []

        def look(answer: Answer, piece: Piece) -> None:
            running.append(scheduler.state().running)
            if len(running) == 20:
                model.resize(memory=None, weights=weights)

        desk.each = look
        answers = scheduler.submit([request([i + 3] * 150, 200, seed=i) for i in range(4)])
        scheduler.start()
        desk.wait(*answers)
        assert max(running[:20]) == 2
        assert max(running) == 4
        scheduler.close()


def test_sessions_and_the_scheduler_share_the_cache(model: pliant.Model) -> None:
    limited(model, 24)
    wanted = [request([i + 3] * 80, 120, seed=i, temperature=1.0) for i in range(5)]
    expected = [alone(model, one) for one in wanted]
    idle = model.session()
    idle.feed([7] * 200)  # goes to disk for the others, and comes back
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    scheduler.start()
    found: dict[int, tuple[int, ...]] = {}

    def beside(number: int) -> None:
        found[number] = alone(model, wanted[number])

    threads = [threading.Thread(target=beside, args=(number,)) for number in range(5)]
    answers = scheduler.submit(wanted)
    for thread in threads:
        thread.start()
    desk.wait(*answers)
    for thread in threads:
        thread.join(WAIT)
    assert [tuple(answer.tokens) for answer in answers] == expected
    assert [found[number] for number in range(5)] == expected
    scheduler.close()
    row = idle.feed([8])
    np.testing.assert_array_equal(row, model.logits([7] * 200 + [8])[-1])
    idle.close()
    assert model._executor.kv_pages_used == 0


def test_closing_finishes_what_runs_or_cancels_it(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver, most_running=2)
    answers = scheduler.submit([request([i + 3], 50) for i in range(5)])
    scheduler.start()
    scheduler.close(patience=WAIT)
    assert scheduler.counters.finished == {"length": 5}
    scheduler = Scheduler(model, desk.deliver, most_running=2)
    answers = scheduler.submit([request([i + 3], None) for i in range(3)])
    scheduler.close()  # never started
    scheduler = Scheduler(model, desk.deliver, most_running=2)
    scheduler.start()
    answers = scheduler.submit([request([i + 3], None) for i in range(3)])
    scheduler.close()
    assert all(desk.last(answer) == Piece(finish_reason="cancelled") for answer in answers)
    assert model._executor.kv_pages_used == 0


def test_an_idle_scheduler_uses_no_processor(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    scheduler.start()
    desk.wait(*scheduler.submit([request("warm", 3)]))
    steps = scheduler.counters.steps
    usage = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - usage < 0.1
    assert scheduler.counters.steps == steps
    scheduler.close()


# --- options of an answer


class OnlyDigits:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> Any:
        bits = np.zeros(264, np.uint8)
        bits[48:58] = 1
        return np.packbits(bits, bitorder="little")

    def take(self, token: int) -> None:
        self.seen.append(token)

    @property
    def complete(self) -> bool:
        return len(self.seen) == 4


def test_a_constraint_is_obeyed_and_ends_the_answer(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    scheduler.start()
    wanted = request("number: ", 50, constraint=OnlyDigits(), temperature=1.0, seed=1)
    answer = scheduler.submit([wanted, request("number: ", 50)])[0]
    desk.wait(answer)
    assert desk.text(answer).isdigit()
    assert len(answer.tokens) == 4
    last = desk.last(answer)
    assert last is not None
    assert last.finish_reason == "eos"
    scheduler.close()


def test_logprobs_are_those_of_the_model(model: pliant.Model) -> None:
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    scheduler.start()
    wanted = request("abc", 4, top_logprobs=3, temperature=2.0, seed=4)
    answer = scheduler.submit([wanted])[0]
    desk.wait(answer)
    choices = [choice for piece in desk.pieces[answer.number] for choice in piece.choices]
    assert [choice.token for choice in choices] == answer.tokens
    logits = model.logits([*wanted.prompt, *answer.tokens]).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for at, choice in enumerate(choices):
        row = logs[len(wanted.prompt) - 1 + at]
        assert choice.logprob == pytest.approx(row[choice.token], abs=1e-4)
        assert [token for token, _ in choice.top] == np.argsort(-row, kind="stable")[:3].tolist()
    scheduler.close()


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"top_logprobs": 21}, {"priority": 101}, {"prompt": []}], ids=str
)
def test_requests_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        request(options.pop("prompt", "x"), **options)


# --- parts


def test_the_pace_keeps_steps_within_twice_their_time() -> None:
    pace = Pace(stretch=0.8, least=8, most=256)
    assert pace.allowance(0) == 256
    assert pace.allowance(4) == 0  # a step without prompts tells how long that takes
    pace.observe(4, 0, 0.05)
    assert pace.allowance(4) == 8  # how long a token takes is not known yet
    pace.observe(0, 256, 0.256)
    assert pace.allowance(4) == 40  # 0.05 s × 0.8 at 1 ms a token
    for _ in range(500):
        tokens = pace.allowance(4)
        pace.observe(4, tokens, 0.05 + tokens * 0.002)
    assert pace.allowance(4) in (0, 19, 20)
    pace.observe(4, 0, 0.05)
    assert pace.allowance(4, 4) in (19, 20)
    assert pace.allowance(4, 12) in (58, 59, 60)  # three times as many as answers
    assert pace.allowance(9) == 0  # many more answers: look again
    pace.observe(9, 0, 0.10)
    assert 38 <= pace.allowance(9) <= 40
    pace.observe(9, 0, 1000.0)  # the machine slept
    assert pace.allowance(9) <= 140


@pytest.mark.parametrize(("begin", "token"), [(0.006, 0.0018), (0.030, 0.0012), (0.090, 0.0012)])
def test_the_pace_is_kept_where_reading_has_a_price_of_its_own(begin: float, token: float) -> None:
    pace, alone = Pace(), 0.045
    pace.observe(0, 256, 256 * 0.0005)
    given, times = [], []
    for _ in range(1000):
        given.append(pace.allowance(8))
        times.append(alone + (begin + token * given[-1] if given[-1] else 0.0))
        pace.observe(8, given[-1], times[-1])
    assert min(tokens for tokens in given if tokens) >= 8
    assert sum(times[50:]) / len(times[50:]) <= 1.6 * alone
    assert sum(given) >= 1000 * 8 * 0.5 * alone / (begin + 8 * token) * 0.7


def test_a_pace_without_bounds_reads_as_fast_as_it_can() -> None:
    pace = Pace(stretch=math.inf, least=256)
    pace.observe(4, 0, 0.01)
    for _ in range(20):
        assert pace.allowance(4) == 256
        pace.observe(4, 256, 1.0)


def test_half_of_an_allowance_is_for_the_oldest_prompt() -> None:
    assert shares([100], 10) == [10]
    assert shares([100, 50], 10) == [5, 5]
    assert shares([100, 50, 3], 10) == [5, 2, 3]  # then the shortest
    assert shares([2, 50, 60], 11) == [2, 9, 0]
    assert shares([100, 2, 3], 20) == [15, 2, 3]  # what nobody needs is the oldest's again
    assert shares([1, 1], 10) == [1, 1]


def test_the_pace_looks_again_now_and_then() -> None:
    pace = Pace(least=8, most=64)
    pace.observe(2, 0, 0.01)
    pace.observe(0, 64, 0.064)
    given = []
    for _ in range(100):
        given.append(pace.allowance(2))
        pace.observe(2, given[-1], 0.015 if given[-1] else 0.01)
    assert 2 <= given.count(0) <= 4
    assert min(tokens for tokens in given if tokens) >= 8


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_kept_pages_are_a_tree_whose_leaves_go_first(paths: list[list[int]], data: Any) -> None:
    dropped: list[int] = []
    prefixes = Prefixes(dropped.extend)
    uses, page = [], 0
    for path in paths:
        keys = page_keys(array("i", path), 1, 0)
        found = prefixes.count(keys)
        prefixes.acquire(keys[:found])
        for key in keys[found:]:
            assert prefixes.insert(key, page)
            page += 1
        uses.append(keys)
        if data.draw(st.booleans()):
            prefixes.release(uses.pop(data.draw(st.integers(0, len(uses) - 1))))
        if data.draw(st.booleans()):
            prefixes.evict(data.draw(st.integers(0, 3)))
        for keys in uses:
            assert prefixes.count(keys) == len(keys)  # what is in use is never given up
    for keys in uses:
        prefixes.release(keys)
    known = {tuple(path): page_keys(array("i", path), 1, 0) for path in paths}
    while len(prefixes):
        for keys in known.values():  # what is there is there from the root on
            there = [key in prefixes._entries for key in keys]
            assert there == sorted(there, reverse=True)
        assert prefixes.evict(1) == 1
    assert prefixes.idle == 0
    assert sorted(dropped) == list(range(page))


def test_keys_of_pages_depend_on_all_before_and_on_the_depth() -> None:
    ids = array("i", range(100))
    keys = page_keys(ids, PAGE, 7)
    assert len(keys) == 3
    assert page_keys(ids, PAGE, 7, keys[:2]) == keys
    assert page_keys(array("i", [1, *ids[1:]]), PAGE, 7)[2] != keys[2]
    assert page_keys(array("i", [*ids[:31], 5, *ids[32:]]), PAGE, 7)[1] != keys[1]
    assert not set(page_keys(ids, PAGE, 8)) & set(keys)


def test_pages_are_counted_and_copied_when_they_part(model: pliant.Model) -> None:
    executor = model._executor
    ids = np.arange(2, 42, dtype=np.int32)
    one = executor.open_sequence()
    executor.step([one], [40], ids, [0])
    pages = executor.pages(one)
    assert len(pages) == 2
    executor.hold_pages(pages[:1])
    other = executor.open_sequence()
    executor.adopt_pages(other, pages[:1])
    assert (executor.length(other), executor.kv_pages_used) == (32, 2)
    with pytest.raises(UsageError):
        executor.adopt_pages(other, pages[:1])
    executor.truncate(other, 20)  # goes on in the middle of a shared page: a copy
    tail = np.array([99, 98, 97], np.int32)
    row = executor.step([other], [3], tail, [1])
    assert executor.pages(other)[0] != pages[0]
    fresh = executor.open_sequence()
    again = executor.step([fresh], [23], np.concatenate((ids[:20], tail)), [1])
    np.testing.assert_array_equal(row, again)
    more = executor.step([one], [1], np.array([3], np.int32), [1])  # not disturbed
    whole = executor.open_sequence()
    np.testing.assert_array_equal(
        more, executor.step([whole], [41], np.append(ids, np.int32(3)), [1])
    )
    for sequence in (one, other, fresh, whole):
        executor.close_sequence(sequence)
    assert executor.kv_pages_used == 1
    with pytest.raises(EngineError, match="not in use"):
        executor.drop_pages([pages[0], pages[0]])
    assert executor.kv_pages_used == 0
    for wrong in ([-1], [10**6], [pages[1]]):
        with pytest.raises(EngineError, match="not in use"):
            executor.hold_pages(wrong)
