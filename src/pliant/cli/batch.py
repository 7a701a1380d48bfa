"""`pliant batch`: a file of requests to a file of answers."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pliant.cli.common import add_engine_options, add_limits, add_park_options, print_json, say
from pliant.cli.serve import add_serving_options, settings

_EVERY = 10.0  # seconds between lines of progress that no terminal shows


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer the requests in a file of the OpenAI batch format, in the order that "
        "is fastest. Answers are appended to OUT as they are done; requests whose answer is there "
        "already are left out, so a batch that was interrupted goes on where it stopped.",
    )
    parser.add_argument("pack", metavar="PACK", help="directory made by pliant pack")
    parser.add_argument("source", metavar="IN.jsonl", help="requests, one in a line")
    parser.add_argument("target", metavar="OUT.jsonl", help="answers, one in a line")
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object")
    add_limits(parser, sessions=True)
    add_serving_options(parser)
    add_park_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; 0 if all requests were answered, 1 if some have errors."""
    from pliant.server.batch import Progress, run_batch

    shown = 0.0

    def show(now: Progress) -> None:
        nonlocal shown
        terminal = sys.stderr.isatty()
        if now.seconds - shown < (0.2 if terminal else _EVERY) and now.done < now.total:
            return
        shown = now.seconds
        text = (
            f"pliant: {now.done} of {now.total} requests, {now.failed} with errors, "
            f"{now.tokens_per_second:.0f} tokens/s, {_time(now.seconds_left)} left"
        )
        if terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            say(text)

    last = run_batch(settings(options), options.source, options.target, show)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if options.json:
        print_json(last.to_dict())
    else:
        say(
            f"pliant: {last.answered} answers in {_time(last.seconds)}, {last.failed} with errors, "
            f"{last.skipped} were there already"
        )
    return 1 if last.failed else 0


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
