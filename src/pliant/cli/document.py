"""docs/cli.md from the parser itself: `python -m pliant.cli.document > docs/cli.md`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator

from pliant.cli.main import COMMANDS, EPILOG, build_parser

__all__ = ["commands", "document"]

HEAD = """\
# The command line

This page is generated from the program, by
`python -m pliant.cli.document > docs/cli.md`.
"""

TAIL = """\
Exit codes: 0 done, 1 an error, 2 wrong arguments, 130 interrupted by Ctrl-C,
141 nobody reads the output any more. An error is one line on standard error that
begins with `pliant: error:`; where something does not fit, the sum follows it.
With `PLIANT_RAISE_ERRORS=1` in the environment the traceback is shown instead.
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by name."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {name: action.choices[name] for name in COMMANDS}
    raise AssertionError("there are no commands")


def document() -> str:
    """The page in Markdown; unlike the help it is the same with every version of Python."""
    pieces = [HEAD, EPILOG + "\n", TAIL]
    for name, parser in commands().items():
        pieces += [f"## `pliant {name}`\n", f"```text\n{_usage(name, parser)}\n```\n"]
        pieces.append(_fold(parser.description or "", ""))
        if parser.epilog:
            pieces.append(f"```text\n{parser.epilog.rstrip()}\n```\n")
        for group in parser._action_groups:
            lines = list(_options(group))
            if lines:
                title = (group.title or "").capitalize()
                pieces += [f"**{title}**\n", "\n".join(lines) + "\n"]
    return "\n".join(pieces)


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [str(action.metavar) for action in parser._actions if not action.option_strings]
    words += [
        f"{action.option_strings[0]} {action.metavar}"
        for action in parser._actions
        if action.option_strings and action.required
    ]
    return " ".join([f"pliant {name}", *words, "[OPTION ...]"])


def _options(group: argparse._ArgumentGroup) -> Iterator[str]:
    for action in group._group_actions:
        if not action.option_strings:
            spelled = f"`{action.metavar}`"
        else:
            value = action.metavar or "|".join(action.choices or ())
            if action.nargs == "+":
                value = f"{value} ..."
            names = (f"`{name} {value}".rstrip() + "`" for name in action.option_strings)
            spelled = ", ".join(names)
        yield _fold(f"- {spelled}: {action.help}", "  ").rstrip()


def _fold(text: str, indent: str) -> str:
    words = " ".join(text.split())
    return textwrap.fill(words, 79, subsequent_indent=indent, break_on_hyphens=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
