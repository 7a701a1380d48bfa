"""The command `pliant`: reads the arguments, runs one command, turns errors into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from pliant.errors import PliantError, UsageError

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = ("pack", "run", "serve", "batch", "top", "plan", "budget", "eval", "bench")
"""Names of the commands; each is a module here with `add_parser` and `run`."""

EPILOG = """\
Sizes are written 300MiB, 1.5GB or as plain bytes. --memory is always the whole
process, --weights only the resident plies and scales. Answers go to standard
output, everything else to standard error."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving the program; takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with the commands `names`."""
    from pliant import __version__

    parser = Parser(
        prog="pliant",
        description="Run a language model inside one memory budget.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pliant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name in names:
        import_module(f"pliant.cli.{name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 for an error, 2 for wrong arguments, 130 for Ctrl-C.

    With PLIANT_RAISE_ERRORS=1 in the environment errors are raised.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Only the module of the command that is used is imported: a resident byte is a byte of budget.
    names = (given[0],) if given and given[0] in COMMANDS else COMMANDS
    if names != ("pack",):
        # numpy multiplies no matrices here, but would begin by starting a thread for each processor
        # that spins, while the model is loaded by all of them.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        parser = build_parser(names)
        options = parser.parse_args(given)
        if options.command is None:
            parser.print_help()
            return 2
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has left. Nothing may be written at exit any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\npliant: interrupted", file=sys.stderr)
        return 130
    except (PliantError, OSError, MemoryError, ImportError) as error:
        if os.environ.get("PLIANT_RAISE_ERRORS") == "1":
            raise
        print(f"pliant: error: {_reason(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory; give a smaller --memory"
    if isinstance(error, ModuleNotFoundError):
        extra = "plot" if (error.name or "").startswith("matplotlib") else "pack"
        return f"this needs {error.name}: install it with pip install 'pliant[{extra}]'"
    return str(error)
