"""What a coded KV cache gives: speed with a long context, sessions in a budget, parked sessions.

    python benchmarks/kv.py PACK [--weights 60MB] [--tokens 8000] [--bits 3.25 4.25 5.25]

`speed`: tokens a second while so many tokens are in the cache, exact and at each number of bits, in
turns; the floor is the bytes that a step reads (weights and KV) over the read bandwidth, which is
probed before and after each turn. `sessions`: how many sessions of a context fit into one budget.
`resume`: a session of 4,096 tokens read back from disk against computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

import pliant
from pliant import _core
from pliant.sizes import MIB, parse_size


def ids_for(model: pliant.Model, count: int) -> list[int]:
    """Random tokens: speed does not depend on which."""
    vocab = model.pack.manifest.model.vocab
    return np.random.default_rng(0).integers(0, vocab, count).tolist()


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode with a full cache, in turns."""
    kinds: list[float] = [16, *options.bits]
    models = [
        pliant.load(options.pack, weights=options.weights, kv_bits=bits, chat=False)
        for bits in kinds
    ]
    rows: list[dict[str, Any]] = []
    sessions = []
    for bits, model in zip(kinds, models, strict=True):
        session = model.session()
        short = decode(session, options.steps) if session.feed(ids_for(model, 128)) is not None else 0
        begin = time.perf_counter()
        session.feed(ids_for(model, options.tokens - 128))
        rows.append({
            "bits": model.depth.kv_bits,
            "short": short,
            "prefill": (options.tokens - 128) / (time.perf_counter() - begin),
            "long": [],
            "probe": [],
            "weights": model.depth.weights,
        })  # fmt: skip
        sessions.append(session)
        print(f"{bits} bits: filled", flush=True)
    for _ in range(options.turns):
        for row, session in zip(rows, sessions, strict=True):
            row["probe"].append(_core.read_bandwidth(128, models[0].report().threads, 3))
            row["long"].append(decode(session, options.steps))
    for row, model in zip(rows, models, strict=True):
        values = model.report().ledger["kv"][1]
        row["kv"] = values
        row["long"] = statistics.median(row["long"])
        row["probe"] = statistics.median(row["probe"])
        row["share"] = (row["weights"] + values) * row["long"] / row["probe"]
        model.close()
    return rows


def decode(session: Any, steps: int) -> float:
    """Tokens a second of single steps."""
    begin = time.perf_counter()
    for _ in range(steps):
        session.feed([5])
    return steps / (time.perf_counter() - begin)


def fits(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The most sessions of --context tokens that are filled and held in --memory, found by doing
    so."""
    rows = []
    for bits in (16, *options.bits):
        most = 0
        for sessions in range(1, 65):
            try:
                model = pliant.load(
                    options.pack, memory=options.memory, context=options.context,
                    sessions=sessions, kv_bits=bits, min_bits=options.min_bits, chat=False,
                )  # fmt: skip
            except pliant.BudgetError:
                break
            model.close()
            most = sessions
        with pliant.load(
            options.pack, memory=options.memory, context=options.context, sessions=most,
            kv_bits=bits, min_bits=options.min_bits, chat=False,
        ) as model:  # fmt: skip
            ids = ids_for(model, options.context)
            held = [model.session() for _ in range(most)]
            for session in held:
                session.reserve(options.context)
                session.feed(ids)
            report = model.report()
            rows.append({"bits": model.depth.kv_bits, "sessions": most, "peak": report.peak,
                         "budget": report.budget, "kl": model.depth.expected_kl})  # fmt: skip
            print(f"{bits} bits: {most} sessions of {options.context} tokens, peak "
                  f"{report.peak / MIB:.0f} of {options.memory / MIB:.0f} MiB", flush=True)  # fmt: skip
    return rows


def resume(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A parked session of 4,096 tokens: read back, against computed again."""
    rows = []
    for bits in (16, *options.bits):
        with pliant.load(
            options.pack, weights=options.weights, kv_bits=bits, context=4160, sessions=1,
            chat=False,
        ) as model, model.session() as session, model.session() as other:  # fmt: skip
            ids = ids_for(model, 4096)
            begin = time.perf_counter()
            first = session.feed(ids)
            computed = time.perf_counter() - begin
            session.reserve(4160)
            expected = [int(first.argmax())]
            for _ in range(8):
                expected.append(int(session.feed(expected[-1:]).argmax()))
            session.rewind(ids + [0])
            session.release()
            other.feed(ids[:4096])  # takes the room: the first one goes to disk
            parked = model.report().parked_bytes
            other.close()
            begin = time.perf_counter()
            got = expected[:1]
            got.append(int(session.feed(got[-1:]).argmax()))
            back = time.perf_counter() - begin
            for _ in range(7):
                got.append(int(session.feed(got[-1:]).argmax()))
            rows.append({"bits": model.depth.kv_bits, "computed": computed, "resumed": back,
                         "times": computed / back, "same": got == expected, "parked": parked})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pack")
    parser.add_argument("parts", nargs="*", default=["speed", "sessions", "resume"])
    parser.add_argument("--weights", type=parse_size, default=parse_size("60MB"))
    parser.add_argument("--memory", type=parse_size, default=parse_size("250MiB"))
    parser.add_argument("--min-bits", type=float, default=4.0)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.25, 4.25, 5.25])
    parser.add_argument("--out", help="write the results to this file")
    options = parser.parse_args()
    kinds = {"speed": speed, "sessions": fits, "resume": resume}
    found = {part: kinds[part](options) for part in options.parts}
    for row in found.get("speed", []):
        print(f"{row['bits']:5.2f} bits: {row['long']:6.1f} tokens/s with {options.tokens} tokens in "
              f"{row['kv'] / 1e6:.1f} MB of KV, {row['short']:.1f} with 128; prefill "
              f"{row['prefill']:.0f}; {row['share']:.0%} of {row['probe'] / 1e9:.1f} GB/s")  # fmt: skip
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
