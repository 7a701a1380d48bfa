"""`pliant run`: one prompt, or a chat in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

from pliant.cli.common import (
    add_engine_options,
    add_json_option,
    add_limits,
    add_park_options,
    load_options,
    print_json,
    quality_text,
    say,
)
from pliant.errors import EngineError, PliantError, UsageError
from pliant.sizes import format_size, parse_size

if TYPE_CHECKING:
    from pliant.engine.generation import Generation
    from pliant.engine.kinds import GenerationResult
    from pliant.engine.model import Model
    from pliant.engine.session import Session

HELP = """\
/memory SIZE   change the budget of the process, for example /memory 200MiB
/memory auto   let it follow the memory that other programs need
/report        show who holds how many bytes, and the depth
/reset         forget the conversation
/help          show this
/quit          leave (also Ctrl-D)
Ctrl-C ends the answer in progress."""

MAX_INPUT = 2**24


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="answer a prompt, or chat in the terminal",
        description="Answer one prompt (-p, or text piped in), or chat in the terminal. "
        "A prompt is put into the chat template of the model if it has one.",
    )
    parser.add_argument("pack", metavar="PACK", help="directory made by pliant pack")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and leave")
    parser.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="message of the system, before all others")
    add_json_option(parser)
    add_limits(parser, auto=True)
    group = parser.add_argument_group("choice of tokens")
    group.add_argument(
        "--max-tokens", metavar="N", type=int, default=512, help="longest answer (default: 512)"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0: always the likeliest token; 1: as the model says (default: 0)",
    )
    group.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="only the K likeliest (default: all)"
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="only the likeliest with this probability together (default: 1)",
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.0,
        help="only those with this part of the largest probability (default: 0)",
    )
    group.add_argument(
        "--seed", metavar="N", type=int, help="same seed, same answer (default: a new one)"
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this; repeatable"
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        default=1.0,
        help="weakens all tokens that came before (default: 1, not at all)",
    )
    group.add_argument(
        "--presence-penalty",
        metavar="X",
        type=float,
        default=0.0,
        help="weakens tokens of the answer, once (default: 0)",
    )
    group.add_argument(
        "--frequency-penalty",
        metavar="X",
        type=float,
        default=0.0,
        help="weakens tokens of the answer, for each time (default: 0)",
    )
    add_park_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    prompt = options.prompt
    talking = prompt is None and sys.stdin.isatty()
    if options.raw and options.system is not None:
        raise UsageError("--system needs a chat template, and --raw leaves it out; use one of them")
    if talking and options.json:
        raise UsageError("--json gives one answer: add -p TEXT, or pipe a prompt in")
    if talking and options.raw:
        raise UsageError("--raw continues one text: add -p TEXT, or pipe a text in")
    if prompt is None and not talking:
        prompt = _piped()
    import pliant.engine.control_socket  # noqa: F401 - before its memory is counted
    from pliant.engine.loading import load

    limits = load_options(options)
    with (
        load(options.pack, chat=not options.raw, log=_tell, early=True, **limits) as model,
        _control(model),
    ):
        if talking:
            return Chat(model, options).talk()
        return _once(model, prompt, options)


def _tell(line: str) -> None:
    say(f"pliant: memory: {line}")


def _control(model: Model) -> AbstractContextManager[object]:
    """The socket through which `pliant budget` reaches this process."""
    from pliant.engine.control import BudgetControl
    from pliant.engine.control_socket import ControlSocket

    try:
        return ControlSocket(BudgetControl(model, log=_tell))
    except EngineError as error:
        say(f"pliant: the budget cannot be changed from outside: {error}")
        return nullcontext()


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Model.generate` that these options stand for."""
    names = (
        *("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    )
    return {name: getattr(options, name) for name in names}


def _piped() -> str:
    # As bytes: what is no UTF-8 becomes U+FFFD instead of an exception.
    data = sys.stdin.buffer.read(MAX_INPUT + 1)
    if len(data) > MAX_INPUT:
        raise UsageError(f"more than {MAX_INPUT} bytes were piped in")
    text = data.decode("utf-8", "replace").rstrip("\n")
    if not text:
        raise UsageError("nothing was piped in; give a prompt with -p TEXT")
    return text


def _once(model: Model, prompt: str, options: argparse.Namespace) -> int:
    prompt = prompt.encode("utf-8", "replace").decode("utf-8")  # arguments may not be UTF-8
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    ids: str | list[int] = prompt
    if not options.raw and (system or model.has_chat):
        ids = model.chat_prompt([*system, {"role": "user", "content": prompt}])
    _warn(model)
    generation = model.generate(ids, **sampling_options(options))
    result = stream(generation, quiet=options.json)
    if options.json:
        print_json({"result": result.to_dict(), "report": model.report().to_dict()})
    else:
        say(summary(result))
    return 130 if result.finish_reason == "cancelled" else 0


def stream(generation: Generation, *, quiet: bool = False) -> GenerationResult:
    """Print an answer as it comes. The first Ctrl-C ends it, a second one the program."""
    previous = signal.getsignal(signal.SIGINT)

    def cancel(number: int, frame: FrameType | None) -> None:
        generation.cancel()
        signal.signal(signal.SIGINT, previous)

    last = "\n"
    signal.signal(signal.SIGINT, cancel)
    try:
        for piece in generation:
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
                last = piece
    finally:
        signal.signal(signal.SIGINT, previous)
        generation.close()
    if not quiet and not last.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return generation.result


def summary(result: GenerationResult) -> str:
    """The line after an answer."""
    from pliant.memory.budget import measure

    count = len(result.tokens)
    speed = result.tokens_per_second
    rate = "" if speed is None else f" at {speed:.3g}/s"
    why = {
        "length": ", cut off by --max-tokens",
        "context": ", context full",
        "cancelled": ", interrupted",
    }.get(result.finish_reason or "", "")
    quality = quality_text(result.bits_per_weight, result.expected_kl)
    moved = ""
    if result.bits_per_weight_lowest != result.bits_per_weight:
        low = quality_text(result.bits_per_weight_lowest, result.expected_kl_highest)
        moved = f" (at worst {low})"
    kv = f"; KV {result.kv_bits_lowest:.2f} bits" if result.kv_bits_lowest < 16 else ""
    resident = format_size(measure().now)
    return f"[{count} tokens{rate}{why}; {quality}{moved}{kv}; {resident}]"


def _warn(model: Model) -> None:
    kl = model.depth.expected_kl
    if kl is not None and kl > 1:
        say(f"pliant: at this size the expected KL is {kl:.2g}: the answers will hardly make sense")


class Chat:
    """A conversation in the terminal."""

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        if not model.has_chat:
            raise UsageError(
                f"{options.pack} has no chat template, so it can only continue text: add -p TEXT"
            )
        self._model = model
        self._options = sampling_options(options)
        self._start: list[dict[str, str]] = []
        if options.system is not None:
            self._start = [{"role": "system", "content": options.system}]
        self._messages = list(self._start)
        self._session: Session = model.session()

    def talk(self) -> int:
        """Read and answer until the end of input."""
        import readline  # noqa: F401 - editing and history for input()

        _warn(self._model)
        depth = self._model.depth
        say(
            f"{quality_text(depth.bits_per_weight, depth.expected_kl)}, context "
            f"{self._model.context} tokens; /help for help"
        )
        while True:
            try:
                line = _ask().strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if line in ("/quit", "/exit"):
                return 0
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except PliantError as error:
                say(f"pliant: {error}")
            except KeyboardInterrupt:
                # Not in the middle of an answer, or for the second time: the cache may be behind
                # what was said, so it is built again.
                self._session.close()
                self._session = self._model.session()
                say("interrupted")

    def _answer(self, text: str) -> None:
        text = text.encode("utf-8", "replace").decode("utf-8")
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = self._model.chat_prompt(messages)
        if len(ids) >= self._model.context:
            raise EngineError(
                f"with this the conversation has {len(ids)} tokens, and the context "
                f"{self._model.context}: /reset it, or give it a larger /memory"
            )
        result = stream(self._model.generate(ids, session=self._session, **self._options))
        self._messages = [*messages, {"role": "assistant", "content": result.text}]
        say(summary(result))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/help":
            say(HELP)
        elif name == "/reset":
            self._messages = list(self._start)
            self._session.close()
            self._session = self._model.session()
            say("forgotten")
        elif name == "/memory":
            if rest.strip() == "auto":
                self._model.govern(log=_tell)
            else:
                self._model.budget = parse_size(rest, "/memory")
            depth = self._model.depth
            say(
                f"{format_size(self._model.budget or 0)}: "
                f"{quality_text(depth.bits_per_weight, depth.expected_kl)}, "
                f"context {self._model.context} tokens"
            )
        elif name == "/report":
            say(report_text(self._model))
        else:
            raise UsageError(f"there is no command {name}; /help shows all")


def _ask() -> str:
    if sys.stdout.isatty():
        return input("> ")
    # The answers go to a file: the prompt must not.
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def report_text(model: Model) -> str:
    """The ledger and the depth as text."""
    report = model.report()
    lines = [f"{'':<16}{'held':>12}{'in memory':>12}"]
    for owner, (held, touched) in report.ledger.items():
        lines.append(f"{owner:<16}{format_size(held):>12}{format_size(touched):>12}")
    lines.append(f"{'free':<16}{format_size(report.free):>12}")
    lines.append(
        f"{'total':<16}{format_size(report.total):>12}{format_size(report.resident):>12}"
        f"   peak {format_size(report.peak)}"
    )
    lines.append(
        f"{report.rungs} of {report.rungs_of_pack} rungs, "
        f"{quality_text(report.bits_per_weight, report.expected_kl)}, "
        f"context {report.context} tokens"
    )
    return "\n".join(lines)
