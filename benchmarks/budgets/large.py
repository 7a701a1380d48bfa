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


def large(options: argparse.Namespace) -> dict[str, Any]:
    """A drop of half the weights of a large model, and the way back."""
    if not options.pack.exists():
        make_large(options.pack)
    turns: list[dict[str, float]] = []
    with pliant.load(options.pack, context=512, chat=False) as model:
        everything = model.depth.weights
        model.resize(weights=everything // 2)
        with Answers(model, 1, 400) as answers:
            for turn in range(2 * options.repeat):
                turns.append(_turn(options.pack, model, answers, cold=turn % 2 == 0))
                print(json.dumps(turns[-1]), file=sys.stderr)
        if answers.error is not None:
            raise answers.error

    def middle(name: str, cold: bool) -> float:
        return statistics.median(t[name] for t in turns if t["in_cache"] != cold)

    names = [name for name in turns[0] if name != "in_cache"]
    cold = {name: middle(name, cold=True) for name in names}
    slowest = max(turn["shrink_acknowledged_ms"] for turn in turns)
    return {
        "pack": str(options.pack),
        "weights": everything,
        "from_disk": cold,
        "from_cache": {name: middle(name, cold=False) for name in names},
        "slowest_shrink_ms": slowest,
        "turns": turns,
        "kept": slowest <= SHRINK_MS
        and cold["growth_of_disk"] >= PART
        and cold["decode_kept"] >= PART,
    }


def _turn(pack: Path, model: pliant.Model, answers: Answers, *, cold: bool) -> dict[str, float]:
    """Grow from half to all of it, and drop half again."""
    everything, half = model.plan_for().weights, model.depth.weights
    forget(pack)
    with answers.paused():
        same, disk = (read_rate(pack, everything - half, fresh=fresh) for fresh in (False, True))
    if not cold:
        for file in pack.glob("plies-*"):
            with file.open("rb") as shard:
                while shard.read(PIECE):
                    pass
    start = time.monotonic()
    time.sleep(1.0)
    before = answers.speed(start, time.monotonic())
    others = Others()
    begin = time.monotonic()
    model.move(weights=everything).wait()
    end = time.monotonic()
    part, during = others.part(), answers.speed(begin, end)
    time.sleep(0.5)
    asked = time.monotonic()
    model.move(weights=half)
    told = time.monotonic()
    growth = (everything - half) / (end - begin)
    return {
        "in_cache": float(not cold),
        "disk_bytes_per_second": disk,
        "disk_into_the_same_memory": same,
        "growth_bytes_per_second": growth,
        "growth_of_disk": growth / disk,
        "decode_before": before,
        "decode_during": during,
        "decode_kept": during / before,
        "shrink_acknowledged_ms": (told - asked) * 1e3,
        "step_at_full_depth_ms": answers.seconds(end, asked) * 1e3,
        "others": part,
    }
