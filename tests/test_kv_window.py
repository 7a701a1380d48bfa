"""Pages give up what layers with a window do not see any more: never too early, and in full; and
answers do not depend on it."""

from __future__ import annotations

import threading
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
from pliant.errors import EngineError, UsageError
from pliant.memory.budget import measure
from pliant.memory.kv_ages import SLACK, Ages, Form, PageBytes, fresh, make_schedule
from pliant.memory.plan import PackSizes, Wish, make_plan
from pliant.store import Pack
from test_executor import Logits, some_ids
from test_kv import PAGE, coded, feed, park
from test_kv import page as stored_page
from tiny import write_tiny_pack

WINDOW = 70
LOCAL = 3  # the largest age at which it sees a page
SHAPE: dict[str, Any] = {
    "layers": 3, "layer_window": [WINDOW, 0, 33], "head_dim": 16, "context": 1024,
}  # fmt: skip
LARGER = {**SHAPE, "layers": 4, "layer_window": [WINDOW, 0, 33, 5], "head_dim": 64, "hidden": 256}
VOCAB = 160


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


def ready(path: Path, exact: bool, whole: int | None = LOCAL, **how: Any) -> _core.Executor:
    """With pages that get shallower, where they are coded; those that stay whole for longer than
    they must do not at once."""
    executor = coded(path, exact=exact, **how)
    rungs = [0] if exact else [6, 6, 6, 5, 4]
    executor.set_kv_ages(rungs, rungs if whole == LOCAL else rungs[:1] * len(rungs), whole)
    return executor


def forms(executor: _core.Executor, sequence: int) -> list[Form]:
    pages = executor.pages(sequence)
    return list(map(Form, executor.page_rungs(pages), executor.page_whole(pages)))


def size(executor: _core.Executor, form: Form) -> int:
    if form.whole:
        return executor.kv_rung_bytes[form.rungs] if form.rungs else executor.kv_page_bytes
    return executor.kv_global_bytes[form.rungs]


# --- the bound


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 34, 35, 64, 65, 66, 67, 96, 97, 98, 300])
def test_the_age_up_to_which_a_window_sees(tmp_path: Path, window: int) -> None:
    """The oldest page of which any token of the newest page sees any token, counted one by one."""
    shape = {**SHAPE, "layer_window": [0, 1, window]}
    executor = coded(write_random_pack(tmp_path / "pack", least=4, **shape), exact=True)
    newest = 20
    seen = {
        newest - at // PAGE
        for position in range(newest * PAGE, (newest + 1) * PAGE)
        for at in range(max(0, position - window + 1), position + 1)
    }
    assert executor.kv_local_age == max(seen)
    executor.set_kv_ages([0], [0], max(seen))
    with pytest.raises(UsageError, match="local layers see"):
        executor.set_kv_ages([0], [0], max(seen) - 1 if max(seen) else -2)


@pytest.mark.parametrize("windows", [[0, 0, 0], [40, 40, 60]])
def test_layers_of_one_kind_give_up_nothing(
    tmp_path: Path, windows: list[int], exact: bool
) -> None:
    path = write_random_pack(tmp_path / "pack", least=4, **{**SHAPE, "layer_window": windows})
    executor = ready(path, exact, 0)
    assert executor.kv_local_age == 0
    assert executor.kv_global_bytes[0] == executor.kv_page_bytes
    assert executor.kv_stored_bytes[False] == executor.kv_stored_bytes[True]
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 300, [300])
    executor.limit_kv(1)
    assert all(executor.page_whole(executor.pages(sequence)))
    other = executor.open_sequence()
    rungs = 0 if exact else 3
    data = np.zeros(executor.kv_stored_bytes[True][rungs], np.uint8)
    with pytest.raises(UsageError):
        executor.put_page(other, PAGE, data, rungs, whole=False)


# --- the same bits


