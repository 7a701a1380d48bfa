"""The governor: signs of pressure in files, the rule on recorded and invented pressure."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from fakes import executor_of, fake_model
from pliant.errors import BudgetError, ChecksumError, UsageError
from pliant.memory.budget import measure, system_limit
from pliant.memory.governor import Decision, Governor, Policy, State, decide, default_keep_free
from pliant.memory.pressure import Signals, Sources, Trigger
from pliant.sizes import GIB, MIB
from tiny import write_tiny_pack

FIXED = 10_000
PSI = "some avg10={} avg60=0.00 avg300=0.00 total=0\nfull avg10={} avg60=0.00 avg300=0.00 total=0\n"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text), encoding="ascii")
    return root


# --- sources


def test_the_machine_says_what_is_available(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 8192 kB\nMemFree: 10 kB\nMemAvailable:   4096 kB\n",
            "proc/self/status": "VmHWM:  300 kB\nVmRSS:  200 kB\n",
            "proc/pressure/memory": PSI.format("12.50", "3.25"),
        },
    )
    seen = Sources(root).read()
    assert (seen.available, seen.bound, seen.total) == (4 * MIB, "machine", 8 * MIB)
    assert seen.resident == 200 * 1024
    assert (seen.some, seen.full, seen.own_stalls) == (12.5, 3.25, False)


ZONE = """Node 0, zone   {}
  pages free     5546
        low      27
  pagesets
    cpu: 0
              count:    {}
              high:     9
              high_min: 9
    cpu: 1
              count:    {}
              batch:    63
  node_unreclaimable:  0
