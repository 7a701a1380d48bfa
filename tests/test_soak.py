"""The soak of `benchmarks/soak.py`, a short one on a small random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny import write_tiny_pack

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def test_a_busy_server_keeps_its_promises(tmp_path: Path) -> None:
    pack = write_tiny_pack(tmp_path / "tiny.pack", least=2, context=2048, layers=30)
    options = ["--seconds", "15", "--clients", "64", "--compare", "150", "--json"]
    done = subprocess.run(
        [sys.executable, str(SOAK), str(pack), *options],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert done.returncode == 0, done.stderr
    assert result["different"] == 0
    assert result["compared"] >= 50
    assert result["left"] > 0
    assert result["budgets"] >= 4
    assert result["preemptions"] > 0
    assert result["resumed_tokens"] > 0
