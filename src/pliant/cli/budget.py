"""`pliant budget`: show or change the budget of a model that runs in another process."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from pliant.cli.common import (
    add_json_option,
    memory_option,
    natural,
    print_json,
    quality_text,
    size_option,
)
from pliant.errors import BudgetError, EngineError, UsageError
from pliant.sizes import format_size

LARGEST_ANSWER = 2**20


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "budget",
        help="show or change the budget of a running model",
        description="Show the budget of a model that runs in another terminal, or change it while "
        "it answers. Without --pid or --url: the one that runs for this user.",
    )
    parser.add_argument(
        "memory",
        metavar="SIZE",
        nargs="?",
        type=lambda text: text if text == "none" else memory_option(text),
        help="new budget of the whole process; auto: as much as other programs leave; none: no "
        "limit (default: show what holds)",
    )
    parser.add_argument(
        "--keep-free",
        metavar="SIZE",
        type=size_option,
        help="with auto: what other programs shall find free (default: a sixteenth of all)",
    )
    parser.add_argument(
        "--wait", action="store_true", help="until what grows is read; otherwise that goes on"
    )
    parser.add_argument("--pid", metavar="PID", type=natural, help="the process that is meant")
    parser.add_argument("--url", metavar="URL", help="a pliant server, such as http://HOST:PORT")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.pid is not None and options.url is not None:
        raise UsageError("--pid and --url name two models; give one of them")
    if options.keep_free is not None and options.memory != "auto":
        raise UsageError("--keep-free belongs to auto: pliant budget auto --keep-free SIZE")
    request: dict[str, Any] | None = None
    if options.memory is not None:
        request = {"memory": None if options.memory == "none" else options.memory}
        if options.keep_free is not None:
            request["keep_free"] = options.keep_free
    path = None if options.url is not None else _find(options.pid)

    def send(request: dict[str, Any] | None) -> dict[str, Any]:
        return _over_http(options.url, request) if path is None else _over_socket(path, request)

    state = send(request)
    while options.wait and state.get("growing"):
        time.sleep(0.05)
        state = send(None)
    if options.wait and state.get("failed"):
        raise EngineError(f"it could not grow, and is as it was: {state['failed']}")
    if options.json:
        print_json(state)
    else:
        _show(state)
    return 0


def _find(pid: int | None) -> Path:
    from pliant.engine.control_socket import running

    found = running()
    if pid is not None:
        if pid not in found:
            raise EngineError(f"process {pid} is no pliant of this user that can be told a budget")
        return found[pid]
    if not found:
        raise EngineError("no pliant runs for this user; a server is reached with --url URL")
    if len(found) > 1:
        raise UsageError(f"several run: name one with --pid ({', '.join(map(str, found))})")
    return next(iter(found.values()))


def _over_socket(path: Path, request: dict[str, Any] | None) -> dict[str, Any]:
    from pliant.engine.control_socket import ask

    return ask(path, {"method": "GET"} if request is None else {"method": "PUT", **request})


def _over_http(url: str, request: dict[str, Any] | None) -> dict[str, Any]:
    import http.client
    from urllib.parse import urlsplit

    from pliant.engine.control_socket import error_from

    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("", "http", "https") or not host:
        raise UsageError(f"{url!r} is not the address of a server; write http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=60)
    key = os.environ.get("PLIANT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if request is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(
            "GET" if request is None else "PUT",
            parts.path.rstrip("/").removesuffix("/v1") + "/v1/budget",
            None if request is None else json.dumps(request),
            headers,
        )
        response = connection.getresponse()
        answer = json.loads(response.read(LARGEST_ANSWER))
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise EngineError(f"{url} does not answer as a pliant server: {error}") from error
    finally:
        connection.close()
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        if response.status == 409:
            raise BudgetError(str(answer["error"].get("message")))
        raise error_from(answer["error"])
    if response.status != 200 or not isinstance(answer, dict):
        raise EngineError(f"{url} does not answer as a pliant server: status {response.status}")
    return answer


def _show(state: dict[str, Any]) -> None:
    memory, governor = state.get("memory"), state.get("governor")
    text = "no limit" if memory is None else format_size(memory)
    if governor:
        text += f", set by itself so that {format_size(governor['keep_free'])} stay free"
    print(f"budget    {text}")
    print(f"resident  {format_size(state['resident'])}, peak {format_size(state['peak'])}")
    quality = quality_text(state["bits_per_weight"], state["expected_kl"])
    print(f"quality   {quality}, context {state['context']}")
    print(f"answers   {state['in_flight']} in flight, {state['parked']} sessions parked on disk")
    print(f"possible  {format_size(state['least'])} to {format_size(state['most'])}")
    if state.get("growing"):
        print("it is growing")
    if state.get("failed"):
        print(f"failed    {state['failed']}")
    for line in governor["moves"][-5:] if governor else ():
        print(f"  {line}")
