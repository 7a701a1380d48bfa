"""The executor against a float64 model, and the laws of exactness that it promises."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import oracle_logits
from packs import slow_matrix, write_random_pack
from pliant import _core
from pliant.codec.tree import LEVELS
from pliant.errors import ChecksumError, EngineError, FormatError, UsageError
from pliant.store import Pack

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "wide": {"hidden": 200, "ffn": 230, "head_dim": 24, "heads": 3, "kv_heads": 1, "vocab": 90},
    "qwen": {"biases": True, "tied": False},
    "qwen3": {"qk_norms": True, "head_dim": 32},
    "gemma": {
        "qk_norms": True, "post_norms": True, "activation": "gelu_tanh", "embed_scale": 8.0,
        "layer_window": [5, 0], "logit_softcap": 30.0, "attn_softcap": 20.0,
    },
    "mixed": {"coding": {"layers.0.q": "f32", "layers.1.down": "bf16", "layers.1.up": "f32"}},
    "bf16": {"coding": "bf16"},
}  # fmt: skip


def build(
    pack: Pack, *, isa: str = "auto", threads: int = 2, chunk: int = 64, rungs: int | None = None
) -> _core.Executor:
    """An executor with the first rungs of a pack, straight from the core's own surface."""
    model = asdict(pack.manifest.model)
    executor = _core.Executor(model, threads=threads, isa=isa, chunk=chunk)
    coded = {m.name for m in pack.manifest.matrices if m.coding == "plies"}
    for name, values in pack.base.items():
        if name.endswith(("norm", ".bias")):
            executor.set_vector(name, values)
        elif name.endswith(".weight"):
            executor.set_plain(name.removesuffix(".weight"), values)
    if coded:
        executor.set_tree(pack.base["tree"], pack.base["scale_steps"])
    for m in pack.manifest.matrices:
        if m.coding == "plies":
            executor.add_coded(
                m.name,
                m.rows,
                m.columns,
                list(m.blocks),
                pack.base["order." + m.input],
                pack.base.get(m.name + ".row_order"),
                pack.base[m.name + ".row_scale"].view(np.uint16),
                pack.base[m.name + ".group_scale"],
            )
    if coded:
        table = pack.manifest.rungs
        executor.set_ladder(np.ascontiguousarray(pack.ladder), list(table.plies), list(table.bytes))
    executor.finish()
    if coded:
        read(executor, pack, len(pack.manifest.rungs) if rungs is None else rungs)
    executor.reserve_kv(64)
    return executor


def read(executor: _core.Executor, pack: Pack, rungs: int) -> None:
    files: dict[Path, int] = {}
    try:
        locations = []
        for rung in range(executor.read_rungs_count, rungs):
            where = pack.rung_location(rung)
            if where.path not in files:
                files[where.path] = os.open(where.path, os.O_RDONLY)
            locations.append((files[where.path], where.offset, where.bytes, where.crc32))
        executor.read_rungs(locations)
    finally:
        for fd in files.values():
            os.close(fd)
    executor.publish(rungs)


def run(executor: _core.Executor, ids: list[int], cuts: list[int] | None = None) -> Logits:
    """Logits of all tokens, the sequence given in pieces of these lengths."""
    sequence = executor.open_sequence()
    rows, at = [], 0
    for length in cuts or [len(ids)]:
        piece = np.array(ids[at : at + length], np.int32)
        rows.append(executor.step([sequence], [length], piece, [2]))
        at += length
    executor.close_sequence(sequence)
    return np.concatenate(rows)


