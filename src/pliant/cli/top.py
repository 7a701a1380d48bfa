"""`pliant top`: what a server does, in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from typing import Any

from pliant.cli.common import print_json, quality_text, table
from pliant.errors import EngineError, UsageError
from pliant.sizes import format_size

MOST_ANSWER = 2**24
_DEPTHS = " ▁▂▃▄▅▆▇█"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "top",
        help="watch a server: memory, depth, queue, speed",
        description="Show what a running server holds and does, again and again until Ctrl-C. "
        "An API key is read from PLIANT_API_KEY in the environment.",
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="of the server (default: http://127.0.0.1:8000)",
    )
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=1.0, help="how often (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="show it once and leave")
    parser.add_argument("--json", action="store_true", help="print one JSON object and leave")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not 0.1 <= options.every <= 3600:
        raise UsageError(f"--every is from 0.1 to 3600 seconds, and not {options.every:g}")
    now = fetch(options.url)
    if options.json:
        print_json(now)
        return 0
    if options.once:
        print(screen(now, None, _width()))
        return 0
    before = None
    while True:
        lines = screen(now, before, _width())
        if sys.stdout.isatty():
            # To the top left corner, each line cleared behind its end, and what is below.
            lines = "\x1b[H" + lines.replace("\n", "\x1b[K\n") + "\x1b[K\n\x1b[J"
        else:
            lines += "\n\n"
        sys.stdout.write(lines)
        sys.stdout.flush()
        time.sleep(options.every)
        before, now = now, fetch(options.url)


def fetch(url: str) -> dict[str, Any]:
    """The state of a server. EngineError if it does not answer, UsageError for a wrong address."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url begins with http://, and {url!r} does not")
    key = os.environ.get("PLIANT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urlopen(Request(f"{url.rstrip('/')}/v1/state", headers=headers), timeout=10) as reply:
            state = json.loads(reply.read(MOST_ANSWER))
    except HTTPError as error:
        with error:
            why = "it wants an API key: set PLIANT_API_KEY" if error.code == 401 else error.reason
        raise EngineError(f"{url} refuses: {error.code}, {why}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EngineError(
            f"no server answers at {url}: {reason}; start one with `pliant serve PACK`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{url} is not a server of pliant: {error}") from error
    if not isinstance(state, dict) or "budget" not in state:
        raise EngineError(f"{url} is not a server of pliant")
    return state


def screen(now: dict[str, Any], before: dict[str, Any] | None, width: int) -> str:
    """What is shown of a state; speeds are those since the state before."""
    budget, kv = now["budget"], now["kv"]
    limit = "no budget" if budget["memory"] is None else f"of {format_size(budget['memory'])}"
    lines = [
        now["model"],
        f"{quality_text(budget['bits_per_weight'], budget['expected_kl'])}   "
        f"rungs {budget['rungs']} of {budget['rungs_available']}   context {budget['context']}",
        f"resident {format_size(budget['resident'])} {limit}, peak {format_size(budget['peak'])}",
        f"running {now['running']}   waiting {now['waiting']}   on disk {budget['parked']}   "
        f"KV pages: {kv['pages'] - kv['kept']} used, {kv['kept']} kept; "
        f"{format_size(max(kv['bytes'] - kv['used'], 0))} free",
        _speed(now, before),
        "",
        *_ledger(budget, width),
        "",
        *_heat(now["matrices"], width),
    ]
    return "\n".join(line[:width] for line in lines)


def _speed(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    new, old = now["counters"], (before or {}).get("counters")
    if before is None or old is None:
        return f"{new['answer_tokens']} tokens of answers, {new['prompt_tokens']} of prompts so far"
    passed = max(now["time"] - before["time"], 1e-3)
    rates = [(new[name] - old[name]) / passed for name in ("answer_tokens", "prompt_tokens")]
    steps = new["steps"] - old["steps"]
    each = f"{(new['step_seconds'] - old['step_seconds']) / steps * 1e3:.1f} ms" if steps else "-"
    return f"answers {rates[0]:.0f} tokens/s   prompts {rates[1]:.0f} tokens/s   a step {each}"


def _ledger(budget: dict[str, Any], width: int) -> list[str]:
    total = max(sum(item["held"] for item in budget["ledger"].values()), 1)
    wide = max(10, min(40, width - 50))
    rows = []
    for owner, item in sorted(budget["ledger"].items(), key=lambda pair: -pair[1]["held"]):
        bar = "█" * round(item["touched"] / total * wide)
        held = "░" * (round(item["held"] / total * wide) - len(bar))
        rows.append([owner, format_size(item["touched"]), format_size(item["held"]), bar + held])
    text = table(["owner", "touched", "held"], [row[:3] for row in rows], left=1).splitlines()
    bars = ["", *(row[3] for row in rows)]
    return [f"{line}  {bar}".rstrip() for line, bar in zip(text, bars, strict=True)]


def _heat(matrices: dict[str, float], width: int) -> list[str]:
    """The mean depth of each matrix: a row for each kind, a letter for each layer."""
    kinds: dict[str, dict[int, float]] = {}
    for name, depth in matrices.items():
        parts = name.split(".")
        if len(parts) == 3:
            kinds.setdefault(parts[2], {})[int(parts[1])] = depth
        else:
            kinds.setdefault(name, {})[0] = depth
    lines = ["depth in plies, a column for each layer"] if kinds else []
    for kind, layers in kinds.items():
        values = [layers.get(layer, 0.0) for layer in range(max(layers) + 1)]
        bars = "".join(_DEPTHS[min(max(round(value), 0), 8)] for value in values)
        mean = sum(values) / len(values)
        lines.append(f"{kind:<6} {mean:5.2f}  {bars}")
    return lines


def _width() -> int:
    return shutil.get_terminal_size((100, 40)).columns
