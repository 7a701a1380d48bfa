"""One pack, three sizes: asks the same question in three processes with three budgets.

    python examples/demo.py PACK

Each run is `pliant run PACK --memory SIZE -p QUESTION`; the resident set is the peak that the
kernel measured for that process.
"""

from __future__ import annotations

import json
import subprocess
import sys

QUESTION = "What is the capital of France, and what is it known for?"


def run(pack: str, memory: str) -> dict[str, object]:
    command = [sys.executable, "-m", "pliant", "run", pack, "--memory", memory, "-p", QUESTION]
    command += ["--max-tokens", "60", "--temperature", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def main() -> None:
    pack = sys.argv[1]
    print(f"{QUESTION}\n")
