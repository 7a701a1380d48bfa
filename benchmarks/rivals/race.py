"""Side by side: ``python benchmarks/rivals/race.py PACK --files GGUF ... --weights SIZE ...``.

Every file in llama.cpp and every size of the pack is a process of its own that waits for its turn.
In each round all of them read a prompt of 512 tokens and decode 128 more, one after the other, so
that what the machine does meanwhile befalls all of them. Reported are medians over the rounds and
the medians of the ratios to the fastest file of the same round.

llama.cpp runs in the Python that ``--llama-python`` names (it needs run_llama.py's packages).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    DECODED,
    WINDOW,
    llama_errors_only,
    load_average,
    machine,
    markdown,
    read_bandwidth,
    write_json,
)

ROUNDS = 5
BATCH = 8
PAUSE = 0.5  # seconds: by then the threads of the one before, which spin for some time, are asleep
Step = Callable[[], None]


def llama(path: str, threads: int) -> dict[str, tuple[int, Step]]:
    """What llama.cpp does in a round: tokens and function of each step."""
    from run_llama import Engine

    llama_errors_only()
    ids = np.random.default_rng(0).integers(1000, 20_000, WINDOW + DECODED).astype(np.int32)
    engine = Engine(Path(path), threads)
    return {
        "prefill": (WINDOW, lambda: engine.prefill(ids[:WINDOW])),
        "decode": (DECODED, lambda: engine.decode(ids[WINDOW:], WINDOW)),
    }


def ours(pack: str, weights: str, threads: int, isa: str) -> dict[str, tuple[int, Step]]:
    """What pliant does in a round, and decoding of several sequences at once."""
    import pliant

    ids = np.random.default_rng(0).integers(1000, 20_000, WINDOW + DECODED).tolist()
    model = pliant.load(
        pack,
        weights=weights,
        threads=threads,
        isa=isa,
        context=WINDOW + 2 * DECODED,
        sessions=BATCH + 1,
        chat=False,
    )
    session = model.session()

    def prefill() -> None:
        nonlocal session
        session.close()
        session = model.session()
        session.feed(ids[:WINDOW])

    def decode() -> None:
        for token in ids[WINDOW:]:
            model.step_all([session], [token])

    def batch() -> None:
        sessions = [model.session() for _ in range(BATCH)]
        for token in ids[:DECODED]:
            model.step_all(sessions, [token] * BATCH)
        for one in sessions:
            one.close()

    return {
        "prefill": (WINDOW, prefill),
        "decode": (DECODED, decode),
        "batch": (BATCH * DECODED, batch),
    }


def serve(steps: dict[str, tuple[int, Step]]) -> None:
    """Do a round whenever a line comes in; answer with tokens a second of each step.

    The prompt is read once more at first: a processor that was idle takes a while to its speed.
    """
    for _ in sys.stdin:
        steps["prefill"][1]()
        rates = {}
        for name, (tokens, step) in steps.items():
            begin = time.perf_counter()
            step()
            rates[name] = tokens / (time.perf_counter() - begin)
        print(json.dumps(rates), flush=True)


class Racer:
    """A process that does a round when asked."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        rates: dict[str, float] = json.loads(line)
        return rates

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def median(self, kind: str) -> float | None:
        rates = [rates[kind] for rates in self.rounds if kind in rates]
        return statistics.median(rates) if rates else None


def race(racers: list[Racer]) -> None:
    """A round that is not counted, then those that are."""
    for number in range(ROUNDS + 1):
        for racer in racers:
            time.sleep(PAUSE)
            rates = racer.run()
            if number:
                racer.rounds.append(rates)
        print(f"round {number} of {ROUNDS}", file=sys.stderr)


def ratio(racer: Racer, rivals: list[Racer], kind: str) -> float:
    """Median over the rounds of the ratio to the fastest rival of that round."""
    return statistics.median(
        mine[kind] / max(rival.rounds[number][kind] for rival in rivals)
        for number, mine in enumerate(racer.rounds)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--files", nargs="+", required=True, help="GGUF files of llama.cpp")
    parser.add_argument("--weights", nargs="+", required=True, help="sizes of the pack")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto", help="of pliant; llama.cpp's is that of its build")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("llama", "pliant"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "llama":
        serve(llama(args.files[0], args.threads))
        return
    if args.child == "pliant":
        serve(ours(str(args.pack), args.weights[0], args.threads, args.isa))
        return

    def command(python: str, child: str, file: str, weights: str) -> list[str]:
        options = ["--files", file, "--weights", weights, "--threads", str(args.threads)]
        options += ["--isa", args.isa]
        return [python, __file__, str(args.pack), *options, "--child", child]

    rivals = [
        Racer(Path(file).stem, command(args.llama_python, "llama", file, "0"))
        for file in args.files
    ]
    mine = [
        Racer(f"pliant {size}", command(sys.executable, "pliant", "-", size))
        for size in args.weights
    ]
    bandwidth = read_bandwidth(args.threads)
    race(rivals + mine)
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for racer in rivals + mine:
        rates = {kind: racer.median(kind) for kind in ("prefill", "decode", "batch")}
        result: dict[str, Any] = {"name": racer.name, **{k: v for k, v in rates.items() if v}}
        if racer in mine:
            for kind in ("prefill", "decode"):
                result[f"{kind}_ratio"] = ratio(racer, rivals, kind)
            gains = [rates["batch"] / rates["decode"] for rates in racer.rounds]
            result["batch_ratio"] = statistics.median(gains)
        results.append(result)
        shown = [f"{rates[kind]:.0f}" if rates[kind] else "-" for kind in rates]
        shown += [
            f"{result[key]:.2f}" if key in result else "-"
            for key in ("prefill_ratio", "decode_ratio", "batch_ratio")
        ]
        rows.append([racer.name, *shown])
        racer.close()
    head = ["", "prefill", "decode", f"batch {BATCH}", "prefill ratio", "decode ratio"]
    print(markdown([*head, "batch / decode"], rows))
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, load {load_average()}")
    if args.out:
        write_json(
            args.out,
            {
                "machine": machine(),
                "threads": args.threads,
                "isa": args.isa,
                "bandwidth": bandwidth,
                "rounds": ROUNDS,
                "results": results,
            },
        )


if __name__ == "__main__":
    main()
