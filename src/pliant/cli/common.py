"""What the commands share: options, tables, JSON, numbers as text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.sizes import parse_size

if TYPE_CHECKING:
    from pliant.engine.model import Model

__all__ = [
    "add_engine_options",
    "add_json_option",
    "add_limits",
    "add_park_options",
    "add_size_options",
    "load_options",
    "memory_option",
    "natural",
    "need_matplotlib",
    "number",
    "print_json",
    "quality_text",
    "save_figure",
    "say",
    "size_option",
    "table",
    "text_windows",
]


def size_option(text: str) -> int:
    """The type of options that are sizes."""
    from pliant.errors import UsageError

    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from error


def memory_option(text: str) -> int | str:
    """The type of options that are sizes, or `auto`."""
    return text if text == "auto" else size_option(text)


def _kv_bits(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def natural(text: str) -> int:
    """The type of options that are whole numbers above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def add_limits(
    parser: argparse.ArgumentParser, *, sessions: bool = False, auto: bool = False
) -> None:
    """--memory, --weights, --context, --kv-bits and more; with `auto` also --keep-free."""
    group = parser.add_argument_group("limits")
    text = "most bytes of the whole process, everything included"
    if auto:
        text += "; auto: as many as other programs leave, at any moment"
    group.add_argument(
        "--memory",
        metavar="SIZE",
        type=memory_option if auto else size_option,
        help=f"{text} (default: no limit)",
    )
    if auto:
        group.add_argument(
            "--keep-free",
            metavar="SIZE",
            type=size_option,
            help="with --memory auto: what other programs shall find free (default: a sixteenth "
            "of all memory)",
        )
    group.add_argument(
        "--weights",
        metavar="SIZE",
        type=size_option,
        help="most bytes of resident plies and scales (default: what --memory leaves)",
    )
    group.add_argument(
        "--context",
        metavar="TOKENS",
        type=natural,
        help="tokens that a conversation may have (default: what --memory leaves)",
    )
    if sessions:
        group.add_argument(
            "--sessions",
            metavar="N",
            type=natural,
            default=1,
            help="conversations of that length held at once (default: 1)",
        )
    group.add_argument(
        "--kv-bits",
        metavar="BITS",
        type=_kv_bits,
        help="most bits of a value in the KV cache, the mean of a full context; auto: as many as "
        "serve best as the budget moves (default: 16, exact)",
    )
    group.add_argument(
        "--kv-floor",
        metavar="BITS",
        type=float,
        help="with --kv-bits auto: never fewer",
    )
    group.add_argument(
        "--min-bits",
        metavar="BITS",
        type=float,
        help="refuse to run with fewer bits per weight",
    )
    group.add_argument(
        "--max-kl",
        metavar="NATS",
        type=float,
        help="refuse to run with a larger expected KL divergence",
    )


def add_size_options(parser: argparse.ArgumentParser, *, memory: str, weights: str) -> None:
    """--memory and --weights with any number of sizes; the texts say what each of them does."""
    for name, text in (("--memory", memory), ("--weights", weights)):
        parser.add_argument(
            name,
            metavar="SIZE",
            type=size_option,
            nargs="+",
            action="extend",
            default=[],
            help=text,
        )


def add_park_options(parser: argparse.ArgumentParser) -> None:
    """--park and --park-limit."""
    group = parser.add_argument_group("parking")
    group.add_argument(
        "--park",
        metavar="DIR",
        help="keep KV pages there that leave memory: what prompts begin with is read instead of "
        "computed where that is faster, also after a restart",
    )
    group.add_argument(
        "--park-limit",
        metavar="SIZE",
        type=size_option,
        help="most that may be there; what was used longest ago goes first (default: 4GiB)",
    )


ISAS = ("auto", "amx", "avx512", "avx512vnni", "avx512bw", "avxvnni", "avx2", "plain")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--threads and --isa."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--threads",
        metavar="N",
        type=natural,
        help="threads that compute (default: the CPUs that this process may use)",
    )
    group.add_argument(
        "--isa",
        metavar="NAME",
        choices=ISAS,
        default="auto",
        help=f"kernels to compute with: {', '.join(ISAS)} (default: the best that this CPU has)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `pliant.load` that these options stand for."""
    names = (
        *("memory", "keep_free", "weights", "context", "sessions", "min_bits", "max_kl"),
        *("kv_bits", "kv_floor", "threads", "isa", "park", "park_limit"),
    )
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def need_matplotlib() -> None:
    """Raise ModuleNotFoundError if it is not there: before the work, and not after it."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib in the form that the name of the file says. UsageError."""
    from pliant.errors import UsageError

    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def say(text: str) -> None:
    """Talk to the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """One object on standard output, at once; numbers that are none become null."""
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    print(text, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def quality_text(bits: float | None, kl: float | None) -> str:
    """Bits per weight and expected KL, in a few words."""
    parts = [] if bits is None else [f"{bits:.2f} bits/weight"]
    if kl is not None:
        parts.append(f"expected KL {kl:.3g}")
    return ", ".join(parts) or "plain weights"


def number(value: float | None, form: str) -> str:
    """A figure of a table; one that is not known is a dash."""
    return "-" if value is None else format(value, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """Columns of text under a heading, right-aligned but for the first `left` ones."""
    cells = [head, *rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        line = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, wide, strict=True))
        ]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def text_windows(model: Model, text: str, tokens: int | None, window: int) -> list[list[int]]:
    """The text in windows; each begins as the model wants it."""
    from pliant.errors import UsageError

    if window > model.context:
        raise UsageError(f"--window {window}: the model was made for {model.context} tokens")
    begin = model.pack.manifest.tokens.begin
    ids = list(model.tokenizer.encode(text, add_special=False, parse_special=False))[:tokens]
    fresh = window - len(begin)
    # A rest too short to say much is left out, unless there is nothing else.
    starts = range(0, max(len(ids) - fresh // 2, 1), fresh)
    windows = [[*begin, *ids[start : start + fresh]] for start in starts]
    if len(windows[0]) < 2:
        raise UsageError("the text has fewer than 2 tokens")
    return windows
