"""Models with windows: plans that hold more, sessions on disk, beginnings in a folder, and answers
that give way to one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pliant
from fakes import AlwaysRead
from packs import write_random_pack
from pliant import _core
from pliant.engine.answers import Request
from pliant.engine.sampling import Sampling
from pliant.engine.scheduler import Scheduler
from pliant.memory.kv_ages import SLACK, Ages, PageBytes, fresh, make_schedule
from pliant.memory.plan import PackSizes, Wish, make_plan
from test_executor import some_ids
from test_kv import PAGE, coded, park
from test_kv_window import SHAPE, WINDOW
from test_scheduler import Desk
from tiny import write_tiny_pack

LARGER = {**SHAPE, "layers": 4, "layer_window": [WINDOW, 0, 33, 5], "head_dim": 64, "hidden": 256}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pack(tmp_path_factory.mktemp("window") / "pack", least=4, seed=3, **SHAPE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window")
    return write_tiny_pack(folder / "tiny.pack", least=4, **LARGER)


@pytest.fixture(params=["exact", "coded"])
def exact(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "exact")


# --- sessions and answers


@pytest.mark.parametrize("bits", [16, 5.5])
def test_a_parked_session_does_the_same(tiny: Path, bits: float) -> None:
    ids = some_ids(256, 700)
    with pliant.load(tiny, kv_bits=bits, sessions=4) as model, model.session() as session:
        executor = model._executor
        session.feed(ids[:600])
        park(model, session)
        large = model.report().parked_bytes
        session.feed(ids[600:640])
        whole = executor.page_whole(executor.pages(session.sequence))
        slack = executor.kv_local_age + SLACK
        assert whole == [number == 0 or 18 - number <= slack for number in range(20)]
        park(model, session)
        assert model.report().parked_bytes < 0.8 * large
        for at in (640, 600, 300):  # on, back inside of what is kept, and outside
            kept = session.rewind([*ids[:at], 7, 7])
            assert kept == {640: 640, 600: 600 if bits == 16 else 576, 300: PAGE}[at]
            rest = [*ids[:at], 7, 7][kept:]
            found = session.feed(rest)
            with model.session() as other:
                np.testing.assert_array_equal(found, other.feed([*ids[:at], 7, 7]))
            session.rewind(ids[:641])
            session.feed(ids[len(session) : 641])
            park(model, session)


@pytest.mark.parametrize("bits", [16, 5.5])
@pytest.mark.parametrize("seconds", [100.0, 1e-4])
def test_beginnings_in_a_folder(
    tiny: Path, tmp_path: Path, bits: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that gave up their local layers are of use to who has more of the same text, however
    little time there is at once, and are replaced when others compute them."""
    ids = some_ids(256, 700)
    monkeypatch.setattr("pliant.engine.model.FETCH", seconds)

    def answers(lengths: list[int], **options: Any) -> list[Any]:
        found = []
        with pliant.load(tiny, kv_bits=bits, **options) as model:
            model._holdings.cache.park.rates = AlwaysRead()
            for length in lengths:
                made = model.generate(ids[:length], max_tokens=4, ignore_eos=True, seed=1)
                list(made)
                found += [made.result.tokens, made.result.cached_tokens]
            with model._turn() as cache:
                pages = cache.prefixes.idle_pages()[::-1]
                for page in pages[1:10] if lengths == [700] else []:  # as if memory was short
                    model._executor.shallow(page, 9, whole=False)
        return found

    long, _, short, _ = answers([700, 300])
    where = {"park": tmp_path / "pages"}
    assert answers([700], **where) == [long, 0]
    assert answers([700, 300], **where) == [long, 672, short, PAGE]
    assert answers([300], **where) == [short, 288]
    assert answers([700], **where) == [long, 672]


@pytest.mark.parametrize("bits", [16, 5.5])
@pytest.mark.parametrize("folder", [False, True])
def test_answers_that_give_way(tiny: Path, tmp_path: Path, bits: float, folder: bool) -> None:
    """Many answers in the room of one, which share beginnings and go to disk: each the same as it
    is alone."""
    ids = some_ids(256, 900)
    prompts = [
        [*ids[:shared], *some_ids(256, more, seed)]
        for seed, (shared, more) in enumerate([(800, 50), (300, 500), (640, 1), (0, 700), (96, 10)])
    ]

    def tokens(at_once: bool, **options: Any) -> list[tuple[int, ...]]:
        desk, found = Desk(), []
        with pliant.load(tiny, kv_bits=bits, **options) as model:
            scheduler = Scheduler(model, desk.deliver)
            scheduler.start()
            for _ in range(2):
                answers = []
                for prompt in prompts:
                    request = Request(prompt=prompt, sampling=Sampling(seed=1), max_tokens=40)
                    answers += scheduler.submit([request])
                    if not at_once:
                        desk.wait(answers[-1])
                desk.wait(*answers)
                found += [tuple(answer.tokens) for answer in answers]
            scheduler.close()
            assert model._executor.kv_used_bytes <= model.plan.kv
        return found

    want = tokens(False, context=960, sessions=8)
    options: dict[str, Any] = {"park": tmp_path / "pages"} if folder else {}
    assert tokens(True, context=960, sessions=1, **options) == want


# --- plans

SIZES = PackSizes(
    weights=[1000 * k for k in range(101)], arena=[1000 * k for k in range(101)], coded=8000,
    quality=[(0, 8.0), (100_000, 0.01)], context=2048, kv_page_tokens=PAGE, kv_page_bytes=1600,
    kv_rungs=[100, 300, 400, 500, 600, 700], kv_quality=[0.5, 0.1, 0.02, 0.004, 0.001],
    kv_global=[320, 60, 80, 100, 120, 140], kv_local_age=16, kv_chunk=3,
)  # fmt: skip
EXACT = replace(SIZES, kv_rungs=[], kv_quality=[], kv_global=[320])


