"""Plans: never above the budget, never worse with more of it, refused with the sum."""

from __future__ import annotations

import math
import mmap
import re
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pliant.errors import BudgetError, UsageError
from pliant.memory.budget import MARGIN, Meter, margin, measure, system_limit
from pliant.memory.kv_ages import Ages
from pliant.memory.ledger import Ledger
from pliant.memory.plan import (
    LEAST_CONTEXT,
    MOST_KL,
    PackSizes,
    Plan,
    Wish,
    bits_per_weight,
    expected_kl,
    make_plan,
    rungs_within,
    smallest,
    tokens_per_second,
)
from pliant.sizes import MIB

QUALITY = [(45, 1.68), (55, 0.68), (65, 0.267), (72, 0.146), (89, 0.042), (105, 0.013)]


def sizes_of(rungs: list[int], **changes: Any) -> PackSizes:
    values: dict[str, Any] = {
        "weights": [500, *(500 + s for s in accumulate(size - 7 for size in rungs))],
        "arena": [0, *accumulate(rungs)],
        "coded": 1000,
        "quality": [],
        "context": 4096,
        "kv_page_tokens": 32,
        "kv_page_bytes": 640,
    }
    return PackSizes(**{**values, **changes})


@st.composite
def pack_sizes(draw: st.DrawFn) -> PackSizes:
    rungs = draw(st.lists(st.integers(100, 5000), min_size=1, max_size=60))
    return sizes_of(
        rungs,
        context=draw(st.integers(1, 9000)),
        kv_page_bytes=draw(st.integers(1, 9000)),
        kv_page_tokens=draw(st.sampled_from([16, 32])),
        quality=[(0, 8.0), (sum(rungs), 0.01)],
    )


FIXED = st.lists(st.integers(0, 10_000), min_size=1, max_size=4).map(
    lambda sizes: tuple((f"part {i}", size) for i, size in enumerate(sizes))
)
CONTEXTS = st.none() | st.integers(1, 9000)


