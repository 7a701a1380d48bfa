"""Figures of the server, each with what it must be: ``python benchmarks/server.py WHAT ... PACK``.

long      a prompt of 4,000 tokens among 8 streams: the time between their tokens meanwhile, and
          in the 4 seconds before and after
shared    100 requests that begin with the same 1,000 tokens: prompt work, by the counters
schema    200 answers of a chat that must obey a JSON schema
idle      processor time without requests, and the resident set without weights and KV
hostile   thousands of requests that no client should send, while one client asks properly

`all` does all of them. Exit status 1 if one is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from clients import Answer, Running, percentile, pliant_server
from pliant.sizes import MIB

Result = dict[str, Any]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.(com|org)$"},
        "role": {"enum": ["reader", "writer", "editor"]},
        "address": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["city", "zip"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "email", "role", "address", "tags"],
    "additionalProperties": False,
}


def ids(rng: random.Random, count: int) -> list[int]:
    """Tokens that stand for any text; the first 3 of a vocabulary are often special."""
    return [rng.randrange(3, 250) for _ in range(count)]


def obeys(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is as SCHEMA and its like say: only what is used there is known."""
    import re

    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(obeys(item, schema["items"]) for item in value)
        )
    known = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(known)
        and all(obeys(item, known[key]) for key, item in value.items())
    )


# --- the figures


