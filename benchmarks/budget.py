"""Does a budget that moves keep its promises? On a real pack, and on a random one of 1 GB.

    python benchmarks/budget.py walk PACK [--changes N] [--sessions N] [--kv-bits auto] [--json]
    python benchmarks/budget.py large DIRECTORY [--repeat N] [--json]
    python benchmarks/budget.py floor DIRECTORY [--json]
    python benchmarks/budget.py pressure PACK [--bursts N] [--spare MIB] [--json]
    python benchmarks/budget.py plans PACK [--memory SIZE ...] [--json]

walk     some sequences generate without pause while random budgets between the least and all of it
         are set. A second process samples the resident set of this one every 10 ms. Afterwards the
         logits are compared with those of a fresh load.
large    makes a random pack of a billion parameters in DIRECTORY if it is not there (1 GB), halves
         its weights, and grows back, while one sequence generates. Beside the rate of growth stand
         those of plain reads past the cache of the kernel, of one thread with nothing else going
         on: into memory that it has, which is the rate of the disk, and of the same bytes into new
         memory, which is what a growth does. Just before each growth: touching memory that a
         virtual machine has given back to its host costs many times what it costs otherwise.
         Within reach is the least of the disk and of what such a thread reads into new memory in
         the time of the processors that decoding may lose: 0.3 of each, and one at most.
floor    what the disk, the kernel and the processors need for the same.
pressure another process takes memory in bursts, with memory="auto"; on the real machine, so what
         other programs take counts too.
plans    what `pliant plan` says beside the resident set of a process that has filled its context.

Exit status 1 if a promise was broken. Other programs on the machine disturb times: `others` is the
part of all processors that they had meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from budgets.large import floor, large
from budgets.pressure import plans, pressure
from budgets.walk import walk


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "\n    ".join(("", *map(_text, value)))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run one of them; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.add_argument("pack", type=Path)
        command.add_argument("--json", action="store_true")
        command.set_defaults(run=run)
        return command

    command = add("walk", walk)
    command.add_argument("--changes", type=int, default=1000)
    command.add_argument("--sessions", type=int, default=8)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--kv-bits", choices=("16", "auto"), default="16")
    add("large", large).add_argument("--repeat", type=int, default=5)
    add("floor", floor)
    command = add("pressure", pressure)
    command.add_argument("--bursts", type=int, default=2)
    command.add_argument(
        "--spare", type=int, default=256, help="MiB that are free beyond keep-free before a burst"
    )
    command.add_argument(
        "--patience", type=float, default=180, help="seconds to wait for full depth"
    )
    command = add("plans", plans)
    command.add_argument("--memory", nargs="+", default=["130MiB", "170MiB", "230MiB"])
    options = parser.parse_args()
    result = options.run(options)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            if name != "turns" or not isinstance(value, list):
                print(f"{name:32}{_text(value)}")
    return 0 if result.get("kept", True) else 1


if __name__ == "__main__":
    sys.exit(main())