def some_ids(vocab: int, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


@pytest.fixture(scope="module", params=VARIANTS)
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    where = tmp_path_factory.mktemp("packs") / request.param
    return Pack.open(write_random_pack(where, least=1, **VARIANTS[request.param]))


def relative(a: Logits, b: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def coded_inputs(pack: Pack, rungs: int) -> Callable[[Floats, str], Floats]:
    """Inputs as the executor codes them: 12 bits where a group has 6 plies or more, 7 below."""
    depths = pack.layout.depths(rungs)
    hadamard = np.ones((1, 1))
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / np.sqrt(2)

    def coded(x: Floats, name: str) -> Floats:
        m = next(m for m in pack.manifest.matrices if m.name == name)
        if m.coding != "plies" or len(m.blocks) > 1:  # row blocks have depths of their own
            return x
        order = pack.base["order." + m.input].astype(int)
        padded = np.zeros((len(x), m.groups * 64))
        padded[:, : m.columns] = x[:, order]
        rotated = padded.reshape(len(x), m.groups, 64) @ hadamard
        peak = np.abs(rotated).max(-1, keepdims=True)
        q = np.rint(rotated / np.where(peak > 0, peak, 1) * 2032)
        first = pack.units.number(name, 0, 0)
        shallow = depths[first : first + m.groups, None] < 6
        q = np.where(shallow, np.floor((q + 16) / 32) * 32, q)
        back = (q / 2032 * peak) @ hadamard
        out = np.empty_like(x)
        out[:, order] = back.reshape(len(x), -1)[:, : m.columns]
        return out

    return coded


def test_logits_are_those_of_the_oracle(pack: Pack) -> None:
    rungs = len(pack.manifest.rungs)
    ids = some_ids(pack.manifest.model.vocab, 40)
    for depth in sorted({rungs // 2, rungs}):
        want = oracle_logits(
            asdict(pack.manifest.model),
            pack.base,
            lambda n, depth=depth: slow_matrix(pack.path, n, depth),
            ids,
            coded_inputs(pack, depth) if rungs else lambda x, name: x,
        )
        got = run(build(pack, rungs=depth), ids)
        # In shallow row blocks of the head inputs have 8 bits.
        assert relative(got, want) < (0.05 if rungs else 1e-3)


def test_deep_plies_are_as_good_as_plain_matrices(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack", least=6))
    ids = some_ids(160, 40)
    want = oracle_logits(
        asdict(pack.manifest.model),
        pack.base,
        lambda n: slow_matrix(pack.path, n),
        ids,
        coded_inputs(pack, len(pack.manifest.rungs)),
    )
    assert relative(run(build(pack), ids), want) < 6e-3  # with inputs of 8 bits it would be 0.08


def test_levels_that_are_near_to_sums_are_taken_and_others_refused(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack", least=8))
    ids = some_ids(160, 20)
    own, unit = pack.base["tree"], pack.base["tree"][-1] / 2032
    want = run(build(pack), ids)
    for tree, right in (
        *((LEVELS, True), *((moved(own, place, 0.45 * unit), True) for place in (0, 64))),
        *((moved(own, place, 60 * unit), False) for place in (0, 64)),
    ):
        pack.base["tree"] = tree
        if right:  # rounded to the same sums
            assert np.array_equal(run(build(pack), ids), want)
        else:
            with pytest.raises(FormatError, match="levels of depth 8 are not near to sums"):
                build(pack)


def moved(tree: npt.NDArray[np.float32], place: int, by: float) -> npt.NDArray[np.float32]:
    """A tree with one of the positive levels of depth 8 moved, and its counterpart."""
    tree = tree.copy()
    tree[-128 + place] += by
    tree[-129 - place] -= by
    return tree


def test_every_instruction_set_gives_the_same_bits(pack: Pack) -> None:
    ids = some_ids(pack.manifest.model.vocab, 37)
    want = run(build(pack, isa="plain", threads=1), ids, [1, 36])
    for isa in _core.cpu_isa():
        assert np.array_equal(run(build(pack, isa=isa), ids, [1, 36]), want), isa


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("plane_byte", [0x00, 0xFF])
def test_the_largest_sums_fit(tmp_path: Path, depth: int, plane_byte: int) -> None:
    """The outermost level everywhere, and inputs that are all as large as one can be."""
    where = tmp_path / "pack"
    pack = Pack.open(
        write_random_pack(
            where, least=depth, most=depth, plane_byte=plane_byte, coding={"embed": "f32"}
        )
    )
    embed = np.zeros_like(pack.base["embed.weight"])
    # The transform makes the first channel of a group the same value in all of them.
    embed[:, pack.base["order.layers.0.attn"][0]] = np.resize([3.0, -3.0, 0.01], len(embed))
    pack.base["embed.weight"] = embed
    ids = [0, 1, 2, *some_ids(160, 30)]
    want = run(build(pack, isa="plain"), ids)
    assert np.ptp(want) > 0
    for isa in _core.cpu_isa():
        for cuts in ([1, 1, 1, 30], [33]):
            assert np.array_equal(run(build(pack, isa=isa), ids, cuts), want), isa


@pytest.mark.parametrize("rows", [717, 704])
def test_any_number_of_tokens_gives_the_same_bits(tmp_path: Path, rows: int) -> None:
    """Kernels differ in how many tokens they take at once, and in how many rows go together."""
    pack = Pack.open(write_random_pack(tmp_path / "pack", vocab=rows, ffn=330, hidden=200))
    ids, cuts = some_ids(rows, 280), [*range(1, 21), 70]
    for rungs in (len(pack.manifest.rungs) // 2, len(pack.manifest.rungs)):
        want = run(build(pack, isa="plain", rungs=rungs), ids)
        for isa in _core.cpu_isa():
            executor = build(pack, isa=isa, chunk=128, threads=1, rungs=rungs)
            assert np.array_equal(run(executor, ids, cuts), want), isa


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_logits_do_not_depend_on_company_cuts_or_threads(pack: Pack, data: st.DataObject) -> None:
    vocab = pack.manifest.model.vocab
    threads, chunk = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3, 13, 64]))
    executor = build(pack, threads=threads, chunk=chunk)
    alone = build(pack, threads=1, chunk=128)
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    texts = [some_ids(vocab, n, seed) for seed, n in enumerate(lengths)]
    want = [run(alone, text) for text in texts]
    sequences = [executor.open_sequence() for _ in texts]
    got: list[list[Logits]] = [[] for _ in texts]
    done = [0] * len(texts)
    while unfinished := [i for i, n in enumerate(lengths) if done[i] < n]:
        seqs, counts, ids, who = [], [], [], []
        moves = data.draw(st.sampled_from(unfinished))  # the others may wait
        for i in unfinished:
            take = data.draw(st.sampled_from([1, 2, 7, 33] if i == moves else [0, 1, 2, 7, 33]))
            take = min(take, lengths[i] - done[i])
            if take:
                seqs.append(sequences[i])
                counts.append(take)
                ids += texts[i][done[i] : done[i] + take]
                who.append(i)
        rows = executor.step(seqs, counts, np.array(ids, np.int32), [2] * len(seqs))
        for i, rows_of in zip(who, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
            got[i].append(rows_of)
            done[i] += len(rows_of)
    for i, text in enumerate(texts):
        assert np.array_equal(np.concatenate(got[i]), want[i]), (i, len(text))
        executor.close_sequence(sequences[i])
    assert executor.kv_pages_used == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 9, 17])
def test_many_tokens_are_divided_among_threads(pack: Pack, threads: int) -> None:
    """By tokens, then by rows: parts that end where they like, more of them than threads, fewer."""
    ids = some_ids(pack.manifest.model.vocab, min(700, pack.manifest.model.context))
    want = run(build(pack, threads=1, chunk=64), ids)
    for chunk in (95, 128, 131, 255, 256, 700):
        assert np.array_equal(run(build(pack, threads=threads, chunk=chunk), ids), want), chunk


def test_threads_that_come_late_change_nothing(pack: Pack) -> None:
    """Tokens one by one, by more threads than there are processors: others do the tasks of some."""
    ids = some_ids(pack.manifest.model.vocab, 300)
    want = run(build(pack, threads=1), ids)
    for threads in (2, 5, 16):
        assert np.array_equal(run(build(pack, threads=threads), ids, [1] * 300), want), threads


def test_any_walk_of_sizes_ends_like_a_fresh_load(pack: Pack) -> None:
    rungs = len(pack.manifest.rungs)
    if not rungs:
        pytest.skip("no plies in this pack")
    ids = some_ids(pack.manifest.model.vocab, 9)
    executor = build(pack)
    rng = np.random.default_rng(3)
    for target in rng.integers(0, rungs + 1, 12).tolist():
        if target > executor.resident_rungs:
            read(executor, pack, target)
        executor.publish(target)
        assert executor.arena_bytes == sum(list(pack.manifest.rungs.bytes)[:target])
        assert np.array_equal(run(executor, ids), run(build(pack, rungs=target), ids))


def test_a_damaged_rung_leaves_the_old_state(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack", least=2))
    rungs = len(pack.manifest.rungs)
    executor = build(pack, rungs=rungs // 2)
    ids = some_ids(160, 5)
    before = run(executor, ids)
    where = pack.rung_location(rungs - 1)
    with where.path.open("r+b") as file:
        file.seek(where.offset + 17)
        byte = file.read(1)
        file.seek(where.offset + 17)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(ChecksumError, match=f"rung {rungs - 1} has checksum"):
        read(executor, pack, rungs)
    assert executor.resident_rungs == rungs // 2
    assert np.array_equal(run(executor, ids), before)
    os.truncate(where.path, where.offset + 100)
    with pytest.raises(ChecksumError, match="ends after 100 of"):
        read(executor, pack, rungs)
    with pytest.raises(OSError, match="rung"):
        executor.read_rungs([(987654, 0, int(pack.manifest.rungs.bytes[rungs // 2]), 0)])
    assert np.array_equal(run(executor, ids), before)


def test_a_step_that_cannot_be_made_changes_nothing(pack: Pack) -> None:
    executor = build(pack)
    executor.reserve_kv(2)
    vocab = pack.manifest.model.vocab
    a, b = executor.open_sequence(), executor.open_sequence()
    executor.step([a], [20], np.array(some_ids(vocab, 20), np.int32), [0])
    with pytest.raises(EngineError, match=r"needs 2 pages of the KV cache, 1 of 2 are free"):
        executor.step([a, b], [20, 3], np.array(some_ids(vocab, 23), np.int32), [1, 1])
    with pytest.raises(UsageError, match="not in the vocabulary"):
        executor.step([b], [1], np.array([vocab], np.int32), [1])
    with pytest.raises(UsageError, match="twice"):
        executor.step([b, b], [1, 1], np.array([1, 2], np.int32), [1, 1])
    with pytest.raises(UsageError, match="counts add up"):
        executor.step([b], [2], np.array([1], np.int32), [1])
    with pytest.raises(EngineError, match="no open sequence"):
        executor.step([7], [1], np.array([1], np.int32), [1])
    assert (executor.length(a), executor.length(b), executor.kv_pages_used) == (20, 0, 1)
    executor.truncate(a, 5)
    assert executor.length(a) == 5
    with pytest.raises(UsageError, match="cannot truncate"):
        executor.truncate(a, 6)


def test_a_step_that_is_given_up_changes_nothing(pack: Pack) -> None:
    executor, ids = build(pack), some_ids(pack.manifest.model.vocab, 300)
    want = run(executor, ids)
    a, b = executor.open_sequence(), executor.open_sequence()
    first = executor.step([a], [100], np.array(ids[:100], np.int32), [2])
    executor.hurry(True)
    both = np.array(ids[100:] + ids[:7], np.int32)
    assert executor.step([a, b], [200, 7], both, [2, 1], whole=False) is None
    assert executor.states([b], [7], np.array(ids[:7], np.int32), whole=False) is None
    assert (executor.length(a), executor.length(b), executor.kv_pages_used) == (100, 0, 4)
    rest = executor.step([a], [100], np.array(ids[100:200], np.int32), [2])  # this one is whole
    # In the middle, wherever that is: it has an effect or none.
    for delay in (0.0, 0.0002, 0.001, 0.005):
        executor.hurry(False)
        hurry = threading.Timer(delay, executor.hurry, (True,))
        hurry.start()
        last = executor.step([a], [100], np.array(ids[200:], np.int32), [2], whole=False)
        hurry.join()
        assert executor.length(a) == (200 if last is None else 300)
        if last is None:
            last = executor.step([a], [100], np.array(ids[200:], np.int32), [2])
        assert np.array_equal(np.concatenate((first, rest, last)), want)
        executor.truncate(a, 200)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.1])
def test_reads_that_are_overtaken_leave_whole_rungs(tmp_path: Path, share: float) -> None:
    """Alone, and in turns of one and of several threads beside steps."""
    pack = Pack.open(
        write_random_pack(tmp_path / "pack", least=8, hidden=256, ffn=512, rung_bytes=16_384)
    )
    executor, ids = build(pack), some_ids(160, 3)
    rungs, sizes = executor.rungs, [0, *np.cumsum(pack.manifest.rungs.bytes).tolist()]
    known: dict[int, Logits] = {}
    rng = np.random.default_rng(3)
    wheres = [pack.rung_location(rung) for rung in range(rungs)]
    files = {path: path.open("rb") for path in {where.path for where in wheres}}
    places = [(files[w.path].fileno(), w.offset, w.bytes, w.crc32) for w in wheres]
    answers = []
    for turn in range(1, 60):
        at = int(rng.integers(0, rungs))
        executor.publish(min(at, executor.read_rungs_count))
        at = executor.read_rungs_count
        reader = threading.Thread(
            target=lambda at=at, turn=turn: answers.append(
                executor.read_rungs(
                    places[at:],
                    first=at,
                    ticket=2 * turn,
                    threads=3,
                    direct=share < 1,
                    share=share,
                )
            )
        )
        reader.start()
        time.sleep(float(rng.exponential(0.001)))
        executor.overtake(2 * turn + 1)
        cut = int(rng.integers(0, rungs))
        if turn % 3 == 0:
            executor.discard(cut)
        elif turn % 3 == 1:
            executor.publish(min(cut, executor.resident_rungs))
        reader.join()
        count = executor.read_rungs_count
        assert executor.arena_bytes == sizes[count]
        executor.publish(count)
        if count not in known:
            known[count] = run(build(pack, rungs=count), ids)
        assert np.array_equal(run(executor, ids), known[count])
    assert len(known) > 5
    for file in files.values():
        file.close()


@pytest.mark.parametrize("window", [0, 40, 700])
def test_long_sequences_are_attended_in_parts(tmp_path: Path, window: int) -> None:
    """Positions are cut into parts of 512: one by one or in chunks, the bits are the same."""
    pack = Pack.open(
        write_random_pack(
            tmp_path / "pack", least=6, context=2048, layer_window=[0, window], heads=6
        )
    )
    ids = some_ids(160, 1100)
    want = run(build(pack, threads=1), ids)
    got = run(build(pack, threads=3, chunk=50), ids, [500, *[1] * 40, 480, *[1] * 10, 70])
    assert np.array_equal(got, want)
    assert np.array_equal(run(build(pack, isa="plain"), ids, [1024, 1, 75]), want)
    oracle = oracle_logits(
        asdict(pack.manifest.model),
        pack.base,
        lambda name: slow_matrix(pack.path, name),
        ids,
        coded_inputs(pack, len(pack.manifest.rungs)),
    )
    assert relative(want, oracle) < 2e-2


def test_a_sequence_among_long_ones_gets_its_own_bits(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack", context=2048))
    texts = [some_ids(160, n, n) for n in (600, 513, 3)]
    want = [run(build(pack, threads=1), text)[-1] for text in texts]
    executor = build(pack)
    sequences = [executor.open_sequence() for _ in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        count = len(text) - 1
        executor.step([sequence], [count], np.array(text[:-1], np.int32), [0])
    last = np.array([text[-1] for text in texts], np.int32)
    assert np.array_equal(executor.step(sequences, [1] * 3, last, [1] * 3), np.stack(want))


@pytest.mark.parametrize("isa", _core.cpu_isa())
def test_what_is_no_number_stays_none_and_the_tiniest_is_nothing(tmp_path: Path, isa: str) -> None:
    """Inputs of a product are coded as integers: a NaN or an infinity must not become one."""
    pack = Pack.open(write_random_pack(tmp_path / "pack", least=1))
    norm = pack.base["final_norm"].copy()
    for ids in (some_ids(160, 1), some_ids(160, 9)):
        for value in (np.nan, np.inf):
            pack.base["final_norm"] = norm.copy()
            pack.base["final_norm"][5] = value
            assert np.isnan(run(build(pack, isa=isa), ids)).all()
        pack.base["final_norm"] = norm * np.float32(1e-36)
        assert np.abs(run(build(pack, isa=isa), ids)).max() < 1e-20


def test_states_are_what_the_head_multiplies(pack: Pack) -> None:
    ids = np.array(some_ids(pack.manifest.model.vocab, 21), np.int32)
    executor = build(pack)
    a, b = executor.open_sequence(), executor.open_sequence()
    states = executor.states([a, b], [20, 1], ids)
    assert states.shape == (21, pack.manifest.model.hidden)
    again = executor.open_sequence()
    alone = [executor.states([again], [1], ids[i : i + 1]) for i in range(20)]
    assert np.array_equal(np.concatenate(alone), states[:20])
    assert np.isfinite(states).all()
    assert states.std() > 0.1


def test_more_threads_than_processors_make_steps_too(pack: Pack) -> None:
    """A phase ends when its tasks are done; a thread that gets no processor holds nobody up."""
    ids = some_ids(pack.manifest.model.vocab, 30)
    want = run(build(pack, threads=1), ids)
    crowd = build(pack, threads=4 * (os.cpu_count() or 1) + 3)
    assert np.array_equal(run(crowd, ids, [5, *[1] * 20, 5]), want)


def test_a_truncated_sequence_goes_on_as_if_it_had_never_been_longer(pack: Pack) -> None:
    executor = build(pack)
    vocab = pack.manifest.model.vocab
    ids, other = some_ids(vocab, 50), some_ids(vocab, 40, 9)
    want = run(executor, ids)
    sequence = executor.open_sequence()
    executor.step([sequence], [10], np.array(ids[:10], np.int32), [0])
    executor.step([sequence], [40], np.array(other, np.int32), [0])
    executor.truncate(sequence, 10)
    got = executor.step([sequence], [40], np.array(ids[10:], np.int32), [2])
    assert np.array_equal(got, want[10:])


def test_only_wanted_logits_come_back(pack: Pack) -> None:
    executor = build(pack)
    ids = some_ids(pack.manifest.model.vocab, 30)
    want = run(executor, ids)
    a, b, c = (executor.open_sequence() for _ in range(3))
    got = executor.step([a, b, c], [30] * 3, np.array(ids * 3, np.int32), [0, 2, 1])
    assert np.array_equal(got, np.concatenate((want, want[-1:])))


def test_the_context_is_a_limit(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack", context=40))
    executor = build(pack)
    sequence = executor.open_sequence()
    executor.step([sequence], [40], np.array(some_ids(160, 40), np.int32), [1])
    with pytest.raises(EngineError, match="the model's context is 40"):
        executor.step([sequence], [1], np.array([1], np.int32), [1])


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack"))
    executor = _core.Executor(asdict(pack.manifest.model), threads=1)
    with pytest.raises(FormatError, match="'embed' is missing"):
        executor.finish()
    with pytest.raises(FormatError, match=r"no vector 'layers\.7\.attn_norm'"):
        executor.set_vector("layers.7.attn_norm", np.ones(64, np.float32))
    with pytest.raises(FormatError, match="has 3 values, not 64"):
        executor.set_vector("final_norm", np.ones(3, np.float32))
    with pytest.raises(UsageError, match="no kernels for the instruction set 'sse9'"):
        _core.Executor(asdict(pack.manifest.model), threads=1, isa="sse9")


def test_unused_memory_goes_back(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "pack"))
    executor = build(pack)
    run(executor, some_ids(160, 200))
    assert executor.memory()["kv"] == 7 * executor.kv_page_bytes
    assert executor.trim_kv() == 7 * executor.kv_page_bytes
    assert executor.memory()["kv"] == 0


@pytest.mark.resident
def test_a_hundred_thousand_changes_leave_nothing_behind(tmp_path: Path) -> None:
    """The resident set after any number of changes is that of the depth, and of nothing else."""
    from pliant.memory.budget import measure

    pack = Pack.open(
        write_random_pack(tmp_path / "pack", least=8, hidden=256, ffn=512, rung_bytes=32_768)
    )
    executor = build(pack)
    rungs, sizes = executor.rungs, [0, *np.cumsum(pack.manifest.rungs.bytes).tolist()]
    files = [(path, path.open("rb")) for path in {pack.rung_location(r).path for r in range(rungs)}]
    numbers = {path: file.fileno() for path, file in files}
    places = [
        (numbers[where.path], where.offset, where.bytes, where.crc32)
        for where in map(pack.rung_location, range(rungs))
    ]
    assert rungs >= 16
    rng = np.random.default_rng(1)

    def change(times: int) -> None:
        for target, grow in rng.integers(0, (rungs + 1, 2), (times, 2)).tolist():
            # Mostly small steps, so that there is time for so many.
            at = executor.resident_rungs
            if grow:
                goal = min(at + 1 + target % 3, rungs)
                executor.read_rungs(places[at:goal], threads=1)
                executor.publish(goal)
            else:
                executor.publish(target if target % 8 == 0 and target < at else max(at - 2, 0))
            assert executor.arena_bytes == sizes[executor.resident_rungs]

    change(1000)
    change(1000)
    executor.publish(0)
    before = measure().now
    for _ in range(99):
        change(1000)
    executor.publish(0)
    after = measure().now
    assert abs(after - before) < 2**20
    for _, file in files:
        file.close()
