"""Half the weights of a model of a billion parameters go and come back; and what bounds that."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pliant
from budgets.common import Answers, Others
from pliant.sizes import GIB, MIB

__all__ = ["floor", "large"]

SHRINK_MS = 150.0
PART = 0.7
"""Of the rate of the disk, and of the speed of decoding meanwhile."""

PIECE = 4 * MIB


def make_large(path: Path) -> None:
    """A random pack of a billion parameters, 8 plies each."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from tiny import write_tiny_pack

    print(f"making {path}", file=sys.stderr)
    write_tiny_pack(
        path, vocab=32_000, hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192,
        context=2048, least=8, embed_block_rows=2048, rung_bytes=None, shard_bytes=128 * MIB,
    )  # fmt: skip


def forget(path: Path) -> None:
    """Take the files of a pack out of the kernel's cache."""
    for file in path.glob("plies-*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def new_memory(size: int, *, huge: bool = True) -> mmap.mmap:
    """Memory that nobody has touched."""
    memory = mmap.mmap(-1, size + PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return memory


def read_rate(path: Path, size: int, *, reads: int = 1, fresh: bool = True) -> float:
    """Bytes a second of reading `size` bytes of the shards past the cache of the kernel.

    `reads`: requests in flight. `fresh`: into new memory; otherwise each reader uses 4 MiB again
    and again, as dd does.
    """
    pieces: list[tuple[int, int]] = []  # descriptor, offset
    descriptors = []
    for shard in sorted(path.glob("plies-*"))[::-1]:
        descriptors.append(os.open(shard, os.O_RDONLY | os.O_DIRECT))
        whole = shard.stat().st_size // PIECE
        pieces += [(descriptors[-1], number * PIECE) for number in range(whole)]
    pieces = pieces[: size // PIECE]
    with new_memory(len(pieces) * PIECE) as memory:
        view = memoryview(memory)
        left = iter(enumerate(pieces))
        guard = threading.Lock()

        def read(number: int) -> None:
            while True:
                with guard:
                    at, (descriptor, offset) = next(left, (-1, (0, 0)))
                if at < 0:
                    return
                to = (at if fresh else number) * PIECE
                os.preadv(descriptor, [view[to : to + PIECE]], offset)

        if not fresh:
            view[: reads * PIECE] = bytes(reads * PIECE)
        threads = [threading.Thread(target=read, args=(number,)) for number in range(reads)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        view.release()
    for descriptor in descriptors:
        os.close(descriptor)
    return len(pieces) * PIECE / seconds


def floor(options: argparse.Namespace) -> dict[str, Any]:
    """What disk, kernel and processors need for the same, without pliant's part in it."""
    if not options.pack.exists():
        make_large(options.pack)
    others, size = Others(), 512 * MIB
    result: dict[str, Any] = {"pack": str(options.pack)}
    for reads in (1, 4):
        for fresh in (False, True):
            forget(options.pack)
            name = f"disk_{reads}_in_flight_{'new_memory' if fresh else 'same_memory'}"
            result[name] = read_rate(options.pack, size, reads=reads, fresh=fresh)
    source = bytes(PIECE)
    for huge in (True, False):
        with new_memory(size, huge=huge) as memory:
            begin = time.perf_counter()
            for at in range(0, size, PIECE):
                memory[at : at + PIECE] = source
            filled = time.perf_counter()
            memory.madvise(mmap.MADV_DONTNEED)
            end = time.perf_counter()
        kind = "huge" if huge else "small"
        result[f"fill_{kind}_pages_s_per_gib"] = (filled - begin) * GIB / size
        result[f"release_{kind}_pages_ms_per_gib"] = (end - filled) * 1e3 * GIB / size
    with pliant.load(options.pack, context=512, chat=False) as model:
        everything = model.depth.weights
        for name, weights in (("all", everything), ("half", everything // 2)):
            model.resize(weights=weights)
            with Answers(model, 1, 400) as answers:
                begin = time.monotonic()
                time.sleep(3)
            result[f"step_ms_with_{name}_plies"] = 1e3 * answers.seconds(begin, time.monotonic())
    result["others"] = others.part()
    return result


PAUSE = 0.5
"""Seconds between a drop and the growth after it. The host of a virtual machine takes back what its
guest has not used for some two seconds; to find it again can take it longer than the disk."""


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Drops of half the weights of a large model, and the ways back."""
    if not options.pack.exists():
        make_large(options.pack)
    turns: dict[str, list[dict[str, float]]] = {"from_disk": [], "from_cache": []}
    with pliant.load(options.pack, context=512, chat=False) as model:
        everything = model.depth.weights
        with Answers(model, 1, 400) as answers:
            for _ in range(options.repeat):
                for kind, some in turns.items():
                    some.append(_turn(options.pack, model, answers, cold=kind == "from_disk"))
                    print(kind, json.dumps(some[-1]), file=sys.stderr)
        if answers.error is not None:
            raise answers.error
    medians = {
        kind: {name: statistics.median(turn[name] for turn in some) for name in some[0]}
        for kind, some in turns.items()
    }
    every = [turn for some in turns.values() for turn in some]
    slowest = max(turn["shrink_acknowledged_ms"] for turn in every)
    # The best of all, which had memory that was at hand.
    disk = max(turn["disk_into_new_memory"] for turn in every)
    of_disk = medians["from_disk"]["growth"] / disk
    within_reach = statistics.median(
        turn["growth"] / turn["within_reach"] for turn in turns["from_disk"]
    )
    return {
        "pack": str(options.pack),
        "weights": everything,
        **medians,
        "disk_into_new_memory_at_best": disk,
        "growth_of_disk": of_disk,
        "growth_of_within_reach": within_reach,
        "slowest_shrink_ms": slowest,
        "kept": slowest <= SHRINK_MS
        and of_disk >= PART
        and medians["from_disk"]["decode_kept"] >= PART,
    }


def _turn(pack: Path, model: pliant.Model, answers: Answers, *, cold: bool) -> dict[str, float]:
    """Drop half of everything, and grow back."""
    everything = model.depth.weights
    half = everything // 2
    forget(pack)
    with answers.paused():
        same, disk = (read_rate(pack, everything - half, fresh=fresh) for fresh in (False, True))
    if not cold:
        for file in pack.glob("plies-*"):
            with file.open("rb") as shard:
                while shard.read(PIECE):
                    pass
    time.sleep(1.0)
    asked = time.monotonic()
    step = answers.seconds(asked - 1.0, asked)
    model.move(weights=half)
    told = time.monotonic()
    time.sleep(PAUSE)
    begin = time.monotonic()
    before, others = answers.speed(told, begin), Others()
    model.move(weights=everything).wait()
    end = time.monotonic()
    during = answers.speed(begin, end)
    # A plain reader has a processor for itself; decoding leaves so much of all of them.
    left = min((1 - PART) * len(os.sched_getaffinity(0)), 1.0)
    return {
        "within_reach": min(same, disk * left),
        "disk_into_new_memory": disk,
        "disk_into_the_same_memory": same,
        "growth": (everything - half) / (end - begin),
        "decode_before": before,
        "decode_during": during,
        "decode_kept": during / before,
        "shrink_acknowledged_ms": (told - asked) * 1e3,
        "step_at_full_depth_ms": step * 1e3,
        "others": others.part(),
    }
