"""Whatever sequences, answers and budgets do: no page too many, none lost, no promise broken."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pliant
from pliant.engine.cache import Cache, CacheFull, Keep
from pliant.engine.page_folder import PageFolder
from pliant.engine.park import Park
from pliant.engine.prefixes import page_keys
from pliant.memory.kv_ages import Ages, fresh
from pliant.memory.plan import Plan
from tiny import write_tiny_pack

PAGE = 32
PAGES = 20
BEGINNINGS = [array("i", [2 + n] * 4 * PAGE) for n in range(2)]

ACTIONS = st.one_of(
    st.tuples(st.just("session"), st.integers(1, 200)),
    st.tuples(st.just("answer"), st.integers(0, 1), st.integers(1, 120), st.integers(-1, 1)),
    st.tuples(st.just("step"), st.integers(0, 9), st.integers(1, 70)),
    st.tuples(st.just("reserve"), st.integers(0, 9), st.integers(1, 300)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("give way"), st.integers(0, 9)),
    st.tuples(st.just("set aside"), st.integers(0, 9)),
    st.tuples(st.just("resume"), st.integers(0, 9), st.integers(1, 60)),
    st.tuples(st.just("close"), st.integers(0, 9)),
    st.tuples(st.just("limit"), st.integers(1, PAGES), st.sampled_from(list(Keep))),
)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {}),
    "windows": ({"layer_window": [20, 0]}, {}),  # pages are whole up to the age 6
    "coded, windows": ({"layer_window": [20, 0], "head_dim": 64}, {"kv_bits": "auto"}),
}


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pliant.Model]:
    shape, options = KINDS[request.param]
    path = write_tiny_pack(tmp_path_factory.mktemp("cache") / "tiny.pack", least=2, **shape)
    with pliant.load(path, sessions=4, chat=False, **options) as loaded:
        yield loaded


def limits(model: pliant.Model, context: int, size: int) -> Plan:
    """A plan of which only the KV counts."""
    return replace(model.plan, context=context, kv=size + model.plan.kv_chunk)


class Player:
    """Plays actions on a cache, and knows what must hold after each."""

    def __init__(self, model: pliant.Model, cache: Cache) -> None:
        self.model = model
        self.cache = cache
        self.sessions: list[int] = []
        self.answers: dict[int, array[int]] = {}  # and their ids

    def play(self, action: tuple[Any, ...]) -> None:
        name, *values = action
        every = [*self.sessions, *self.answers]
        if name == "session":
            self.sessions.append(self.cache.open())
            self.cache.reserve(self.sessions[-1], values[0])
        elif name == "answer":
            beginning, more, priority = values
            ids = BEGINNINGS[beginning] + array("i", [9] * more)
            sequence = self.cache.open()
            keys = page_keys(ids, PAGE, 0)[: (len(ids) - 1) // PAGE]
            rank = (priority, sequence)
            found = self.cache.admit(sequence, len(ids), keys, claim=len(ids) + 40, rank=rank)
            if found is None:
                self.cache.close(sequence)
            else:
                self.answers[sequence] = ids
                self.cache.fetch(sequence, keys, 1.0)
                self.read(sequence, ids)
        elif name == "limit":
            context, held = self.cache.needs(values[1])
            least = max(self.bytes(ages) for ages in held)
            size = max(values[0] * self.model._executor.kv_page_bytes, least)
            self.cache.limit(limits(self.model, max(context, 1), size))
        elif every:
            self.one(name, every[values[0] % len(every)], values[1:])

    def bytes(self, ages: Ages) -> int:
        """What a plan counts for these sequences."""
        return self.cache._sizes.kv_bytes(self.cache.level, ages)

    def one(self, name: str, sequence: int, values: list[Any]) -> None:
        ids = self.answers.get(sequence)
        if name == "step" and (ids is None or self.cache.holds(sequence)):
            self.step(sequence, ids, values[0])
        elif name == "reserve" and (ids is None or self.cache.holds(sequence)):
            self.cache.reserve(sequence, values[0])
        elif name == "release" and ids is None:
            self.cache.release(sequence)
        elif name == "give way" and ids is not None:
            self.cache.give_way(sequence)
        elif name == "set aside" and ids is not None:
            self.cache.set_aside(sequence)
        elif name == "resume" and ids is not None and not self.cache.holds(sequence):
            wanted = self.cache.length(sequence) + values[0]
            if self.cache.resume(sequence, wanted):
                assert self.cache.holds(sequence)
                self.read(sequence, ids)
            elif not self.cache.in_flight:
                size = self.bytes(fresh(wanted, PAGE))
                assert size > self.cache.bytes, "there was room"
        elif name == "close":
            self.cache.close(sequence)
            if self.answers.pop(sequence, None) is None:
                self.sessions.remove(sequence)

    def step(self, sequence: int, ids: array[int] | None, count: int) -> None:
        at = self.cache._entries[sequence].length
        if ids is not None:
            count = min(count, len(ids) - at)
        count = min(count, self.cache.context - at)
        if count < 1:
            return
        within = at + count <= self.cache.promised(sequence)
        tokens = np.array(ids[at : at + count] if ids else [5] * count, np.int32)
        try:
            self.cache.prepare([sequence], [count])
        except CacheFull:
            assert not within, "a promise was broken"
            return
        self.model._executor.step([sequence], [count], tokens, [0])
        self.cache.stepped([sequence], [count])
        if ids is not None:
            self.cache.share(sequence, page_keys(ids[: at + count], PAGE, 0))

    def read(self, sequence: int, ids: array[int]) -> None:
        """What is in the pages of an answer must be what its tokens make, as far as it is there."""
        if self.cache.level:
            return
        length = self.cache.length(sequence)
        other = self.model._executor.open_sequence()
        try:
            if self.model._executor.kv_pages_total - self.cache.used >= -(-length // PAGE) > 0:
                tokens = np.array(ids[:length], np.int32)
                self.model._executor.step([other], [length], tokens, [0])
                pages = map(self.model._executor.pages, (sequence, other))
                for both in list(zip(*pages, strict=True))[: length // PAGE]:
                    mine, due = map(self.content, both)
                    assert (mine[: len(due)] == due[: len(mine)]).all()
        finally:
            self.model._executor.close_sequence(other)

    def content(self, page: int) -> Any:
        """An exact page as it is stored, without its local layers if it has none."""
        executor = self.model._executor
        data = np.empty(executor.kv_stored_bytes[executor.page_whole([page])[0]][0], np.uint8)
        executor.take_page(page, data)
        return data

    def check(self) -> None:
        executor, cache = self.model._executor, self.cache
        taken = self.bytes(cache._ages(cache._in_memory({})))
        taken += executor.kv_bytes(cache.prefixes.idle_pages())
        if executor.kv_used_bytes > taken:
            executor.limit_kv(1)  # what nobody needs goes
            executor.limit_kv(cache._most)
        assert executor.kv_used_bytes <= taken <= cache.bytes
        for sequence, entry in self.cache._entries.items():
            length = self.model._executor.length(sequence)
            assert length == (0 if entry.parked is not None else entry.length)
        sizes = []
        for keep in (Keep.LEAST, Keep.ANSWERS, Keep.SESSIONS):
            context, held = cache.needs(keep)
            sizes.append((context, max(map(self.bytes, held))))
        assert sizes == sorted(sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: pliant.Model) -> PageFolder:
    path = tmp_path_factory.mktemp("pages") / "pages"
    return PageFolder(path, 2**20, bytes(16), model._executor.kv_stored_bytes)


@pytest.mark.parametrize("parks", [False, True])
@given(st.lists(ACTIONS, max_size=40))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_page_too_many_and_none_lost(
    model: pliant.Model, folder: PageFolder, parks: bool, actions: list[tuple[Any, ...]]
) -> None:
    with model._turn():
        park = Park(model._executor, folder if parks else None)
        size = PAGES * model._executor.kv_page_bytes
        cache = Cache(model._executor, model._sizes, limits(model, 512, size), park)
        player = Player(model, cache)
        for action in actions:
            player.play(action)
            player.check()
        for sequence in [*player.sessions, *player.answers]:
            cache.close(sequence)
        assert model._executor.kv_pages_used == cache.prefixes.idle == len(cache.prefixes)
        cache.forget()
        assert model._executor.kv_pages_used == 0