@given(pack_sizes(), FIXED, st.integers(1, 400_000), CONTEXTS, st.integers(1, 5))
def test_a_plan_fits_or_is_refused_with_the_sum(
    sizes: PackSizes,
    fixed: tuple[tuple[str, int], ...],
    memory: int,
    context: int | None,
    sessions: int,
) -> None:
    assume(context is None or context <= sizes.context)
    wish = Wish(memory=memory, context=context, sessions=sessions)
    least = smallest(sizes, fixed, wish)
    try:
        plan = make_plan(sizes, fixed, wish)
    except BudgetError as error:
        assert least.total > memory
        lines = str(error).splitlines()
        assert "needed are" in lines[0]
        assert lines[-1].split()[0] == "sum"
        assert len(lines) >= 3
    else:
        assert least.total <= memory
        check_plan(plan, sizes, wish)
        # Not a rung more would fit beside the KV that was promised.
        if plan.rungs < sizes.rungs:
            kv = sizes.kv_session(0, least.context if context is None else context) * sessions
            free = memory - sum(size for _, size in fixed)
            assert sizes.arena[plan.rungs + 1] > free - max(kv, min(free // 6, plan.kv))


def check_plan(plan: Plan, sizes: PackSizes, wish: Wish) -> None:
    assert wish.memory is None or plan.total <= wish.memory
    assert plan.total == sum(size for _, size in plan.lines())
    assert 1 <= plan.rungs <= sizes.rungs
    assert plan.weights == sizes.weights[plan.rungs]
    assert plan.arena == sizes.arena[plan.rungs]
    assert plan.context <= sizes.context
    pages = math.ceil(plan.context / sizes.kv_page_tokens) * wish.sessions
    assert plan.kv == pages * sizes.kv_page_bytes
    if wish.context is not None:
        assert plan.context == wish.context
    else:
        assert plan.context >= min(LEAST_CONTEXT, sizes.context)


@given(pack_sizes(), FIXED, CONTEXTS, st.lists(st.integers(1, 400_000), min_size=2, max_size=8))
def test_more_memory_is_never_worse(
    sizes: PackSizes, fixed: tuple[tuple[str, int], ...], context: int | None, budgets: list[int]
) -> None:
    assume(context is None or context <= sizes.context)
    rungs, refused = 0, True
    for memory in sorted(budgets):
        try:
            plan = make_plan(sizes, fixed, Wish(memory=memory, context=context))
        except BudgetError:
            assert refused, "refused with more memory than sufficed"
            continue
        refused = False
        assert plan.rungs >= rungs
        rungs = plan.rungs


@given(pack_sizes(), FIXED)
def test_everything_is_held_where_there_is_no_limit(
    sizes: PackSizes, fixed: tuple[tuple[str, int], ...]
) -> None:
    plan = make_plan(sizes, fixed, Wish())
    assert (plan.rungs, plan.context) == (sizes.rungs, sizes.context)
    assert make_plan(sizes, fixed, Wish(memory=plan.total)) == Plan(
        **{name: getattr(plan, name) for name in Plan.__slots__ if name != "memory"},
        memory=plan.total,
    )


@given(pack_sizes(), st.integers(1, 400_000))
def test_weights_are_the_largest_prefix_that_fits(sizes: PackSizes, weights: int) -> None:
    if weights < sizes.weights[1]:
        with pytest.raises(BudgetError, match="too few"):
            rungs_within(sizes, weights)
        return
    rungs = rungs_within(sizes, weights)
    assert sizes.weights[rungs] <= weights
    assert rungs == sizes.rungs or sizes.weights[rungs + 1] > weights
    assert make_plan(sizes, (), Wish(weights=weights)).rungs == rungs
    try:
        both = make_plan(sizes, (), Wish(weights=weights, memory=200_000))
    except BudgetError:
        pass
    else:
        assert both.rungs == rungs


def test_the_floor_of_quality_is_kept_or_refused() -> None:
    sizes = sizes_of([1000] * 50, quality=[(0, 8.0), (50_000, 0.01)], coded=10_000)
    for memory in range(20_000, 90_000, 5000):
        try:
            plan = make_plan(sizes, (), Wish(memory=memory, min_bits=20, context=32))
        except BudgetError:
            assert memory < 25_000 + 2000
        else:
            assert plan.bits_per_weight is not None
            assert plan.bits_per_weight >= 20
    plan = smallest(sizes, (), Wish(max_kl=0.1))
    assert plan.expected_kl is not None
    assert plan.expected_kl <= 0.1
    shallower = expected_kl(sizes.quality, sizes.weights[plan.rungs - 1])
    assert shallower is not None
    assert shallower > 0.1
    with pytest.raises(BudgetError, match="asked for"):
        make_plan(sizes, (), Wish(min_bits=20, weights=2000))
    with pytest.raises(BudgetError, match="all 50 rungs"):
        make_plan(sizes_of([100] * 50), (), Wish(min_bits=64))
    with pytest.raises(BudgetError, match="all 50 rungs"):
        make_plan(sizes, (), Wish(max_kl=1e-6))
    with pytest.raises(UsageError, match="measured quality"):
        make_plan(sizes_of([100]), (), Wish(max_kl=1.0))
    with pytest.raises(UsageError, match="not coded"):
        make_plan(sizes_of([], coded=0), (), Wish(min_bits=2))


def test_a_pack_without_plies_has_a_plan() -> None:
    sizes = sizes_of([], coded=0)
    plan = make_plan(sizes, (("base", 10_000),), Wish(memory=90_000))
    assert (plan.rungs, plan.arena, plan.bits_per_weight) == (0, 0, None)
    assert plan.context == 4000 // 32 * 32


def test_what_sessions_hold_is_not_taken() -> None:
    sizes = sizes_of([1000] * 50)
    promised: dict[str, Any] = {
        "least_context": 2000,
        "held": (Ages((1,) * 60, 3, 4), Ages((1,) * 62, 1, 1) + Ages((1,) * 20)),
    }
    kept = make_plan(sizes, (), Wish(memory=60_000, **promised))
    assert kept.context >= 2000
    assert kept.kv >= 83 * 640
    assert kept.total <= 60_000
    least = smallest(sizes, (), Wish(memory=1, sessions=4, **promised))
    assert (least.kv, least.context, least.rungs) == (83 * 640, 2000, 1)
    with pytest.raises(BudgetError, match=r"(?s)2656 tokens in use or promised.*sum"):
        make_plan(sizes, (), Wish(memory=53_000, **promised))


@pytest.mark.parametrize(
    "wish",
    [
        {"sessions": 0},
        {"context": 0},
        {"min_bits": -1.0},
        {"min_bits": math.nan},
        {"max_kl": 0.0},
        {"max_kl": math.nan},
    ],
    ids=str,
)
def test_wishes_without_meaning_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Wish(**wish)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 4096"):
        make_plan(sizes_of([100]), (), Wish(context=4097))


def test_expected_kl_is_exact_at_the_points_and_log_linear_between() -> None:
    for size, kl in QUALITY:
        assert expected_kl(QUALITY, size) == pytest.approx(kl)
    assert expected_kl(QUALITY, 50) == pytest.approx(math.sqrt(1.68 * 0.68))
    # Beyond the ends the slope goes on.
    assert expected_kl(QUALITY, 121) == pytest.approx(0.013 * 0.013 / 0.042)
    assert expected_kl(QUALITY, 35) == pytest.approx(1.68 * 1.68 / 0.68)
    assert expected_kl(QUALITY, 0) == MOST_KL
    assert expected_kl([], 5) is None
    assert expected_kl([(5, 0.1)], 99) == pytest.approx(0.1)


@given(st.lists(st.integers(0, 200), min_size=2, max_size=9))
def test_expected_kl_never_rises(at: list[int]) -> None:
    found = [expected_kl(QUALITY, size) or 0.0 for size in sorted(at)]
    assert all(later <= earlier for earlier, later in pairwise(found))


def test_bits_and_speed() -> None:
    assert bits_per_weight(500, 1000) == 4.0
    assert bits_per_weight(500, 0) is None
    slow, fast = tokens_per_second(10**9, 1e10), tokens_per_second(10**8, 1e10)
    assert 4 < slow < 10 < fast < 100


def test_the_ledger_balances_and_refuses() -> None:
    ledger = Ledger(1000)
    ledger.hold("weights", 600, touched=100)
    ledger.hold("kv", 300)
    assert (ledger.held, ledger.free, ledger.total) == (900, 100, 1000)
    with pytest.raises(BudgetError, match=re.compile(r"weights.*kv.*sum", re.S)):
        ledger.hold("kv", 401)
    assert ledger.owners() == {"weights": (600, 100), "kv": (300, 300)}
    ledger.move({"weights": 100, "kv": 850}, 960)
    assert (ledger.held, ledger.free, ledger.total) == (950, 10, 960)
    with pytest.raises(BudgetError):
        ledger.move({"weights": 1}, 800)
    assert (ledger.held, ledger.total) == (950, 960)
    ledger.touch("kv", 7)
    assert ledger.audit().touched == 107
    with pytest.raises(KeyError):
        ledger.touch("nobody", 1)
    with pytest.raises(ValueError, match="-1"):
        ledger.hold("kv", -1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 700)), max_size=20))
