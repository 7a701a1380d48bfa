"""`pliant bench`: how fast it runs, and how much of what the memory allows."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli.common import (
    add_engine_options,
    add_json_option,
    add_size_options,
    load_options,
    natural,
    need_matplotlib,
    print_json,
    table,
)
from pliant.errors import UsageError
from pliant.sizes import MIB, format_mb, format_size

if TYPE_CHECKING:
    from pliant.engine.model import Model

PROBE = 128 * MIB  # larger than any cache, so that it is memory that is measured


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure the speed",
        description="Measure tokens a second for reading a prompt (prefill) and for answering "
        "(decode), in medians, beside the plain read bandwidth of the memory in the same minute. "
        "share is the part of that bandwidth at which the median step reads the resident "
        "weights.",
    )
    parser.add_argument("pack", metavar="PACK", help="directory made by pliant pack")
    add_size_options(
        parser,
        memory="measure at the depth that pliant run --memory SIZE would have",
        weights="measure with at most so many bytes of plies and scales",
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=natural,
        default=512,
        help="length of the prompt (default: 512)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=natural,
        default=128,
        help="length of the answer (default: 128)",
    )
    parser.add_argument(
        "--batch", metavar="N", type=natural, default=1, help="sequences in a step (default: 1)"
    )
    parser.add_argument(
        "--repeat", metavar="N", type=natural, default=5, help="medians of N (default: 5)"
    )
    parser.add_argument(
        "--walk",
        metavar="SECONDS",
        type=natural,
        help="instead, answer for so long while the budget moves down and up",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        type=Path,
        help="with --walk: draw budget, resident set, bits and speed (needs pliant[plot])",
    )
    add_json_option(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from pliant.cli.progress import progress_bar
    from pliant.engine.loading import load

    limits = {
        key: value for key, value in load_options(options).items() if key in ("threads", "isa")
    }
    if options.plot is not None:
        if options.walk is None:
            raise UsageError("--plot belongs to --walk")
        need_matplotlib()
    if options.walk is not None:
        return _walk(options, limits)
    with load(options.pack, sessions=options.batch, **limits) as model:
        need = options.prompt_tokens + options.tokens
        if need > model.context:
            raise UsageError(
                f"--prompt-tokens and --tokens are {need}, and the model was made for "
                f"{model.context} tokens"
            )
        plans = [(size, model.plan_for(memory=size)) for size in options.memory]
        plans += [(None, model.plan_for(weights=size)) for size in options.weights]
        plans = plans or [(None, model.plan_for())]
        turns: list[list[dict[str, Any]]] = [[] for _ in plans]
        total = (options.repeat + 1) * len(plans)
        with progress_bar(quiet=options.json) as bar:
            # Sizes take turns, so that what the machine does meanwhile befalls all of them.
            for number in range(total):
                (_, plan), taken = plans[number % len(plans)], turns[number % len(plans)]
                model.resize(weights=plan.weights or None)
                taken.append(_measure(model, options))
                bar("measuring", (number + 1) / total)
        sizes = [
            {"memory": memory, **_medians(taken[1:], options)}  # the first one warms up
            for (memory, _), taken in zip(plans, turns, strict=True)
        ]
        report = model.report()
        answer = {
            "pack": options.pack,
            "threads": report.threads,
            "isa": report.isa,
            "prompt_tokens": options.prompt_tokens,
            "tokens": options.tokens,
            "batch": options.batch,
            "repeat": options.repeat,
            "sizes": sizes,
        }
    if options.json:
        print_json(answer)
    else:
        _show(answer)
    return 0


def _walk(options: argparse.Namespace, limits: dict[str, Any]) -> int:
    from pliant.cli.progress import progress_bar
    from pliant.cli.walk import plot_walk, show_walk, walk

    if options.memory or options.weights:
        raise UsageError("--walk goes through the sizes by itself: leave out --memory, --weights")
    with progress_bar(quiet=options.json) as bar:
        answer = walk(options, limits, bar)
    if options.plot is not None:
        plot_walk(answer, options.plot)
    if options.json:
        print_json(answer)
    else:
        show_walk(answer)
    return 0


def _measure(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """One run at the depth that is resident: seconds, and the read bandwidth beside them.

    What memory gives changes from one second to the next where a machine is shared, so decode
    stands between two probes, each the best of three readings; beside them stands the median step.
    """
    import numpy as np

    from pliant import _core

    report, depth = model.report(), model.depth
    vocab, batch = model.pack.manifest.model.vocab, options.batch
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, vocab, (batch, options.prompt_tokens), np.int32)
    nexts = generator.integers(0, vocab, (options.tokens, batch), np.int32)

    def probe() -> float:
        return _core.read_bandwidth(PROBE // MIB, report.threads, 3)

    sessions = [model.session() for _ in range(batch)]
    try:
        begin = time.perf_counter()
        for session, prompt in zip(sessions, prompts.tolist(), strict=True):
            session.feed(prompt)
        prefill = time.perf_counter() - begin
        before = probe()
        steps = []
        for tokens in nexts:
            begin = time.perf_counter()
            model.step_all(sessions, tokens)
            steps.append(time.perf_counter() - begin)
        bandwidth = (before + probe()) / 2
        resident = model.report().resident
    finally:
        for session in sessions:
            session.close()
    read = report.ledger["weights"][0] + (0 if report.weights else report.ledger["base"][0])
    return {
        "weights": depth.weights,
        "bits_per_weight": depth.bits_per_weight,
        "expected_kl": depth.expected_kl,
        "resident": resident,
        "prefill": prefill,
        "decode": sum(steps),
        "bandwidth": bandwidth,
        "read_per_second": read / float(np.median(steps)),
    }


def _medians(turns: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one size, from all its runs. The share is of the bandwidth beside each run."""
    import numpy as np

    def column(key: str) -> Any:
        return np.array([turn[key] for turn in turns])

    prefill = options.batch * options.prompt_tokens / column("prefill")
    decode = options.batch * options.tokens / column("decode")
    return {
        **{key: turns[-1][key] for key in ("weights", "bits_per_weight", "expected_kl")},
        "prefill_tokens_per_second": float(np.median(prefill)),
        "prefill_range": [float(prefill.min()), float(prefill.max())],
        "decode_tokens_per_second": float(np.median(decode)),
        "decode_range": [float(decode.min()), float(decode.max())],
        "bandwidth": float(np.median(column("bandwidth"))),
        "read_per_second": float(np.median(column("read_per_second"))),
        "share": float(np.median(column("read_per_second") / column("bandwidth"))),
        "resident": turns[-1]["resident"],
    }


def _show(answer: dict[str, Any]) -> None:
    rows = [
        [
            "-" if size["memory"] is None else format_size(size["memory"]),
            format_mb(size["weights"]),
            "-" if size["bits_per_weight"] is None else f"{size['bits_per_weight']:.2f}",
            "-" if size["expected_kl"] is None else f"{size['expected_kl']:.3g}",
            f"{size['prefill_tokens_per_second']:.0f}",
            f"{size['decode_tokens_per_second']:.1f}",
            f"{size['bandwidth'] / 1e9:.1f}",
            f"{size['share']:.0%}",
        ]
        for size in answer["sizes"]
    ]
    print(
        f"{answer['threads']} threads, {answer['isa']}, prompt {answer['prompt_tokens']}, answer "
        f"{answer['tokens']}, batch {answer['batch']}, medians of {answer['repeat']}\n"
    )
    head = ("memory", "weights", "bits", "KL", "prefill/s", "decode/s", "GB/s", "share")
    print(table(head, rows))
    print(
        "\nprefill and decode in tokens/s; GB/s is plain reading of memory, share the part\n"
        "of it at which decode reads the weights"
    )
