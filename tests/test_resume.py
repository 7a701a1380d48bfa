"""A session on a slow disk goes on with its first rungs, gets the others between steps, and says so
meanwhile."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pliant
import pliant.memory.plan as plan_module
from fakes import AlwaysRead
from pliant.engine.answers import Answer, Request
from pliant.engine.cache import RESUME
from pliant.engine.kinds import DepthTrack
from pliant.engine.parked_page import ParkedPage
from pliant.engine.sampling import Sampling
from pliant.engine.scheduler import Counters, Scheduler
from pliant.errors import ChecksumError
from pliant.memory import kv_ages
from test_park import some
from test_scheduler import Desk
from tiny import write_tiny_pack

BITS = 6.5


class Disk:
    """A clock on which reading takes as long as it would with so many bytes a second."""

    def __init__(self) -> None:
        self.now, self.rate = 0.0, 1e15
        self.read = ParkedPage.read

    def __call__(self) -> float:
        return self.now

    def patched(self, page: ParkedPage, *arguments: Any, **named: Any) -> Any:
        data = self.read(page, *arguments, **named)
        self.now += len(data) / self.rate
        return data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(
        tmp_path_factory.mktemp("resume") / "tiny.pack",
        quality=[{"bytes": 0, "kl": 1.0}, {"bytes": 10**9, "kl": 0.01}],
        least=4,
        head_dim=64,
        hidden=256,
        layers=4,
    )


@pytest.fixture(autouse=True)
def all_ages_alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here all pages of a level have the same rungs; tests/test_kv_ages.py has those of ages."""
    for module in (kv_ages, plan_module):
        monkeypatch.setattr(module, "SLOPE", 0.0)
    kv_ages.make_schedule.cache_clear()
    yield
    kv_ages.make_schedule.cache_clear()


def top(model: pliant.Model) -> int:
    """The rungs of pages."""
    return int(model._sizes.schedule(model.depth.kv_level).seen[0])


def level(model: pliant.Model, rungs: int) -> int:
    """At which pages have so many rungs."""
    levels = model._sizes.kv_levels
    return next(one for one in levels if model._sizes.schedule(one).seen[0] == rungs)


def bits(model: pliant.Model, rungs: int) -> float:
    return model._sizes.kv_bits(level(model, rungs), model.context)


