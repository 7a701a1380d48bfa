"""Parked pages: the format as docs/parking.md says it, rung by rung, and files that are not so."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packs import write_random_pack
from pliant import _core
from pliant.codec.tree import LEVELS
from pliant.engine.parked_page import Label, ParkedPage, header_bytes, part_sizes, write_page
from pliant.engine.parking import Parked
from pliant.errors import ChecksumError, FormatError, UsageError
from pliant.memory.kv_ages import Form
from pliant.store import Pack
from test_executor import some_ids
from test_kv import PAGE, SHAPES, coded, feed, page

STORED = (640, 100, 170, 230, 300)
KINDS = ((500, 60, 130, 180, 250), STORED)
LABEL = Label(bytes(range(16)), bytes(range(16, 32)))


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pack(
        tmp_path_factory.mktemp("parking") / "pack", least=4, seed=3, **SHAPES[request.param]
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


# --- rungs of a page, out of a slot and into one


def test_what_is_stored_is_what_the_document_says(path: Path) -> None:
    """The codes of all scales, then ply after ply as the ladder has them, found in the slot by its
    own rule: head after head, unit after unit."""
    pack, executor = Pack.open(path), coded(path)
    model, kv = pack.manifest.model, pack.manifest.kv
    assert kv is not None
    groups, heads = -(-model.head_dim // 64), model.layers * model.kv_heads
    sequence = executor.open_sequence()
    feed(executor, sequence, some_ids(model.vocab, 40), [40])
    codes = heads * 2 * groups * PAGE
    plies = np.cumsum(kv.rungs)
    assert executor.kv_stored_bytes[True] == [
        executor.kv_page_bytes, *(codes + 128 * plies).tolist()
    ]  # fmt: skip
    whole = page(executor, sequence, 0)
    for level in range(len(plies), 0, -1):
        executor.set_kv_ages([level], [level])
        assert page(executor, sequence, 0) == whole[: codes + 128 * plies[level - 1]]


def test_a_page_with_fewer_rungs_is_the_beginning_of_it(path: Path) -> None:
    """Joined from the first rungs, in one go or one by one: bit by bit what `shallow` leaves."""
    executor = coded(path)
    sequence = executor.open_sequence()
    feed(executor, sequence, some_ids(Pack.open(path).manifest.model.vocab, 40), [40])
    whole = np.frombuffer(page(executor, sequence, 0), np.uint8)
    stored = executor.kv_stored_bytes[True]
    most = len(stored) - 1
    ids = np.array([1], np.int32)
    for first in range(1, most + 1):
        one = executor.open_sequence()
        executor.put_page(one, PAGE, whole[: stored[first]], first)
        assert page(executor, one, 0) == whole[: stored[first]].tobytes()
        number = executor.pages(one)[0]
        for last in range(first + 1, most + 1):
            executor.deepen_page(number, whole[stored[last - 1] : stored[last]], last)
            assert page(executor, one, 0) == whole[: stored[last]].tobytes()
        executor.shallow(number, first)
        if first < most:
            executor.deepen_page(number, whole[stored[first] :], most)
        assert page(executor, one, 0) == whole.tobytes()
        executor.shallow(number, 2)
        other = executor.open_sequence()
        executor.put_page(other, PAGE, whole[: stored[min(2, first)]], min(2, first))
        if first > 1:
            logits = [executor.step([s], [1], ids, [1]) for s in (one, other)]
            np.testing.assert_array_equal(logits[0], logits[1])
        executor.close_sequence(one)
        executor.close_sequence(other)


def test_pages_do_not_get_what_they_may_not_have(path: Path) -> None:
    executor = coded(path)
    sequence = executor.open_sequence()
    feed(executor, sequence, some_ids(Pack.open(path).manifest.model.vocab, 40), [40])
    stored, whole = (
        executor.kv_stored_bytes[True],
        np.frombuffer(page(executor, sequence, 0), np.uint8),
    )
    executor.set_kv_ages([3], [3])
    full, newest = executor.pages(sequence)
    rest = whole[stored[3] : stored[4]]
    with pytest.raises(UsageError, match="level is 3"):
        executor.deepen_page(full, rest, 4)
    executor.set_kv_ages([5], [5])
    for wrong, rungs in ((rest[1:], 4), (rest, 3), (rest, 99), (rest, 5), (rest, -1)):
        with pytest.raises(UsageError):
            executor.deepen_page(full, wrong, rungs)
    with pytest.raises(UsageError):
        executor.deepen_page(newest, whole[: stored[4]], 4)
    executor.hold_pages([full])
    with pytest.raises(UsageError, match="2 users"):
        executor.deepen_page(full, rest, 4)
    executor.drop_pages([full])
    executor.deepen_page(full, rest, 4)
    assert page(executor, sequence, 0) == whole[: stored[4]].tobytes()


# --- the format


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.binary(max_size=30), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_come_back_with_any_number_of_rungs(
    folder: Path, rungs: int, first: int, last: int, before: bytes, data: Any
) -> None:
    form = Form(rungs, data.draw(st.booleans()))
    stored = KINDS[form.whole]
    tokens = 32 if rungs or not form.whole else data.draw(st.integers(1, 32))
    label = LABEL if tokens == 32 and data.draw(st.booleans()) else Label(LABEL.origin)
    content = np.random.default_rng(rungs).integers(0, 256, stored[rungs], dtype=np.uint8)
    with (folder / "page").open("w+b") as file:
        number = file.fileno()
        os.write(number, before)
        write_page(number, label, KINDS, tokens, form, content)
        found = ParkedPage(number, len(before), label, KINDS)
        assert (found.form, found.tokens) == (form, tokens)
        assert found.bytes == header_bytes(rungs) + stored[rungs]
        assert file.seek(0, os.SEEK_END) == len(before) + found.bytes
        assert np.array_equal(found.read(), content)
        if rungs:
            above, most = sorted((first, last))
            ends = (0, *stored[1:])
            part = found.read(most, above=above) if above < rungs else np.empty(0, np.uint8)
            assert np.array_equal(part, content[ends[above] : ends[min(most, rungs)]])


def test_the_header_is_that_of_the_document(folder: Path) -> None:
    content = np.arange(170, dtype=np.uint8)
    with (folder / "page").open("w+b") as file:
        write_page(file.fileno(), LABEL, KINDS, 32, Form(2, whole=True), content)
    head = (folder / "page").read_bytes()
    assert head[:56] == (
        b"PLIANTKV" + struct.pack("<II", 2, 2) + LABEL.origin + LABEL.key
        + struct.pack("<II", 32, 1)
    )  # fmt: skip
    crcs = [zlib.crc32(content[:100]), zlib.crc32(content[100:])]
    assert head[56:72] == struct.pack("<IIII", 100, crcs[0], 70, crcs[1])
    assert head[72:76] == struct.pack("<I", zlib.crc32(head[:72]))
    assert head[76:] == content.tobytes()
    assert part_sizes(KINDS, Form(2, whole=True)) == [100, 70]


def changed(at: int, value: bytes, *, signed: bool = True) -> Any:
    """Writes `value` over a page of 3 rungs, and makes the check of its header right."""

    def change(data: bytearray) -> bytearray:
        data[at : at + len(value)] = value
        if signed:
            data[80:84] = struct.pack("<I", zlib.crc32(data[:80]))
        return data

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(0, b"PLIANTKW"), "no parked page"),
        (changed(8, b"\1"), "version is 1"),
        (changed(8, b"\3"), "version is 3"),
        (changed(12, struct.pack("<I", 5)), "5 rungs"),
        (changed(12, struct.pack("<I", 2**32 - 1)), "4294967295 rungs"),
        (changed(12, struct.pack("<I", 2)), "header"),
        (changed(16, b"x"), "another pack"),
        (changed(32, b"x"), "another pack"),
        (changed(48, b"\0"), "tokens"),
        (changed(48, b"\37"), "tokens"),
        (changed(48, b"\41"), "tokens"),
        (changed(52, b"\2"), "kind 2"),
        (changed(52, b"\0"), "size"),
        (changed(56, struct.pack("<I", 2**31)), "size"),
        (changed(64, struct.pack("<I", 71)), "size"),
        (changed(66, b"x", signed=False), "header"),
        (lambda data: data[:50], "ends"),
        (lambda data: data[:70], "header"),
        (lambda data: data[:0], "ends"),
    ],
    ids=itertools.count(),
)
def test_headers_that_are_not_so_are_refused(folder: Path, change: Any, message: str) -> None:
    with (folder / "page").open("w+b") as file:
        write_page(file.fileno(), LABEL, KINDS, 32, Form(3, whole=True), np.zeros(230, np.uint8))
    (folder / "page").write_bytes(change(bytearray((folder / "page").read_bytes())))
    with (folder / "page").open("rb") as file, pytest.raises(FormatError, match=message):
        ParkedPage(file.fileno(), 0, LABEL, KINDS)


def test_damage_is_noticed_in_the_rung_that_has_it(folder: Path) -> None:
    content = np.arange(230, dtype=np.uint8)
    with (folder / "page").open("w+b") as file:
        write_page(file.fileno(), LABEL, KINDS, 32, Form(3, whole=True), content)
        os.pwrite(file.fileno(), b"\xff", header_bytes(3) + 120)
        found = ParkedPage(file.fileno(), 0, LABEL, KINDS)
        assert np.array_equal(found.read(1), content[:100])
        assert np.array_equal(found.read(3, above=2), content[170:])
        for most, above in ((2, 0), (3, 0), (2, 1)):
            with pytest.raises(ChecksumError):
                found.read(most, above=above)
        os.ftruncate(file.fileno(), header_bytes(3) + 229)
        with pytest.raises(ChecksumError):
            found.read(3, above=2)


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(folder: Path, data: bytes) -> None:
    (folder / "page").write_bytes(data)
    with (folder / "page").open("rb") as file, pytest.raises(FormatError):
        ParkedPage(file.fileno(), 0, LABEL, KINDS)


# --- sessions


def test_a_session_is_page_after_page(folder: Path) -> None:
    pages = [np.full(size, number, np.uint8) for number, size in enumerate((230, 170, 640))]
    parked = Parked(KINDS)
    for tokens, rungs, data in ((32, 3, pages[0]), (5, 0, pages[2]), (32, 2, pages[1])):
        parked.append(tokens, Form(rungs, whole=True), data)
    parked.cut(1)
    parked.append(32, Form(2, whole=True), pages[1])
    parked.append(7, Form(0, whole=True), pages[2])
    assert not list(folder.iterdir())
    assert len(parked) == 3
    assert parked.bytes == 230 + 170 + 640 + sum(map(header_bytes, (3, 2, 0)))
    for number, (rungs, tokens) in enumerate(((3, 32), (2, 32), (0, 7))):
        found = parked.page(number)
        assert (found.form, found.tokens) == (Form(rungs, whole=True), tokens)
        assert parked.form(number) == found.form
        assert np.array_equal(found.read(), pages[number])
    os.pwrite(parked._descriptor, b"\xff", 5)
    with pytest.raises(FormatError):
        parked.page(0)
    with pytest.raises(IndexError):
        parked.page(3)
    parked.close()


def test_the_core_gives_exact_pages_as_they_are(path: Path) -> None:
    executor: _core.Executor = coded(path)
    sequence = executor.open_sequence()
    feed(executor, sequence, [1] * 20, [20])
    newest = page(executor, sequence, 0)
    assert len(newest) == executor.kv_page_bytes == executor.kv_stored_bytes[True][0]
    other = executor.open_sequence()
    executor.put_page(other, 20, np.frombuffer(newest, np.uint8))
    assert page(executor, other, 0) == newest


def test_a_page_is_decoded_by_the_document(path: Path) -> None:
    """By hand, from what docs/parking.md, format.md and kv.md say, against the exact cache."""
    pack = Pack.open(path)
    model, kv = pack.manifest.model, pack.manifest.kv
    assert kv is not None
    ladder, plies = pack.base["kv.ladder"].tolist(), sum(kv.rungs)
    mean, scale, order = (pack.base[f"kv.{name}"] for name in ("mean", "scale", "order"))
    ids = some_ids(model.vocab, PAGE)
    pages = []
    for executor in (coded(path), coded(path, exact=True)):
        sequence = executor.open_sequence()
        feed(executor, sequence, ids, [PAGE])
        pages.append(np.frombuffer(page(executor, sequence, 0), np.uint8))
    groups, size = -(-model.head_dim // 64), model.head_dim
    heads = model.layers * model.kv_heads
    codes = pages[0][: heads * 2 * groups * PAGE].reshape(heads, 2, groups, PAGE)
    planes = pages[0][codes.size :].reshape(plies, 2, 16, 4)
    leaves = np.zeros((heads * 2 * groups * 2, PAGE, PAGE), np.int64)  # rows, columns
    depth = np.zeros(len(leaves), np.int64)
    for unit, plane in zip(ladder, planes, strict=True):
        bits = (plane[..., None] >> np.arange(8)) & 1  # vector, row, column mod 4, column // 4
        leaves[unit] = 2 * leaves[unit] + bits.transpose(0, 1, 3, 2).reshape(PAGE, PAGE)
        depth[unit] += 1
    turn = np.ones((1, 1))
    for _ in range(5):
        turn = np.block([[turn, turn], [turn, -turn]])
    stride = -(-size // 16) * 16
    halves = pages[1].view(np.float16)[: heads * PAGE * (size + stride)].reshape(heads, -1)
    places = np.argsort([window > 0 for window in model.layer_window], kind="stable").tolist()
    for head, (layer, number) in enumerate(np.ndindex(model.layers, model.kv_heads)):
        place = places.index(layer) * model.kv_heads + number
        keys = halves[place, : size * PAGE].reshape(size, PAGE)
        values = halves[place, size * PAGE :].reshape(PAGE, stride)[:, :size].T
        for kind, due in enumerate((keys, values)):
            found = np.zeros((groups * 64, PAGE))
            for half in range(2 * groups):
                unit = (head * 2 + kind) * 2 * groups + half
                table = np.array(LEVELS)[2 ** depth[unit] - 2 :]
                levels = table[leaves[unit]] if depth[unit] else np.zeros((PAGE, PAGE))
                of_token = levels.T if kind == 0 else levels  # [channel][token]
                steps = 2.0 ** ((codes[head, kind, half // 2].astype(float) - 160) / 8)
                found[half * 32 : half * 32 + 32] = turn @ (of_token * steps) / 32**0.5
            at = order[layer, number, kind].astype(int)
            back = np.empty((size, PAGE))
            back[at] = found[:size] / scale[layer, number, kind, at][:, None]
            back += mean[layer, number, kind][:, None]
            error = np.sqrt(np.mean((back - due) ** 2) / np.mean(np.square(due, dtype=float)))
            assert error < 0.02
