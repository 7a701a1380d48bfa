"""The programs of `benchmarks/` that watch a server, on a small random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import write_tiny_pack

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("soak")
    return write_tiny_pack(folder / "tiny.pack", least=2, context=2048, layers=30)


def result_of(script: str, *arguments: str | Path) -> Any:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_a_busy_server_keeps_its_promises(pack: Path) -> None:
    result = result_of("soak.py", pack, "--seconds", "15", "--clients", "64", "--compare", "150")
    assert result["wrong"] == []
    assert result["different"] == 0
    assert result["compared"] >= 50
    assert result["left"] > 0
    assert result["budgets"] >= 4
    assert result["preemptions"] > 0
    assert result["resumed_tokens"] > 0


def test_what_a_hundred_requests_share_is_computed_once(pack: Path) -> None:
    result = result_of("server.py", "shared", pack)["shared"]
    assert result["met"]
    assert result["computed"] <= 0.15 * 100 * 1020


def test_thousands_of_bad_requests_get_a_reason(pack: Path) -> None:
    result = result_of("server.py", "hostile", pack)["hostile"]
    assert result["wrong"] == []
    assert result["requests"] == sum(result["statuses"].values()) == 4000
    assert set(result["statuses"]) <= {"200", "400", "404", "409", "413", "415", "429", "504"}
    assert result["good_client"] > 0