@given(level=st.integers(0, 60), full=st.integers(1, 64))
def test_bytes_and_bits_of_pages(level: int, full: int) -> None:
    page = PageBytes((1600, 300, 400, 500, 600, 700), (320, 60, 80, 100, 120, 140), 16)
    schedule = make_schedule(level, page, 65)
    total = bits = 0.0
    for age in range(full):
        form = schedule.form(age)
        assert form.whole == (age <= 16 + SLACK)
        assert form.rungs == schedule.kept[age]
        total += (page.whole if form.whole else page.global_only)[form.rungs]
        bits += 16 * page.whole[form.rungs] / 1600
    assert schedule.total(full) == total == schedule.bytes((1,) * full)
    assert schedule.bits(full) == pytest.approx(bits / full)
    without = make_schedule(level, replace(page, global_only=(), local_age=0), 65)
    assert schedule.bits(full) == without.bits(full)
    if not level:
        assert schedule.bits(full) == 16


@settings(deadline=None)
@given(
    sizes=st.sampled_from([SIZES, EXACT]),
    memory=st.integers(30_000, 300_000),
    context=st.none() | st.integers(1, 2048),
    sessions=st.integers(1, 5),
)
def test_a_plan_with_windows_holds_more(
    sizes: PackSizes, memory: int, context: int | None, sessions: int
) -> None:
    wish = Wish(memory=memory, context=context, sessions=sessions)
    try:
        without = make_plan(replace(sizes, kv_global=(), kv_local_age=0), (), wish)
    except pliant.BudgetError:
        return
    plan = make_plan(sizes, (), wish)
    assert plan.total <= memory
    assert plan.context >= without.context - 4 * PAGE  # the chunk, and a page of each session
    assert plan.kv - plan.kv_chunk >= sessions * sizes.kv_session(plan.kv_level, plan.context)
    long = fresh(2048, PAGE) + fresh(100, PAGE)
    alone = [sizes.kv_bytes(plan.kv_level, fresh(tokens, PAGE)) for tokens in (2048, 100)]
    assert sizes.kv_bytes(plan.kv_level, long) >= sum(alone)
    assert alone[0] == sizes.kv_session(plan.kv_level, 2048)
    if context is None and plan.kv_level == without.kv_level and without.context == 2048:
        assert plan.context == 2048


@settings(deadline=None)
@given(size=st.integers(0, 200_000), level=st.sampled_from([0, 30, 40]))
def test_the_context_that_fits(size: int, level: int) -> None:
    sizes = SIZES if level else EXACT
    tokens = sizes.kv_context(level, size)
    assert tokens == 0 or sizes.kv_session(level, tokens) <= size
    if tokens < sizes.context:
        assert sizes.kv_session(level, tokens + PAGE) > size


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=4), data=st.data())
def test_what_is_planned_is_enough(
    path: Path, exact: bool, lengths: list[int], data: st.DataObject
) -> None:
    """With a limit of what a plan counts for these sequences and a chunk, it never exceeds it."""
    chunk = data.draw(st.sampled_from([8, 64, 128]))
    executor = coded(path, exact=exact, chunk=chunk)
    sizes = sizes_of(executor, chunk)
    schedule = sizes.schedule(0 if exact else 40)
    executor.set_kv_ages(schedule.seen.tolist(), schedule.kept.tolist(), schedule.whole_age)
    level = 0 if exact else 40
    ages = sum((fresh(length, PAGE) for length in lengths), Ages())
    if sum(ages.full) + ages.partial > executor.kv_pages_total:
        return
    limit = sizes.kv_bytes(level, ages) + sizes.kv_in_chunk(level, max(lengths))
    executor.limit_kv(limit)
    left = {executor.open_sequence(): length for length in lengths}
    while left:
        counts = {
            sequence: min(length, data.draw(st.integers(1, 150)))
            for sequence, length in left.items()
        }
        tokens = np.ones(sum(counts.values()), np.int32)
        executor.step(list(counts), list(counts.values()), tokens, [0] * len(counts))
        assert executor.kv_used_bytes <= limit
        left = {s: length - counts[s] for s, length in left.items() if length > counts[s]}
    executor.trim_kv()
    assert executor.memory()["kv"] <= limit


def sizes_of(executor: _core.Executor, chunk: int) -> PackSizes:
    return replace(
        EXACT,
        context=1024,
        kv_page_bytes=executor.kv_page_bytes,
        kv_rungs=executor.kv_rung_bytes,
        kv_global=executor.kv_global_bytes,
        kv_local_age=executor.kv_local_age,
        kv_chunk=chunk // PAGE + 1,
    )


def test_a_model_holds_more_with_windows(tiny: Path) -> None:
    """What the plan of a model says fits, and the kernel agrees."""
    with pliant.load(tiny, context=1000, sessions=2, kv_bits=16) as model:
        whole = 2 * 32 * model._executor.kv_page_bytes
        assert model.plan.kv < 0.8 * whole
        assert model.plan.kv_bits == 16
        sessions = [model.session() for _ in range(2)]
        for session in sessions:
            assert session.reserve(1000)
            session.feed(some_ids(256, 1000))
        assert model._executor.kv_used_bytes <= model.plan.kv
        assert model.report().parked == 0
        for session in sessions:
            session.close()
