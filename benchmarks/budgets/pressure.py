"""Another program takes memory in bursts, and the budget follows; and plans beside what is true."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from typing import Any

import pliant
from budgets.common import TOLERANCE, Answers, Others
from pliant.memory.pressure import Sources
from pliant.sizes import MIB

__all__ = ["plans", "pressure"]

LATE = 1.0
"""Seconds for which less than asked for may be free."""

TURNS = 2
"""Changes of direction in a minute."""

TAKER = """if True:
    import sys
    for line in sys.stdin:
        held = bytearray(int(line))
        held[::4096] = b"x" * len(held[::4096])
        print("done", flush=True)
"""


class _Watch:
    """What is available and what the budget is, every 20 ms, in a thread of its own."""

    def __init__(self, model: pliant.Model) -> None:
        self.samples: list[tuple[float, int, int]] = []  # time, available, budget
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        sources = Sources()
        while not self._stop.wait(0.02):
            available = sources.read().available
            self.samples.append((time.monotonic(), available, self._model.budget or 0))

    def longest_below(self, size: int, begin: float) -> float:
        """Seconds in a row in which less than `size` was available."""
        longest, since = 0.0, None
        for now, available, _ in self.samples:
            if now < begin:
                continue
            if available >= size:
                since = None
            else:
                since = now if since is None else since
                longest = max(longest, now - since)
        return longest

    def turns_in_a_minute(self) -> tuple[int, int]:
        """How often the budget changed its direction in all, and at most within a minute."""
        turns, direction, before = [], 0, 0
        for now, _, budget in self.samples:
            if before and budget != before:
                new = 1 if budget > before else -1
                if direction and new != direction:
                    turns.append(now)
                direction = new
            before = budget
        return len(turns), max((sum(t <= s < t + 60 for s in turns) for t in turns), default=0)


def pressure(options: argparse.Namespace) -> dict[str, Any]:
    """Bursts of another process, with `memory="auto"`, while a sequence generates."""
    lines: list[str] = []
    with pliant.load(options.pack, context=512, chat=False) as model:
        most, least = model.plan.total, model.least_plan().total
    spare, give = options.spare * MIB, (most - least) * 2 // 3
    seen, others = Sources().read(), Others()
    # With everything loaded, `spare` more is free than asked for.
    keep_free = seen.resident + seen.available - most - spare
    taker = subprocess.Popen(
        [sys.executable, "-c", TAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert taker.stdin is not None
    assert taker.stdout is not None

    def take(size: int) -> float:
        assert taker.stdin is not None
        assert taker.stdout is not None
        begin = time.monotonic()
        print(size, file=taker.stdin, flush=True)
        taker.stdout.readline()
        return time.monotonic() - begin

    bursts = []
    with pliant.load(
        options.pack, memory="auto", keep_free=keep_free, context=512, chat=False, log=lines.append
    ) as model:
        full = model.depth.rungs
        with Answers(model, 1, 400) as answers, _Watch(model) as watch:
            for _ in range(options.bursts):
                time.sleep(2)
                begin = time.monotonic()
                taken = take(spare + give)
                time.sleep(5)
                low = model.depth.rungs
                late = watch.longest_below(keep_free, begin)
                take(1)
                freed = time.monotonic()
                while model.depth.rungs < full and time.monotonic() < freed + options.patience:
                    time.sleep(0.1)
                bursts.append(
                    {
                        "taken_in_s": taken,
                        "longest_below_keep_free_s": late,
                        "rungs": [full, low, model.depth.rungs],
                        "back_after_s": time.monotonic() - freed,
                    }
                )
                print(json.dumps(bursts[-1]), file=sys.stderr)
            turns, in_a_minute = watch.turns_in_a_minute()
        if answers.error is not None:
            raise answers.error
    taker.stdin.close()
    taker.wait()
    worst = max(burst["longest_below_keep_free_s"] for burst in bursts)
    return {
        "pack": str(options.pack),
        "keep_free": keep_free,
        "burst": spare + give,
        "bursts": bursts,
        "steps": len(answers.steps),
        "longest_below_keep_free_s": worst,
        "turns": turns,
        "turns_in_a_minute": in_a_minute,
        "log": lines,
        "others": others.part(),
        "kept": worst <= LATE
        and in_a_minute <= TURNS
        and all(burst["rungs"][1] < full == burst["rungs"][2] for burst in bursts),
    }


FILL = """if True:
    import json, sys
    import pliant
    options = json.loads(sys.argv[2])
    with pliant.load(sys.argv[1], chat=False, **options) as model:
        for _ in range(model.plan.sessions):
            model.session().feed([5] * model.context)
        report = model.report()
        print(json.dumps([report.resident, report.peak]))
"""


def plans(options: argparse.Namespace) -> dict[str, Any]:
    """What `pliant plan` says beside the resident set of a process that has filled its context."""
    rows = []
    for memory in options.memory:
        for context, sessions in ((None, 1), (512, 4)):
            wish = {"memory": memory, "sessions": sessions}
            if context is not None:
                wish["context"] = context
            words = [word for key in wish for word in (f"--{key}", str(wish[key]))]
            command = [sys.executable, "-m", "pliant", "plan", str(options.pack), *words, "--json"]
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode:
                rows.append({**wish, "refused": told.stderr.splitlines()[:1]})
                continue
            planned = json.loads(told.stdout)["plan"]["total"]
            ran = subprocess.run(
                [sys.executable, "-c", FILL, str(options.pack), json.dumps(wish)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            resident, peak = json.loads(ran.stdout)
            off = planned - resident
            rows.append(
                {
                    **wish,
                    "planned_mib": planned / MIB,
                    "resident_mib": resident / MIB,
                    "peak_mib": peak / MIB,
                    "off_mib": off / MIB,
                    "off_part": off / planned,
                    "kept": abs(off) <= max(TOLERANCE, 0.03 * planned),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {
        "pack": str(options.pack),
        "plans": rows,
        "kept": all(row.get("kept", True) for row in rows) and any("kept" in row for row in rows),
    }
