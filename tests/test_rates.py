"""Whether pages are read or computed follows from the rates, and the tokens do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pliant
from pliant.engine.rates import Rate, Rates
from test_park import run, some
from tiny import write_tiny_pack

SLOW_DISK, FAST_DISK = (1.0, 1e12), (1e15, 1e-3)
PARKED = 7  # pages


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(tmp_path_factory.mktemp("rates") / "tiny.pack", least=4)


@given(
    st.floats(1, 1e10), st.floats(1, 1e6), st.integers(1, 10**9), st.integers(1, 10**5)
)  # fmt: skip
def test_what_is_expected_to_be_faster_is_chosen(
    read: float, prefill: float, size: int, tokens: int
) -> None:
    rates = Rates(read, prefill)
    chosen = rates.choose(size, tokens, 2)
    if abs(size / read / (tokens / prefill) - 1) > 1e-9:
        assert chosen == (size / read < tokens / prefill)
    assert (rates.reads, rates.computes) == ((2, 0) if chosen else (0, 2))


def test_what_is_not_known_is_read() -> None:
    for rates in (Rates(), Rates(read=1.0), Rates(prefill=1e9)):
        assert rates.choose(10**9, 1)


def test_a_slow_disk_is_asked_again() -> None:
    rates = Rates(*SLOW_DISK)
    assert [rates.choose(1000, 32) for _ in range(64)].count(True) == 2
    assert not any(rates.choose(1000, 32, 64) for _ in range(64))  # never for a whole session
    for _ in range(200):
        rates.read.add(1e15, 1.0)
    assert all(rates.choose(1000, 32) for _ in range(64))


def test_rates_follow_what_is_seen() -> None:
    rate = Rate()
    assert rate.value is None
    rate.add(100, 2)
    assert rate.value == 50
    for _ in range(100):
        rate.add(300, 1)
    assert rate.value == pytest.approx(300, rel=0.01)
    rate.add(1, 1e-9)  # small observations weigh little
    assert rate.value == pytest.approx(300, rel=0.01)


@pytest.mark.parametrize("rates", [SLOW_DISK, FAST_DISK])
def test_beginnings_are_read_where_that_is_faster(
    tiny: Path, tmp_path: Path, rates: tuple[float, float]
) -> None:
    ids = some(230)
    with pliant.load(tiny, park=tmp_path / "pages") as model:
        first = run(model, [ids])[0][0].tokens
    with pliant.load(tiny, park=tmp_path / "pages") as model:
        model._holdings.cache.park.rates = Rates(*rates)
        answers, counters = run(model, [ids])
        assert answers[0].tokens == first
        report = model.report().park
        read = rates == FAST_DISK
        assert counters.read_tokens == (224 if read else 0)
        assert (report.read, report.computed) == ((7, 0) if read else (0, 1))


@pytest.mark.parametrize("rates", [SLOW_DISK, FAST_DISK])
@pytest.mark.parametrize("moves", [False, True])
def test_sessions_are_read_where_that_is_faster_or_nothing_else_gives_the_same(
    tiny: Path, rates: tuple[float, float], moves: bool
) -> None:
    ids, less = some(200), 0
    results = []
    for parks in (False, True):
        with pliant.load(tiny) as model, model.session() as session:
            cache = model._holdings.cache
            cache.park.rates = Rates(*rates)
            session.feed(ids[:100])
            if moves:
                less = less or model.depth.weights * 2 // 3
                model.resize(weights=less)
            session.feed(ids[100:])
            if parks:
                with model._turns:
                    cache._park(session.sequence)
            results.append(session.feed([7]))
            computed = parks and not moves and rates == SLOW_DISK
            report = cache.park.report()
            done = (0, PARKED) if computed else (PARKED if parks and not moves else 0, 0)
            assert (report.read, report.computed) == done
            assert cache.length(session.sequence) == len(session) == 201
    assert np.array_equal(*results)