def long_prompt(server: Running) -> Result:
    """The median time between tokens of 8 streams while a long prompt is read, and before and
    after: it grows with what the streams have made, also without the prompt."""
    streams = 8
    times: list[list[float]] = [[] for _ in range(streams)]
    stop = threading.Event()

    def read(number: int) -> None:
        seen = times[number]

        def leave(answer: Answer) -> bool:
            if len(answer.times) > len(seen):
                seen.append(time.perf_counter())
            return stop.is_set()

        body = {"prompt": f"Story number {number}: once upon a time", "max_tokens": 3000}
        server.stream({**body, "ignore_eos": True, "seed": number}, leave=leave)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    time.sleep(5)
    begin = time.perf_counter()
    prompt = ids(random.Random(1), 4000)
    status, reply = server.send("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1})
    end = time.perf_counter()
    time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join()
    if status != 200:
        raise RuntimeError(f"the long prompt got {status}: {reply}")

    def gaps(first: float, last: float) -> list[float]:
        return [
            late - early
            for one in times
            for early, late in pairwise(one)
            if first <= early and late <= last
        ]

    before, during, after = gaps(begin - 4, begin), gaps(begin, end), gaps(end, end + 4)
    without = (statistics.median(before) + statistics.median(after)) / 2
    ratio = statistics.median(during) / without
    return {
        "prompt_seconds": end - begin,
        "between_tokens_before": statistics.median(before),
        "between_tokens_after": statistics.median(after),
        "between_tokens_during": statistics.median(during),
        "between_tokens_during_mean": statistics.mean(during),
        "between_tokens_during_p90": percentile(during, 0.9),
        "ratio": ratio,
        "met": ratio <= 2,
    }


def shared_prefix(server: Running) -> Result:
    """Tokens of prompts that were computed, of those of 100 separate requests."""
    rng, count = random.Random(2), 100
    beginning = ids(rng, 1000)
    bodies = [
        {"prompt": beginning + ids(rng, 20), "max_tokens": 4, "ignore_eos": True}
        for _ in range(count)
    ]
    before = server.send("GET", "/v1/state")[1]["counters"]
    begin = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        replies = pool.map(lambda one: server.send("POST", "/v1/completions", one), bodies)
        statuses = {status for status, _ in replies}
    seconds = time.perf_counter() - begin
    after = server.send("GET", "/v1/state")[1]["counters"]
    computed = after["prompt_tokens"] - before["prompt_tokens"]
    share = computed / (count * 1020)
    return {
        "seconds": seconds,
        "computed": computed,
        "found": after["cached_tokens"] - before["cached_tokens"],
        "share": share,
        "met": share <= 0.15 and statuses == {200},
    }


def schema_answers(server: Running) -> Result:
    """How many of 200 answers obey SCHEMA."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}

    def ask(number: int) -> bool:
        body = {
            "messages": [{"role": "user", "content": f"Invent person number {number}, as JSON."}],
            "response_format": form,
            "max_tokens": 600,
            "temperature": 1,
            "seed": number,
        }
        status, reply = server.send("POST", "/v1/chat/completions", body)
        if status != 200 or reply["choices"][0]["finish_reason"] != "stop":
            return False
        try:
            return obeys(json.loads(reply["choices"][0]["message"]["content"]), SCHEMA)
        except ValueError:
            return False

    begin = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        good = sum(pool.map(ask, range(200)))
    return {"obey": good, "of": 200, "seconds": time.perf_counter() - begin, "met": good == 200}


def idle(server: Running) -> Result:
    """What a server costs that nobody uses."""
    time.sleep(2)
    begin = server.cpu()
    time.sleep(10)
    used = server.cpu() - begin
    ledger = server.send("GET", "/v1/budget")[1]["ledger"]
    beyond = server.resident() - ledger["weights"]["touched"] - ledger["kv"]["touched"]
    return {
        "processor_seconds_in_10": used,
        "resident_beyond_weights_and_kv_mib": beyond / MIB,
        "met": used <= 0.01 and beyond < 90 * MIB,
    }


def hostile(server: Running) -> Result:
    """Bad requests from 8 clients at once, slow and broken connections, and one good client."""
    count, clients = 4000, 8
    seen: Counter[int] = Counter()
    wrong: list[str] = []
    waits: list[float] = []
    resident: list[int] = []
    done = threading.Event()
    paths = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    paths += ["/tokenize", "/detokenize", "/v1/budget"]

    def attack(number: int) -> None:
        rng = random.Random(number)
        for _ in range(count // clients):
            path, data = rng.choice(paths), bad_body(rng)
            connection = server.connect()
            try:
                method = "PUT" if path == "/v1/budget" else "POST"
                kind = rng.choice(["application/json"] * 9 + ["text/plain"])
                connection.request(method, path, data, {"Content-Type": kind})
                reply = connection.getresponse()
                body = reply.read()
                seen[reply.status] += 1
                if reply.status >= 500 and reply.status != 504:
                    wrong.append(f"{path} {reply.status}: {data[:200]!r}")
                elif reply.status >= 400 and not json.loads(body)["error"]["message"]:
                    wrong.append(f"{path} {reply.status} without a reason: {data[:200]!r}")
            except OSError as error:
                wrong.append(f"{path} {error}: {data[:200]!r}")
            finally:
                connection.close()

    def ask_well() -> None:
        body = {"prompt": "The sea is", "max_tokens": 2, "temperature": 0}
        while not done.is_set():
            begin = time.perf_counter()
            status, _ = server.send("POST", "/v1/completions", body)
            waits.append(time.perf_counter() - begin)
            resident.append(server.resident())
            if status != 200:
                wrong.append(f"the good client got {status}")
            time.sleep(0.05)

    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for one in slow:  # these never finish their request
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r"
        )
    threads = [threading.Thread(target=attack, args=(number,)) for number in range(clients)]
    good = threading.Thread(target=ask_well)
    for thread in [*threads, good]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    good.join()
    for one in slow:
        one.close()
    budget = server.send("GET", "/v1/budget")[1]
    if server.send("GET", "/health")[0] != 200:
        wrong.append("it is not well any more")
    over = max(resident) - (budget["memory"] or max(resident))
    return {
        "requests": sum(seen.values()),
        "statuses": {str(status): seen[status] for status in sorted(seen)},
        "good_client": len(waits),
        "its_median_seconds": statistics.median(waits),
        "its_longest_seconds": max(waits),
        "over_budget": over,
        "wrong": wrong[:20],
        "met": not wrong and over <= 8 * MIB and max(waits) < 10,
    }


def bad_value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, and some that hurt."""
    kind = rng.randrange(12 if depth < 4 else 9)
    if kind < 9:
        plain = [None, True, -1, 0, 2**63, -(2**70), 1e308, -0.0, 10**400, "", "x" * 5000, "\ud800"]
        plain += ["auto", "json_schema", "(a|a)*" * 50, "{% for i in range(10**9) %}x{% endfor %}"]
        return rng.choice(plain)
    if kind < 11:
        names = [
            "role",
            "content",
            "type",
            "function",
            "name",
            "schema",
            "regex",
            "$ref",
            "grammar",
        ]
        return {rng.choice(names): bad_value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return [bad_value(rng, depth + 1) for _ in range(rng.randrange(5))]


def bad_body(rng: random.Random) -> bytes:
    """The body of a request that is wrong in some way, most of the time."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    if kind == 1:
        return b'{"prompt": "\xff\xfe\xc3", "max_tokens": 3}'
    if kind == 2:
        return b"[" * rng.choice([100, 5000, 100_000])
    if kind == 3:
        deep = rng.choice([50, 900, 20_000])
        return b'{"prompt": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}"
    if kind == 4:
        forms = [
            {"type": "grammar", "grammar": 'start: s\ns: s s | "a" | "b" | ""\n'},
            {"type": "regex", "regex": "(.*a){20}.*"},
            {"type": "regex", "regex": "(?:(?:a?){50}){50}a{50}"},
            {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
            {"type": "json_schema", "json_schema": {"schema": bad_value(rng)}},
        ]
        body = {"prompt": "x", "max_tokens": 20, "response_format": rng.choice(forms)}
        return json.dumps(body).encode()
    names = ["model", "messages", "prompt", "input", "max_tokens", "temperature", "top_p", "n"]
    names += ["stop", "seed", "stream", "logprobs", "logit_bias", "tools", "tool_choice", "memory"]
    names += ["response_format", "stream_options", "priority", "deadline", "user", "tokens", "text"]
    base: dict[str, Any] = rng.choice(
        [
            {},
            {"prompt": "x", "max_tokens": 2},
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
            {"input": "x", "max_output_tokens": 2},
        ]
    )
    changes = {rng.choice(names): bad_value(rng) for _ in range(rng.randrange(4))}
    if changes.get("memory") in (None, "auto"):  # these are no mistake
        changes.pop("memory", None)
    return json.dumps({**base, **changes}).encode("utf-8", "surrogatepass")


WHAT: dict[str, tuple[Callable[[Running], Result], list[str]]] = {
    "long": (long_prompt, ["--weights", "72MB", "--context", "4096", "--sessions", "3"]),
    "shared": (shared_prefix, ["--weights", "72MB", "--context", "2048", "--sessions", "2"]),
    "schema": (schema_answers, ["--weights", "72MB", "--context", "1024", "--sessions", "12"]),
    "idle": (idle, ["--weights", "72MB"]),
    "hostile": (hostile, ["--memory", "260MiB"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*WHAT, "all"])
    parser.add_argument("pack")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {}
    for name in WHAT if args.what == "all" else [args.what]:
        function, options = WHAT[name]
        with pliant_server(sys.executable, args.pack, *options, log=sys.stderr) as server:
            results[name] = function(server)
        if not args.json:
            print(f"{name}: {'as it must be' if results[name]['met'] else 'NOT AS IT MUST BE'}")
            for key, value in results[name].items():
                shown = f"{value:.4g}" if isinstance(value, float) else value
                print(f"  {key:36} {shown}")
    if args.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["met"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
