"""Beginnings that stay in a folder: found after a restart, the same tokens, and no harm from what
is in it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pliant
from fakes import AlwaysRead
from pliant.engine.answers import Answer, Request
from pliant.engine.page_folder import PageFolder
from pliant.engine.sampling import Sampling
from pliant.engine.scheduler import Counters, Scheduler
from pliant.errors import UsageError
from pliant.memory.kv_ages import Form
from test_scheduler import Desk
from tiny import write_tiny_pack

PAGE = 32
STORED = (640, 100, 170)
EXACT = Form(0, whole=True)
KINDS = (STORED, STORED)  # no layer has a window
ORIGIN = bytes(range(16))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pack(
        tmp_path_factory.mktemp("park") / "tiny.pack", least=4, head_dim=64, hidden=256, layers=4
    )


def some(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def run(model: pliant.Model, prompts: list[list[int]]) -> tuple[list[Answer], Counters]:
    """Answers of the scheduler, one after the other."""
    desk = Desk()
    scheduler = Scheduler(model, desk.deliver)
    scheduler.start()
    answers = []
    for prompt in prompts:
        wanted = Request(prompt=prompt, sampling=Sampling(seed=1), max_tokens=5)
        answers += scheduler.submit([wanted])
        desk.wait(answers[-1])
    scheduler.close()
    return answers, scheduler.counters


# --- over a restart


@pytest.mark.parametrize("bits", [16, 4.5])
def test_a_prompt_is_read_after_a_restart(tiny: Path, tmp_path: Path, bits: float) -> None:
    ids, where = some(333), tmp_path / "pages"
    other = ids[:170] + some(60, 1)
    with pliant.load(tiny, kv_bits=bits) as model:
        expected = [tuple(a.tokens) for a in run(model, [ids, other])[0]]
    with pliant.load(tiny, kv_bits=bits, park=where) as model:
        answers, counters = run(model, [ids])
        assert (counters.prompt_tokens, counters.read_tokens) == (333, 0)
        assert tuple(answers[0].tokens) == expected[0]
        assert model.report().park.kept == 10
    assert len(list(where.iterdir())) == 10
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in where.iterdir()} == {0o600}
    with pliant.load(tiny, kv_bits=bits, park=where) as model:
        answers, counters = run(model, [ids, other])
        assert [tuple(a.tokens) for a in answers] == expected
        assert (counters.prompt_tokens, counters.read_tokens) == (13 + 70, 320)
        assert counters.cached_tokens == 160
        assert [a.cached for a in answers] == [320, 160]
        report = model.report().park
        assert (report.read, report.computed, report.broken) == (10, 0, 0)
        assert report.bytes_per_second is not None
        assert report.tokens_per_second is not None


def test_generate_and_other_processes_use_the_same_pages(tiny: Path, tmp_path: Path) -> None:
    where, ids = tmp_path / "pages", some(200)
    code = f"""
        import pliant
        with pliant.load({str(tiny)!r}, park={str(where)!r}) as model:
            made = model.generate({ids!r}, max_tokens=6, ignore_eos=True, seed=1)
            list(made)
            print(made.result.cached_tokens, *made.result.tokens)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(Path(pliant.__file__).parents[1])}

    def once() -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        assert not done.stderr
        return done.stdout.split()

    (before, *first), (after, *second) = once(), once()
    assert first == second
    assert (before, after) == ("0", "192")
    with pliant.load(tiny, park=where) as model:
        made = model.generate(ids, max_tokens=6, ignore_eos=True, seed=1)
        list(made)
        assert [str(token) for token in made.result.tokens] == first
        assert made.result.cached_tokens == 192
        again = model.generate(ids[:150], max_tokens=1)
        list(again)
        assert again.result.cached_tokens == 128  # from memory
        assert model.report().park.read == 6


