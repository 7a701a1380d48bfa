"""Does a budget that moves keep its promises? On a real pack, and on a random one of 1 GB.

    python benchmarks/budget.py walk PACK [--changes N] [--sessions N] [--json]
    python benchmarks/budget.py large DIRECTORY [--repeat N] [--json]

walk   some sequences generate without pause while random budgets between the least and all of it
       are set. A second process samples the resident set of this one every 10 ms. Afterwards the
       logits are compared with those of a fresh load. Exit status 1 if a promise was broken.
large  makes a random pack of a billion parameters in DIRECTORY if it is not there (1 GB), halves
       its weights, and grows back, while one sequence generates. The rate of growth stands beside
       that of a plain read of the same bytes into new memory just before, past the cache of the
       kernel. Just before, since a virtual machine gives memory that was free for some seconds back
       to its host, and touching it again then costs many times what it costs otherwise.

Other programs on the machine disturb these figures: `others` is the part of all processors that
they had meanwhile.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import pliant
from pliant.sizes import MIB

TOLERANCE = 8 * MIB

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


class Others:
    """The part of all processors that other programs use, from here on."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
        return (
            (sum(fields) - fields[3] - fields[4]) / ticks,
            time.process_time(),
            sum(fields) / ticks,
        )

    def part(self) -> float:
        """From 0 to 1."""
        busy, mine, total = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        return max(busy - mine, 0) / max(total, 1e-9)


