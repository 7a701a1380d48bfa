"""Broken packs in the core: what it is given is refused by name, or computes something.

The first test lets through what the store lets through: packs that say other things than they did,
with sizes and digests that fit (the mutations are those of test_store_fuzz). The second hands the
core arguments that no store has looked at. `make sanitize` runs both with a core that ends at the
first read or write of memory that is not its own, and at the first sum that overflows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packs import write_random_pack
from pliant import _core
from pliant.engine.build import RungFiles, build_executor
from pliant.errors import PackError, PliantError
from pliant.store import Pack
from test_store_fuzz import TIMES, Mutation, header, manifest_values, mutate_json, read, values

TOKENS = np.array([1, 5, 2, 90, 5, 0, 3], np.int32)
Call = tuple[str, list[Any]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pack(
        tmp_path_factory.mktemp("broken") / "pack",
        layers=2, tied=False, post_norms=True, qk_norms=True, biases=True, rung_bytes=4096,
        coding={"layers.0.q": "f32", "layers.1.up": "bf16"}, vocab=96, least=1,
        layer_window=[3, 0],
    )  # fmt: skip


def compute(executor: Any, pack: Pack) -> None:
    """All that a model does: every rung, a prompt, a token after it, half of the rungs, a token."""
    files, rungs = RungFiles(pack), pack.rungs_available
    try:
        executor.read_rungs([files.location(rung) for rung in range(rungs)])
    finally:
        files.close()
    executor.publish(rungs)
    executor.reserve_kv(2)
    sequence = executor.open_sequence()
    vocab = pack.manifest.model.vocab
    ids = TOKENS % vocab
    assert executor.step([sequence], [len(ids)], ids, [2]).shape == (len(ids), vocab)
    executor.step([sequence], [1], ids[:1], [1])
    executor.publish(rungs // 2)
    executor.step([sequence], [1], ids[1:2], [1])


def outcome(work: Callable[[], None], what: str) -> str:
    """What came of it. Nothing but an error of pliant may come out, or one of Python's types."""
    try:
        work()
    except PliantError as error:
        return "refused" if str(error).isprintable() else str(error)
    except TypeError:  # an argument that the signature does not take
        return "mistyped"
    except BaseException as error:
        raise AssertionError(f"{what}: {error!r}") from error
    return "computed"


@pytest.mark.parametrize(
    ("mutation", "count"), [(manifest_values, 400), (header, 200), (values, 100)]
)
def test_what_the_store_lets_through(
    original: Path, tmp_path: Path, mutation: Mutation, count: int
) -> None:
    files = read(original)
    outcomes: Counter[str] = Counter()
    for seed in range(count * TIMES):
        broken = dict(files)
        mutation(random.Random(seed), broken)
        for name, content in broken.items():
            (tmp_path / name).write_bytes(content)
        try:
            pack = Pack.open(tmp_path)
        except PackError:
            continue

        def work(pack: Pack = pack) -> None:
            compute(build_executor(pack, threads=1, chunk=4), pack)

        outcomes[outcome(work, f"{mutation.__name__} with seed {seed}")] += 1
    assert outcomes.keys() <= {"refused", "computed"}, "a message that is no line of text"
    assert outcomes["computed"] >= count // 50, outcomes


def calls(pack: Pack) -> tuple[dict[str, Any], list[Call]]:
    """The model, and all calls that build an executor of a pack: names and arguments."""
    base, found = pack.base, []
    for name, array in base.items():
        if name.endswith(("norm", ".bias")):
            found.append(("set_vector", [name, array]))
        elif name.endswith(".weight"):
            found.append(("set_plain", [name.removesuffix(".weight"), array]))
    found.append(("set_tree", [base["tree"], base["scale_steps"]]))
    for m in pack.manifest.matrices:
        if m.coding == "plies":
            scale, rows = base[f"{m.name}.row_scale"].view(np.uint16), f"{m.name}.row_order"
            shape = [m.name, m.rows, m.columns, list(m.blocks), base[f"order.{m.input}"]]
            group_scale = base[f"{m.name}.group_scale"]
            found.append(("add_coded", [*shape, base.get(rows), scale, group_scale]))
    table = pack.manifest.rungs
    ladder = np.ascontiguousarray(pack.ladder)
    found.append(("set_ladder", [ladder, table.plies.tolist(), table.bytes.tolist()]))
    return asdict(pack.manifest.model), found


def mutate_array(rng: random.Random, array: Any) -> Any:
    """An array of another length, or with other numbers in it."""
    kind = rng.randrange(3)
    if kind == 0:
        return np.ascontiguousarray(array[: rng.choice([0, 1, len(array) - 1])])
    if kind == 1:
        return np.ascontiguousarray(np.concatenate([array, array[:1]]))
    changed = array.copy()
    flat = changed.reshape(-1).view(np.uint8)
    for _ in range(rng.choice([1, 4])):
        flat[rng.randrange(len(flat))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
    return changed


def test_the_core_believes_nothing(original: Path) -> None:
    """One argument in one call is wrong, or a call is missing, made twice or too early."""
    outcomes: Counter[str] = Counter()
    for seed in range(600 * TIMES):
        rng = random.Random(seed)
        pack = Pack.open(original)
        model, todo = calls(pack)
        action = rng.randrange(6)
        at = rng.randrange(len(todo))
        if action < 2:
            mutate_json(rng, model)
        elif action == 2:
            del todo[at]
        elif action == 3:
            todo.insert(rng.randrange(len(todo)), todo[at])
        else:
            arguments = todo[at][1]
            which = rng.randrange(len(arguments))
            if isinstance(arguments[which], np.ndarray):
                arguments[which] = mutate_array(rng, arguments[which])
            elif isinstance(arguments[which], list):
                arguments[which] = deepcopy(arguments[which])
                mutate_json(rng, arguments[which])
            elif isinstance(arguments[which], int):
                arguments[which] += rng.choice([-64, -1, 1, 64, 2**20, 2**31 - 1000, -(2**31)])

        def work(pack: Pack = pack, model: dict[str, Any] = model, todo: list[Call] = todo) -> None:
            executor = _core.Executor(model, threads=1, chunk=4)
            for name, arguments in todo:
                getattr(executor, name)(*arguments)
            executor.finish()
            compute(executor, pack)

        outcomes[outcome(work, f"seed {seed}")] += 1
    assert outcomes.keys() <= {"refused", "mistyped", "computed"}, "a message that is no text"
    assert outcomes["refused"] > 200, outcomes
    assert outcomes["computed"] > 50, outcomes
