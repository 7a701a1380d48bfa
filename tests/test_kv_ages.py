"""Pages of the KV cache get shallower as they age: the rule, the bytes that are counted for it, and
that answers do not depend on whether what is not seen is still there."""

from __future__ import annotations

import gc
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from packs import write_random_pack
from pliant import _core
from pliant.errors import UsageError
from pliant.memory.kv_ages import (
    LEVELS_PER_BIT,
    SLACK,
    SLOPE,
    Ages,
    PageBytes,
    fresh,
    make_schedule,
)
from pliant.store import Pack
from test_executor import some_ids
from test_kv import PAGE, coded, feed
from tiny import write_tiny_pack

RUNGS = (100, 300, 400, 500, 600, 700, 800)
EXACT = 1600  # bytes of an exact page: 16 bits a value
SIZES = PageBytes((EXACT, *RUNGS[1:]))
AGES = [6, 6, 5, 4, 4, 3, 3]
KEPT = [6, 6, 6, 6, 6, 6, 5]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ages")
    return write_random_pack(folder / "pack", least=4, seed=3, head_dim=16, context=1024)


# --- the rule


@given(level=st.integers(20, 120), pages=st.integers(1, 600))
def test_pages_get_shallower_as_they_age(level: int, pages: int) -> None:
    schedule = make_schedule(level, SIZES, pages)
    seen, kept = schedule.seen.astype(int), schedule.kept.astype(int)
    assert (np.diff(seen) <= 0).all()
    assert (np.diff(kept) <= 0).all()
    assert (kept >= seen).all()
    assert kept[0] == seen[0]
    bits = [16 * size / EXACT for size in RUNGS]
    for age, rungs in enumerate(seen.tolist()):
        due = level / LEVELS_PER_BIT - SLOPE * np.log2(max(age, 1))
        assert rungs == max([r for r in range(1, 7) if bits[r] <= due + 1e-9], default=1)
        if age > SLACK:
            assert kept[age] == seen[age - SLACK]


