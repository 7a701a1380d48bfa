"""Thousands of broken packs: each is refused with a PackError, or is still a pack.

Mutations are drawn from a seeded generator, so a failure names the seed that repeats it. Memory is
measured twice: what Python and numpy allocate, by tracemalloc, for every mutation; and the address
space as a whole, by running a part of them in a process that may take little more. PLIANT_FUZZ=20
in the environment tries twenty times as many.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packs import write_random_pack
from pliant.errors import PackError
from pliant.store import Pack

SLACK = 16 * 2**20
TIMES = int(os.environ.get("PLIANT_FUZZ", "1"))
Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], "bool | None"]
"""Changes files in place; True if it may change what the pack says without being found."""

HOSTILE: list[Any] = [
    0, 1, -1, 2, 63, 65, 255, 2**16, 2**20, 2**22, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53,
    2**63, 2**64, -(2**63), 10**18, 10**400, 0.0, -0.0, 0.5, 64.0, 1e300, 1e-300, float("nan"),
    float("inf"), float("-inf"), None, True, False, "", "0", "64", "a" * 5000, "../../etc/passwd",
    "/dev/zero", "base.safetensors", "plies-00002.safetensors", "\0", "\x1b[31m", "\ud800", "é",
    "𝔘", [], {}, [0], [[]], [None] * 1000, [2**53] * 1000, {"a": 1}, {"": {}}, "embed",
    "plies", "f32",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in a JSON value."""
    found, stack = [], [value]
    while stack:
        container = stack.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                stack.append(container[key])
    return found


def mutate_json(rng: random.Random, value: Any) -> None:
    found = places(value)
    if not found:
        return
    # Every list and object as often as a number in a long list.
    container, key = rng.choice(found if rng.random() < 0.5 else places_by_container(found, rng))
    action = rng.randrange(9)
    if action < 4:
        container[key] = deepcopy(rng.choice(HOSTILE))
    elif action == 4 and isinstance(container[key], (int, float)):
        container[key] += rng.choice([-4096, -64, -1, 1, 64, 4096, 2**32, 0.5])
    elif action == 5:
        del container[key]
    elif action == 6:
        other, its_key = rng.choice(found)
        container[key], other[its_key] = deepcopy(other[its_key]), deepcopy(container[key])
    elif action == 7 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), deepcopy(container[key]))
    elif isinstance(container, dict):
        container[rng.choice(["x", "", "a" * 300, "../x", "__metadata__", "rung.000000"])] = (
            container.pop(key) if rng.random() < 0.5 else deepcopy(container[key])
        )


def places_by_container(found: list[tuple[Any, Any]], rng: random.Random) -> list[tuple[Any, Any]]:
    chosen = rng.choice(list({id(container): container for container, _ in found}.values()))
    return [(container, key) for container, key in found if container is chosen]


def dump(rng: random.Random, value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not have
        return json.dumps(value).encode()


def digest_fits(files: Files, name: str) -> None:
    """Make the manifest say the size and digest that a file has now."""
    manifest = json.loads(files["pliant.json"])
    content = files[name]
    if name in manifest["files"]:
        manifest["files"][name] = {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    for shard in manifest["shards"]:
        if shard["file"] == name:
            shard["bytes"] = len(content)
    files["pliant.json"] = json.dumps(manifest).encode()


def flip(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    content = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 2, 8])):
        limit = rng.choice([16, 600, len(content)])
        content[rng.randrange(min(limit, len(content)))] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)


def resize(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    content = files[name]
    cut = rng.choice([rng.randrange(len(content)), len(content) - 1, 0, 8, 7])
    tail = rng.choice([b"\0", b" ", bytes(4096), rng.randbytes(100), content])
    files[name] = rng.choice([content[:cut], content + tail, tail + content])


def swap(rng: random.Random, files: Files) -> None:
    one, two = rng.sample(list(files), 2)
    files[one], files[two] = files[two], files[one]


def remove(rng: random.Random, files: Files) -> None:
    for name in rng.sample(list(files), rng.choice([1, 1, 2])):
        del files[name]


def overwrite(rng: random.Random, files: Files) -> None:
    """A piece of one file over another place, as a broken copy does."""
    source, name = rng.choice(list(files)), rng.choice(list(files))
    size = rng.choice([1, 8, 100, 4096])
    begin, at = rng.randrange(len(files[source])), rng.randrange(len(files[name]))
    piece = files[source][begin : begin + size]
    files[name] = files[name][:at] + piece + files[name][at + len(piece) :]


def manifest_values(rng: random.Random, files: Files) -> bool:
    value = json.loads(files["pliant.json"])
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        mutate_json(rng, value)
    files["pliant.json"] = dump(rng, value)
    return True


def manifest_text(rng: random.Random, files: Files) -> bool:
    """Pieces of the text taken out, put in twice, or replaced by hostile ones."""
    text = files["pliant.json"]
    hostile = [b"[" * 3000, b"{" * 300, b'{"a":' * 2000, b"1" * 6000, b"NaN", b"-", b"1e999", b'"',
               b"\\ud800", b"\xff", b"\0", b",", b"]", b"}", b'"version":9,', b" " * 10**5,
               b"[]," * 10**5, b"0," * 10**5, b'"\\u0000"']  # fmt: skip
    begin = rng.randrange(len(text))
    end = begin + rng.choice([0, 0, 1, 5, 50])
    piece = rng.choice([*hostile, text[begin : begin + 40]])
    files["pliant.json"] = text[:begin] + piece + text[end:]
    return True


def header(rng: random.Random, files: Files) -> bool:
    name = rng.choice([name for name in files if name.endswith(".safetensors")])
    content = files[name]
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, length - 1, length + 1, 2**26, 2**63, 2**64 - 1, len(content)])
        content = wrong.to_bytes(8, "little") + content[8:]
    else:
        value = json.loads(content[8 : 8 + length])
        for _ in range(rng.choice([1, 1, 2])):
            mutate_json(rng, value)
        text = dump(rng, value)
        if rng.random() < 0.5:  # keep the size, so that later checks are reached
            text += b" " * (length - len(text))
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    files[name] = content
    digest_fits(files, name)
    return True