def test_the_same_bits_whatever_is_given_up(path: Path, exact: bool) -> None:
    """On every instruction set, cut in any way, with a limit that takes all that nobody sees before
    each chunk, or some of it, or nothing."""
    ids = some_ids(VOCAB, 500)
    results = []
    for isa, threads, chunk, cuts, limit in (
        *((isa, 2, 128, [500], limit) for isa in _core.cpu_isa() for limit in (0, 1)),
        ("auto", 1, 128, [1] * 500, 1),
        ("auto", 3, 7, [130, 1, 1, 200, 168], 1),
        ("auto", 2, 64, [33, 64, 128, 275], 60_000),
    ):
        executor = ready(path, exact, isa=isa, threads=threads, chunk=chunk)
        executor.limit_kv(limit)
        sequence = executor.open_sequence()
        results.append(feed(executor, sequence, ids, cuts))
        if limit == 1:
            assert not any(executor.page_whole(executor.pages(sequence)[1:8]))
        executor.limit_kv(1)
        newest = 500 // PAGE
        assert executor.page_whole(executor.pages(sequence)) == [
            number == 0 or newest - number <= LOCAL for number in range(newest + 1)
        ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_windows_that_are_not_the_largest_are_masked_as_ever(path: Path, exact: bool) -> None:
    """What is still there beyond a window changes nothing, and neither does noise there."""
    ids = some_ids(VOCAB, 400)
    executor = ready(path, exact)
    sequence, other = executor.open_sequence(), executor.open_sequence()
    feed(executor, sequence, ids, [400])
    assert all(form.whole for form in forms(executor, sequence))
    rng = np.random.default_rng(0)
    for number, form in enumerate(forms(executor, sequence)):
        data = np.frombuffer(stored_page(executor, sequence, number), np.uint8).copy()
        if exact and 0 < number < 12 - LOCAL:
            behind = executor.kv_stored_bytes[False][0]
            data[behind:] = rng.integers(0, 256, len(data) - behind)
        executor.put_page(other, min(PAGE, 400 - number * PAGE), data, form.rungs)
    want = feed(executor, sequence, [7, 8, 9], [3])
    np.testing.assert_array_equal(feed(executor, other, [7, 8, 9], [3]), want)


def test_a_step_that_may_be_given_up_loses_nothing(path: Path, exact: bool) -> None:
    """Somebody is in a hurry again and again, while each chunk gives up what is not seen."""
    ids = some_ids(VOCAB, 960)
    executor = ready(path, exact, chunk=16)
    sequence = executor.open_sequence()
    want = feed(executor, sequence, ids, [960])[-1:]
    executor.close_sequence(sequence)
    executor.limit_kv(1)
    stop = threading.Event()

    def hurry() -> None:
        while not stop.is_set():
            for on in (True, False):
                executor.hurry(on)
                stop.wait(0.0005)

    thread = threading.Thread(target=hurry)
    thread.start()
    try:
        for _ in range(3):
            sequence, at, given_up = executor.open_sequence(), 0, 0
            while at < 960:
                tokens = np.array(ids[at : at + 240], np.int32)
                found = executor.step([sequence], [240], tokens, [1], whole=given_up > 40)
                at += 240 if found is not None else 0
                given_up += found is None
                assert executor.length(sequence) == at
            assert found is not None
            np.testing.assert_array_equal(found, want)
            executor.close_sequence(sequence)
    finally:
        stop.set()
        thread.join()


# --- memory


def test_memory_is_that_of_the_forms(path: Path, exact: bool) -> None:
    executor = ready(path, exact, LOCAL + 2)
    assert executor.kv_global_bytes[0] < executor.kv_page_bytes
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 420, [420])
    for limit in (0, 1):
        executor.limit_kv(limit)
        executor.trim_kv()
        found = forms(executor, sequence)
        assert sum(not form.whole for form in found) == (7 if limit else 0)
        total = sum(size(executor, form) for form in found)
        assert executor.kv_used_bytes == executor.memory()["kv"] == total
        assert executor.kv_bytes(executor.pages(sequence)) == total
    # The halves and slots are whole again when others use them.
    executor.close_sequence(sequence)
    assert executor.kv_used_bytes == 0
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 420, [420])
    executor.close_sequence(sequence)
    executor.trim_kv()
    assert executor.memory()["kv"] == 0


@pytest.mark.own_process
def test_the_kernel_has_it_back(tmp_path: Path, exact: bool) -> None:
    path = write_random_pack(
        tmp_path / "pack", least=4, layers=8, layer_window=[40] * 7 + [0], head_dim=64, kv_heads=4,
        heads=4, hidden=64, context=2048,
    )  # fmt: skip
    executor = coded(path, exact=exact)
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 1900, [1900])
    executor.trim_kv()
    before, used = measure().now, executor.kv_used_bytes
    rungs = [0] if exact else [6]
    executor.set_kv_ages(rungs, rungs, executor.kv_local_age)
    given = used - executor.kv_used_bytes
    assert given > (8 if exact else 2) * 2**20
    assert abs(before - measure().now - given) < 2**20


# --- going back, sharing


