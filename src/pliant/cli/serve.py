"""`pliant serve`: the OpenAI API over HTTP, and a page."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from pliant.cli.common import (
    add_engine_options,
    add_limits,
    add_park_options,
    load_options,
    natural,
    print_json,
    say,
    size_option,
)
from pliant.errors import UsageError

if TYPE_CHECKING:
    from pliant.server.serve import Settings


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a pack over HTTP, as the OpenAI API",
        description="Serve a pack over HTTP: the OpenAI API under /v1, and a page at / to chat and "
        "to move the budget. Ends with SIGINT or SIGTERM, after the answers in work. "
        "API keys are read from --api-keys, or from PLIANT_API_KEY in the environment.",
    )
    parser.add_argument("pack", metavar="PACK", help="directory made by pliant pack")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the address as one JSON object on standard output",
    )
    add_limits(parser, sessions=True, auto=True)
    add_serving_options(parser)
    group = parser.add_argument_group("network")
    group.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="listen there (default: 127.0.0.1)"
    )
    group.add_argument(
        "--port", metavar="N", type=int, default=8000, help="0 takes any (default: 8000)"
    )
    group.add_argument("--api-keys", metavar="FILE", help="API keys that are taken, one in a line")
    group.add_argument(
        "--connections",
        metavar="N",
        type=natural,
        default=512,
        help="most connections at once (default: 512)",
    )
    group.add_argument(
        "--grace",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="finish answers for so long before the end (default: 30)",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is logged, as lines of JSON on standard error (default: info)",
    )
    add_park_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Options that `serve` and `batch` share."""
    group = parser.add_argument_group("requests")
    group.add_argument("--name", metavar="NAME", help="of the model (default: that of the pack)")
    group.add_argument(
        "--running",
        metavar="N",
        type=natural,
        default=16,
        help="most answers in one step (default: 16)",
    )
    group.add_argument(
        "--waiting",
        metavar="N",
        type=natural,
        default=256,
        help="most answers in the queue; more are refused (default: 256)",
    )
    group.add_argument(
        "--body-limit",
        metavar="SIZE",
        type=size_option,
        default=2**20,
        help="largest request (default: 1MiB)",
    )
    group.add_argument(
        "--no-grammars",
        action="store_true",
        help="refuse answers of a given form, and save the memory of their tables",
    )


def settings(options: argparse.Namespace, **more: Any) -> Settings:
    """The settings that the options stand for."""
    from pliant.server.serve import Settings

    if options.running > 1024:
        raise UsageError(f"--running may be 1024, and not {options.running}")
    return Settings(
        pack=options.pack,
        load=load_options(options),
        name=options.name,
        most_running=options.running,
        most_waiting=options.waiting,
        body_limit=options.body_limit,
        grammars=not options.no_grammars,
        **more,
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not 0 <= options.port < 65536:
        raise UsageError(f"--port is from 0 to 65535, and not {options.port}")
    if not 0 <= options.grace <= 86400:
        raise UsageError(f"--grace is from 0 to 86400 seconds, and not {options.grace:g}")
    from pliant.server.serve import read_keys, serve

    keys = read_keys(options.api_keys) if options.api_keys else []
    if os.environ.get("PLIANT_API_KEY"):
        keys.append(os.environ["PLIANT_API_KEY"])

    def told(address: str) -> None:
        if options.json:
            print_json({"url": address})
        say(f"pliant: serving {options.pack} at {address} (the API at {address}/v1)")

    serve(
        settings(
            options,
            host=options.host,
            port=options.port,
            keys=keys,
            connections=options.connections,
            patience=options.grace,
            log_level=options.log_level,
        ),
        told,
    )
    return 0