def on_disk(model: pliant.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr(ParkedPage, "read", lambda *a, **n: disk.patched(*a, **n))
    model._holdings.cache.park._clock = disk


@pytest.fixture
def sliced(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pliant.Model]:
    with pliant.load(tiny, kv_bits=BITS) as loaded:
        on_disk(loaded, monkeypatch)
        yield loaded


@pytest.fixture(params=["slices", "at once"])
def model(
    sliced: pliant.Model, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> pliant.Model:
    if request.param == "at once":
        park: Any = sliced._holdings.cache.park
        deepen = park.deepen
        monkeypatch.setattr(park, "deepen", lambda *a: deepen(*(*a, 1e9)[:5]))
    return sliced


def slow(model: pliant.Model, pages: int, rungs: int, exact: int = 1) -> None:
    """Lets reading be so slow that only so many rungs of so many pages come in time, and `exact`
    pages that are not coded."""
    park: Any = model._holdings.cache.park
    stored = model._executor.kv_stored_bytes[True]
    disk: Disk = park._clock
    disk.rate = (pages * stored[rungs] + exact * stored[0]) / RESUME
    park.rates = AlwaysRead(disk.rate)


def away(model: pliant.Model, session: pliant.Session) -> None:
    with model._turns:
        model._holdings.cache._park(session.sequence)


def move(model: pliant.Model, rungs: int) -> None:
    with model._turns:
        model._holdings.cache.limit(replace(model.plan, kv_level=level(model, rungs)))


def rungs(model: pliant.Model, session: pliant.Session) -> list[int]:
    return model._executor.page_rungs(model._executor.pages(session.sequence))


def contents(model: pliant.Model, session: pliant.Session, count: int) -> list[bytes]:
    found = []
    for number in model._executor.pages(session.sequence)[:count]:
        data = np.empty(model._executor.kv_stored_bytes[True][0], np.uint8)
        form = model._executor.page_rungs([number])[0]
        data = data[: model._executor.kv_stored_bytes[True][form]]
        model._executor.take_page(number, data)
        found.append(data.tobytes())
    return found


def test_it_goes_on_before_all_is_back(model: pliant.Model) -> None:
    full = top(model)
    with model.session() as session:
        session.feed(some(200))
        before = contents(model, session, 6)
        slow(model, 6, 2)
        away(model, session)
        track, seen = DepthTrack(), []
        for _ in range(60):
            session.feed([7], track)
            seen.append(rungs(model, session)[:6])
            if min(seen[-1]) == full:
                break
        assert seen[0] == [2] * 6
        for earlier, later in itertools.pairwise(seen):  # rung after rung
            assert earlier < later
            assert max(later) - min(later) <= (1 if len(seen) > 2 else full)
        assert seen[-1] == [full] * 6
        assert contents(model, session, 6) == before
        assert track.values()["kv_bits_lowest"] == bits(model, 2)
        last = DepthTrack()
        session.feed([7], last)
        assert last.values()["kv_bits_lowest"] == model.depth.kv_bits
        assert last.values()["expected_kl"] == model.depth.expected_kl
        assert track.values()["expected_kl_highest"] > model.depth.expected_kl
        assert model.report().parked_bytes == 0
        assert model.report().parked == 0


def test_where_reading_is_fast_nothing_differs(model: pliant.Model) -> None:
    with model.session() as session, model.session() as other:
        other.feed(some(200))
        expected = other.feed([7])
        session.feed(some(200))
        slow(model, 7, top(model))
        away(model, session)
        track = DepthTrack()
        session.feed([7], track)
        assert track.values()["kv_bits_lowest"] == model.depth.kv_bits
        away(model, other)
        assert np.array_equal(session.feed([8]), other.feed([8]))
        assert not np.array_equal(session.feed([7]), expected)


def test_what_a_level_took_comes_back_if_it_was_parked(model: pliant.Model) -> None:
    full = top(model)
    with model.session() as parked, model.session() as live:
        for session in (parked, live):
            session.feed(some(100))
        before = contents(model, parked, 3)
        away(model, parked)
        move(model, 2)
        for session in (parked, live):
            session.feed([7])
            assert rungs(model, session)[:3] == [2] * 3
        assert model.report().parked_bytes > 0  # the rest waits
        move(model, full)
        track = DepthTrack()
        for _ in range(20):
            for session in (parked, live):
                session.feed([7], track if session is live else None)
        assert rungs(model, live)[:3] == [2] * 3
        assert track.values()["kv_bits_lowest"] == bits(model, 2)
        assert track.values()["bits_per_weight"] == model.depth.bits_per_weight
        assert contents(model, parked, 3) == before
        assert model.report().parked_bytes == 0


def test_a_rest_that_is_broken_is_left(
    model: pliant.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.session() as session:
        session.feed(some(100))
        slow(model, 3, 2)
        away(model, session)
        session.feed([7])

        def broken(*_: Any, **__: Any) -> Any:
            raise ChecksumError("not as it was written")

        monkeypatch.setattr(ParkedPage, "read", broken)
        track = DepthTrack()
        for _ in range(3):
            session.feed([7], track)
        assert rungs(model, session)[:3] == [2] * 3
        assert track.values()["kv_bits_lowest"] == bits(model, 2)
        assert model.report().parked_bytes == 0


ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 50)),
    st.tuples(st.just("park"), st.just(0)),
    st.tuples(st.just("level"), st.integers(1, 6)),
    st.tuples(st.just("rewind"), st.integers(0, 150)),
    st.tuples(st.just("slow"), st.integers(1, 6)),
)


