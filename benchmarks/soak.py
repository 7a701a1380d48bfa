"""Does a busy server keep its promises? ``python benchmarks/soak.py PACK [--seconds N]``.

Many clients at once ask for streams of random lengths, with beginnings that some of them share; one
in five leaves in the middle. Meanwhile the budget moves at random between the least and all of the
model. A second process samples the resident set of the server every 10 ms. In the end

- every answer has ended as it should,
- answers that were made at one depth are those that the model makes alone at that depth,
- no page is in use and nothing is parked, and the ledger agrees with the kernel,
- the resident set was never more than 8 MiB above the budget, and the server ends with status 0.

Exit status 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pliant
from budgets.common import TOLERANCE
from budgets.walk import SAMPLER
from clients import Answer, Running, pliant_server
from pliant.memory.plan import bits_per_weight

LEAVE = 0.2  # of the clients
SLACK = 0.05  # seconds between a move and a sample that are not told apart


@dataclass
class Move:
    """A change of the budget: when it was asked for and when it was answered, in seconds."""

    asked: float
    answered: float
    budget: int


@dataclass
class Soak:
    """A run against one server, and what came of it."""

    server: Running
    seconds: float
    most_prompt: int
    most_answer: int
    vocab: int
    seed: int = 1
    counted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    whole: list[tuple[dict[str, Any], Answer]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    least: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        rng = random.Random(self.seed)
        self._beginnings = [self._ids(rng, rng.randrange(self.most_prompt // 2)) for _ in range(4)]
        self._end = 0.0

    def run(self, clients: int) -> None:
        """All of it."""
        state = self.server.send("GET", "/v1/budget")[1]
        self.least, self.most = state["least"], state["most"]
        self._set(self.most)
        if not self.moves:
            raise RuntimeError("the server does not take the largest budget")
        self._end = time.monotonic() + self.seconds
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]
        threads.append(threading.Thread(target=self._budgets))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ids(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(3, self.vocab) for _ in range(count)]

    def _body(self, rng: random.Random) -> dict[str, Any]:
        start = rng.choice(self._beginnings) if rng.random() < 0.5 else []
        own = self._ids(rng, rng.randrange(1, self.most_prompt // 2))
        return {
            "prompt": start + own,
            "max_tokens": rng.randrange(1, self.most_answer),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(2**32),
            "priority": rng.choice([0, 0, 0, -1]),
            "ignore_eos": True,
        }

    def _client(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        while time.monotonic() < self._end:
            body = self._body(rng)
            pieces = rng.randrange(30) if rng.random() < LEAVE else None

            def leave(answer: Answer, pieces: int | None = pieces) -> bool:
                return pieces is not None and len(answer.events) > pieces

            try:
                answer = self.server.stream(body, leave=leave)
            except (OSError, ValueError) as error:
                self._note("broken", f"{type(error).__name__}: {error}")
                continue
            if answer.status == 429:
                self._note("refused: queue full")
                time.sleep(0.5)
            elif answer.status != 200 or answer.error is not None:
                self._note("error", f"{answer.status}: {answer.events[-1]}")
            elif answer.done and answer.reason == "length":
                self._note("whole")
                with self._lock:
                    self.whole.append((body, answer))
            elif pieces is not None and not answer.done:
                self._note("left")
            else:
                self._note("cut", f"done {answer.done}, finish_reason {answer.reason}")

    def _budgets(self) -> None:
        rng = random.Random(self.seed)
        while time.monotonic() < self._end:
            time.sleep(rng.uniform(0.5, 4.0))
            self._set(int(self.least + (self.most - self.least) * rng.random() ** 2))
        self._set(self.most)

    def _set(self, budget: int) -> None:
        asked = time.monotonic()
        status, reply = self.server.send("PUT", "/v1/budget", {"memory": budget})
        if status == 200:
            self.moves.append(Move(asked, time.monotonic(), budget))
            self._note("budgets")
        elif status == 409:
            self._note("refused: budget too small")
        else:
            self._note("error", f"budget: {status} {reply}")

    def _note(self, what: str, wrong: str | None = None) -> None:
        with self._lock:
            self.counted[what] += 1
            if wrong is not None:
                self.wrong.append(wrong)

    # --- afterwards

    def over(self, samples: list[tuple[float, int]]) -> int:
        """Bytes that the resident set was above the budget at most. `samples`: time and bytes."""
        worst, at = -(2**62), 0
        for when, resident in samples:
            while at + 1 < len(self.moves) and self.moves[at + 1].answered + SLACK < when:
                at += 1
            if when < self.moves[0].answered + SLACK:
                continue
            allowed = self.moves[at].budget
            for move in self.moves[at + 1 : at + 3]:
                if move.asked <= when:
                    allowed = max(allowed, move.budget)
            worst = max(worst, resident - allowed)
        return worst

    def settle(self) -> dict[str, Any]:
        """The state once nothing runs any more."""
        end = time.monotonic() + 30
        while True:
            state: dict[str, Any] = self.server.send("GET", "/v1/state")[1]
            if (not state["running"] and not state["waiting"]) or time.monotonic() > end:
                break
            time.sleep(0.2)
        pages, budget = state["kv"], state["budget"]
        if state["running"] or state["waiting"]:
            self.wrong.append(f"{state['running']} run and {state['waiting']} wait for ever")
        if pages["pages"] != pages["kept"]:
            self.wrong.append(f"{pages['used'] - pages['kept']} pages are in use by nobody")
        if budget["parked"] or budget["parked_bytes"]:
            self.wrong.append(f"{budget['parked']} sequences are parked for nobody")
        touched = sum(one["touched"] for one in budget["ledger"].values())
        if abs(touched - budget["resident"]) > 2 * TOLERANCE:
            self.wrong.append(f"the ledger has {touched}, the kernel {budget['resident']}")
        return state


def compare(pack: str, whole: list[tuple[dict[str, Any], Answer]], most: int) -> dict[str, int]:
    """Make answers again, alone, at the depth that they say they were made at.

    At most `most` of those that were made at one depth, spread over the depths.
    """
    depths: dict[float, list[tuple[dict[str, Any], Answer]]] = {}
    for body, answer in whole:
        made = next(event["pliant"] for event in answer.events if "pliant" in event)
        if made["bits_per_weight"] == made["bits_per_weight_lowest"]:
            depths.setdefault(made["bits_per_weight"], []).append((body, answer))
    one_depth = sum(map(len, depths.values()))
    chosen: list[tuple[float, dict[str, Any], Answer]] = []
    while len(chosen) < most and any(depths.values()):
        for bits, found in depths.items():
            if found and len(chosen) < most:
                chosen.append((bits, *found.pop()))
    chosen.sort(key=lambda item: item[0])
    result = {"one_depth": one_depth, "depths": len(depths), "compared": 0, "different": 0}
    with pliant.load(pack, chat=False) as model:
        sizes = model._sizes
        known = {bits_per_weight(size, sizes.coded): size for size in sizes.weights}
        for bits, body, answer in chosen:
            if model.depth.bits_per_weight != bits:
                model.resize(weights=known[bits])
            names = ("max_tokens", "temperature", "seed", "ignore_eos")
            alone = model.generate(body["prompt"], **{name: body[name] for name in names})
            result["compared"] += 1
            result["different"] += "".join(alone) != answer.text
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pack")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=300, help="most tokens of a prompt")
    parser.add_argument("--answer", type=int, default=120, help="most tokens of an answer")
    parser.add_argument("--compare", type=int, default=100, help="most answers that are made again")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.prompt + args.answer > 512:
        parser.error("prompt and answer must fit into 512 tokens, which the least budget holds")
    with pliant.load(args.pack, chat=False) as model:
        vocab = model.pack.manifest.model.vocab
    server = pliant_server(
        sys.executable, args.pack, "--running", str(args.running), log=sys.stderr
    )
    with tempfile.TemporaryDirectory() as folder, server:
        out = Path(folder) / "samples"
        command = [sys.executable, "-S", "-c", SAMPLER, str(server.pid), str(out)]
        sampler = subprocess.Popen(command)
        try:
            soak = Soak(server, args.seconds, args.prompt, args.answer, vocab)
            soak.run(args.clients)
            state = soak.settle()
        finally:
            sampler.terminate()
            sampler.wait()
        samples = [
            (float(when), int(size))
            for when, size in (line.split() for line in out.read_text().splitlines()[:-1])
        ]
        status = server.close()
    if status != 0:
        soak.wrong.append(f"the server ended with {status}")
    over = soak.over(samples)
    if over > TOLERANCE:
        soak.wrong.append(f"the resident set was {over} bytes above the budget")
    compared = compare(args.pack, soak.whole, args.compare)
    if compared["different"]:
        soak.wrong.append(f"{compared['different']} answers are not those made alone")
    if not soak.counted["whole"] or not compared["compared"]:
        soak.wrong.append("nothing was made that can be compared")
    counters = state["counters"]
    result = {
        "seconds": args.seconds,
        "clients": args.clients,
        **soak.counted,
        **compared,
        "samples": len(samples),
        "over_budget": over,
        "slowest_move_seconds": max(one.answered - one.asked for one in soak.moves),
        "least": soak.least,
        "most": soak.most,
        **{name: counters[name] for name in ("preemptions", "resumed_tokens", "answer_tokens")},
        "wrong": soak.wrong[:20],
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:26} {value}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
