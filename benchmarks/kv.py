"""What a coded KV cache gives: speed with a long context, sessions in a budget, parked sessions.

    python benchmarks/kv.py PACK [speed] [sessions] [shrink] [resume] [prefix]
        [--bits 3.25 4.25 5.25]

`speed`: tokens a second with 128 and with so many tokens in the cache, exact and at each number of
bits, in turns. The floor is the bytes that a step reads, weights and KV, over the read bandwidth,
which is probed in each turn; the floor of the ratio is weights over weights and KV. `sessions`: how
many sessions of a context can be filled and held in one budget. `shrink`: 16 sessions that go on in
turns while the budget falls step by step, and then rises. `resume`: a session of 4,096 tokens read
back from disk, against computed again. `prefix`: the time to the first token of a prompt of
2,048 tokens that was parked before the model was loaded anew, from the kernel's cache and from the
disk, against computing it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import pliant
from pliant import _core
from pliant.sizes import MIB, parse_size

RESUMED = 4096  # tokens of the session that is parked
PARKED = 2048  # tokens of the prompt that is parked
MOST_SESSIONS = 64
SHRINKING, SHRUNK = 16, 2048  # sessions, and tokens of each
BUDGETS = (400, 350, 300, 260, 230, 210, 400)  # MiB
TOLERANCE = 8 * MIB  # of the resident set


def ids_for(model: pliant.Model, count: int) -> list[int]:
    """Random tokens: speed does not depend on which."""
    vocab = model.pack.manifest.model.vocab
    return np.random.default_rng(0).integers(0, vocab, count).tolist()


def decode(session: Any, steps: int) -> float:
    """Tokens a second, by the median step: other programs make some of them longer."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        session.feed([5])
        times.append(time.perf_counter() - begin)
    return 1 / statistics.median(times)


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode with a full cache."""
    rows: list[dict[str, Any]] = []
    for bits in (16, *options.bits):
        model = pliant.load(options.pack, weights=options.weights, kv_bits=bits, chat=False)
        short, long = model.session(), model.session()
        short.feed(ids_for(model, 128))
        before = model.report().ledger["kv"][1]
        begin = time.perf_counter()
        long.feed(ids_for(model, options.tokens))
        prefill = options.tokens / (time.perf_counter() - begin)
        kv = model.report().ledger["kv"][1] - before
        rows.append(
            {"model": model, "sessions": (short, long), "kv": kv, "prefill": prefill, "turns": []}
        )
    for _ in range(options.turns):
        for row in rows:
            speeds = [decode(session, options.steps) for session in row["sessions"]]
            probe = _core.read_bandwidth(128, row["model"].report().threads, 3)
            row["turns"].append((*speeds, speeds[1] / speeds[0], probe))
    for row in rows:
        for session in row.pop("sessions"):
            session.close()
        with row.pop("model") as model:
            row["bits"], row["weights"] = model.depth.kv_bits, model.depth.weights
        columns = zip(*row.pop("turns"), strict=True)
        row["short"], row["long"], row["ratio"], row["probe"] = map(statistics.median, columns)
        read = row["weights"] + row["kv"]
        row["floor_ratio"] = row["weights"] / read
        row["share"] = read * row["long"] / row["probe"]
        print(
            f"{row['bits']:5.2f} bits: {row['long']:.1f} tokens/s with {options.tokens} tokens in "
            f"{row['kv'] / 1e6:.1f} MB, {row['short']:.1f} with 128: {row['ratio']:.2f} of it, "
            f"{row['floor_ratio']:.2f} by bytes; reads at {row['share']:.0%} of "
            f"{row['probe'] / 1e9:.1f} GB/s; prefill {row['prefill']:.0f}",
            flush=True,
        )
    return rows


def sessions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The most sessions of --context tokens in --memory, with weights of at least --min-bits."""
    rows = []
    for bits in (16, *options.bits):
        wish: dict[str, Any] = {
            "memory": options.memory,
            "context": options.context,
            "kv_bits": bits,
            "min_bits": options.min_bits,
            "chat": False,
        }
        most = 0
        for count in range(1, MOST_SESSIONS + 1):
            try:
                pliant.load(options.pack, sessions=count, **wish).close()
            except pliant.BudgetError:
                break
            most = count
        with pliant.load(options.pack, sessions=most, **wish) as model:
            held = [model.session() for _ in range(most)]
            for session in held:
                if not session.reserve(options.context):
                    raise SystemExit("a session that was planned has no room")
                session.feed(ids_for(model, options.context))
            report = model.report()
            row = {"bits": report.kv_bits, "sessions": most, "peak": report.peak}
            rows.append(row | {"parked": report.parked, "expected_kl": report.expected_kl})
        print(
            f"{row['bits']:5.2f} bits: {most} sessions of {options.context} tokens, resident at "
            f"most {row['peak'] / MIB:.0f} of {options.memory / MIB:.0f} MiB",
            flush=True,
        )
    return rows