@given(st.lists(ACTIONS, max_size=15))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_happens_a_page_is_a_beginning_of_itself(
    model: pliant.Model, actions: list[tuple[str, int]]
) -> None:
    """Pages have at most the rungs that the level allows, those of a page are always the first of
    what was once coded, and depths say the least of them."""
    full, files = top(model), open_files()
    ids, made = some(600), list[bytes]()  # of each page, when it was coded
    cache = model._holdings.cache
    move(model, full)
    slow(model, 1, full)
    with model.session() as session:
        for name, value in actions:
            if name == "feed" and len(session) + value <= model.context:
                track, at = DepthTrack(), len(session)
                session.feed(ids[at : at + value], track)
                fewest = min([r for r in rungs(model, session) if r] or [top(model)])
                assert track.values()["kv_bits_lowest"] <= bits(model, fewest)
                assert cache.level_of(session.sequence) <= cache.level
            elif name == "park" and len(session) and cache._entries[session.sequence].length:
                if cache._entries[session.sequence].parked is None:
                    away(model, session)
            elif name == "level":
                move(model, min(value, full))
            elif name == "rewind" and value < len(session):
                session.rewind([*ids[:value], 259, 259])
                del made[len(session) // 32 :]
            elif name == "slow":
                slow(model, 3, min(value, full))
            if cache._entries[session.sequence].parked is None:
                forms = rungs(model, session)
                assert max(forms, default=0) <= top(model)
                now = contents(model, session, len(session) // 32)
                made += now[len(made) :]
                for one, whole in zip(now, made, strict=True):
                    assert whole[: len(one)] == one
    assert model.report().parked_bytes == 0
    assert model._executor.kv_pages_used == 0
    assert open_files() == files


def test_a_disk_that_is_faster_than_expected_gives_all(model: pliant.Model) -> None:
    park: Any = model._holdings.cache.park
    with model.session() as session, model.session() as other:
        for one in (session, other):
            one.feed(some(200))
        slow(model, 1, 1)
        park._clock.rate *= 1000
        away(model, session)
        assert np.array_equal(session.feed([8]), other.feed([8]))
        assert model.report().parked_bytes == 0


def test_answers_that_give_way_come_back_whole(sliced: pliant.Model) -> None:
    """Their text is that which they have alone, and so nothing of them may be missing."""
    model = sliced
    wanted = [
        Request(prompt=some(90, n), sampling=Sampling(seed=1), max_tokens=150) for n in range(3)
    ]

    def make(wanted: list[Request]) -> tuple[list[Answer], Counters]:
        desk = Desk()
        scheduler = Scheduler(model, desk.deliver)
        answers = scheduler.submit(wanted)
        scheduler.start()
        desk.wait(*answers)
        scheduler.close()
        return answers, scheduler.counters

    expected = [make([one])[0][0] for one in wanted]
    cache = model._holdings.cache
    cache.bytes = model._sizes.kv_session(cache.level, 240) * 5 // 2
    slow(model, 1, 1, exact=0)
    answers, counters = make(wanted)
    assert counters.preemptions > 0
    assert model._holdings.cache.park.rates.reads > 0
    for answer, due in zip(answers, expected, strict=True):
        assert answer.tokens == due.tokens
        assert answer.track.values()["kv_bits_lowest"] == model.depth.kv_bits
    assert model.report().parked_bytes == model._executor.kv_pages_used == 0


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_no_file_is_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    with pliant.load(tiny, kv_bits=BITS) as model:
        on_disk(model, monkeypatch)
        session = model.session()
        session.feed(some(100))
        slow(model, 3, 1)
        away(model, session)
        session.feed([7])
        assert model.report().parked_bytes > 0
    assert open_files() <= before


def test_a_short_session_parks_again(model: pliant.Model) -> None:
    before = open_files()
    with model.session() as session:
        session.feed(some(100))
        slow(model, 3, 1)
        away(model, session)
        session.feed([7])
        session.rewind([*some(100)[:60], 9, 9])
        assert len(session) == 0  # what came of its pages is too shallow to go on from there
        session.rewind([5, 5])
        session.feed([5, 5])
        away(model, session)
        session.feed([5])
    assert open_files() == before
