"""load(early=True): answers at the floor of quality while the rest of the plan is read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pliant
from fakes import FakeExecutor, executor_of, fake_model
from pliant import _core
from pliant.engine.build import read_ahead
from pliant.errors import ChecksumError, EngineError
from pliant.store import Pack
from tiny import write_tiny_pack

FIXED = 10_000
FLOOR = 20  # bits per weight, which are rungs of the fake


class SlowDisk(FakeExecutor):
    """Rungs beyond the floor come when they may."""

    def __init__(self) -> None:
        super().__init__(100)
        self.may = threading.Event()

    def read_rungs(self, locations: Any, **options: Any) -> bool:
        if options["first"] >= FLOOR:
            assert self.may.wait(20)
        return super().read_rungs(locations, **options)


@pytest.fixture
def disk() -> Iterator[SlowDisk]:
    found = SlowDisk()
    yield found
    found.may.set()


def test_answers_are_made_at_the_floor_until_the_rest_is_there(disk: SlowDisk) -> None:
    model = fake_model(executor=disk, early=True, min_bits=FLOOR)
    assert (model.depth.rungs, model.plan.rungs) == (FLOOR, 100)
    answer = model.generate("hello", max_tokens=3)
    "".join(answer)
    assert answer.result.bits_per_weight == FLOOR
    change = model.change
    assert change is not None
    assert not change.done
    disk.may.set()
    assert change.wait(20)
    assert model.depth.rungs == 100
    again = model.generate("hello", max_tokens=3)
    "".join(again)
    assert again.result.bits_per_weight == 100


def test_without_a_floor_or_without_early_everything_is_read_first() -> None:
    for options in ({"early": True}, {"min_bits": FLOOR}):
        model = fake_model(**options)  # type: ignore[arg-type]
        assert model.depth.rungs == model.plan.rungs == 100
        assert model.change is None


def test_a_rung_that_is_damaged_leaves_the_floor_and_says_so() -> None:
    executor, lines = FakeExecutor(100), list[str]()
    executor.broken_rung = 50
    model = fake_model(executor=executor, early=True, log=lines.append, min_bits=FLOOR)
    change = model.change
    assert change is not None
    with pytest.raises(ChecksumError, match="rung 50"):
        change.wait(20)
    assert len(lines) == 1
    assert "rung 50 is broken" in lines[0]
    assert model.depth.rungs == model.plan.rungs == executor.read == FLOOR
    executor.broken_rung = None
    model.resize()
    assert model.depth.rungs == model.plan.rungs == 100


def test_a_damaged_floor_is_no_model() -> None:
    executor = FakeExecutor(100)
    executor.broken_rung = FLOOR - 1
    with pytest.raises(ChecksumError, match="rung 19"):
        fake_model(executor=executor, early=True, min_bits=FLOOR)


def test_another_budget_takes_over(disk: SlowDisk) -> None:
    model = fake_model(executor=disk, early=True, min_bits=FLOOR, memory=FIXED + 150_000)
    first = model.change
    assert first is not None
    model.budget = FIXED + FLOOR * 1000 + 10_240
    assert model.depth.rungs == model.plan.rungs == FLOOR
    disk.may.set()
    assert first.wait(20) is False
    assert executor_of(model).read == FLOOR
    model.budget = FIXED + 150_000
    assert model.depth.rungs == 100


def test_a_model_may_be_closed_before_the_rest_is_there(disk: SlowDisk) -> None:
    model = fake_model(executor=disk, early=True, min_bits=FLOOR)
    change = model.change
    assert change is not None
    threading.Timer(0.05, disk.may.set).start()
    model.close()
    assert change.wait(20) is False
    with pytest.raises(EngineError, match="closed"):
        model.change  # noqa: B018


class SlowEnd(FakeExecutor):
    """All rungs are read at once, but their publication goes on until it may end."""

    def __init__(self) -> None:
        super().__init__(100)
        self.there, self.may = threading.Event(), threading.Event()

    def publish(self, rungs: int) -> None:
        super().publish(rungs)
        if rungs > FLOOR:
            self.there.set()
            assert self.may.wait(20)


def test_closing_when_the_rest_has_just_come_is_no_failure() -> None:
    executor, lines = SlowEnd(), list[str]()
    model = fake_model(executor=executor, early=True, log=lines.append, min_bits=FLOOR)
    change = model.change
    assert change is not None
    assert executor.there.wait(20)
    closing = threading.Thread(target=model.close)
    closing.start()
    while not model._turns._waiting:  # close takes the next turn, before the growth can settle
        time.sleep(0.001)
    executor.may.set()
    with pytest.raises(EngineError, match="closed"):
        change.wait(20)
    closing.join(20)
    assert not lines


@pytest.mark.resident
def test_the_core_ends_at_the_same_logits(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "tiny.pack")
    ids = [1, 2, 3, 4]
    with pliant.load(path) as model:
        expected, most = model.logits(ids), model.depth
    assert most.bits_per_weight is not None
    with pliant.load(path, early=True, min_bits=most.bits_per_weight / 2) as model:
        if model.change is not None:
            assert model.change.wait(20)
        assert model.depth.rungs == most.rungs
        np.testing.assert_array_equal(model.logits(ids), expected)
        assert model.audit().ok


def wait_for_reading_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join()


def test_the_disk_is_asked_for_the_first_rungs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack.open(write_tiny_pack(tmp_path / "pack", rung_bytes=4096, shard_bytes=10_000))
    assert len(pack.manifest.shards) > 2
    asked: list[tuple[str, int, int]] = []

    def note(fd: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((str(Path(f"/proc/self/fd/{fd}").readlink()), offset, offset + size))

    cached = True

    monkeypatch.setattr(os, "posix_fadvise", note)
    monkeypatch.setattr(_core, "is_cached", lambda fd, offset, size: cached)
    read_ahead(pack, 1 << 30)
    wait_for_reading_ahead()
    assert not asked
    cached = False
    payload = pack.layout.payload.tolist()
    for rungs in (0, 1, pack.manifest.shards[0].rungs + 1, pack.rungs_available):
        for most in (payload[rungs], payload[rungs] + 1):
            asked.clear()
            read_ahead(pack, most)
            wait_for_reading_ahead()
            # Not one rung more than there is room for, but for the last one, which may be cut.
            wanted = [pack.rung_location(r) for r in range(rungs)]
            for place in wanted:
                assert any(
                    name == str(place.path)
                    and begin <= place.offset
                    and place.offset + place.bytes <= end
                    for name, begin, end in asked
                )
            there = sum(place.bytes for place in wanted)
            assert there <= sum(end - begin for _, begin, end in asked)
            assert sum(end - begin for _, begin, end in asked) <= there + (
                pack.rung_location(rungs).bytes if rungs < pack.rungs_available else 0
            )


def test_reading_ahead_meets_no_error(tmp_path: Path) -> None:
    pack = Pack.open(write_tiny_pack(tmp_path / "pack"))
    pack.rung_location(0).path.unlink()
    read_ahead(pack, 1 << 30)
    wait_for_reading_ahead()