def test_two_processes_share_a_folder(tiny: Path, tmp_path: Path) -> None:
    """With so little room that pages of one leave while the other writes and reads."""
    prompts = [some(200, n) for n in range(6)]
    code = f"""
        import pliant
        with pliant.load({str(tiny)!r}, context=256, park={str(tmp_path / "pages")!r},
                         park_limit=20 * {2 * 4 * 64 * 32 * 2 * 2}) as model:
            for turn in range(3):
                for prompt in {prompts!r}:
                    made = model.generate(prompt, max_tokens=3, ignore_eos=True, seed=1)
                    list(made)
                    print(*made.result.tokens)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(Path(pliant.__file__).parents[1])}
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for _ in range(2)
    ]
    found = [process.communicate(timeout=100) for process in both]
    with pliant.load(tiny) as model:
        expected = []
        for prompt in prompts:
            made = model.generate(prompt, max_tokens=3, ignore_eos=True, seed=1)
            list(made)
            expected.append(made.result.tokens)
    lines = "".join(" ".join(map(str, tokens)) + "\n" for tokens in expected) * 3
    assert found == [(lines, ""), (lines, "")]
    assert 0 < len(list((tmp_path / "pages").iterdir())) <= 22


def test_pages_of_another_depth_or_pack_are_not_used(tiny: Path, tmp_path: Path) -> None:
    where, ids = tmp_path / "pages", some(200)
    other = write_tiny_pack(tmp_path / "other.pack", least=4, head_dim=64, hidden=256, layers=4)
    (other / "pliant.json").write_text((other / "pliant.json").read_text() + " ")
    with pliant.load(tiny, park=where) as model:
        run(model, [ids])
        half = model.depth.weights * 2 // 3
    loads: list[tuple[Path, dict[str, Any]]] = [
        (tiny, {"weights": half}), (tiny, {"kv_bits": 5}), (tiny, {"kv_bits": 4}), (other, {}),
    ]  # fmt: skip
    for pack, options in loads:
        with pliant.load(pack, park=where, **options) as model:
            assert run(model, [ids])[1].read_tokens == 0
            assert model.report().park.broken == 0
    assert len(list(where.iterdir())) == 5 * 6
    for pack, options in loads:
        with pliant.load(pack, park=where, **options) as model:
            assert run(model, [ids])[1].read_tokens == 192


def test_pages_that_gave_way_come_back_in_the_same_process(tiny: Path, tmp_path: Path) -> None:
    prompts = [some(200, n) for n in range(4)]
    with pliant.load(tiny, context=256, sessions=1, park=tmp_path / "pages") as model:
        model._holdings.cache.park.rates = AlwaysRead()
        _, counters = run(model, prompts)
        assert counters.read_tokens == 0
        report = model.report().park
        assert report.kept > 10
        assert report.lost == 0
        answers, counters = run(model, prompts)
        assert counters.read_tokens == 4 * 192
    with pliant.load(tiny, context=256, sessions=1) as model:
        expected, _ = run(model, prompts)
        assert model.report().park.lost > 10
        assert model.report().park.folder is None
    assert [a.tokens for a in answers] == [a.tokens for a in expected]


def test_a_smaller_budget_keeps_what_it_has_time_for(tiny: Path, tmp_path: Path) -> None:
    with pliant.load(tiny, park=tmp_path / "pages") as model:
        run(model, [some(200)])  # ends with all kept pages written
        model.generate(some(200), max_tokens=1).close()
        with model.session() as session:
            session.rewind(some(200))
            session.feed(some(200)[len(session) :])
        park = model._holdings.cache.park
        before = park.kept
        with model._turns, park.hurried(-1.0):
            model._holdings.cache.forget()
        assert (park.kept, park.lost) == (before, 6)


@pytest.mark.resident
def test_a_session_gives_its_pages_back_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    """Sessions share pages where beginnings stay, and turn back to whole pages then."""
    ids = some(200)
    with pliant.load(tiny, park=tmp_path / "pages") as model:
        with model.session() as session, model.session() as fresh:
            session.feed(ids)
            assert session.rewind([*ids[:100], 3, 3]) == 96
            found = session.feed([*ids[96:100], 3, 3])
            assert np.array_equal(found, fresh.feed([*ids[:100], 3, 3]))
            assert session.rewind([7, 7]) == 0
            session.feed([7, 7])
            with model._turns:
                model._holdings.cache._park(fresh.sequence)
            assert fresh.rewind([*ids[:70], 5]) == 70  # on disk it has its pages for itself
            fresh.feed([5])
        assert model._executor.kv_pages_used == model._holdings.cache.prefixes.idle == 6
        assert model.audit().ok


def test_a_level_that_falls_spoils_no_page(tiny: Path) -> None:
    """Pages that lost rungs while an answer had them are not found under their old name."""
    with pliant.load(tiny, kv_bits=6.5) as model:
        cache, executor = model._holdings.cache, model._executor
        level = cache.level
        with model._turns:
            sequence = cache.open()
            assert cache.admit(sequence, 64, [], claim=64, rank=(0, 0)) == 0
            executor.step([sequence], [64], np.array(some(64), np.int32), [0], whole=True)
            cache.stepped([sequence], [64])
            cache.share(sequence, [b"one", b"two"])
            assert cache.prefixes.count([b"one", b"two"]) == 2
            plan = model.plan
            for now in (28, level):
                cache.limit(replace(plan, kv_level=now))
            kept = model._sizes.schedule(28).kept[:2].tolist()
            assert executor.page_rungs(executor.pages(sequence)) == kept < [6, 6]
            assert cache.prefixes.count([b"one", b"two"]) == 0
            cache.share(sequence, [b"one", b"two"])  # it is no page of this state
            assert len(cache.prefixes) == 0
            cache.close(sequence)
        assert executor.kv_pages_used == 0


# --- the folder


@pytest.fixture
def folder(tmp_path: Path) -> PageFolder:
    return PageFolder(tmp_path / "pages", 10_000, ORIGIN, KINDS)


def content(rungs: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, STORED[rungs], dtype=np.uint8)


def put(folder: PageFolder, number: int, rungs: int = 2, used: int | None = None) -> bytes:
    key = number.to_bytes(16, "big")
    assert folder.write(
        key, Form(rungs, whole=True), content(rungs, number), used or time.time_ns()
    )
    return key


def test_pages_are_found_by_another_reader(folder: PageFolder) -> None:
    key = put(folder, 1)
    other = PageFolder(folder.path, 10_000, ORIGIN, KINDS)
    assert other.bytes == folder.bytes == 170 + 60 + 16
    for most, rungs in ((1, 1), (2, 2), (3, 2)):
        found = other.read(key, most)
        assert found is not None
        assert found[0] == Form(rungs, whole=True)
        assert np.array_equal(found[1], content(2, 1)[: STORED[rungs]])
    assert other.read(bytes(16), 2) is None
    assert PageFolder(folder.path, 10_000, bytes(16), KINDS).read(key, 2) is None
    assert not other.broken


def test_the_limit_holds_and_the_oldest_go_first(folder: PageFolder) -> None:
    now = time.time_ns()
    keys = [put(folder, n, used=now + n) for n in range(38)]
    for key in keys[:3]:
        assert folder.touch(key, now + 1000)
    other = PageFolder(folder.path, 10_000, ORIGIN, KINDS)
    for n in range(38, 200):
        keys.append(put(folder if n % 2 else other, n, used=now + n))
        total = sum(file.stat().st_size for file in folder.path.iterdir())
        assert total <= 10_000 + 10_000 // 16
        if n == 60:
            assert folder.has(keys[1])
            assert not folder.has(keys[4])
            assert not folder.touch(keys[4], now)
    assert folder.has(keys[-1])
    assert (
        not folder.write(b"x" * 16, EXACT, np.zeros(640, np.uint8), now) or folder.bytes <= 10_000
    )
    small = PageFolder(folder.path, 300, ORIGIN, KINDS)
    assert len(list(folder.path.iterdir())) <= 1
    assert not small.write(b"x" * 16, EXACT, np.zeros(640, np.uint8), now)


def test_what_is_not_ours_stays_and_is_not_counted(folder: PageFolder) -> None:
    (folder.path / "notes.txt").write_bytes(b"x" * 50_000)
    (folder.path / f"{'0' * 32}-{'1' * 32}.kv3").write_bytes(b"x" * 50_000)
    (folder.path / f"{ORIGIN.hex()}-{'0' * 31}1.kv1").write_bytes(
        b"x" * 50_000
    )  # not read any more
    old, new = (folder.path / f".1-{digit * 16}.tmp" for digit in "12")
    for file in (old, new):
        file.write_bytes(b"x" * 50_000)
    os.utime(old, (0, 0))
    assert not folder.has(bytes(15) + b"\1")
    again = PageFolder(folder.path, 10_000, ORIGIN, KINDS)
    assert again.bytes == 0
    put(again, 1)
    assert sorted(file.suffix for file in folder.path.iterdir()) == [".kv2", ".kv3", ".tmp", ".txt"]


@pytest.mark.parametrize("how", ["short", "long", "bit", "empty", "rungs", "other", "link", "pipe"])
def test_broken_files_are_removed_and_told_once(
    folder: PageFolder, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [put(folder, n) for n in range(3)]
    for key in keys:
        path = folder.path / f"{ORIGIN.hex()}-{key.hex()}.kv2"
        data = path.read_bytes()
        if how in ("link", "pipe"):
            path.unlink()
            if how == "pipe":
                os.mkfifo(path)
            else:
                secret = folder.path.parent / "secret"
                secret.write_bytes(data)
                path.symlink_to(secret)
        elif how == "other":
            path.write_bytes((folder.path / f"{ORIGIN.hex()}-{keys[2].hex()}.kv2").read_bytes())
        elif how != "rungs":
            half = len(data) // 2
            path.write_bytes({
                "short": data[:-1], "long": data + b"x", "empty": b"",
                "bit": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :],
            }[how])  # fmt: skip
    if how == "other":
        keys.pop()
    for key in keys:
        assert folder.read(key, 0 if how == "rungs" else 2) is None
        assert not folder.has(key)
        assert folder.read(key, 2) is None
    assert folder.broken == len(keys)
    assert len(caplog.records) == 1
    if how == "link":
        assert (folder.path.parent / "secret").exists()


def test_a_full_disk_is_no_error(
    folder: PageFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pliant.engine.page_folder.write_page", full)
    for number in range(3):
        assert not folder.write(
            bytes([number] * 16), Form(2, whole=True), content(2), time.time_ns()
        )
    assert not list(folder.path.iterdir())
    assert [record.getMessage() for record in caplog.records] == [
        f"pages cannot be written to {folder.path}: No space left on device"
    ]


def test_a_folder_that_goes_away_is_no_error(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pliant.load(tiny, park=tmp_path / "pages") as model:
        first = run(model, [some(100)])[0]
        for file in (tmp_path / "pages").iterdir():
            file.unlink()
        (tmp_path / "pages").rmdir()
        answers, counters = run(model, [some(100)])
        assert answers[0].tokens == first[0].tokens
        assert (counters.read_tokens, counters.prompt_tokens) == (0, 100)
        assert model.report().park.lost == 3
    assert len(caplog.records) == 1


def test_a_disk_that_fails_removes_nothing(
    folder: PageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = put(folder, 1)

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        assert folder.read(key, 2) is None
    assert folder.broken == 1
    assert folder.read(key, 2) is not None


def test_folders_that_others_can_open_are_refused(tmp_path: Path) -> None:
    where = tmp_path / "open"
    where.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="chmod 700"):
        PageFolder(where, 1000, ORIGIN, KINDS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be used"):
        PageFolder(tmp_path / "file", 1000, ORIGIN, KINDS)


def test_options(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="park_limit belongs to park"):
        pliant.load(tiny, park_limit="1GiB")
    with pytest.raises(UsageError, match="park_limit"):
        pliant.load(tiny, park=tmp_path / "p", park_limit="much")
    with pliant.load(tiny, park=tmp_path / "p", park_limit="1MiB") as model:
        report = model.report().park
        assert (report.folder, report.limit) == (str(tmp_path / "p"), 2**20)


@pytest.fixture(autouse=True)
def files_are_closed() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