"""


def test_pages_in_the_lists_of_processors_are_available_too(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 8192 kB\nMemAvailable:   4096 kB\n",
            "proc/zoneinfo": ZONE.format("DMA32", 0, 3) + ZONE.format("Normal", 200, 40),
        },
    )
    assert Sources(root).read().available == 4 * MIB + 243 * os.sysconf("SC_PAGE_SIZE")


def test_every_group_above_limits_and_its_clean_cache_does_not_count(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 900000 kB\nMemAvailable: 800000 kB\n",
            "proc/self/cgroup": "0::/user/app\n",
            "proc/pressure/memory": PSI.format("99", "99"),
            "sys/fs/cgroup/user/memory.max": "max\n",
            "sys/fs/cgroup/user/memory.high": 50 * MIB,
            "sys/fs/cgroup/user/memory.current": 40 * MIB,
            "sys/fs/cgroup/user/memory.stat": f"anon 1\ninactive_file {5 * MIB}\n",
            "sys/fs/cgroup/user/app/memory.max": 100 * MIB,
            "sys/fs/cgroup/user/app/memory.high": "max",
            "sys/fs/cgroup/user/app/memory.current": 30 * MIB,
            "sys/fs/cgroup/user/app/memory.pressure": PSI.format("1.00", "0.50"),
        },
    )
    seen = Sources(root).read()
    assert (seen.available, seen.total) == (15 * MIB, 50 * MIB)
    assert seen.bound == str(root / "sys/fs/cgroup/user")
    assert (seen.some, seen.full, seen.own_stalls) == (1.0, 0.5, True)


def test_cgroup_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/docker/x"
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 900000 kB\nMemAvailable: 800000 kB\n",
            "proc/self/cgroup": "5:cpu:/other\n4:memory,hugetlb:/docker/x\n0::/\n",
            f"{group}/memory.limit_in_bytes": 64 * MIB,
            f"{group}/memory.usage_in_bytes": 60 * MIB,
            f"{group}/memory.stat": f"cache 9\ntotal_inactive_file {10 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        },
    )
    assert Sources(root).read().available == 14 * MIB
    assert system_limit(root) == 64 * MIB
    (root / group / "memory.usage_in_bytes").write_text(str(80 * MIB))
    assert Sources(root).read().available == 0


@pytest.mark.parametrize("text", ["", "nonsense", "some avg10=x\n\nfull", "some\xff avg10=3", "²"])
def test_files_of_any_content_do_no_harm(tmp_path: Path, text: str) -> None:
    names = (
        "proc/meminfo",
        "proc/zoneinfo",
        "proc/self/cgroup",
        "proc/pressure/memory",
        "proc/self/status",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("utf-8", "replace"))
    seen = Sources(tmp_path).read()
    assert seen.available > 0
    assert (seen.some, seen.full) == (0, 0)


def test_nothing_to_read_limits_nothing(tmp_path: Path) -> None:
    seen = Sources(tmp_path).read()
    assert seen.available > 2**50
    assert Sources(tmp_path).stall_file is None


def test_a_trigger_wakes_and_sleeps(tmp_path: Path) -> None:
    plain = tmp_path / "memory.pressure"
    plain.write_text("")
    for file in (None, tmp_path / "nowhere", Path("/proc/pressure/memory")):
        trigger = Trigger(file)
        assert trigger.wait(0.001) in (False, True)  # True if the machine has no memory just now
        thread = threading.Timer(0.02, trigger.wake)
        thread.start()
        begin = time.monotonic()
        while time.monotonic() - begin < 10 and trigger.wait(10):
            pass
        assert time.monotonic() - begin < 10
        thread.join()
        trigger.close()


# --- the rule

POLICY = Policy(keep_free=100 * MIB, slack=10 * MIB)
FLOOR, MOST = 50 * MIB, 400 * MIB


class World:
    """A machine with one other program; the model has what its budget allows, at once."""

    def __init__(self, total: int = 1000 * MIB, budget: int = MOST) -> None:
        self.total = total
        self.other = 0  # what the other program would like to have
        self.taken = 0  # and has
        self.budget = budget
        self.state = State()
        self.now = 0.0
        self.moves: list[tuple[float, int]] = []
        self.some = 0.0
        self.own_stalls = False

    @property
    def available(self) -> int:
        return self.total - self.taken - self.budget

    def look(self, seconds: float = 0.25) -> Decision | None:
        self.now += seconds
        self.taken = min(self.other, self.total - self.budget)
        seen = Signals(
            available=self.available,
            bound="machine",
            total=self.total,
            resident=self.budget,
            some=self.some,
            own_stalls=self.own_stalls,
        )
        self.state, decision = decide(POLICY, self.state, seen, self.now, self.budget, FLOOR, MOST)
        if decision is not None:
            assert FLOOR <= decision.budget <= MOST
            assert decision.budget != self.budget
            self.moves.append((self.now, decision.budget - self.budget))
            self.budget = decision.budget
        return decision

    def turns(self) -> list[float]:
        signs = [(now, size > 0) for now, size in self.moves]
        return [b[0] for a, b in pairwise(signs) if a[1] != b[1]]


def most_in_a_minute(times: list[float]) -> int:
    return max((sum(0 <= other - t < 60 for other in times) for t in times), default=0)


def test_a_burst_is_answered_at_once_and_full_depth_comes_back() -> None:
    world = World()
    assert world.look() is None
    world.other = 550 * MIB
    assert world.look() is not None
    assert world.available >= POLICY.keep_free
    assert world.taken == world.other
    budget = world.budget
    for _ in range(400):  # as long as the burst lasts, nothing moves
        assert world.look() is None
    world.other = 0
    grown = 0
    while world.budget < MOST:
        move = world.look()
        grown += move is not None
        if move is not None and grown == 1:
            assert world.moves[-1][1] <= (MOST - FLOOR) * POLICY.grade
        assert world.now < 160
    assert grown >= (MOST - budget) // int((MOST - FLOOR) * POLICY.grade)
    assert len(world.turns()) == 1


def test_at_the_floor_nothing_more_is_given() -> None:
    world = World()
    world.other = 990 * MIB
    for _ in range(10):  # as it takes what we give
        world.look()
    assert world.budget == FLOOR
    assert world.look() is None


def test_small_noise_moves_nothing() -> None:
    rng = random.Random(0)
    world = World(budget=200 * MIB)
    world.other = 1000 * MIB - 200 * MIB - POLICY.keep_free - 10 * MIB
    for _ in range(2000):
        world.other += rng.randint(-1, 1) * MIB
        world.other = min(max(world.other, 682 * MIB), 698 * MIB)
        world.look()
    assert not world.moves


def test_another_program_that_takes_what_we_give_does_not_make_us_swing() -> None:
    world = World()
    for _ in range(4 * 1800):  # half an hour; it takes everything, then shies away, again and again
        if world.available > POLICY.keep_free:
            world.other = min(world.other + 60 * MIB, 960 * MIB)
        else:
            world.other = max(world.other - 700 * MIB, 0)
        world.look()
    assert most_in_a_minute(world.turns()) <= 2
    assert world.moves


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1200), st.integers(1, 300), st.sampled_from([0.0, 0.0, 20.0]),
            st.booleans(),
        ),
        min_size=1,
        max_size=25,
    )
)  # fmt: skip
def test_any_pressure_gives_at_most_two_turns_a_minute(
    phases: list[tuple[int, int, float, bool]],
) -> None:
    world = World()
    for other, looks, world.some, world.own_stalls in phases:
        world.other = other * MIB
        for _ in range(looks):
            world.look()
            # What can be kept free is free after every single look.
            assert world.available >= POLICY.keep_free or world.budget == FLOOR
    assert most_in_a_minute(world.turns()) <= 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 100)), max_size=10))
def test_after_any_history_full_depth_comes_back_within_three_minutes(
    phases: list[tuple[int, int]],
) -> None:
    world = World()
    for other, looks in phases:
        world.other = other * MIB
        for _ in range(looks):
            world.look()
    world.other = 0
    for _ in range(4 * 180):
        world.look()
    assert world.budget == MOST


def test_stalls_shrink_in_grades_and_those_of_others_only_if_memory_is_short() -> None:
    world = World(total=4000 * MIB)
    world.some = 30.0
    for _ in range(40):
        assert world.look() is None  # somebody else fills a container of his own
    world.own_stalls = True
    sizes = []
    for _ in range(40):
        if world.look() is not None:
            sizes.append(-world.moves[-1][1])
    assert sizes == [int((MOST - FLOOR) * POLICY.grade)] * len(sizes)
    assert 4 <= len(sizes) <= 6  # one in two seconds
    world.own_stalls = False
    world.total = world.budget + POLICY.keep_free + 20 * MIB
    assert world.look(2.0) is not None


def test_recorded_pressure() -> None:
    """What a machine of 24 GiB said while a program took up to 1.2 GB, for some seconds each."""
    with (Path(__file__).parent / "data/pressure.csv").open(encoding="ascii") as file:
        rows = list(csv.DictReader(file))
    low = min(int(row["available"]) for row in rows)
    policy = Policy(keep_free=low + 400 * MIB)
    budget = most = 2 * GIB
    resident = floor = 200 * MIB
    state, moves = State(), []
    for row in rows * 3:
        # It was recorded without us: what we had is taken away.
        seen = Signals(
            available=max(int(row["available"]) - (budget - resident), 0),
            bound="machine",
            total=24 * GIB,
            resident=budget,
            some=float(row["some"]),
            full=float(row["full"]),
        )
        now = len(moves) * 0.25
        state, decision = decide(policy, state, seen, now, budget, floor, most)
        moves.append(0 if decision is None else decision.budget - budget)
        if decision is not None:
            budget = decision.budget
    signs = [(n * 0.25, move > 0) for n, move in enumerate(moves) if move]
    assert signs[0][1] is False
    turns = [b[0] for a, b in pairwise(signs) if a[1] != b[1]]
    assert most_in_a_minute(turns) <= 2
    assert len(signs) < len(moves) / 10


def test_what_is_kept_free_by_default() -> None:
    assert default_keep_free(16 * GIB) == GIB
    assert default_keep_free(512 * MIB) == 64 * MIB
    assert default_keep_free(1000 * GIB) == 2 * GIB


# --- the thread


class FakeModel:
    """A model whose resident set is written where the sources read it."""

    def __init__(self) -> None:
        self.budget = 300 * MIB
        self.error: Exception | None = None
        self.growing = False
        self.moves: list[int] = []

    def current(self) -> int:
        return self.budget

    def bounds(self) -> tuple[int, int]:
        return 50 * MIB, 400 * MIB

    def busy(self) -> bool:
        return self.growing

    def move(self, budget: int) -> str:
        if self.error is not None:
            raise self.error
        self.moves.append(budget)
        self.budget = budget
        return "fine"


def machine(root: Path, available: int, resident: int) -> Path:
    return write(
        root,
        {
            "proc/meminfo": f"MemTotal: 2000000 kB\nMemAvailable: {available // 1024} kB\n",
            "proc/self/status": f"VmRSS: {resident // 1024} kB\n",
        },
    )


def test_a_governor_says_what_it_saw_and_did(tmp_path: Path) -> None:
    model, lines = FakeModel(), list[str]()
    governor = Governor(
        model, POLICY, sources=Sources(machine(tmp_path, 40 * MIB, 300 * MIB)), log=lines.append
    )
    assert governor.look(0.0) is not None
    assert lines == [
        "40.0 MiB available (machine), 60.0 MiB less than is to be kept free: budget 300.0 MiB -> "
        "230.0 MiB, fine"
    ]
    machine(tmp_path, 0, 50 * MIB)
    governor.look(1.0)
    governor.look(2.0)
    governor.look(3.0)
    assert model.budget == 50 * MIB
    assert len(lines) == 3
    assert "nothing left to give" in lines[-1]
    report = governor.report()
    assert report["moves"] == lines
    assert (report["direction"], report["available"], report["keep_free"]) == (-1, 0, 100 * MIB)
    governor.close()
    governor.close()
    assert governor.look(4.0) is None


def test_a_move_that_fails_is_told_once_and_growth_waits_for_growth(tmp_path: Path) -> None:
    model, lines = FakeModel(), list[str]()
    sources = Sources(machine(tmp_path, 800 * MIB, 300 * MIB))
    governor = Governor(model, POLICY, sources=sources, log=lines.append)
    model.growing = True
    for second in range(30):
        assert governor.look(float(second)) is None
    assert not model.moves
    model.growing = False
    assert governor.look(30.0) is not None
    model.error = ChecksumError("rung 7 is broken")
    for second in range(31, 60):
        governor.look(float(second))
    assert [line for line in lines if "rung 7" in line] == lines[1:]
    assert 1 <= len(lines[1:]) <= 2
    governor.close()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("governor")
    return write_tiny_pack(
        folder / "pack", least=8, hidden=1024, ffn=4096, heads=16, head_dim=64, context=512,
        rung_bytes=2**20,
    )  # fmt: skip


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


TAKER = """if True:
    import sys
    for line in sys.stdin:
        block = bytearray(int(line))
        block[::4096] = b"x" * len(block[::4096])
        print("done", flush=True)
