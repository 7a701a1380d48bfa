"""Random budgets while sequences generate without pause."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import pliant
from budgets.common import TOLERANCE, Answers, Others, summary
from pliant.sizes import MIB

__all__ = ["walk"]

MOST_MS = 50.0
"""The 99th percentile of the time in which a change is acknowledged may be this."""

SAMPLER = """if True:
    import sys, time
    path, out = f"/proc/{sys.argv[1]}/statm", open(sys.argv[2], "w")
    due = time.monotonic()
    while True:
        try:
            pages = open(path).read().split()[1]
        except OSError:
            break
        print(time.monotonic(), int(pages) * 4096, file=out)
        due = max(due + 0.01, time.monotonic() - 0.01)
        out.flush()
        time.sleep(max(due - time.monotonic(), 0))
"""

Limit = tuple[float, float, int]  # asked, acknowledged, budget


def walk(options: argparse.Namespace) -> dict[str, Any]:
    """The promise on a real pack."""
    rng = np.random.default_rng(options.seed)
    samples = Path(f"/tmp/pliant-rss-{os.getpid()}")
    limits: list[Limit] = []
    shrinks, grows, whole = [], [], []
    length = 256
    wish: dict[str, Any] = {"context": length, "sessions": options.sessions, "chat": False}
    wish["kv_bits"] = 16 if options.kv_bits == "16" else options.kv_bits
    with pliant.load(options.pack, **wish) as model:
        least, most = model.least_plan().total, model.plan.total
        model.budget = most
        sampler = subprocess.Popen([sys.executable, "-c", SAMPLER, str(os.getpid()), samples])
        others, overtaken, start = Others(), 0, time.monotonic()
        with Answers(model, options.sessions, length) as answers:
            for size in rng.integers(least, most + 1, options.changes).tolist():
                before = model.budget or 0
                begin = time.monotonic()
                change = model.move(memory=size)
                end = time.monotonic()
                limits.append((begin, end, size))
                (shrinks if size < before else grows).append(end - begin)
                if rng.random() < 0.1:  # the others are overtaken by the next
                    overtaken += not change.wait(60)
                    if size > before:
                        whole.append(time.monotonic() - begin)
                time.sleep(float(rng.exponential(0.02)))
            last = time.monotonic()
        sampler.terminate()
        sampler.wait()
        if answers.error is not None:
            raise answers.error
        target = (least + most) // 2
        model.budget = target
        depth = model.depth
        audit = model.audit()
        logits = model.logits(list(range(3, 67)))
    rows = [line.split() for line in samples.read_text().splitlines()]
    samples.unlink()
    over, counted = _over([(float(t), int(r)) for t, r in rows[:-1]], limits, most, last)
    wish |= {"weights": depth.weights, "kv_bits": depth.kv_bits}
    with pliant.load(options.pack, **wish) as fresh:
        if fresh.depth.kv_bits != depth.kv_bits:
            raise SystemExit(f"a fresh model has {fresh.depth}, and not {depth}")
        same = bool(np.array_equal(fresh.logits(list(range(3, 67))), logits))
    step = summary([b - a for a, b in answers.steps])
    result: dict[str, Any] = {
        "pack": str(options.pack),
        "budgets": [least, most],
        "changes": len(limits),
        "seconds": last - start,
        "sequences": options.sessions,
        "steps": len(answers.steps),
        "step_ms": step,
        "answers_finished": len(answers.finished),
        "answers_of_wrong_length": sum(n != length for n in answers.finished),
        "acknowledged_ms": summary(shrinks + grows),
        "shrink_acknowledged_ms": summary(shrinks),
        "growth_acknowledged_ms": summary(grows),
        "growth_done_ms": summary(whole),
        "waited_for_and_overtaken": overtaken,
        "samples": counted,
        "most_over_budget_mib": over / MIB,
        "audit_difference_mib": audit.difference / MIB,
        "same_logits_as_a_fresh_load": same,
        "others": others.part(),
    }
    result["kept"] = (
        same
        and over <= TOLERANCE
        and result["acknowledged_ms"]["p99"] <= MOST_MS
        and not result["answers_of_wrong_length"]
        and audit.ok
    )
    return result


def _over(
    samples: list[tuple[float, int]], limits: list[Limit], most: int, last: float
) -> tuple[int, int]:
    """The most bytes above the budget in any sample, and how many samples counted."""
    over, counted, n = -(2**62), 0, -1
    for now, resident in samples:
        while n + 1 < len(limits) and limits[n + 1][0] <= now:
            n += 1
        if n < 0 or now > last:
            continue
        # Until a change is acknowledged, the larger of both budgets holds.
        bound = limits[n][2]
        if now < limits[n][1]:
            bound = max(bound, limits[n - 1][2] if n else most)
        over, counted = max(over, resident - bound), counted + 1
    return over, counted