@given(level=st.integers(20, 120), pages=st.integers(2, 300), size=st.integers(0, 200_000))
def test_bytes_are_those_of_the_pages(level: int, pages: int, size: int) -> None:
    schedule = make_schedule(level, SIZES, pages + 1)
    each = [RUNGS[rungs] for rungs in schedule.kept]
    for full in (0, 1, pages // 2, pages):
        assert schedule.total(full) == sum(each[:full]) == schedule.bytes((1,) * full)
    within = schedule.pages_within(size)  # beside an exact one
    assert schedule.total(within) + EXACT * (within > 0) <= size
    assert within == pages + 1 or schedule.total(within + 1) + EXACT > size
    counts = tuple(random.Random(size).choices(range(4), k=pages + 5))
    assert schedule.bytes(counts) == sum(
        count * each[min(age, pages)] for age, count in enumerate(counts)
    )


@given(st.lists(st.integers(0, 400), max_size=6))
def test_sums_of_sequences_that_share_nothing(lengths: list[int]) -> None:
    total = Ages()
    for tokens in lengths:
        total += fresh(tokens, PAGE)
    assert total.sequences == sum(map(bool, lengths))
    assert total.partial == sum(tokens % PAGE > 0 for tokens in lengths)
    assert sum(total.full) == sum(tokens // PAGE for tokens in lengths)
    assert total.full == tuple(
        sum(tokens // PAGE > age for tokens in lengths) for age in range(len(total.full))
    )


# --- the core


def test_the_same_bits_whatever_is_still_there(path: Path) -> None:
    """On every instruction set, cut in any way, and with what is not seen given up at once, later,
    or never."""
    ids = some_ids(Pack.open(path).manifest.model.vocab, 400)
    results = []
    for isa, cuts, limit in (
        *((isa, [400], 0) for isa in _core.cpu_isa()),
        ("auto", [1] * 400, 0),
        ("auto", [1] * 400, 1),
        ("auto", [400], 1),
        ("auto", [33, 64, 128, 100, 75], 60_000),
    ):
        executor = coded(path, isa=isa, chunk=128)
        executor.set_kv_ages(AGES, KEPT)
        executor.limit_kv(limit)
        sequence = executor.open_sequence()
        results.append(feed(executor, sequence, ids, cuts))
        rungs = executor.page_rungs(executor.pages(sequence))
        executor.limit_kv(1)
        due = [KEPT[min(12 - page, 6) if page else 0] for page in range(12)]
        if limit:
            assert all(mine >= least for mine, least in zip(rungs, [*due, 0], strict=True))
            assert sum(rungs) < 12 * 6
        else:
            assert rungs == [6] * 12 + [0]
        assert executor.page_rungs(executor.pages(sequence)) == [*due, 0]
        sizes = [executor.kv_rung_bytes[one] for one in due]
        assert executor.kv_used_bytes == sum(sizes) + executor.kv_page_bytes
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_ages_differ(path: Path) -> None:
    """The rule is followed: a token sees old pages with fewer rungs, and the first one with all."""
    ids = some_ids(Pack.open(path).manifest.model.vocab, 200)
    rows = []
    for ages in ([6], [3], [6, 6, 6, 3], [6, 3, 3, 3]):
        executor = coded(path)
        executor.set_kv_ages(ages, ages)
        rows.append(feed(executor, executor.open_sequence(), ids, [200]))
    deep, shallow, late, early = rows
    np.testing.assert_array_equal(late[: 4 * PAGE], deep[: 4 * PAGE])  # page 1 is of the age 2
    assert not np.array_equal(late[4 * PAGE :], deep[4 * PAGE :])
    np.testing.assert_array_equal(early[: 2 * PAGE], deep[: 2 * PAGE])  # only the first is seen
    assert not np.array_equal(early[2 * PAGE :], deep[2 * PAGE :])
    assert not np.array_equal(early[2 * PAGE :], shallow[2 * PAGE :])


def test_turning_back_needs_what_a_younger_page_has(path: Path) -> None:
    executor = coded(path)
    executor.set_kv_ages(AGES, KEPT)
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 320, [320])
    assert executor.truncate(sequence, 230) == 224  # nothing was given up
    feed(executor, sequence, [1] * 96, [96])
    executor.limit_kv(1)
    assert executor.truncate(sequence, 319) == 288
    assert executor.truncate(sequence, 192) == 192  # four pages back from 320
    feed(executor, sequence, [1] * 128, [128])
    executor.limit_kv(1)
    assert executor.truncate(sequence, 128) == 32  # only the first page is deep enough
    for seen, kept in (([], []), ([3], [3, 3]), ([3, 4], [3, 4]), ([3, 3], [3, 2]), ([3], [4])):
        with pytest.raises(UsageError):
            executor.set_kv_ages(seen, kept)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_what_sequences_will_have_is_counted(path: Path, data: st.DataObject) -> None:
    executor = coded(path)
    sequences = [executor.open_sequence()]
    feed(executor, sequences[0], [1] * 200, [200])
    for _ in range(2):
        shared = data.draw(st.integers(0, 6))
        sequences.append(executor.open_sequence())
        executor.adopt_pages(sequences[-1], executor.pages(sequences[0])[:shared])
    tokens = [executor.length(sequence) + data.draw(st.integers(0, 300)) for sequence in sequences]
    youngest: dict[Any, int] = {}
    for sequence, length in zip(sequences, tokens, strict=True):
        pages, full = executor.pages(sequence), length // PAGE
        for number in range(full):
            name = pages[number] if number < len(pages) else (sequence, number)
            age = full - number if number else 0
            youngest[name] = min(youngest.get(name, age), age)
    ages = list(youngest.values())
    full, partial = executor.kv_ages(sequences, tokens)
    assert full == [ages.count(age) for age in range(max(ages) + 1)]
    assert partial == sum(length % PAGE > 0 for length in tokens)


# --- models


def test_a_closed_model_leaves_nothing(tmp_path: Path) -> None:
    """Its memory goes at once, and not when Python looks for cycles."""
    path = write_tiny_pack(tmp_path / "pack", least=4)
    gc.disable()
    try:
        for bits in (16.0, "auto"):
            model = pliant.load(path, kv_bits=bits)  # type: ignore[arg-type]
            with model.session() as session:
                session.feed([1] * 100)
            executor = model._executor
            model.close()
            assert sys.getrefcount(executor) == 2  # ours, and that of the call
    finally:
        gc.enable()


def test_beginnings_that_lost_rungs_are_computed_again(tmp_path: Path) -> None:
    """What is found in memory gives the same as what is computed."""
    path = write_tiny_pack(tmp_path / "pack", least=4, head_dim=64, hidden=256, layers=4)
    ids = some_ids(256, 400)
    results = []
    with pliant.load(path, kv_bits=5.5, sessions=2) as model:
        cache, executor = model._holdings.cache, model._executor
        with model._turns:
            long = cache.open()
            keys = [bytes([n]) * 16 for n in range(12)]
            assert cache.admit(long, 400, keys, claim=400, rank=(0, 0)) == 0
            cache.prepare([long], [400])
            executor.step([long], [400], np.array(ids, np.int32), [0], whole=True)
            cache.stepped([long], [400])
            cache.share(long, keys)
            for tight in (False, True):
                if tight:
                    executor.limit_kv(1)
                short = cache.open()
                begun = cache.admit(short, 100, keys[:3], claim=100, rank=(0, 1))
                assert begun is not None
                if tight:
                    assert begun < 3
                else:
                    assert begun == 3
                at = begun * PAGE
                rest = np.array(ids[at:100], np.int32)
                cache.prepare([short], [100 - at])
                found = executor.step([short], [100 - at], rest, [1], whole=True)
                cache.stepped([short], [100 - at])
                cache.share(short, keys[:3])
                assert found is not None
                results.append(found)
                cache.close(short)
            cache.close(long)
            cache.forget()
            assert executor.kv_pages_used == 0
    np.testing.assert_array_equal(results[0], results[1])