def test_turning_back(path: Path, exact: bool) -> None:
    """Within what is kept nothing is computed again; further back all that is not whole is."""
    ids = some_ids(VOCAB, 640)
    executor = ready(path, exact, LOCAL + SLACK)
    other = ready(path, exact, None)
    sequence, fresh_one = executor.open_sequence(), other.open_sequence()
    feed(executor, sequence, ids, [640])
    assert executor.truncate(sequence, 320) == 320  # nothing was given up
    feed(executor, sequence, ids[320:], [320])
    executor.limit_kv(1)
    assert executor.truncate(sequence, 640 - SLACK * PAGE) == 640 - SLACK * PAGE
    if exact:  # one page more than that is half needed, half gone
        assert executor.truncate(sequence, 640 - SLACK * PAGE - 1) == PAGE
    else:
        assert executor.truncate(sequence, 640 - SLACK * PAGE - 1) <= PAGE
    left = executor.length(sequence)
    want = feed(other, fresh_one, ids, [640])
    got = feed(executor, sequence, ids[left:], [640 - left])
    np.testing.assert_array_equal(got, want[left:])


def test_the_inside_of_a_page_that_gave_up_its_local_layers(path: Path) -> None:
    """An exact page can be gone on in, but not when a part of its tokens is gone."""
    executor = ready(path, True)
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 100, [100])
    executor.shallow(executor.pages(sequence)[2], 0, whole=False)
    assert executor.truncate(sequence, 80) == 64


def test_a_shared_page_has_what_its_youngest_user_sees(path: Path, exact: bool) -> None:
    ids = some_ids(VOCAB, 640)
    executor, other = ready(path, exact), ready(path, exact, None)
    old, young = executor.open_sequence(), executor.open_sequence()
    feed(executor, old, ids[:320], [320])
    executor.adopt_pages(young, executor.pages(old)[:6])
    feed(executor, old, ids[320:], [320])
    executor.limit_kv(1)
    whole = executor.page_whole(executor.pages(old))
    assert [n for n in range(20) if whole[n]] == [0, *range(6 - LOCAL, 6), 17, 18, 19]
    alone = other.open_sequence()
    want = feed(other, alone, [*ids[: 6 * PAGE], *ids[:50]], [6 * PAGE + 50])[-50:]
    np.testing.assert_array_equal(feed(executor, young, ids[:50], [50]), want)
    # Held by nobody but for reuse: it stays as it is.
    pages = executor.pages(young)[:6]
    executor.hold_pages(pages)
    before = executor.page_whole(pages)
    for sequence in (old, young):
        executor.close_sequence(sequence)
    executor.limit_kv(1)
    assert executor.page_whole(pages) == before