def values(rng: random.Random, files: Files) -> bool:
    """Other values in base tensors, whose digest then fits."""
    content = bytearray(files["base.safetensors"])
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    start, stop = tensors[rng.choice(list(tensors))]["data_offsets"]
    at = 8 + length + rng.randrange(start, stop)
    piece = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\0\0\x80\x7f", rng.randbytes(2)])
    piece = piece[: 8 + length + stop - at]
    content[at : at + len(piece)] = piece
    files["base.safetensors"] = bytes(content)
    digest_fits(files, "base.safetensors")
    return True


MUTATIONS: list[tuple[Mutation, int]] = [
    (flip, 400), (resize, 250), (swap, 60), (remove, 60), (overwrite, 250), (manifest_values, 750),
    (manifest_text, 400), (header, 400), (values, 120),
]  # fmt: skip


def read(pack: Path) -> Files:
    return {file.name: file.read_bytes() for file in pack.iterdir()}


def exercise(pack: Pack) -> None:
    """What a program does with an open pack."""
    pack.verify()
    for rung in range(pack.rungs_available):
        units, bits, offsets = pack.layout.plies_of(rung)
        data = pack.read_rung(rung)
        assert len(data) == pack.rung_location(rung).bytes
        assert int(offsets[-1] + pack.units.bytes_of(units, bits)[-1]) <= len(data)
    for unit in range(min(len(pack.units), 50)):
        pack.units.locate(unit)
    assert pack.layout.resident_bytes(pack.rungs_available) >= 0
    Pack.open(pack.path)
    type(pack.manifest).from_json(pack.manifest.to_json())


def same(pack: Pack, original: Pack) -> bool:
    """Whether the same numbers come out of both; of the rungs, those that are there."""
    return (
        pack.base.keys() == original.base.keys()
        and all(np.array_equal(array, original.base[name]) for name, array in pack.base.items())
        and np.array_equal(pack.ladder, original.ladder)
        and all(pack.read_rung(i) == original.read_rung(i) for i in range(pack.rungs_available))
    )


def run(original: Path, work: Path, mutation: Mutation, count: int, seed: int) -> Counter[str]:
    """Try `count` mutations; `work` is an empty directory for the broken packs."""
    files, reference = read(original), Pack.open(original)
    written: Files = {}
    outcomes: Counter[str] = Counter()
    for number in range(seed, seed + count):
        rng = random.Random(number)
        broken = dict(files)
        fitted = mutation(rng, broken)
        for name in written.keys() - broken.keys():
            (work / name).unlink()
        for name, content in broken.items():
            if written.get(name) is not content:
                (work / name).write_bytes(content)
        written = broken
        size = sum(map(len, broken.values()))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            pack = Pack.open(work)
            exercise(pack)
            # Whatever was not made to fit is found, or made no difference.
            if not fitted and broken["pliant.json"] == files["pliant.json"]:
                assert same(pack, reference), "altered, and not found"
            outcomes["opened"] += 1
            del pack
        except PackError as error:
            message = str(error)
            outcomes["refused" if message.isprintable() and len(message) < 1000 else message] += 1
        except BaseException as error:
            raise AssertionError(f"{mutation.__name__} with seed {number}: {error!r}") from error
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 4 * size + SLACK, f"{mutation.__name__} with seed {number}: {peak} bytes"
    return outcomes


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pack(
        tmp_path_factory.mktemp("fuzz") / "pack",
        layers=1, tied=False, post_norms=True, qk_norms=True, biases=True, rung_bytes=4096,
        coding={"head": "bf16", "layers.0.q": "f32"}, shard_bytes=9000, vocab=96,
        extra_files={"config.json": b"{}"},
    )  # fmt: skip


@pytest.mark.parametrize(("mutation", "count"), MUTATIONS)
def test_broken_packs(original: Path, tmp_path: Path, mutation: Mutation, count: int) -> None:
    tracemalloc.start()
    try:
        outcomes = run(original, tmp_path, mutation, count * TIMES, seed=10**6)
    finally:
        tracemalloc.stop()
    assert outcomes.keys() <= {"opened", "refused"}, "a message that is no line of text"
    assert outcomes["refused"] > count // 4, outcomes


def test_address_space(original: Path, tmp_path: Path) -> None:
    """With 96 MiB more than an idle interpreter has, nothing runs out of memory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, str(original), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def main(original: str, work: str) -> None:
    """Run a part of all mutations under a limit of the address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 96 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for mutation, count in MUTATIONS:
        place = Path(work) / mutation.__name__
        place.mkdir()
        run(Path(original), place, mutation, count // 8, seed=5000)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
