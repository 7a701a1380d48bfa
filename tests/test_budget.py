"""A budget that moves: promises, parking, growth and its faults, over the fake and the core."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from fakes import executor_of, fake_model
from pliant.engine import line as line_module
from pliant.engine import model as model_module
from pliant.engine.build import RungFiles
from pliant.engine.cache import Cache
from pliant.engine.control import BudgetControl
from pliant.engine.parked_page import ParkedPage, header_bytes
from pliant.engine.parking import Parked
from pliant.engine.turns import Turns
from pliant.errors import BudgetError, ChecksumError, EngineError, PackError
from tiny import write_tiny_pack

FIXED = 10_000
PAGE = 640


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


def cache_of(model: pliant.Model) -> Cache:
    return model._holdings.cache


# --- growth beside everything else


def test_a_shrink_does_not_wait_for_a_read() -> None:
    model = fake_model(memory=FIXED + 60_000)
    executor, entered, leave = executor_of(model), threading.Event(), threading.Event()
    before = executor.read_rungs

    def stuck(*arguments: Any, **options: Any) -> bool:
        entered.set()
        leave.wait()  # a disk that does not answer
        return before(*arguments, **options)

    executor.read_rungs = stuck  # type: ignore[method-assign]
    change = model.move(memory=FIXED + 120_000)
    entered.wait()
    model.budget = FIXED + 30_000
    assert model.depth.rungs == model.plan.rungs == executor.resident_rungs == executor.read
    assert model.budget == FIXED + 30_000
    assert not change.done
    leave.set()
    assert change.wait(20) is False
    assert executor.read == model.depth.rungs


def test_a_growth_takes_over_what_the_one_before_has_read() -> None:
    model = fake_model(memory=FIXED + 30_000)
    executor = executor_of(model)
    executor.read_seconds = 0.03
    first = model.move(memory=FIXED + 110_000)
    wait_for(lambda: executor.read > model.depth.rungs)
    second = model.move(memory=FIXED + 120_000)
    assert executor.read > model.depth.rungs
    assert first.wait(20) is False
    assert second.wait(20) is True
    assert model.depth.rungs == model.plan.rungs == second.plan.rungs == executor.read


def test_limits_of_a_growth_hold_at_once_and_rungs_follow() -> None:
    model = fake_model(memory=FIXED + 30_000)
    executor_of(model).read_seconds = 0.02
    low = model.depth.rungs
    change = model.move(memory=FIXED + 110_000)
    assert model.budget == model.ledger.total == FIXED + 110_000
    assert model.depth.rungs == low
    assert change.wait(20)
    assert model.depth.rungs == change.plan.rungs > low
    assert change.done
    assert change.error is None


def test_a_failed_growth_in_the_background_tells_and_leaves_the_old_state() -> None:
    model = fake_model(memory=FIXED + 40_000)
    before = model.plan, model.ledger.owners(), model.depth, model.context
    executor_of(model).broken_rung = 60
    change = model.move(memory=FIXED + 110_000)
    with pytest.raises(ChecksumError, match="rung 60"):
        change.wait(20)
    assert (model.plan, model.ledger.owners(), model.depth, model.context) == before
    assert model.budget == FIXED + 40_000
    assert executor_of(model).read == model.depth.rungs
    executor_of(model).broken_rung = None
    assert model.move(memory=FIXED + 110_000).wait(20)


def test_a_failure_after_an_overtaken_growth_leaves_the_last_state_that_held() -> None:
    model = fake_model(memory=FIXED + 40_000)
    executor, before = executor_of(model), model.plan
    executor.read_seconds = 0.02
    first = model.move(memory=FIXED + 100_000)
    executor.broken_rung = 80
    second = model.move(memory=FIXED + 120_000)
    with pytest.raises(ChecksumError):
        second.wait(20)
    assert first.wait(20) is False
    assert model.plan == before
    assert model.depth.rungs == before.rungs == executor.read
    assert model.ledger.total == model.budget == FIXED + 40_000


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where this runs in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_in_the_middle_leaves_the_old_state() -> None:
    model = fake_model(memory=FIXED + 40_000)
    executor, before = executor_of(model), model.plan
    executor.read_seconds = 60  # nothing but the signal ends it

    def interrupt() -> None:
        wait_for(executor._reading.locked)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        model.budget = FIXED + 120_000
    assert (model.plan, model.budget) == (before, FIXED + 40_000)
    assert model.depth.rungs == executor.read == before.rungs
    executor.read_seconds = 0
    model.budget = FIXED + 120_000
    assert model.depth.rungs > before.rungs


def test_closing_ends_a_growth() -> None:
    model = fake_model(memory=FIXED + 40_000)
    executor_of(model).read_seconds = 0.05
    change = model.move(memory=FIXED + 120_000)
    model.close()
    assert change.done or change.wait(20) is False


# --- a step in progress


def test_a_change_does_not_wait_for_the_end_of_a_step() -> None:
    model = fake_model(memory=FIXED + 120_000)
    executor, ended = executor_of(model), threading.Event()
    executor.step_seconds = 1000.0  # a prompt of a large model
    session = model.session()

    def read() -> None:
        session.feed([1, 2, 3])
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    wait_for(lambda: executor.busy)
    executor.after_giving_up = 0.0
    model.budget = FIXED + 30_000
    assert model.depth.rungs == executor.resident_rungs
    thread.join(20)
    assert ended.is_set()
    assert executor.given_up == 1
    assert executor.sequences[session.sequence] == [1, 2, 3]
    assert executor.steps == [(3, model.depth.rungs)]


def test_the_answer_to_a_request_does_not_wait_for_a_step_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_module, "_LOSS", 1e9)  # time decides nothing here
    model = fake_model(memory=FIXED + 120_000)
    executor = executor_of(model)
    executor.step_seconds = 1000.0
    session = model.session()
    thread = threading.Thread(target=session.feed, args=([1, 2, 3],))
    thread.start()
    wait_for(lambda: executor.busy)
    state = BudgetControl(model).put({"memory": FIXED + 30_000})
    assert state["memory"] == FIXED + 30_000
    executor.step_seconds = 0.0
    model.report(hurry=True)
    thread.join(20)
    assert executor.sequences[session.sequence] == [1, 2, 3]
    assert executor.given_up >= 1


def test_steps_are_not_given_up_for_ever() -> None:
    model = fake_model()
    executor = executor_of(model)
    executor.step_seconds = 0.01
    executor.hurried = True  # as if one change came after the other
    session = model.session()
    for token in range(3):
        session.feed([token])
    assert executor.given_up >= 3
    assert executor.sequences[session.sequence] == [0, 1, 2]


def test_turns_go_to_those_ahead_first_and_in_their_order() -> None:
    hurries: list[bool] = []
    turns, order, threads = Turns(hurries.append), list[str](), list[threading.Thread]()

    def take(name: str, turn: Callable[[], AbstractContextManager[object]]) -> None:
        with turn():
            order.append(name)

    def wait(name: str, turn: Callable[[], AbstractContextManager[object]]) -> None:
        before = len(turns._waiting) + len(turns._ahead)
        threads.append(threading.Thread(target=take, args=(name, turn)))
        threads[-1].start()
        wait_for(lambda: len(turns._waiting) + len(turns._ahead) > before)

    with turns:
        wait("one", lambda: turns)
        wait("two", lambda: turns)
        wait("first", turns.next)
        assert hurries == []
        wait("second", lambda: turns.next(hurry=True))
        wait("third", lambda: turns.next(hurry=True))
        assert hurries == [True, True]
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second", "third", "one", "two"]
    assert hurries == [True, True, False]
    assert not turns.taken
    with turns.next(hurry=True):  # nobody is there who could
        assert hurries == [True, True, False]


@pytest.mark.usefixtures("interruptible")
def test_a_signal_while_it_waits_in_a_hurry_leaves_nobody_in_one() -> None:
    hurries: list[bool] = []
    turns, leave = Turns(hurries.append), threading.Event()

    def hold() -> None:
        with turns:
            leave.wait(20)

    def interrupt() -> None:
        wait_for(lambda: hurries == [True])
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    holder = threading.Thread(target=hold)
    holder.start()
    wait_for(lambda: turns.taken)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), turns.next(hurry=True):
        raise AssertionError
    assert hurries == [True, False]
    leave.set()
    holder.join(20)
    assert not turns.taken


# --- the order under a shrink


def test_weights_go_first_then_idle_sessions_and_what_is_promised_stays() -> None:
    model = fake_model(sessions=2)
    idle, busy = model.session(), model.session()
    idle.feed([7] * 700)  # 22 pages
    busy.feed([8] * 300)
    assert busy.reserve(640)  # 20 pages
    model.budget = FIXED + 42 * PAGE + 1000
    assert model.depth.rungs == 1
    assert (cache_of(model).parked[0], len(executor_of(model).sequences[0])) == (0, 700)
    model.budget = FIXED + 41 * PAGE + 1000
    assert cache_of(model).parked == (1, 22 * (PAGE + header_bytes(0)))
    assert len(executor_of(model).sequences[0]) == 0
    report = model.report()
    assert (report.parked, report.in_flight) == (1, 1)
    least = model.least_plan()
    assert (least.rungs, least.kv) == (1, 32 * PAGE)  # 512 tokens for each of two
    with pytest.raises(BudgetError, match=r"(?s)512 tokens x 2 sessions.*sum"):
        model.budget = least.total - 1
    model.budget = least.total
    assert busy.reserve(640)
    busy.feed([8] * 340)
    assert executor_of(model).sequences[1] == [8] * 640


def test_what_is_promised_is_not_taken() -> None:
    model = fake_model(sessions=1)
    session = model.session()
    assert session.reserve(2000)  # 63 pages
    least = model.least_plan()
    assert (least.rungs, least.kv, least.context) == (1, 63 * PAGE, 2000)
    with pytest.raises(BudgetError, match=r"(?s)wait until the answers.*2016 tokens in use"):
        model.budget = least.total - 1
    model.budget = least.total
    session.feed([1] * 2000)
    session.release()
    model.budget = FIXED + 16 * PAGE + 1000
    assert cache_of(model).parked[0] == 1


def test_a_parked_session_comes_back_when_it_is_used() -> None:
    model = fake_model(memory=FIXED + 60_000, sessions=2)
    one, two = model.session(), model.session()
    one.feed(list(range(1, 101)))
    two.feed([9] * 100)
    model.budget = FIXED + 512 * 2 * 20 + 1000
    assert cache_of(model).parked[0] == 0
    assert two.reserve(model.context)
    pages = model.context // 32
    three = model.session()
    assert three.reserve((cache_of(model).bytes // PAGE - pages) * 32)
    three.release()
    assert cache_of(model).parked[0] == 1
    one.feed([5])
    assert executor_of(model).sequences[0] == [*range(1, 101), 5]
    assert cache_of(model).parked[0] == 0


def test_rewinding_a_parked_session_keeps_what_agrees() -> None:
    model = fake_model(memory=FIXED + 60_000)
    session = model.session()
    session.feed(list(range(1, 101)))
    with model._turns:
        cache_of(model)._park(session.sequence)
    assert session.rewind([*range(1, 51), 7, 7]) == 50
    session.feed([7])
    assert executor_of(model).sequences[0] == [*range(1, 51), 7]
    with model._turns:
        cache_of(model)._park(session.sequence)
    assert session.rewind([9, 9]) == 0
    assert cache_of(model).parked == (0, 0)
    session.close()


def test_what_was_parked_and_cannot_be_read_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fake_model(memory=FIXED + 60_000, sessions=2)
    one, two = model.session(), model.session()
    one.feed(list(range(1, 101)))
    two.feed([4] * 10)
    with model._turns:
        cache_of(model)._park(one.sequence)

    def broken(*_: Any) -> Any:
        raise ChecksumError("not as it was written")

    monkeypatch.setattr(ParkedPage, "read", broken)
    model.step_all([two, one], [6, 5])
    assert executor_of(model).sequences == {0: [*range(1, 101), 5], 1: [4] * 10 + [6]}
    with model._turns:
        cache_of(model)._park(one.sequence)
    one.feed([8])
    assert executor_of(model).sequences[0] == one.tokens == [*range(1, 101), 5, 8]


def test_a_disk_that_is_full_refuses_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_model()
    session = model.session()
    session.feed([1] * 1000)
    before = model.plan, model.depth

    def full(self: Parked, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Parked, "__init__", full)
    with pytest.raises(EngineError, match="No space left"):
        model.budget = FIXED + 512 * 20 + 1000
    assert (model.plan, model.depth) == before
    session.feed([1])


def test_new_answers_wait_for_room_and_come_in_order() -> None:
    model = fake_model(memory=FIXED + 60_000, context=64, sessions=1)
    first = model.generate([1], max_tokens=64, ignore_eos=True)
    next(first)
    ended: list[int] = []

    def answer(number: int) -> None:
        generation = model.generate([number], max_tokens=64, ignore_eos=True)
        assert len(list(generation)) == 64
        ended.append(number)

    threads = []
    for number in range(2, 6):
        threads.append(threading.Thread(target=answer, args=(number,)))
        threads[-1].start()
        wait_for(lambda: len(model._line) == len(threads))
    assert not ended
    list(first)
    for thread in threads:
        thread.join(20)
    assert ended == [2, 3, 4, 5]
    assert cache_of(model).in_flight == 0


def test_an_answer_that_waits_can_be_cancelled_and_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fake_model(memory=FIXED + 60_000, context=64, sessions=1)
    first = model.generate([1], max_tokens=64, ignore_eos=True)
    next(first)
    second = model.generate([2], max_tokens=64, ignore_eos=True)
    second.cancel()
    assert list(second) == []
    assert second.result.finish_reason == "cancelled"
    monkeypatch.setattr(line_module, "PATIENCE", 0.05)
    with pytest.raises(EngineError, match="none of them goes on"):
        list(model.generate([3], max_tokens=64, ignore_eos=True))
    list(first)
    assert len(list(model.generate([4], max_tokens=64, ignore_eos=True))) == 64


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_order_of_events_loses_a_token_or_breaks_the_sum(data: st.DataObject) -> None:
    """Sessions that feed, reserve, rest and close while the budget moves at random."""
    model = fake_model(memory=FIXED + 60_000, sessions=3)
    executor = executor_of(model)
    sessions: dict[Any, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "feed", "reserve", "release", "budget"]))
        if action == "open" or not sessions:
            sessions[model.session()] = []
            continue
        session = data.draw(st.sampled_from(list(sessions)))
        if action == "feed":
            tokens = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=300))
            fits = len(session) + len(tokens) <= model.context
            try:
                session.feed(tokens)
                sessions[session] += tokens
            except EngineError:
                # What was appended before the error stays.
                sessions[session] = list(session.tokens)
                assert not fits or cache_of(model).in_flight
        elif action == "reserve":
            session.reserve(data.draw(st.integers(1, 800)))
        elif action == "release":
            session.release()
        else:
            size = data.draw(st.integers(FIXED + 11_500, FIXED + 90_000))
            try:
                model.budget = size
            except BudgetError:
                assert size < max(model.least_plan().total, FIXED + 512 * 3 * 20 + 1001)
        plan, cache = model.plan, cache_of(model)
        assert executor.kv_used_bytes <= cache.bytes == plan.kv
        assert model.ledger.free + model.ledger.held == model.ledger.total >= plan.total
        assert model.depth.rungs == plan.rungs
    for session, tokens in sessions.items():
        assert session.tokens == tokens
        session.rewind([*tokens, 1])
        if len(tokens) < model.context:
            for other in sessions:
                other.release()
            session.feed([1])
            assert executor.sequences[session.sequence] == [*tokens, 1]
        session.close()


# --- with the core


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    return write_tiny_pack(
        folder / "tiny.pack", least=1, context=2048, hidden=256, ffn=512, shard_bytes=200_000
    )


def test_parking_changes_no_bit(pack: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 260, 333).tolist()
    with pliant.load(pack) as model:
        with model.session() as session:
            session.feed(ids)
            expected = session.feed([7])
        with model.session() as session, model.session() as other:
            session.feed(ids)
            with model._turns:
                cache_of(model)._park(session.sequence)
            other.feed(ids[::-1])  # takes the pages
            assert np.array_equal(session.feed([7]), expected)


def test_parked_files_have_no_name_and_are_closed(pack: Path, tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    os.environ["TMPDIR"] = str(tmp_path)
    try:
        with pliant.load(pack) as model:
            before = open_files()
            session = model.session()
            session.feed([1] * 100)
            with model._turns:
                cache_of(model)._park(session.sequence)
            assert open_files() == before + 1
            assert not list(tmp_path.iterdir())
            size = model._executor.kv_page_bytes + header_bytes(0)
            assert model.report().parked_bytes == 4 * size
            session.close()
            assert open_files() == before
            session = model.session()
            session.feed([1] * 100)
            with model._turns:
                cache_of(model)._park(session.sequence)
        gc.collect()
        assert open_files() < before
    finally:
        del os.environ["TMPDIR"]


@pytest.mark.resident
def test_eight_answers_go_on_while_the_budget_walks(pack: Path) -> None:
    """The shape of benchmarks/budget.py in small: counts, and no times."""
    with pliant.load(pack, context=128, sessions=8) as model:
        most, least = model.plan.weights, model.least_plan().weights
        done = threading.Event()
        lengths: list[int] = []
        failures: list[BaseException] = []

        def answer(number: int) -> None:
            try:
                while not done.is_set() or not lengths:
                    generation = model.generate([number], max_tokens=40, ignore_eos=True)
                    list(generation)
                    assert generation.result.finish_reason == "length"
                    low = generation.result.bits_per_weight_lowest
                    mean = generation.result.bits_per_weight
                    assert low is not None
                    assert mean is not None
                    assert low <= mean
                    lengths.append(len(generation.result.tokens))
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=answer, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        rng = np.random.default_rng(5)
        for size in rng.integers(least, most + 1, 100).tolist():
            change = model.move(weights=size)
            assert model.depth.weights <= max(size, least)
            assert model.plan.weights <= size
            if size % 3 == 0:
                change.wait(60)
        done.set()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert set(lengths) == {40}
        target = (least + most) // 2
        model.resize(weights=target)
        logits = model.logits([1, 2, 3, 4, 5])
        assert model.audit().ok
    with pliant.load(pack, weights=target) as fresh:
        assert np.array_equal(fresh.logits([1, 2, 3, 4, 5]), logits)


def test_steps_that_are_made_again_change_no_token(pack: Path) -> None:
    prompt = np.random.default_rng(2).integers(0, 256, 400).tolist()
    with pliant.load(pack) as model:

        def answer() -> list[int]:
            generation = model.generate(prompt, max_tokens=60, ignore_eos=True)
            list(generation)
            return generation.result.tokens

        alone, weights, done = answer(), model.depth.weights, threading.Event()

        def change() -> None:
            while not done.is_set():
                model.move(weights=weights)  # to where it is: steps give way all the same

        mover = threading.Thread(target=change)
        mover.start()
        try:
            assert answer() == alone
        finally:
            done.set()
            mover.join()


def test_shards_that_are_replaced_or_gone_are_named(pack: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.pack"
    shutil.copytree(pack, copy)
    shards = sorted(copy.glob("plies-*.safetensors"))
    assert len(shards) > 2
    with pliant.load(copy, weights="80KB") as model:
        before, depth = model.logits([1, 2, 3]), model.depth
        shards[-1].unlink()
        with pytest.raises(PackError, match=r"plies-.* cannot be opened: it is not there any more"):
            model.resize()
        shards[-1].mkdir()
        with pytest.raises(PackError, match="not a regular file"):
            model.resize()
        shards[-1].rmdir()
        os.mkfifo(shards[-1])
        with pytest.raises(PackError, match="not a regular file"):
            model.resize()
        shards[-1].unlink()
        shards[-1].write_bytes(b"another file")
        with pytest.raises(ChecksumError, match="ends after 0 of"):
            model.resize()
        assert model.depth == depth
        assert np.array_equal(model.logits([1, 2, 3]), before)
        assert model.plan.rungs == depth.rungs


def test_a_disk_that_fails_leaves_the_old_state(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pliant.load(pack, weights="80KB") as model:
        before, depth = model.logits([1, 2, 3]), model.depth
        folder = os.open(tmp_path, os.O_RDONLY)
        location = RungFiles.location
        # Reading from a folder is an error of the kernel, as that of a disk is.
        monkeypatch.setattr(
            RungFiles, "location", lambda files, rung: (folder, *location(files, rung)[1:])
        )
        change = model.move()
        with pytest.raises(OSError, match=r"reading rung \d+: Is a directory"):
            change.wait(20)
        os.close(folder)
        monkeypatch.undo()
        assert model.depth == depth
        assert np.array_equal(model.logits([1, 2, 3]), before)
        assert model.move().wait(20)
        assert model.depth.rungs > depth.rungs


def test_killing_it_anywhere_harms_no_pack(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "pack", least=1, hidden=256, ffn=512, shard_bytes=200_000)
    files = sorted(file for file in path.iterdir())
    before = [file.read_bytes() for file in files]
    walk = (
        "import sys, random, pliant\n"
        "with pliant.load(sys.argv[1]) as model:\n"
        "    most, least = model.plan.weights, model.least_plan().weights\n"
        "    print('begun', flush=True)\n"
        "    while True:\n"
        "        model.move(weights=random.randint(least, most))\n"
    )
    for milliseconds in (0, 3, 20, 70):
        process = subprocess.Popen(
            [sys.executable, "-c", walk, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(milliseconds / 1000)
        process.kill()
        process.wait()
        process.stdout.close()
        assert sorted(path.iterdir()) == files
        assert [file.read_bytes() for file in files] == before
    with pliant.load(path) as model:
        assert model.depth.rungs == model.pack.rungs_available


def test_closing_gives_the_rungs_back_at_once(tmp_path: Path) -> None:
    """Also after changes, and before the garbage of Python is collected."""
    model = pliant.load(write_tiny_pack(tmp_path / "pack", least=2))
    executor, most = model._executor, model.depth.weights
    model.resize(weights=most // 2)
    model.resize(weights=most)
    gc.disable()
    try:
        model.close()
        assert executor.memory()["weights"] == 0
    finally:
        gc.enable()