def test_what_was_given_up_is_never_read(path: Path, exact: bool) -> None:
    """Pages that are not whole where a window reaches: no step, and no change."""
    executor = ready(path, exact)
    sequence, other = executor.open_sequence(), executor.open_sequence()
    feed(executor, sequence, [1] * 420, [420])
    executor.limit_kv(1)
    pages = executor.pages(sequence)
    assert executor.kv_usable(pages[:13]) == 13
    assert executor.kv_usable(pages[:12]) == 1
    for adopted in (pages[:12], pages[:2]):
        executor.adopt_pages(other, adopted)
        used = executor.kv_used_bytes
        with pytest.raises(EngineError, match="given up"):
            executor.step([other], [1], np.array([1], np.int32), [1])
        assert (executor.length(other), executor.kv_used_bytes) == (len(adopted) * PAGE, used)
        executor.truncate(other, 0)
    form = forms(executor, sequence)[2]
    data = np.frombuffer(stored_page(executor, sequence, 2), np.uint8)
    executor.put_page(other, PAGE, data, *form)
    with pytest.raises(EngineError, match="given up"):
        executor.step([other], [1], np.array([1], np.int32), [1])
    with pytest.raises(UsageError):  # a page in progress is whole
        executor.put_page(other, 5, data, 0, whole=False)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_walk(path: Path, exact: bool, data: st.DataObject) -> None:
    """Sequences that grow, turn back, begin with pages of others and end, under a limit: the same
    logits as one alone that gives up nothing, and bytes that are those of the pages."""
    executor = ready(path, exact, data.draw(st.sampled_from([LOCAL, LOCAL + SLACK])), chunk=48)
    free = ready(path, exact, None)
    executor.limit_kv(data.draw(st.sampled_from([0, 1, 40_000, 90_000])))
    texts: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["open", "feed", "feed", "feed", "truncate", "close"]))
        sequence = data.draw(st.sampled_from(sorted(texts))) if texts else None
        if what == "open" or sequence is None:
            new = executor.open_sequence()
            texts[new] = []
            if sequence is not None:
                pages = executor.pages(sequence)[: len(texts[sequence]) // PAGE]
                pages = pages[: data.draw(st.integers(0, len(pages)))]
                count = executor.kv_usable(pages)
                executor.adopt_pages(new, pages[:count])
                texts[new] = texts[sequence][: count * PAGE]
        elif what == "feed":
            count = data.draw(st.integers(1, 250))
            if len(texts[sequence]) + count > 700:
                continue
            ids = some_ids(VOCAB, count, data.draw(st.integers(0, 3)))
            if executor.kv_pages_total - executor.kv_pages_used < pages_for(count):
                continue
            got = feed(executor, sequence, ids, [count])
            texts[sequence] += ids
            np.testing.assert_array_equal(got[-1], last(free, texts[sequence]))
        elif what == "truncate":
            length = data.draw(st.integers(0, len(texts[sequence])))
            left = executor.truncate(sequence, length)
            assert left <= length
            del texts[sequence][left:]
        else:
            executor.close_sequence(sequence)
            del texts[sequence]
        every = {page for one in texts for page in executor.pages(one)}
        assert executor.kv_used_bytes == executor.kv_bytes(list(every))
        assert executor.memory()["kv"] >= executor.kv_used_bytes


def pages_for(tokens: int) -> int:
    """Pages that so many tokens may take: they may begin inside one, or in a copy."""
    return tokens // PAGE + 3


def last(executor: _core.Executor, ids: list[int]) -> Logits:
    sequence = executor.open_sequence()
    row = executor.step([sequence], [len(ids)], np.array(ids, np.int32), [1])[0]
    executor.close_sequence(sequence)
    return row


# --- on disk


def test_pages_go_and_come_back(path: Path, exact: bool) -> None:
    """Whole or not, and a whole one without what is of no use any more."""
    executor = ready(path, exact)
    sequence = executor.open_sequence()
    feed(executor, sequence, some_ids(VOCAB, 420), [420])
    whole = [stored_page(executor, sequence, number) for number in range(14)]
    executor.limit_kv(1)
    found = [stored_page(executor, sequence, number) for number in range(14)]
    expected = feed(executor, sequence, [5], [1])
    for pages in (found, whole):
        other = executor.open_sequence()
        for number, (data, form) in enumerate(zip(pages, forms(executor, sequence), strict=True)):
            given = np.frombuffer(data, np.uint8)
            rungs, has = (form.rungs, form.whole) if pages is found else (0 if exact else 6, True)
            rungs = 0 if number == 13 else rungs
            assert len(given) == executor.kv_stored_bytes[has][rungs]
            executor.put_page(other, min(PAGE, 420 - number * PAGE), given, rungs, has)
            executor.shallow(executor.pages(other)[-1], max(form.rungs, 1), form.whole)
            assert stored_page(executor, other, number) == found[number]
        np.testing.assert_array_equal(feed(executor, other, [5], [1]), expected)


def test_rungs_come_back_to_a_page_that_is_not_whole(path: Path) -> None:
    """From what was stored of it, whole or not."""
    executor = ready(path, False)
    sequence = executor.open_sequence()
    feed(executor, sequence, some_ids(VOCAB, 40), [40])
    page = executor.pages(sequence)[0]
    whole = np.frombuffer(stored_page(executor, sequence, 0), np.uint8)
    executor.shallow(page, 6, whole=False)
    part = np.frombuffer(stored_page(executor, sequence, 0), np.uint8)
    for data, has in ((whole, True), (part, False)):
        sizes = executor.kv_stored_bytes[has]
        executor.shallow(page, 2, whole=False)
        used = executor.kv_used_bytes
        for rungs in (4, 6):
            before = executor.page_rungs([page])[0]
            executor.deepen_page(page, data[sizes[before] : sizes[rungs]], rungs, has)
        assert stored_page(executor, sequence, 0) == part.tobytes()
        assert executor.kv_used_bytes >= used
    other = executor.open_sequence()
    executor.put_page(other, PAGE, whole[: executor.kv_stored_bytes[True][2]], 2)
    sizes = executor.kv_stored_bytes[False]
    with pytest.raises(UsageError):  # a whole one needs all of it
        executor.deepen_page(executor.pages(other)[0], part[sizes[2] : sizes[4]], 4, whole=False)


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
        assert model.audit().ok
        assert Pack.open(tiny).manifest.model.layer_window == tuple(LARGER["layer_window"])
        for session in sessions:
            session.close()
