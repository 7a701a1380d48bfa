"""How soon `pliant run` answers, and what it holds besides the model.

    python benchmarks/start.py PACK [PACK ...] [--turns 5] [--check SECONDS [SECONDS ...]]

For each pack, medians of some turns with its files in the kernel's cache: seconds from the start of
the process to the first bytes of the answer, with all rungs and, given a floor of 3 bits per
weight, with as many as that needs (the others follow beside the answer). Beside them what limits
these: starting Python, importing what `pliant run` imports, reading the plies at the rate that
copying from the kernel's cache has, and the prompt. And the resident set without weights and KV.
`--check` ends with status 1 if the first token takes longer, with all rungs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pliant.cli.common import table
from pliant.sizes import MIB, format_mb
from pliant.store import Pack

PROMPT = "Why is the sky blue?"
FLOOR = "3"  # bits per weight
IMPORTS = "import pliant.cli, pliant.cli.run, pliant.engine.loading, pliant.engine.control_socket"


def seconds(command: list[str]) -> float:
    """From the start of a process to its first bytes."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        found = time.perf_counter() - begin
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}, and no answer")
    return found


def copied(paths: list[Path]) -> float:
    """Seconds that copying files out of the kernel's cache takes."""
    buffer = bytearray(MIB)
    begin = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def measure(path: str, turns: int) -> dict[str, Any]:
    """The figures of one pack; seconds, and bytes."""
    run = [sys.executable, "-m", "pliant", "run", path, "-p", PROMPT, "--max-tokens", "1"]
    pack = Pack.open(path)
    files = sorted({pack.rung_location(rung).path for rung in range(pack.rungs_available)})
    shown = json.loads(subprocess.run([*run, "--json"], check=True, capture_output=True).stdout)
    ledger = shown["report"]["ledger"]
    steps = {
        "python": lambda: seconds([sys.executable, "-c", "print()"]),
        "imports": lambda: seconds([sys.executable, "-c", f"{IMPORTS}; print()"]),
        "plies": lambda: copied(files),
        "first token": lambda: seconds(run),
        "from the floor": lambda: seconds([*run, "--min-bits", FLOOR]),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            times[name].append(step())
    found: dict[str, Any] = {name: statistics.median(every) for name, every in times.items()}
    found["imports"] -= found["python"]
    found["prompt"] = shown["result"]["prefill_seconds"]
    model = sum(ledger[owner]["touched"] for owner in ("weights", "kv"))
    found["besides"] = shown["report"]["peak"] - model
    found["weights"] = ledger["weights"]["touched"]
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packs", metavar="PACK", nargs="+")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--check", type=float, nargs="+", help="most seconds to the first token, for each pack"
    )
    options = parser.parse_args()
    if options.check and len(options.check) != len(options.packs):
        parser.error("--check wants a number for each pack")
    names = ("first token", "from the floor", "python", "imports", "plies", "prompt")
    rows = []
    slow = False
    for number, path in enumerate(options.packs):
        found = measure(path, options.turns)
        times = [f"{found[name]:.3f}" for name in names]
        sizes = format_mb(found["weights"]), f"{found['besides'] / MIB:.1f} MiB"
        rows.append([Path(path).name, sizes[0], *times, sizes[1]])
        slow |= bool(options.check) and found["first token"] > options.check[number]
    print(table(("pack", "weights", *names, "besides"), rows, left=1))
    print("\ntimes in seconds")
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
