"""The engine over a scripted executor, and over the real core with random packs."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from fakes import EOS, executor_of, fake_model
from packs import write_random_pack
from pliant.engine.generation import Stops
from pliant.engine.turns import Turns
from pliant.errors import (
    BudgetError,
    ChecksumError,
    EngineError,
    FormatError,
    PackError,
    UsageError,
)
from tiny import write_tiny_pack

FIXED = 10_000  # bytes of a fake model that no plan can change
KV_TOKEN = 20


# --- answers, over the fake


def test_an_answer_streams_whole_characters_and_says_what_it_was_made_with() -> None:
    model = fake_model()
    reply = [*"naïve".encode(), EOS]
    prompt = [1, 2, 3]
    executor_of(model).script = lambda tokens, rungs: reply[len(tokens) - len(prompt)]
    generation = model.generate(prompt)
    assert list(generation) == ["n", "a", "ï", "v", "e"]
    result = generation.result
    assert result.text == "naïve"
    assert (result.finish_reason, result.prompt_tokens, result.cached_tokens) == ("eos", 3, 0)
    assert result.tokens == tuple(reply[:-1])
    assert result.bits_per_weight == result.bits_per_weight_lowest == 8 * 100_000 / 8000
    assert result.expected_kl == result.expected_kl_highest == pytest.approx(0.01)
    assert result.decode_steps == 6
    assert model.last == result
    assert not executor_of(model).sequences


@pytest.mark.parametrize(("limit", "reason"), [(3, "length"), (None, "context")])
def test_answers_end_at_their_limits(limit: int | None, reason: str) -> None:
    model = fake_model(context=64)
    executor_of(model).script = lambda tokens, rungs: 65
    generation = model.generate("abc", max_tokens=limit)
    text = "".join(generation)
    assert generation.result.finish_reason == reason
    # The last token needs no room: it is not fed.
    assert len(text) == (3 if limit else 64 - 4 + 1)


def test_the_end_of_the_model_can_be_ignored() -> None:
    model = fake_model()
    executor_of(model).script = lambda tokens, rungs: EOS
    assert "".join(model.generate("a", max_tokens=2)) == ""
    assert "".join(model.generate("a", max_tokens=2, ignore_eos=True)) == "<299><299>"


def test_a_stop_text_ends_the_answer_before_it() -> None:
    model = fake_model()
    reply = b"one two three"
    executor_of(model).script = lambda tokens, rungs: reply[len(tokens) - 1]
    generation = model.generate([5], stop=["xyz", " three"])
    assert "".join(generation) == "one two"
    assert generation.result.finish_reason == "stop"
    assert "".join(model.generate([5], stop="o t")) == "one tw"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_never_lose_or_delay_more_than_they_must(text: str, stops: list[str]) -> None:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    machine, out = Stops(stops), ""
    for letter in text:
        out += machine.push(letter)
    out += machine.flush()
    # A stop text that ends first wins, even where a longer one began before it.
    if not found:
        assert out == text
        assert not machine.stopped
    else:
        assert machine.stopped
        assert text.startswith(out)
        assert any(text.startswith(stop, len(out)) for stop in stops)


def test_no_more_is_held_back_than_could_become_a_stop_text() -> None:
    machine = Stops(["abc"])
    assert [machine.push(letter) for letter in "xabab"] == ["x", "", "", "ab", ""]
    assert machine.flush() == "ab"
    with pytest.raises(UsageError):
        Stops([""])


def test_a_session_computes_only_what_is_new() -> None:
    model = fake_model()
    executor = executor_of(model)
    executor.script = lambda tokens, rungs: 65
    with model.session() as session:
        list(model.generate([1, 2, 3], session=session, max_tokens=4))
        assert session.tokens == [1, 2, 3, 65, 65, 65]
        executor.steps.clear()
        generation = model.generate([1, 2, 3, 65, 65, 9, 9], session=session, max_tokens=1)
        list(generation)
        assert generation.result.cached_tokens == 5
        assert executor.steps == [(2, 100)]
        # The very same prompt again: its last token is fed for the logits.
        again = model.generate([1, 2, 3, 65, 65, 9, 9], session=session, max_tokens=1)
        list(again)
        assert again.result.cached_tokens == 6
        assert executor.sequences == {0: [1, 2, 3, 65, 65, 9, 9]}
    assert not executor.sequences
    with pytest.raises(EngineError, match="closed"):
        session.feed([1])


def test_long_prompts_are_fed_in_pieces_that_end_in_logits() -> None:
    model = fake_model()
    for size in (1, 255, 256, 257, 600):
        executor_of(model).steps.clear()
        with model.session() as session:
            row = session.feed([7] * size)
        assert row.argmax() == 8
        fed = [count for count, _ in executor_of(model).steps]
        assert sum(fed) == size
        assert max(fed) <= 256


def test_leaving_an_answer_gives_its_memory_back() -> None:
    model = fake_model()
    generation = model.generate("abc")
    next(generation)
    assert executor_of(model).sequences
    generation.close()
    assert not executor_of(model).sequences
    assert model.last is not None
    assert model.last.finish_reason == "cancelled"
    forgotten = model.generate("abc")
    next(forgotten)
    del forgotten
    gc.collect()
    assert not executor_of(model).sequences


def test_an_answer_can_be_cancelled_from_elsewhere() -> None:
    model = fake_model()
    generation = model.generate([9] * 1000)
    generation.cancel()
    assert list(generation) == []
    assert generation.result.finish_reason == "cancelled"
    assert not executor_of(model).steps
    generation = model.generate([9], ignore_eos=True)
    next(generation)
    generation.cancel()
    assert list(generation) == []
    assert generation.result.text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": [300]}, UsageError),
        ({"prompt": [-1]}, UsageError),
        ({"prompt": [1.5]}, UsageError),
        ({"prompt": [True]}, UsageError),
        ({"prompt": [1], "max_tokens": 0}, UsageError),
        ({"prompt": [1], "temperature": -1}, UsageError),
        ({"prompt": [1], "stop": [""]}, UsageError),
        ({"prompt": [1], "logit_bias": {300: 1.0}}, UsageError),
        ({"prompt": [1], "tempreature": 1}, TypeError),
        ({"prompt": [1] * 2049}, EngineError),
    ],
    ids=str,
)
def test_requests_without_meaning_are_refused(arguments: Any, error: type[Exception]) -> None:
    model = fake_model()
    with pytest.raises(error):
        model.generate(**arguments)
    assert not executor_of(model).sequences


def test_an_empty_prompt_begins_with_the_first_token() -> None:
    model = fake_model()
    generation = model.generate("", max_tokens=1)
    list(generation)
    assert generation.result.prompt_tokens == 1
    assert generation.result.tokens == ((256 + 1),)


# --- the budget, over the fake


def test_the_budget_decides_on_rungs_and_context() -> None:
    model = fake_model(memory=FIXED + 60_000)
    assert model.plan.total <= FIXED + 60_000
    assert model.depth.rungs == 49  # 60,000 less 512 tokens of KV, which are more than a sixth
    assert model.context == 544  # and what is left over
    model.budget = FIXED + 100_000
    assert (model.depth.rungs, model.context) == (83, 832)
    model.budget = "40KB"
    assert model.budget == 40_000
    assert model.depth.rungs == executor_of(model).resident_rungs == 19
    model.budget = None
    assert (model.depth.rungs, model.context) == (100, 2048)
    model.resize(weights=30_500)
    assert model.depth.rungs == 30
    assert model.report().weights == 30_000


def test_a_refused_budget_changes_nothing() -> None:
    model = fake_model(memory=FIXED + 60_000)
    before, ledger = model.plan, model.ledger.owners()
    with pytest.raises(BudgetError, match="sum"):
        model.budget = FIXED + 5000
    with pytest.raises(UsageError):
        model.budget = "much"
    assert (model.plan, model.ledger.owners()) == (before, ledger)
    assert model.budget == FIXED + 60_000
    list(model.generate("abc", max_tokens=3))


def test_a_rung_that_cannot_be_read_leaves_the_old_state() -> None:
    model = fake_model(memory=FIXED + 40_000)
    before, ledger, depth = model.plan, model.ledger.owners(), model.depth
    executor_of(model).broken_rung = 70
    with pytest.raises(ChecksumError):
        model.budget = FIXED + 110_000
    assert (model.plan, model.ledger.owners(), model.depth) == (before, ledger, depth)
    assert model.budget == FIXED + 40_000
    assert executor_of(model).read == depth.rungs
    executor_of(model).broken_rung = None
    model.budget = FIXED + 110_000
    assert model.depth.rungs > 70


def test_what_a_session_holds_is_kept_when_the_budget_shrinks() -> None:
    model = fake_model(memory=FIXED + 60_000)
    with model.session() as session:
        session.feed([1] * 540)
        with pytest.raises(BudgetError):
            model.budget = FIXED + 544 * KV_TOKEN  # no byte left for a rung
        model.budget = FIXED + 544 * KV_TOKEN + 1000
        assert (model.depth.rungs, model.context) == (1, 544)
        session.feed([1] * 4)
        with pytest.raises(EngineError, match="context is full"):
            session.feed([1])
        assert len(session) == 544


def test_sessions_share_the_pages_that_were_planned() -> None:
    model = fake_model(memory=FIXED + 60_000, context=512, sessions=2)
    with model.session() as one, model.session() as two, model.session() as three:
        assert one.reserve(512)
        one.feed([1] * 512)
        assert two.reserve(480)
        two.feed([1] * 480)
        assert three.reserve(32)
        three.feed([1] * 32)
        assert not two.reserve(481)
        with pytest.raises(EngineError, match="KV cache is full"):
            two.feed([1])
        assert len(two) == 480
        three.close()
        two.feed([1])


def test_an_answer_says_the_lowest_and_the_mean_quality() -> None:
    model = fake_model(memory=FIXED + 90_000)
    high = model.depth
    generation = model.generate("abc", max_tokens=4, ignore_eos=True)
    next(generation)
    model.budget = FIXED + 30_000
    low = model.depth
    list(generation)
    result = generation.result
    assert result.bits_per_weight_lowest == low.bits_per_weight
    assert result.expected_kl_highest == low.expected_kl
    assert high.bits_per_weight is not None
    assert low.bits_per_weight is not None
    mean = (high.bits_per_weight + 3 * low.bits_per_weight) / 4
    assert result.bits_per_weight == pytest.approx(mean)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(FIXED + 11_000, 200_000), max_size=12), st.integers(0, 500))
def test_any_walk_of_budgets_ends_where_a_fresh_load_begins(walk: list[int], used: int) -> None:
    model = fake_model(memory=FIXED + 90_000)
    with model.session() as session:
        if used:
            session.feed([3] * used)
        for size in walk:
            try:
                model.budget = size
            except BudgetError:
                continue
            assert model.plan.total <= size
            assert model.ledger.total == size
            assert model.ledger.free + model.ledger.held == size
            assert executor_of(model).resident_rungs == model.depth.rungs == model.plan.rungs
    for size in [*walk, 90_000][-1:]:
        try:
            model.budget = size
        except BudgetError:
            return
        fresh = fake_model(memory=size)
        assert (model.plan, model.context) == (fresh.plan, fresh.context)
        held = {name: size for name, (size, _) in model.ledger.owners().items()}
        assert held == {name: size for name, (size, _) in fresh.ledger.owners().items()}


def test_budgets_from_many_threads_leave_one_of_them_in_force() -> None:
    model = fake_model(memory=FIXED + 90_000, sessions=4)
    executor_of(model).read_seconds = 0.001
    failures: list[BaseException] = []
    done = threading.Event()

    def answer(number: int) -> None:
        try:
            while not done.is_set():
                generation = model.generate([number], max_tokens=5, ignore_eos=True)
                assert len(list(generation)) >= 1
                assert generation.result.finish_reason == "length"
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    def change(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for size in rng.integers(FIXED + 60_000, FIXED + 160_000, 40).tolist():
                model.budget = size
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=answer, args=(n,)) for n in range(3)]
    changers = [threading.Thread(target=change, args=(n,)) for n in range(3)]
    for thread in [*threads, *changers]:
        thread.start()
    for thread in changers:
        thread.join()
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.budget is not None
    assert model.plan.memory == model.budget == model.ledger.total
    assert model.depth.rungs == model.plan.rungs == executor_of(model).read
    assert model.plan.total <= model.budget


def test_a_newer_request_overtakes_one_that_still_reads() -> None:
    model = fake_model(memory=FIXED + 40_000)
    executor = executor_of(model)
    executor.read_seconds = 0.05
    grow = threading.Thread(target=lambda: setattr(model, "budget", FIXED + 130_000))
    grow.start()
    while executor.most_read <= model.depth.rungs:
        time.sleep(0.001)
    model.budget = FIXED + 30_000
    grow.join()
    assert executor.most_read < 100
    assert model.depth.rungs == executor.read == model.plan.rungs
    assert model.budget == model.ledger.total == FIXED + 30_000


def test_a_turn_is_given_in_the_order_in_which_it_was_asked_for() -> None:
    turns, order = Turns(lambda on: None), []

    def wait(number: int) -> None:
        with turns:
            order.append(number)

    threads = []
    with turns:
        for number in range(8):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    assert not turns.taken
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        pass


def test_a_closed_model_says_so() -> None:
    model = fake_model()
    generation = model.generate("abc")
    next(generation)
    model.close()
    with pytest.raises(EngineError, match="closed"):
        list(generation)
    with pytest.raises(EngineError, match="closed"):
        model.generate("abc").__next__()
    with pytest.raises(EngineError, match="closed"):
        model.budget = "1MB"
    with pytest.raises(EngineError, match="closed"):
        model.report()
    model.close()


def test_logits_that_have_no_room_are_refused() -> None:
    model = fake_model(memory=FIXED + 40_000)
    assert model.logits([1, 2]).shape == (2, 300)
    with pytest.raises(BudgetError, match="logits take"):
        model.logits([1] * 100)
    with pytest.raises(BudgetError, match="use fewer rows"):
        next(model.logit_blocks([1] * 100, rows=50))
    blocks = list(model.logit_blocks([1] * 100, rows=3))
    assert [block.shape for block in blocks] == [(3, 300)] * 33 + [(1, 300)]
    assert 1 < len(next(model.logit_blocks([1] * 100))) < 8
    assert len(next(fake_model().logit_blocks([1] * 100))) == 64


# --- with the core


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    return write_tiny_pack(folder / "tiny.pack", least=1, context=2048, hidden=128, ffn=256)


def test_the_core_answers_the_same_for_the_same_seed(pack: Path) -> None:
    def answer(model: pliant.Model, seed: int) -> tuple[int, ...]:
        generation = model.generate(
            "Once upon", temperature=9.0, max_tokens=20, seed=seed, ignore_eos=True
        )
        list(generation)
        return generation.result.tokens

    with pliant.load(pack) as model:
        first = answer(model, 5)
        assert len(first) == 20
        assert answer(model, 5) == first
        assert answer(model, 6) != first
    with pliant.load(pack, threads=1, chunk=16, isa="plain") as model:
        assert answer(model, 5) == first


def test_logits_are_those_of_a_fresh_load_after_any_walk(pack: Path) -> None:
    ids = [72, 101, 108, 108, 111] * 7
    with pliant.load(pack, weights="60KB") as fresh:
        expected = fresh.logits(ids)
        depth = fresh.depth
    assert depth.weights <= 60_000
    with pliant.load(pack) as model:
        full = model.logits(ids)
        assert not np.array_equal(full, expected)
        for size in ("30KB", "90KB", "41KB", "60KB"):
            model.resize(weights=size)
        assert model.depth == depth
        assert np.array_equal(model.logits(ids), expected)
        model.resize()
        assert np.array_equal(model.logits(ids), full)
        blocks = list(model.logit_blocks(ids, rows=8))
        assert np.array_equal(np.concatenate(blocks), full)


def test_batched_steps_are_those_of_each_alone(pack: Path) -> None:
    with pliant.load(pack, sessions=3) as model:
        sessions = [model.session() for _ in range(3)]
        for number, session in enumerate(sessions):
            session.feed([number + 1] * (number + 3))
        rows = model.step_all(sessions, [9, 8, 7])
        with model.session() as alone:
            assert np.array_equal(alone.feed([2, 2, 2, 2, 8]), rows[1])
        with pytest.raises(UsageError):
            model.step_all(sessions, [1])
        with pytest.raises(UsageError):
            model.step_all([sessions[0], sessions[0]], [1, 1])
        for session in sessions:
            session.close()


def test_the_report_names_everything(pack: Path) -> None:
    with pliant.load(pack, memory="4GiB") as model:
        report = model.report()
        assert report.budget == report.total == 4 * 2**30
        assert report.free + sum(held for held, _ in report.ledger.values()) == report.total
        assert {"interpreter", "tokenizer", "base", "weights", "kv"} <= report.ledger.keys()
        assert report.rungs == report.rungs_available == report.rungs_of_pack
        names = {m.name for m in model.pack.manifest.matrices}
        assert report.matrices.keys() == names
        assert all(1 <= depth <= 8 for depth in report.matrices.values())
        audit = model.audit()
        assert audit.ok, audit
        import json

        assert json.loads(json.dumps(report.to_dict()))["ledger"]["kv"]["held"] > 0


def test_a_budget_that_is_too_small_shows_the_sum(pack: Path) -> None:
    with pytest.raises(BudgetError, match=r"(?s)at least \d+MiB.*interpreter.*weights.*kv.*sum"):
        pliant.load(pack, memory="5MiB")


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"isa": "mmx"},
        {"kv_bits": 17},
        {"chunk": 0},
        {"memory": "x"},
        {"sessions": 0},
    ],
    ids=str,
)
def test_loading_with_nonsense_is_refused(pack: Path, options: Any) -> None:
    with pytest.raises(UsageError):
        pliant.load(pack, **options)
    with pytest.raises(TypeError):
        pliant.load(pack, memroy="1GB")  # type: ignore[call-arg]


def test_plain_packs_run(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "plain.pack", coding="f32")
    with pliant.load(path) as model:
        assert model.depth.bits_per_weight is None
        generation = model.generate("abc", max_tokens=3, ignore_eos=True)
        list(generation)
        assert generation.result.expected_kl is None
        assert model.report().matrices == {}


def test_broken_packs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError):
        pliant.load(tmp_path / "nowhere")
    broken = write_random_pack(tmp_path / "a.pack")  # its tokenizer.bin is a placeholder
    with pytest.raises(FormatError):
        pliant.load(broken)
    other = write_tiny_pack(tmp_path / "b.pack")
    data = bytearray((other / "tokenizer.bin").read_bytes())
    data[-1] ^= 1
    (other / "tokenizer.bin").write_bytes(data)
    with pytest.raises(ChecksumError):
        pliant.load(other)


def test_a_shard_that_breaks_while_running_leaves_the_old_state(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "c.pack", least=4, hidden=128, ffn=256, shard_bytes=40_000)
    with pliant.load(path, weights="60KB") as model:
        ids = [1, 2, 3, 4]
        before, depth = model.logits(ids), model.depth
        shards = sorted(path.glob("plies-*.safetensors"))
        data = bytearray(shards[-1].read_bytes())
        data[-5000] ^= 255
        shards[-1].write_bytes(data)
        with pytest.raises(ChecksumError):
            model.resize()
        shards[-1].unlink()
        shards[0].unlink()  # open already, so it stays readable
        assert model.depth == depth
        assert np.array_equal(model.logits(ids), before)
        model.resize(weights="30KB")
        model.resize(weights="60KB")
        assert np.array_equal(model.logits(ids), before)


def test_files_are_closed(pack: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    pliant.load(pack).close()
    before = open_files()
    for _ in range(5):
        pliant.load(pack).close()
    gc.collect()
    assert open_files() == before
