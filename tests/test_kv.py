"""The coded KV cache: the same bits whatever computes them, rungs that can be dropped at any time,
and everything that goes with pages of several forms."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pliant
from packs import write_random_pack
from pliant import _core
from pliant.engine.build import RungFiles, build_executor
from pliant.engine.kv_quality import Caches, kv_quality
from pliant.errors import BudgetError, EngineError, FormatError, UsageError
from pliant.memory.kv_ages import Form
from pliant.memory.plan import PackSizes, Wish, kv_levels, make_plan
from pliant.store import Pack
from test_executor import Logits, build, relative, some_ids
from test_executor import run as run_exact
from tiny import roomy, write_tiny_pack

PAGE = 32
SHAPES: dict[str, dict[str, Any]] = {
    "16 of 64": {"head_dim": 16},
    "40 of 64": {"head_dim": 40, "hidden": 160},
    "two groups": {"head_dim": 80, "heads": 2, "kv_heads": 1, "hidden": 160},
    "gemma": {
        "head_dim": 64, "hidden": 128, "heads": 4, "kv_heads": 1, "qk_norms": True,
        "post_norms": True, "layer_window": [40, 0], "attn_softcap": 20.0,
    },
    "many queries": {"head_dim": 16, "heads": 20, "kv_heads": 2, "hidden": 320},
}  # fmt: skip


def coded(
    path: Path, *, isa: str = "auto", threads: int = 2, chunk: int = 64, exact: bool = False
) -> _core.Executor:
    """An executor that codes its KV cache unless it is `exact`, with all rungs of the weights."""
    pack = Pack.open(path)
    executor: Any = build_executor(pack, threads=threads, isa=isa, chunk=chunk, coded_kv=not exact)
    files = RungFiles(pack)
    executor.read_rungs([files.location(rung) for rung in range(pack.rungs_available)])
    files.close()
    executor.publish(pack.rungs_available)
    executor.reserve_kv(64)
    return executor  # type: ignore[no-any-return]


def feed(executor: _core.Executor, sequence: int, ids: list[int], cuts: list[int]) -> Logits:
    rows, at = [], 0
    for length in cuts:
        piece = np.array(ids[at : at + length], np.int32)
        rows.append(executor.step([sequence], [length], piece, [2]))
        at += length
    return np.concatenate(rows)


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pack(
        tmp_path_factory.mktemp("kv") / "pack", least=4, seed=3, **SHAPES[request.param]
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(
        tmp_path_factory.mktemp("kv") / "tiny.pack", least=4, head_dim=64, hidden=256, layers=4
    )


# --- the same bits


def test_same_bits_on_every_instruction_set_and_however_it_is_cut(path: Path) -> None:
    ids = some_ids(Pack.open(path).manifest.model.vocab, 150)
    results = []
    for isa in _core.cpu_isa():
        executor = coded(path, isa=isa)
        executor.set_kv_ages([3], [3])
        results.append(feed(executor, executor.open_sequence(), ids, [150]))
    for threads, chunk, cuts in (
        (1, 128, [1] * 150),
        (3, 7, [31, 1, 1, 64, 53]),
        (2, 64, [32, 32, 86]),
    ):
        executor = coded(path, threads=threads, chunk=chunk)
        executor.set_kv_ages([3], [3])
        results.append(feed(executor, executor.open_sequence(), ids, cuts))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_the_largest_sums_fit(path: Path) -> None:
    """One token all the time: all values are the same, and attention makes no difference."""
    pack = Pack.open(path)
    ids = [7] * 150
    for level in range(1, len(pack.manifest.kv.rungs) + 1):  # type: ignore[union-attr]
        results = []
        for isa in _core.cpu_isa():
            executor = coded(path, isa=isa)
            executor.set_kv_ages([level], [level])
            results.append(feed(executor, executor.open_sequence(), ids, [150]))
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])


def test_long_sequences_with_pages_of_several_depths(tmp_path: Path) -> None:
    """More than two parts of 512 tokens; the first page has fewer rungs than its neighbours."""
    path = write_random_pack(
        tmp_path / "pack", least=4, context=2048, head_dim=80, heads=3, kv_heads=1, hidden=64,
        layer_window=[0, 560],
    )  # fmt: skip
    ids = some_ids(Pack.open(path).manifest.model.vocab, 1070)

    def run(cuts: list[int], **how: Any) -> Logits:
        executor = coded(path, **how)
        sequence = executor.open_sequence()
        executor.set_kv_ages([5], [5])
        first = feed(executor, sequence, ids, [40])
        executor.set_kv_ages([6], [6])
        rest = feed(executor, sequence, ids[40:], cuts)
        assert executor.page_rungs(executor.pages(sequence)) == [5, *[6] * 32, 0]
        return np.concatenate([first, rest])

    want = run([1030])
    for isa in _core.cpu_isa()[1:]:
        np.testing.assert_array_equal(run([1030], isa=isa), want)
    got = run([400, 10, *[1] * 60, 13, 387, *[1] * 130, 30], threads=3, chunk=50)
    np.testing.assert_array_equal(got, want)
    # A page that is read as if it had the depths of another gives noise: 1.2 and more.
    exact = run_exact(build(Pack.open(path)), ids[:200])
    assert relative(want[110:200], exact[110:]) < 0.8


def test_a_sequence_is_the_same_in_any_company(path: Path) -> None:
    vocab = Pack.open(path).manifest.model.vocab
    texts = [some_ids(vocab, 70 + 20 * n, seed=n) for n in range(3)]
    alone = []
    for text in texts:
        executor = coded(path)
        alone.append(feed(executor, executor.open_sequence(), text, [len(text)])[-1])
    executor = coded(path)
    sequences = [executor.open_sequence() for _ in texts]
    executor.step(
        sequences, [40] * 3, np.concatenate([t[:40] for t in texts]).astype("i4"), [0] * 3
    )
    last: dict[int, Logits] = {}
    for at in range(40, 110):
        going = [n for n, text in enumerate(texts) if at < len(text)]
        tokens = np.array([texts[n][at] for n in going], np.int32)
        rows = executor.step(
            [sequences[n] for n in going], [1] * len(going), tokens, [1] * len(going)
        )
        last.update(zip(going, rows, strict=True))
    for n, expected in enumerate(alone):
        np.testing.assert_array_equal(last[n], expected)


# --- rungs


def test_dropping_rungs_is_having_coded_fewer(path: Path) -> None:
    """The law of the ladder: what is left is what would have been made. (Of the first page: what
    later ones hold was computed from it.)"""
    ids = some_ids(Pack.open(path).manifest.model.vocab, 40)
    for level in (5, 2, 1):
        deep, shallow = coded(path), coded(path)
        shallow.set_kv_ages([level], [level])
        pages = []
        for executor in (deep, shallow):
            sequence = executor.open_sequence()
            feed(executor, sequence, ids, [40])
            if executor is deep:
                executor.set_kv_ages([6], [6])
                executor.set_kv_ages([level], [level])
            pages.append(page(executor, sequence, 0))
            assert executor.page_rungs(executor.pages(sequence)) == [level, 0]
        assert pages[0] == pages[1]


def page(executor: _core.Executor, sequence: int, number: int) -> bytes:
    found = executor.pages(sequence)[number]
    stored = executor.kv_stored_bytes[executor.page_whole([found])[0]]
    data = np.empty(stored[executor.page_rungs([found])[0]], np.uint8)
    executor.take_page(found, data)
    return data.tobytes()


def test_more_rungs_are_nearer_to_exact(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "pack", least=6, head_dim=64, hidden=256, layers=6, seed=5)
    caches = Caches(path, [2.7, 3.7, 4.7, 5.7, 6.7], threads=2)
    found = kv_quality(caches, [some_ids(160, 320)])["coded"]
    worst = [one["all_coded"]["kl"] for one in found]
    assert len(worst) == 5
    assert worst == sorted(worst)
    assert worst[0] < 0.5 * worst[-1]
    for one in found:  # a page in ten is exact here
        assert one["as_run"]["kl"] < one["all_coded"]["kl"]
        assert one["bytes_per_token"] * 8 == pytest.approx(one["bits"] * 6 * 2 * 2 * 64, rel=0.05)


def test_pages_go_and_come_back(path: Path) -> None:
    ids = some_ids(Pack.open(path).manifest.model.vocab, 101)
    executor = coded(path)
    executor.set_kv_ages([4], [4])
    first, second = executor.open_sequence(), executor.open_sequence()
    feed(executor, first, ids[:100], [100])
    forms = executor.page_rungs(executor.pages(first))
    assert forms == [4, 4, 4, 0]
    for number, rungs in enumerate(forms):
        data = np.frombuffer(page(executor, first, number), np.uint8)
        executor.put_page(second, min(PAGE, 100 - number * PAGE), data, rungs)
    expected = feed(executor, first, ids[100:], [1])
    np.testing.assert_array_equal(feed(executor, second, ids[100:], [1]), expected)
    third, size = executor.open_sequence(), executor.kv_stored_bytes[True][4]
    for tokens, rungs, count in ((32, 0, executor.kv_page_bytes), (5, 4, size), (32, 99, size)):
        with pytest.raises(UsageError):
            executor.put_page(third, tokens, np.zeros(count, np.uint8), rungs)


def test_memory_is_that_of_the_rungs(path: Path) -> None:
    executor = coded(path)
    levels = len(executor.kv_rung_bytes) - 1
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 130, [130])
    executor.trim_kv()
    for level in range(levels, 0, -1):
        executor.set_kv_ages([level], [level])
        whole = 4 * executor.kv_rung_bytes[level] + executor.kv_page_bytes
        assert executor.memory()["kv"] == whole == executor.kv_used_bytes
    executor.close_sequence(sequence)
    executor.trim_kv()
    assert executor.memory()["kv"] == 0
    for level in (0, levels + 1):
        with pytest.raises(UsageError):
            executor.set_kv_ages([level], [level])


def test_truncating_inside_a_coded_page_forgets_all_of_it(path: Path) -> None:
    executor = coded(path)
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 75, [75])
    assert executor.truncate(sequence, 70) == 70  # the newest page is exact
    assert executor.truncate(sequence, 64) == 64
    assert executor.truncate(sequence, 40) == 32
    assert executor.length(sequence) == 32


# --- broken packs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv.ladder": lambda a: a + 100}, "names unit"),
        ({"kv.ladder": lambda a: a * 0}, "plies of unit 0, and 8 is most"),
        ({"kv.scale": lambda a: a * 0}, "they must be from"),
        ({"kv.scale": lambda a: a * np.float32(np.nan)}, "NaN"),
        ({"kv.mean": lambda a: a + np.float32(np.inf)}, "infinity"),
        ({"kv.order": lambda a: a * 0}, "no permutation"),
        ({"kv.thresholds": lambda a: a[::-1].copy()}, "do not rise"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_tensors_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import packs

    original = packs.kv_base

    def broken(*given: Any) -> Any:
        base = original(*given)
        return base | {name: edit(base[name]) for name, edit in change.items()}

    monkeypatch.setattr(packs, "kv_base", broken)
    with pytest.raises(FormatError, match=message):
        write_random_pack(tmp_path / "pack")


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({"rungs": [], "quality": []}, "at least one"),
        ({"rungs": [8], "quality": [0.1, 0.01]}, "they must be as many"),
        ({"rungs": [8, 8], "quality": [0.1, 0.2]}, "must fall"),
        ({"rungs": [8, 8], "quality": [0.1, -0.2]}, "not below 0"),
        ({"rungs": [10**6], "quality": [0.1]}, "must lie in"),
        ({"rungs": [64, 8], "quality": [0.1, 0.1]}, "have at most|add up|kv.ladder"),
        ([], "must be an object"),
    ],
    ids=str,
)
def test_wrong_manifests_are_refused(tiny: Path, tmp_path: Path, kv: Any, message: str) -> None:
    import shutil

    copy = tmp_path / "pack"
    shutil.copytree(tiny, copy)
    manifest = json.loads((copy / "pliant.json").read_text())
    manifest["kv"] = kv
    (copy / "pliant.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=message):
        Pack.open(copy)


# --- plans

SIZES = PackSizes(
    weights=[1000 * k for k in range(101)], arena=[1000 * k for k in range(101)], coded=8000,
    quality=[(0, 8.0), (100_000, 0.01)], context=2048, kv_page_tokens=PAGE, kv_page_bytes=1600,
    kv_rungs=[100, 300, 400, 500, 600, 700], kv_quality=[0.5, 0.1, 0.02, 0.004, 0.001], kv_chunk=3,
)  # fmt: skip


@settings(deadline=None)
@given(
    memory=st.integers(30_000, 300_000),
    context=st.none() | st.integers(1, 2048),
    sessions=st.integers(1, 5),
    bits=st.none() | st.floats(3.0, 7.0),
)
def test_plans_fit_and_say_what_they_cost(
    memory: int, context: int | None, sessions: int, bits: float | None
) -> None:
    wish = Wish(memory=memory, context=context, sessions=sessions, kv_bits=bits)
    try:
        plan = make_plan(SIZES, (), wish)
    except BudgetError:
        return
    assert plan.total <= memory
    # Each sequence has pages of all ages, and its newest page exact; a chunk fills some more.
    kept = SIZES.schedule(plan.kv_level).kept[: plan.context // PAGE]
    pages = sum(SIZES.kv_rungs[rungs] for rungs in kept) + SIZES.kv_page_bytes
    assert plan.kv == pages * sessions + 3 * SIZES.kv_page_bytes
    if bits is not None:
        assert plan.kv_bits <= bits
    if context is not None:
        assert plan.context == context
        found = [SIZES.kv_bits(other, context) for other in kv_levels(SIZES, wish, context)]
        others = [
            make_plan(SIZES, (), replace(wish, kv_bits=one))
            for one in found
            if _fits(replace(wish, kv_bits=one))
        ]
        assert plan.expected_kl == min(other.expected_kl or 0 for other in others)


def _fits(wish: Wish) -> bool:
    try:
        make_plan(SIZES, (), wish)
    except BudgetError:
        return False
    return True


def test_bits_that_cannot_be_had_are_refused() -> None:
    for wish in (Wish(kv_bits=2.9), Wish(kv_floor=7.5), Wish(kv_bits=4.0, kv_floor=5.0)):
        with pytest.raises(UsageError, match="tokens this pack has"):
            make_plan(SIZES, (), wish)
    with pytest.raises(UsageError, match="from 1 to 16"):
        Wish(kv_bits=0.5)


# --- models


def test_options_of_load(tiny: Path, tmp_path: Path) -> None:
    with pliant.load(tiny, kv_bits=4.5) as model:
        assert model.depth.kv_bits <= 4.5
        assert model.report().kv_bits == model.depth.kv_bits == model.plan.kv_bits
        made = model.generate([1] * 40, max_tokens=3, ignore_eos=True)
        list(made)
        assert made.result.kv_bits_lowest == model.depth.kv_bits
    with pliant.load(tiny) as model:
        assert model.depth.kv_bits == 16
    for wrong in (0, 17, "8", True):
        with pytest.raises(UsageError, match="kv_bits must be"):
            pliant.load(tiny, kv_bits=wrong)
    with pytest.raises(UsageError, match="kv_floor belongs"):
        pliant.load(tiny, kv_bits=4, kv_floor=3)
    old = write_tiny_pack(tmp_path / "old.pack", kv=False)
    with pytest.raises(UsageError, match="pack the model again"):
        pliant.load(old, kv_bits="auto")


def test_a_session_that_turns_back_computes_its_page_again(tiny: Path) -> None:
    ids = some_ids(256, 90)
    with pliant.load(tiny, kv_bits=5) as model, model.session() as session:
        session.feed(ids)
        other = [*ids[:50], 7, 7]
        assert session.rewind(other) == 32
        found = session.feed(other[32:])
        with model.session() as fresh:
            np.testing.assert_array_equal(found, fresh.feed(other))


def park(model: pliant.Model, session: pliant.Session) -> None:
    with model._turns:
        model._holdings.cache._park(session.sequence)


def test_a_parked_session_that_turns_back_does_the_same(tiny: Path) -> None:
    ids = some_ids(256, 90)
    with pliant.load(tiny, kv_bits=5) as model, model.session() as session:
        for at, kept in ((80, 80), (50, 32), (20, 0)):
            session.rewind(ids)
            session.feed(ids[len(session) :])
            park(model, session)
            other = [*ids[:at], 7, 7]
            assert session.rewind(other) == kept
            found = session.feed(other[kept:])
            with model.session() as fresh:
                np.testing.assert_array_equal(found, fresh.feed(other))


def test_a_parked_session_comes_back_with_what_the_level_allows(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_ids(256, 200)
    with pliant.load(tiny, kv_bits=6.5) as model:
        executor: Any = model._executor
        level = model.depth.kv_level
        with model.session() as session:
            session.feed(ids)
            park(model, session)
            executor.set_kv_ages([2], [2])
            two = Form(2, whole=True)
            monkeypatch.setattr(model._holdings.cache, "_forms", lambda *_: lambda number: two)
            found = session.feed([7])
            assert executor.page_rungs(executor.pages(session.sequence)) == [2] * 6 + [0]
        schedule = model._sizes.schedule(level)
        executor.set_kv_ages(schedule.seen.tolist(), schedule.kept.tolist())
        with model.session() as session:
            session.feed(ids)
            executor.set_kv_ages([2], [2])
            np.testing.assert_array_equal(session.feed([7]), found)


def test_parked_sessions_lose_nothing(tiny: Path) -> None:
    ids = some_ids(256, 200)
    with pliant.load(tiny, kv_bits=4.5) as model:
        with model.session() as session:
            session.feed(ids)
            expected = session.feed([7])
        with model.session() as session:
            session.feed(ids)
            park(model, session)
            assert model.report().parked == 1
            np.testing.assert_array_equal(session.feed([7]), expected)


@pytest.fixture
def answers(tiny: Path) -> Iterator[pliant.Model]:
    with pliant.load(
        tiny, memory=f"{roomy(16)}MiB", kv_bits="auto", context=256, sessions=4
    ) as model:
        yield model


@pytest.mark.own_process
@pytest.mark.resident
def test_budgets_walk_while_answers_are_made(answers: pliant.Model) -> None:
    """Nothing ends early, nothing is lost, and the ledger holds after each change."""
    stop, results, errors = threading.Event(), [], []

    def work(seed: int) -> None:
        try:
            while not stop.is_set():
                made = answers.generate(
                    some_ids(256, 100, seed), max_tokens=100, ignore_eos=True, temperature=1, seed=1
                )
                list(made)
                results.append(made.result)
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    least = answers.least_plan().total
    steps, levels = random.Random(4), set()
    for _ in range(60):
        size = steps.randint(least, least + 3 * 2**20)
        try:
            answers.budget = size
        except BudgetError:
            continue
        levels.add(answers.depth.kv_bits)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert {len(result.tokens) for result in results} == {100}
    assert len(levels) > 1
    assert answers.audit().ok


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 7)), max_size=12))
def test_any_walk_of_lengths_and_levels(tiny: Path, walk: list[tuple[int, int, int]]) -> None:
    """Used bytes are those of the pages, and a sequence that came through it all goes on."""
    executor = coded(tiny)
    sequences: dict[int, int] = {}
    for key, count, level in walk:
        if key not in sequences:
            sequences[key] = executor.open_sequence()
        rungs = min(level, len(executor.kv_rung_bytes) - 1)
        ages = [rungs, rungs, max(rungs - 1, 1), max(rungs - 2, 1)]
        executor.set_kv_ages(ages, [*ages[:2], *ages[1:3]])
        if executor.length(sequences[key]) + count > 256:
            executor.truncate(sequences[key], count)
        try:
            feed(executor, sequences[key], [1] * count, [count])
        except EngineError:
            continue
        total = 0
        for sequence in sequences.values():
            pages = executor.pages(sequence)
            assert len(pages) == -(-executor.length(sequence) // PAGE)
            for number, rungs in enumerate(executor.page_rungs(pages)):
                full = (number + 1) * PAGE <= executor.length(sequence)
                assert (rungs > 0) == full
                total += executor.kv_rung_bytes[rungs] if rungs else executor.kv_page_bytes
        assert executor.kv_used_bytes == total