class Answers:
    """Sequences that are continued in common steps, each with the likeliest token, without end."""

    def __init__(self, model: pliant.Model, count: int, length: int) -> None:
        self.model = model
        self.length = length
        self.steps: list[tuple[float, float]] = []
        self.finished: list[int] = []
        self.error: BaseException | None = None
        self._count = count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Answers:
        self._thread.start()
        while len(self.steps) < 20 and self.error is None:
            time.sleep(0.01)
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            sessions = [self.model.session() for _ in range(self._count)]
            tokens = []
            for number, session in enumerate(sessions):
                assert session.reserve(self.length)
                # Different lengths, so that they do not all end at once.
                prompt = [number + 3] * (1 + number * self.length // self._count // 2)
                tokens.append(int(session.feed(prompt).argmax()))
            while not self._stop.is_set():
                begin = time.monotonic()
                rows = self.model.step_all(sessions, tokens)
                self.steps.append((begin, time.monotonic()))
                tokens = rows.argmax(-1).tolist()
                for session in sessions:
                    if len(session) >= self.length:
                        self.finished.append(len(session))
                        session.rewind([*session.tokens[:2], 0])
            for session in sessions:
                session.close()
        except BaseException as error:  # noqa: BLE001 - told by whoever waits
            self.error = error

    def speed(self, begin: float, end: float) -> float:
        """Steps a second between two moments, counted by their parts inside."""
        part = sum(
            (min(b, end) - max(a, begin)) / (b - a) for a, b in self.steps if b > begin and a < end
        )
        return part / (end - begin)

    def seconds(self, begin: float, end: float) -> float:
        """The median time of a step."""
        return statistics.median([b - a for a, b in self.steps if b >= begin and a <= end] or [0])


def summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    each = np.array(times) * 1e3
    values = (np.median(each), np.quantile(each, 0.99), each.max())
    return dict(zip(("median", "p99", "most"), map(float, values), strict=True))


def walk(options: argparse.Namespace) -> dict[str, Any]:
    """The promise on a real pack."""
    rng = np.random.default_rng(options.seed)
    samples = Path(f"/tmp/pliant-rss-{os.getpid()}")
    limits: list[tuple[float, float, int]] = []  # asked, acknowledged, budget
    shrinks, grows, all_of_it, whole = [], [], [], []
    length = 256
    with pliant.load(options.pack, context=length, sessions=options.sessions, chat=False) as model:
        least, most = model.least_plan().total, model.plan.total
        model.budget = most
        sampler = subprocess.Popen([sys.executable, "-c", SAMPLER, str(os.getpid()), samples])
        others, failed = Others(), 0
        with Answers(model, options.sessions, length) as answers:
            for size in rng.integers(least, most + 1, options.changes).tolist():
                before = model.budget or 0
                begin = time.monotonic()
                change = model.move(memory=size)
                end = time.monotonic()
                limits.append((begin, end, size))
                (shrinks if size < before else grows).append(end - begin)
                all_of_it.append(end - begin)
                if rng.random() < 0.1:  # the others are overtaken by the next
                    failed += not change.wait(60)
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
        weights = model.depth.weights
        audit = model.audit()
        logits = model.logits(list(range(3, 67)))
    rows = [line.split() for line in samples.read_text().splitlines()]
    samples.unlink()
    over, counted = -(2**62), 0
    for now, resident in ((float(t), int(r)) for t, r in rows[:-1]):
        known = [n for n, (begin, _, _) in enumerate(limits) if begin <= now]
        if not known or now > last:
            continue
        n = known[-1]
        # Until a change is acknowledged, the larger of both budgets holds.
        bound = limits[n][2]
        if now < limits[n][1]:
            bound = max(bound, limits[n - 1][2] if n else most)
        over, counted = max(over, resident - bound), counted + 1
    with pliant.load(options.pack, weights=weights, chat=False) as fresh:
        same = bool(np.array_equal(fresh.logits(list(range(3, 67))), logits))
    beyond = []
    for begin, end, _ in limits:
        running = [b for a, b in answers.steps if a < begin < b]
        beyond.append(end - max(begin, *running) if running else end - begin)
    result = {
        "pack": str(options.pack),
        "budgets": [least, most],
        "changes": len(limits),
        "sequences": options.sessions,
        "steps": len(answers.steps),
        "step_ms": summary([b - a for a, b in answers.steps]),
        "answers_finished": len(answers.finished),
        "answers_of_wrong_length": sum(n != length for n in answers.finished),
        "acknowledged_ms": summary(all_of_it),
        "acknowledged_after_the_step_ms": summary(beyond),
        "shrink_acknowledged_ms": summary(shrinks),
        "growth_acknowledged_ms": summary(grows),
        "growth_done_ms": summary(whole),
        "waited_for_and_overtaken": failed,
        "samples": counted,
        "most_over_budget_mib": over / MIB,
        "audit_difference_mib": audit.difference / MIB,
        "same_logits_as_a_fresh_load": same,
        "others": others.part(),
    }
    result["kept"] = (
        same
        and over <= TOLERANCE
        and result["acknowledged_ms"]["p99"] <= 50
        and not result["answers_of_wrong_length"]
        and audit.ok
    )
    return result


def make_large(path: Path) -> None:
    """A random pack of a billion parameters, 8 plies each."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import write_tiny_pack

    print(f"making {path}", file=sys.stderr)
    write_tiny_pack(
        path, vocab=32_000, hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192,
        context=2048, least=8, embed_block_rows=2048, rung_bytes=None, shard_bytes=128 * MIB,
    )  # fmt: skip


def forget(path: Path) -> None:
    """Take the files of a pack out of the kernel's cache."""
    for file in path.glob("plies-*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_rate(path: Path, size: int) -> float:
    """Bytes a second of reading the last `size` bytes of the shards into new memory."""
    shards = sorted(path.glob("plies-*"))[::-1]
    done, total = 0.0, 0
    with mmap.mmap(-1, size + 4 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory)
        for shard in shards:
            descriptor = os.open(shard, os.O_RDONLY | os.O_DIRECT)
            begin = time.perf_counter()
            while total < size and (got := os.readv(descriptor, [view[total : total + 4 * MIB]])):
                total += got
                if got % 4096:
                    break
            done += time.perf_counter() - begin
            os.close(descriptor)
            total = total // 4096 * 4096
        view.release()
    return total / done


def large(options: argparse.Namespace) -> dict[str, Any]:
    """A drop of half the weights of a large model, and the way back."""
    if not options.pack.exists():
        make_large(options.pack)
    turns: list[dict[str, float]] = []
    with pliant.load(options.pack, context=512, chat=False) as model:
        everything = model.depth.weights
        model.resize(weights=everything // 2)
        with Answers(model, 1, 400) as answers:
            for turn in range(2 * options.repeat):
                cold = turn % 2 == 0
                start = time.monotonic()
                time.sleep(1.0)
                before = answers.speed(start, time.monotonic())
                forget(options.pack)
                disk = read_rate(options.pack, everything // 2)
                if cold:
                    forget(options.pack)
                others = Others()
                begin = time.monotonic()
                change = model.move(weights=everything)
                change.wait()
                end = time.monotonic()
                part, during = others.part(), answers.speed(begin, end)
                time.sleep(0.5)
                asked = time.monotonic()
                model.move(weights=everything // 2)
                told = time.monotonic()
                turns.append(
                    {
                        "in_cache": float(not cold),
                        "disk_bytes_per_second": disk,
                        "growth_bytes_per_second": (everything - everything // 2) / (end - begin),
                        "decode_before": before,
                        "decode_during": during,
                        "shrink_acknowledged_ms": (told - asked) * 1e3,
                        "step_at_full_depth_ms": answers.seconds(end, asked) * 1e3,
                        "others": part,
                    }
                )
                print(json.dumps(turns[-1]), file=sys.stderr)
        if answers.error is not None:
            raise answers.error

    def middle(name: str, cold: bool | None = None) -> float:
        return statistics.median(t[name] for t in turns if cold is None or t["in_cache"] != cold)

    for turn_ in turns:
        turn_["growth_of_disk"] = turn_["growth_bytes_per_second"] / turn_["disk_bytes_per_second"]
        turn_["decode_kept"] = turn_["decode_during"] / turn_["decode_before"]
    names = [name for name in turns[0] if name != "in_cache"]
    return {
        "pack": str(options.pack),
        "weights": everything,
        "from_disk": {name: middle(name, cold=True) for name in names},
        "from_cache": {name: middle(name, cold=False) for name in names},
        "turns": turns,
    }


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run one of both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("walk")
    first.add_argument("pack", type=Path)
    first.add_argument("--changes", type=int, default=1000)
    first.add_argument("--sessions", type=int, default=8)
    first.add_argument("--seed", type=int, default=0)
    first.set_defaults(run=walk)
    second = commands.add_parser("large")
    second.add_argument("pack", type=Path, metavar="DIRECTORY")
    second.add_argument("--repeat", type=int, default=5)
    second.set_defaults(run=large)
    for command in (first, second):
        command.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = options.run(options)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            if name != "turns":
                print(f"{name:32}{_text(value)}")
    return 0 if result.get("kept", True) else 1


if __name__ == "__main__":
    sys.exit(main())