"""


@pytest.mark.own_process
def test_real_pressure_from_a_second_process(pack: Path, tmp_path: Path) -> None:
    """Two processes and a machine of 100 MiB more than they have at first.

    Their resident sets are the kernel's own; the machine is made of them, so that nothing else that
    runs here matters. What the second takes must be free again, and comes back when it leaves.
    """
    with subprocess.Popen(
        [sys.executable, "-c", TAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as taker:
        press(pack, tmp_path, taker)


def press(pack: Path, tmp_path: Path, taker: subprocess.Popen[str]) -> None:
    def take(size: int) -> None:
        assert taker.stdin is not None
        assert taker.stdout is not None
        print(size, file=taker.stdin, flush=True)
        assert taker.stdout.readline() == "done\n"

    take(1)
    others = Path(f"/proc/{taker.pid}")
    keep_free = 40 * MIB
    with pliant.load(pack, chat=False) as model:
        full = model.depth
        budget = model.plan.total
        total = measure().now + measure(others).now + 100 * MIB

        class Machine(Sources):
            def read(self) -> Signals:
                resident = measure().now
                left = total - resident - measure(others).now
                return Signals(available=max(left, 0), bound="test", total=total, resident=resident)

        lines: list[str] = []
        governor = model.govern(keep_free=keep_free, log=lines.append, sources=Machine(tmp_path))
        governor.policy = Policy(
            keep_free=keep_free, slack=2 * MIB, calm=0.2, dwell=0.5, pace=0.05, period=0.02
        )
        sources = Machine(tmp_path)
        assert model.depth == full
        generation = model.generate([1], max_tokens=400, ignore_eos=True)
        next(generation)
        take(72 * MIB)
        # The memory is there before the move is over, and its line is the last of it.
        wait_for(lambda: bool(lines) and sources.read().available >= keep_free)
        assert model.depth.rungs < full.rungs
        assert model.budget is not None
        assert model.budget < budget
        assert "than is to be kept free: budget " in lines[0]
        next(generation)
        take(1)
        wait_for(lambda: model.depth == full)
        for _ in generation:
            pass
        assert generation.result.finish_reason == "length"
        assert len(generation.result.tokens) == 400
        low = generation.result.bits_per_weight_lowest
        assert low is not None
        assert full.bits_per_weight is not None
        assert low < full.bits_per_weight
        assert model.governor is governor
        model.budget = budget
        assert model.governor is None


@pytest.mark.own_process
def test_auto_is_a_budget_like_others(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pliant.load(pack, memory="auto", keep_free="1MiB", chat=False) as model:
        assert model.governor is not None
        assert model.governor.policy.keep_free == MIB
        assert model.budget is not None
        assert model.budget <= system_limit()
        model.budget = "900MiB"
        assert model.governor is None
        model.budget = "auto"
        assert model.governor is not None
        assert model.governor.report()["keep_free"] == default_keep_free(system_limit())
    with pytest.raises(UsageError, match="keep_free"):
        pliant.load(pack, keep_free="1MiB")
    with pytest.raises(UsageError, match="auto"):
        pliant.load(pack, memory="auto", weights="1MB")
    with pytest.raises(BudgetError, match="to be kept free"):
        pliant.load(pack, memory="auto", keep_free="100TB")


def test_growth_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    model = fake_model(memory=FIXED + 90_000)
    everything = model.plan_for().total
    governor = model.govern(keep_free=1, sources=Sources(machine(tmp_path, 0, 0)))
    governor.close()
    low = model.budget
    assert low is not None
    steering: Any = governor._model
    assert steering.bounds() == (low, everything)
    executor_of(model).broken_rung = 70
    steering.move(everything)
    wait_for(lambda: not steering.busy())
    assert model.budget == low
    assert steering.bounds() == (low, low)
