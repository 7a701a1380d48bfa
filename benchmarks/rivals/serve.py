"""Two servers in turns: ``python benchmarks/rivals/serve.py PACK --file GGUF --text FILE``.

Both servers run on loopback all the time. In each round first one and then the other gets as many
clients at once as ``--clients`` says; each sends a prompt of ``--prompt`` tokens and reads a stream
of ``--answer`` tokens. What the machine does meanwhile befalls both. Prompts are cut from the text,
and no two of them begin alike, so neither can use what it computed before.

pliant gets as many bytes of weights as the GGUF file has, and each of ``--weights`` besides.
llama-cpp-python's server runs in the Python that ``--llama-python`` names; it does one request
after the other, and is told not to break one off for the next.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import load_average, machine, markdown, read_bandwidth, write_json

sys.path.append(str(Path(__file__).resolve().parents[1]))
from clients import Answer, Running, free_port, pliant_server


def llama_server(python: str, file: Path, threads: int, context: int) -> Running:
    """llama-cpp-python's server, as fast as it can be."""
    port = free_port()
    command = [python, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port)]
    options = {
        "--host": "127.0.0.1",
        "--n_threads": threads,
        "--n_threads_batch": threads,
        "--n_ctx": context,
        "--interrupt_requests": False,  # otherwise a new stream ends the one before
        "--verbose": False,
    }
    for name, value in options.items():
        command += [name, str(value)]
    return Running(command, port, "/v1/models")


class Prompts:
    """Texts of so many tokens each, cut from a file; none is given out twice."""

    def __init__(self, server: Running, text: str, tokens: int) -> None:
        self._server = server
        self._ids = server.send("POST", "/tokenize", {"prompt": text})[1]["tokens"]
        self._tokens = tokens
        self._at = 0

    def take(self) -> str:
        """The next one; IndexError at the end of the file."""
        ids = self._ids[self._at : self._at + self._tokens]
        if len(ids) < self._tokens:
            raise IndexError("the text is too short for so many prompts")
        self._at += self._tokens
        prompt: str = self._server.send("POST", "/detokenize", {"tokens": ids})[1]["prompt"]
        return prompt


def ask_all(server: Running, bodies: list[dict[str, Any]]) -> tuple[list[Answer], float]:
    """What comes back when all are asked at once, and the seconds until the last has ended."""
    answers: list[Answer] = []

    def ask(body: dict[str, Any]) -> None:
        answers.append(server.stream(body))

    threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - begin


class Racer:
    """One of the servers, and what was measured of it."""

    def __init__(self, name: str, server: Running, body: dict[str, Any], tokens: int) -> None:
        self.name = name
        self.server = server
        self.rounds: list[dict[str, float]] = []
        self._body = body
        self._tokens = tokens

    def run(self, prompts: list[str], *, count: bool) -> None:
        """One round."""
        bodies = [{**self._body, "prompt": prompt} for prompt in prompts]
        answers, seconds = ask_all(self.server, bodies)
        for answer in answers:
            if not (answer.done and answer.reason == "length"):
                raise RuntimeError(f"{self.name}: {answer.status}, {answer.reason}")
        if len(answers) != len(prompts):
            raise RuntimeError(f"{self.name}: {len(prompts) - len(answers)} clients failed")
        if count:
            self.rounds.append(
                {
                    "seconds": seconds,
                    "answer_tokens_per_second": len(prompts) * self._tokens / seconds,
                    "first_token_median": statistics.median(one.times[0] for one in answers),
                    "first_token_last": max(one.times[0] for one in answers),
                }
            )

    def median(self, kind: str) -> float:
        """Over the rounds."""
        return statistics.median(one[kind] for one in self.rounds)

    def ratio(self, rival: Racer, kind: str) -> float:
        """Median over the rounds of what this has to what the other has."""
        pairs = zip(self.rounds, rival.rounds, strict=True)
        return statistics.median(mine[kind] / other[kind] for mine, other in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pack")
    parser.add_argument("--file", type=Path, required=True, help="GGUF file of llama.cpp")
    parser.add_argument("--text", type=Path, required=True, help="prompts are cut from it")
    parser.add_argument("--weights", nargs="*", default=[], help="more sizes of the pack")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--answer", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="status 1 below 4 times, a third")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    body = {"model": "served", "max_tokens": args.answer, "temperature": 0}
    context = 2048
    sessions = -(-args.clients * (args.prompt + args.answer + 64) // context)
    options = [
        *("--name", "served", "--threads", str(args.threads), "--running", str(args.clients)),
        *("--context", str(context), "--sessions", str(sessions)),
    ]
    racers: list[Racer] = []
    try:
        rival = llama_server(args.llama_python, args.file, args.threads, context)
        wants = {**body, "min_tokens": args.answer}
        racers.append(Racer(f"llama.cpp {args.file.stem}", rival, wants, args.answer))
        for size in [str(args.file.stat().st_size), *args.weights]:
            server = pliant_server(sys.executable, args.pack, *options, "--weights", size)
            wants = {**body, "ignore_eos": True}
            racers.append(Racer(f"pliant {int(size) / 1e6:.1f} MB" if size.isdigit()
                                else f"pliant {size}", server, wants, args.answer))  # fmt: skip
        prompts = Prompts(racers[1].server, args.text.read_text("utf-8"), args.prompt)
        bandwidth = read_bandwidth(args.threads)
        for number in range(args.rounds + 1):
            for racer in racers:
                # First a round of two, which is not counted.
                texts = [prompts.take() for _ in range(args.clients if number else 2)]
                racer.run(texts, count=number > 0)
                if number:
                    rate = racer.rounds[-1]["answer_tokens_per_second"]
                    print(f"round {number}: {racer.name} {rate:.0f} tokens/s", file=sys.stderr)
        results = [_result(racer, racers[0]) for racer in racers]
    finally:
        for racer in racers:
            racer.server.close()
    rows = [
        [
            one["name"],
            f"{one['answer_tokens_per_second']:.0f}",
            f"{one['first_token_median']:.2f} s",
            f"{one['throughput_ratio']:.1f}",
            f"{one['first_token_ratio']:.2f}",
            f"{one['resident'] / 1e6:.0f} MB",
        ]
        for one in results
    ]
    head = ["", "answer tokens/s", "first token, median", "times", "of its time", "resident set"]
    print(markdown(head, rows))
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, load {load_average()}")
    if args.out:
        about = {"clients": args.clients, "prompt": args.prompt, "answer": args.answer}
        about |= {"threads": args.threads, "bandwidth": bandwidth, "rounds": args.rounds}
        write_json(args.out, {"machine": machine(), **about, "results": results})
    same = results[1]
    met = same["throughput_ratio"] >= 4 and same["first_token_ratio"] <= 1 / 3
    return 0 if met or not args.check else 1


def _result(racer: Racer, rival: Racer) -> dict[str, Any]:
    kinds = ("answer_tokens_per_second", "first_token_median", "first_token_last")
    return {
        "name": racer.name,
        **{kind: racer.median(kind) for kind in kinds},
        "throughput_ratio": racer.ratio(rival, "answer_tokens_per_second"),
        "first_token_ratio": racer.ratio(rival, "first_token_median"),
        "resident": racer.server.resident(),
        "rounds": racer.rounds,
    }


if __name__ == "__main__":
    sys.exit(main())