def test_free_and_held_are_the_total_whatever_happens(moves: list[tuple[str, int]]) -> None:
    ledger = Ledger(1000)
    for owner, size in moves:
        before = ledger.owners()
        try:
            ledger.hold(owner, size)
        except BudgetError:
            assert ledger.owners() == before
        assert ledger.free + ledger.held == ledger.total == 1000
        assert ledger.free >= 0


def touched(size: int) -> mmap.mmap:
    """Fresh memory of the kernel, all of it in use: what malloc has freed before is not taken."""
    block = mmap.mmap(-1, size)
    block.write(b"x" * size)
    return block


def test_the_resident_set_is_what_the_kernel_says(tmp_path: Any) -> None:
    touched(40 * MIB).close()  # the text to write is in memory too: let the heap grow before
    before = measure()
    block = touched(32 * MIB)
    grown = measure()
    assert 31 * MIB <= grown.now - before.now <= 72 * MIB
    assert grown.peak >= grown.now
    block.close()
    assert measure().now <= grown.now - 31 * MIB
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t     20 kB\nVmRSS:\t     30 kB\n")
    assert (measure(tmp_path).now, measure(tmp_path).peak) == (30 * 1024, 30 * 1024)


def test_the_meter_gives_growth_to_its_cause() -> None:
    touched(20 * MIB).close()
    meter = Meter()
    block = touched(16 * MIB)
    meter.mark("block")
    parts = dict(meter.parts)
    assert list(parts) == ["interpreter", "block"]
    assert 15 * MIB <= parts["block"] <= 40 * MIB
    block.close()


def test_huge_pages_that_nobody_asked_for_widen_the_margin(tmp_path: Any) -> None:
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    assert margin(tmp_path) == MARGIN
    (folder / "enabled").write_text("always [madvise] never\n")
    assert margin(tmp_path) == MARGIN
    (folder / "enabled").write_text("[always] madvise never\n")
    assert margin(tmp_path) == MARGIN + 4 * MIB


def test_the_limit_of_the_system_is_the_least_of_all(tmp_path: Any) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemFree: 10 kB\n")
    assert system_limit(tmp_path) == 1000 * 1024
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    assert system_limit(tmp_path) == 1000 * 1024
    (group.parent / "memory.max").write_text("512000\n")
    assert system_limit(tmp_path) == 512000
    old = tmp_path / "sys/fs/cgroup/memory/c"
    old.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("7:cpu,memory:/c\nbroken\n1:name=x:/../..\n")
    (old / "memory.limit_in_bytes").write_text("4096\n")
    assert system_limit(tmp_path) == 4096
