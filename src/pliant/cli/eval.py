"""`pliant eval`: how far the model is from its source, at one or many sizes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli.common import (
    add_engine_options,
    add_json_option,
    add_size_options,
    load_options,
    natural,
    need_matplotlib,
    number,
    print_json,
    save_figure,
    say,
    table,
    text_windows,
)
from pliant.cli.eval_kv import add_kv_options, check_kv_options, run_kv
from pliant.errors import SourceError, UsageError
from pliant.sizes import format_mb, format_size

if TYPE_CHECKING:
    from pliant.cli.progress import Bar
    from pliant.engine.model import Model
    from pliant.engine.seam import Floats

ROWS = 64  # positions whose logits are in memory at once


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        help="measure the distance to the source model",
        description="Measure on a text how far the model is from its source: mean KL divergence, "
        "perplexity, and how often both have the same likeliest token. Without --source all the "
        "rungs that are there are the reference.",
    )
    parser.add_argument("pack", metavar="PACK", help="directory made by pliant pack")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help="UTF-8 text to measure on"
    )
    add_size_options(
        parser,
        memory="measure the depth that pliant run --memory SIZE would have",
        weights="measure with at most so many bytes of plies and scales",
    )
    parser.add_argument(
        "--source",
        metavar="SPEC",
        help="compare with this model, in any form that pliant pack takes (needs pliant[pack])",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub source")
    parser.add_argument(
        "--tokens", metavar="N", type=natural, help="tokens of the text to use (default: all)"
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=natural,
        default=512,
        help="tokens that are read together, from nothing (default: 512)",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw KL over size (needs pliant[plot])"
    )
    add_json_option(parser)
    add_kv_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from pliant.cli.progress import progress_bar
    from pliant.engine.loading import load

    if options.revision is not None and options.source is None:
        raise UsageError("--revision belongs to --source")
    check_kv_options(options)
    if options.window < 2:
        raise UsageError("--window must be at least 2 tokens")
    if options.plot is not None:
        need_matplotlib()

    limits = {
        key: value for key, value in load_options(options).items() if key in ("threads", "isa")
    }
    text = _read(options.text)
    if options.kv is not None:
        return run_kv(options, text, limits)
    # The sizes are planned before torch comes in and grows the process.
    with load(options.pack, **limits) as model, progress_bar(quiet=options.json) as bar:
        sizes = _sizes(model, options.memory, options.weights)
        windows = text_windows(model, text, options.tokens, options.window)
        reference = None
        if options.source is not None:
            reference = _source(
                options.source, options.revision, model, model.report().threads, bar
            )
        answer = {
            "pack": options.pack,
            "text": str(options.text),
            "tokens": sum(map(len, windows)),
            "window": options.window,
            "reference": options.source or "all rungs of the pack",
            **_measure(model, sizes, windows, reference, bar),
        }
    if options.plot is not None:
        _plot(answer, options.plot)
    if options.json:
        print_json(answer)
    else:
        _show(answer)
        if options.plot is not None:
            say(f"wrote {options.plot}")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error


def _sizes(model: Model, memory: list[int], weights: list[int]) -> list[dict[str, Any]]:
    """The depths to measure, deepest first; all rungs if nothing was asked for."""
    found: list[dict[str, Any]] = []
    for size in memory:
        plan = model.plan_for(memory=size)
        found.append({"memory": size, "rungs": plan.rungs, "weights": plan.weights})
    for size in weights:
        plan = model.plan_for(weights=size)
        found.append({"memory": None, "rungs": plan.rungs, "weights": plan.weights})
    if not found:
        plan = model.plan_for()
        found.append({"memory": None, "rungs": plan.rungs, "weights": plan.weights})
    return sorted(found, key=lambda size: -size["rungs"])


def _source(
    spec: str, revision: str | None, model: Model, threads: int, bar: Bar
) -> Callable[[list[int]], Floats]:
    """The source model: from ids to its logits, float32 [tokens, vocabulary]."""
    import torch

    from pliant.pack.sources import open_source

    source = open_source(spec, revision=revision, progress=bar)
    vocab = model.pack.manifest.model.vocab
    if source.config.get("vocab_size") != vocab:
        raise SourceError(
            f"{spec} has {source.config.get('vocab_size')} tokens and the pack {vocab}: this is "
            "not the source of the pack"
        )
    bar("loading the source", None)
    torch.set_num_threads(threads)
    net: Any = source.load_torch()

    def logits(ids: list[int]) -> Floats:
        with torch.inference_mode():
            found: Floats = net(torch.tensor([ids])).logits[0].float().numpy()
        return found

    return logits


def _measure(
    model: Model,
    sizes: list[dict[str, Any]],
    windows: list[list[int]],
    reference: Callable[[list[int]], Floats] | None,
    bar: Bar,
) -> dict[str, Any]:
    """Window after window, at all sizes: only one window of the reference is in memory."""
    import numpy as np

    from pliant.engine.compare import Divergence

    sums = [Divergence() for _ in sizes]
    original = Divergence()
    begin, deepest = time.perf_counter(), model.plan_for().rungs
    for place, ids in enumerate(windows):
        vocab = model.pack.manifest.model.vocab
        if reference is not None:
            theirs = reference(ids)
        else:
            model.resize()
            theirs = np.empty((len(ids), vocab), np.float32)
            _fill(theirs, model.logit_blocks(ids, rows=ROWS))
        original.begin_window()
        for start in range(0, len(ids), ROWS):
            original.add(theirs[start : start + ROWS], ids[start + 1 : start + ROWS + 1])
        for index, (size, total) in enumerate(zip(sizes, sums, strict=True)):
            total.begin_window()
            if reference is None and size["rungs"] == deepest:
                blocks: Iterator[Floats] = iter([theirs])
            else:
                model.resize(weights=size["weights"] or None)
                blocks = model.logit_blocks(ids, rows=ROWS)
            at = 0
            for block in blocks:
                end = at + len(block)
                total.add(block, ids[at + 1 : end + 1], theirs[at:end])
                at = end
            bar("measuring", (place + (index + 1) / len(sizes)) / len(windows))
    results = []
    for size, total in zip(sizes, sums, strict=True):
        plan = model.plan_for(weights=size["weights"] or None)
        quality = {"bits_per_weight": plan.bits_per_weight, "expected_kl": plan.expected_kl}
        results.append({**size, **quality, **total.values()})
    return {
        "reference_perplexity": original.values()["perplexity"],
        "seconds": time.perf_counter() - begin,
        "sizes": results,
    }


def _fill(array: Floats, blocks: Iterator[Floats]) -> None:
    at = 0
    for block in blocks:
        array[at : at + len(block)] = block
        at += len(block)


def _show(answer: dict[str, Any]) -> None:
    rows = []
    for size in answer["sizes"]:
        error = size["kl_error"]
        rows.append(
            [
                "-" if size["memory"] is None else format_size(size["memory"]),
                format_mb(size["weights"]),
                number(size["bits_per_weight"], ".2f"),
                number(size["kl"], ".3g") + ("" if error is None else f" ± {error:.2g}"),
                number(size["expected_kl"], ".3g"),
                number(size["top1"], ".1%"),
                number(size["perplexity"], ".4g"),
            ]
        )
    print(
        f"{answer['tokens']} tokens of {answer['text']} in windows of {answer['window']}\n"
        f"reference: {answer['reference']}, perplexity "
        f"{number(answer['reference_perplexity'], '.4g')}\n"
    )
    head = ("memory", "weights", "bits", "KL", "expected", "top-1", "perplexity")
    print(table(head, rows))


def _plot(answer: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    measured = [(s["weights"] / 1e6, s["kl"]) for s in answer["sizes"] if s["kl"]]
    expected = [(s["weights"] / 1e6, s["expected_kl"]) for s in answer["sizes"] if s["expected_kl"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color="#1f5fa8", label="measured")
    if expected:
        axes.plot(*zip(*expected, strict=True), "x--", color="#999999", label="expected")
    wide = measured[0][0] - measured[-1][0] if measured else 0.0
    labelled = float("inf")
    for x, y in measured:  # from the largest on; where points are close only one gets its number
        if labelled - x > wide / 25:
            axes.annotate(f"{y:.3g}", (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8)
            labelled = x
    axes.margins(x=0.08)
    axes.set_yscale("log")
    axes.set_xlabel("resident plies and scales, MB")
    axes.set_ylabel("mean KL divergence to the reference, nats")
    axes.set_title(f"{Path(answer['pack']).name} on {Path(answer['text']).name}")
    axes.grid(which="both", alpha=0.25)
    if measured or expected:
        axes.legend()
    save_figure(figure, path)
