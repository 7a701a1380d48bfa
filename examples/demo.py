"""One pack, three sizes: asks the same question in three processes with three budgets.

    python examples/demo.py PACK

Each run is `pliant run PACK --memory SIZE --kv-bits auto -p QUESTION`; the peak is the largest
resident set that the kernel saw of that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

QUESTION = "What is the capital of France, and what is it known for?"
SIZES = ("125MiB", "150MiB", "200MiB")


def run(pack: str, memory: str) -> tuple[dict[str, Any], int]:
    """The answer of `pliant run --json` with this budget, and the peak of the process in bytes."""
    command = [sys.executable, "-m", "pliant", "run", pack, "--memory", memory, "-p", QUESTION]
    command += ["--kv-bits", "auto", "--max-tokens", "60", "--temperature", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answer = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(answer), usage.ru_maxrss * 1024


def main() -> None:
    pack = sys.argv[1]
    print(f"\n{QUESTION}\n")
    rows = []
    for memory in SIZES:
        began = time.monotonic()
        answer, peak = run(pack, memory)
        seconds = time.monotonic() - began
        print(f"--memory {memory}\n{answer['result']['text'].strip()}\n")
        rows.append(
            (
                memory,
                f"{peak / 2**20:.0f} MiB",
                f"{answer['report']['weights'] / 1e6:.1f} MB",
                f"{answer['result']['bits_per_weight']:.2f}",
                f"{answer['result']['kv_bits_lowest']:.2f}",
                f"{answer['result']['expected_kl']:.3g}",
                f"{answer['result']['tokens_per_second']:.0f}",
                f"{seconds:.1f} s",
            )
        )
    heads = ("memory", "peak", "weights", "bits", "KV bits", "expected KL", "tokens/s", "in all")
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