def shrink(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Sessions under a budget that falls: none is lost, and their pages get shallower with age."""
    rows = []
    wish: dict[str, Any] = {"kv_bits": "auto", "sessions": SHRINKING, "context": SHRUNK + 128}
    with pliant.load(options.pack, memory=BUDGETS[0] * MIB, chat=False, **wish) as model:
        held = [model.session() for _ in range(SHRINKING)]
        text = ids_for(model, SHRUNK * SHRINKING)
        for number, session in enumerate(held):
            session.feed(text[number * SHRUNK : (number + 1) * SHRUNK])
        for budget in BUDGETS:
            model.budget = budget * MIB
            most = 0
            for session in held * 4:
                session.feed([5])
                most = max(most, model.report().resident)
            executor = model._executor
            pages = [executor.pages(session.sequence) for session in held]
            rungs = [executor.page_rungs(one)[1:] for one in pages if one]  # the first stays deep
            if not all(_falls(one) for one in rungs):
                raise SystemExit("an old page is deeper than one that is younger")
            report = model.report()
            depths = [model._holdings.depth_of(session.sequence) for session in held]
            if most > budget * MIB + TOLERANCE or any(len(one) < SHRUNK for one in held):
                raise SystemExit(f"{most} bytes were resident, or a session was lost")
            row = {"budget": budget * MIB, "resident": most}
            row |= {"kv_bits": min(depth.kv_bits for depth in depths), "weights": report.weights}
            kls = [depth.expected_kl for depth in depths if depth.expected_kl is not None]
            row["expected_kl"] = max(kls, default=None)
            row |= {"parked": report.parked, "kv": report.ledger["kv"][1]}
            rows.append(row)
            kl = "-" if row["expected_kl"] is None else f"{row['expected_kl']:.3f}"
            print(
                f"{budget} MiB: resident at most {most / MIB:.0f}, weights "
                f"{row['weights'] / 1e6:.0f} MB, KV {row['kv'] / 1e6:.0f} MB of "
                f"{row['kv_bits']:.2f} bits, expected KL {kl}, {row['parked']} on disk",
                flush=True,
            )
    return rows


def _falls(rungs: list[int]) -> bool:
    """Whether pages, from the oldest on, have never fewer rungs than one before; 0: exact."""
    coded = [one for one in rungs if one]
    return coded == sorted(coded)


def resume(options: argparse.Namespace) -> list[dict[str, Any]]:
    """From disk, against from the tokens; and whether both go on with the same tokens."""
    rows = []
    for bits in (16, *options.bits):
        room = {"context": RESUMED + 64, "weights": options.weights, "kv_bits": bits}
        with pliant.load(options.pack, chat=False, **room) as model:
            ids = ids_for(model, RESUMED)
            with model.session() as session:
                begin = time.perf_counter()
                expected = follow(session, ids)
                computed = time.perf_counter() - begin
                expected += follow(session, expected)
            with model.session() as session, model.session() as other:
                first = follow(session, ids)
                other.feed(ids)  # takes the room: the first session goes to disk
                parked = model.report().parked_bytes
                other.close()
                begin = time.perf_counter()
                got = first + follow(session, first)
                back = time.perf_counter() - begin
            row = {"bits": model.depth.kv_bits, "computed": computed, "resumed": back}
            rows.append(row | {"parked": parked, "same": got == expected})
        print(
            f"{row['bits']:5.2f} bits: {parked / 1e6:.1f} MB back in {back:.3f} s, computed in "
            f"{computed:.3f} s: {computed / back:.1f} times; same tokens: {got == expected}",
            flush=True,
        )
    return rows


def follow(session: Any, ids: list[int]) -> list[int]:
    """The likeliest token after `ids`."""
    return [int(session.feed(ids).argmax())]


def prefix(options: argparse.Namespace) -> list[dict[str, Any]]:
    """First tokens after loading, with pages in a folder and without."""
    rows = []
    for bits in (16, *options.bits):
        with tempfile.TemporaryDirectory() as folder:
            load = {"weights": options.weights, "kv_bits": bits, "chat": False, "park": folder}
            row: dict[str, Any] = {}
            for name in ("computed", "cache", "disk"):
                if name == "disk":
                    forget(Path(folder))
                with pliant.load(options.pack, **load) as model:
                    begin = time.perf_counter()
                    made = model.generate(
                        ids_for(model, PARKED), max_tokens=8, ignore_eos=True, seed=0
                    )
                    next(made)
                    row[name] = time.perf_counter() - begin
                    list(made)
                    row[name + "_tokens"] = made.result.tokens
                    row["bits"], row["cached"] = model.depth.kv_bits, made.result.cached_tokens
            row["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        rows.append(row)
        same = row["computed_tokens"] == row["cache_tokens"] == row["disk_tokens"]
        print(
            f"{row['bits']:5.2f} bits: first token of {PARKED} after {row['computed']:.3f} s "
            f"computed, {row['cache']:.3f} s from the kernel's cache, {row['disk']:.3f} s from "
            f"disk ({row['bytes'] / 1e6:.1f} MB, {row['cached']} tokens); same tokens: {same}",
            flush=True,
        )
    return rows


def forget(folder: Path) -> None:
    """Write files to disk, and let the kernel drop them from its cache."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


PARTS = {"speed": speed, "sessions": sessions, "shrink": shrink, "resume": resume, "prefix": prefix}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description="What a coded KV cache gives.")
    parser.add_argument("pack")
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    parser.add_argument("--weights", type=parse_size, default=parse_size("60MB"))
    parser.add_argument("--bits", type=float, nargs="+", default=[3.25, 4.25, 5.25])
    parser.add_argument("--tokens", type=int, default=8000, help="speed: in the cache")
    parser.add_argument("--steps", type=int, default=32, help="speed: of a turn")
    parser.add_argument("--turns", type=int, default=5, help="speed: of which the median counts")
    parser.add_argument("--memory", type=parse_size, default=parse_size("250MiB"))
    parser.add_argument("--min-bits", type=float, default=4.0, help="sessions: of the weights")
    parser.add_argument("--context", type=int, default=2048, help="sessions: tokens of each")
    parser.add_argument("--out", type=Path, help="write the results to this file")
    options = parser.parse_args()
    found = {part: PARTS[part](options) for part in options.parts}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
