"""Pages give up what layers with a window do not see any more: never too early, and in full; and
answers do not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packs import write_random_pack
from pliant import _core
from pliant.engine.park import Park
from pliant.errors import EngineError, UsageError
from pliant.memory.budget import measure
from pliant.memory.kv_ages import SLACK, Form
from test_executor import Logits, some_ids
from test_kv import PAGE, coded, feed
from test_kv import page as stored_page

WINDOW = 70
LOCAL = 3  # the largest age at which it sees a page
SHAPE: dict[str, Any] = {
    "layers": 3, "layer_window": [WINDOW, 0, 33], "head_dim": 16, "context": 1024,
}  # fmt: skip
VOCAB = 160


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pack(tmp_path_factory.mktemp("window") / "pack", least=4, seed=3, **SHAPE)


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
@pytest.mark.resident
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


def test_rungs_come_back_in_slices(path: Path) -> None:
    """What was stored whole comes back as far as it is of use, first with few rungs."""
    executor = ready(path, False, None)
    sequence, other = executor.open_sequence(), executor.open_sequence()
    feed(executor, sequence, some_ids(VOCAB, 420), [420])
    park = Park(executor)
    parked = park.store(sequence, 420)

    def of_use(rungs: int) -> Callable[[int], Form]:
        return lambda number: Form(rungs, number == 0 or 13 - number <= LOCAL)

    for goal in (2, 4, 6):
        if goal == 2:
            done = park.restore(other, parked, 420, of_use(2), of_use(6))
        else:
            done = park.deepen(other, parked, 0, of_use(goal), of_use(6), 1e9)
        assert done == (goal == 6)
        assert forms(executor, other)[:13] == [of_use(goal)(number) for number in range(13)]
        assert executor.kv_used_bytes == sum(
            size(executor, form) for one in (sequence, other) for form in forms(executor, one)
        )
    for number, form in enumerate(forms(executor, other)):
        executor.shallow(executor.pages(sequence)[number], 6, form.whole)
        assert stored_page(executor, other, number) == stored_page(executor, sequence, number)
    want = feed(executor, sequence, [5], [1])
    np.testing.assert_array_equal(feed(executor, other, [5], [1]), want)
    parked.close()
