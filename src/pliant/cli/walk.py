"""`pliant bench --walk`: a budget that moves while answers are made, as figures and as a plot."""

from __future__ import annotations

import argparse
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli.common import save_figure
from pliant.errors import PliantError
from pliant.sizes import MIB, format_size

if TYPE_CHECKING:
    from pliant.cli.progress import Bar
    from pliant.engine.model import Model

PATH = (1.0, 0.75, 0.5, 0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 1.0, 0.1, 0.6, 1.0)
"""Where the budget goes, one after the other: 0 is the least, 1 everything."""

LEAST = 0.3
"""The least has this part of all plies: some two and a half bits a weight."""

CONTEXT = 512

APART = 0.002
"""Seconds between two samples at least: those of a tiny model would take more memory than it."""


def walk(options: argparse.Namespace, limits: dict[str, Any], bar: Bar) -> dict[str, Any]:
    """Generate for `options.walk` seconds while the budget goes along PATH."""
    from pliant.engine.loading import load

    with load(options.pack, context=CONTEXT, sessions=options.batch, chat=False, **limits) as model:
        most = model.plan.total
        least = model.plan_for(weights=int(model.depth.weights * LEAST) or None).total
        model.budget = most
        moves: list[dict[str, Any]] = []
        failure: list[BaseException] = []
        begin = time.perf_counter()

        def move() -> None:
            try:
                for number, part in enumerate(PATH):
                    time.sleep(max(begin + number * options.walk / len(PATH) - _now(), 0))
                    asked = _now()
                    budget = round(least + part * (most - least))
                    change = model.move(memory=budget)
                    told = _now()
                    change.wait()
                    moves.append(
                        {
                            "seconds": asked - begin,
                            "budget": budget,
                            "acknowledged": told - asked,
                            "done": _now() - asked,
                        }
                    )
            except PliantError as error:
                failure.append(error)

        mover = threading.Thread(target=move)
        mover.start()
        try:
            samples = _generate(model, options, begin, mover, bar)
        finally:
            mover.join()
        if failure:
            raise failure[0]
    return {
        "pack": options.pack,
        "batch": options.batch,
        "least": least,
        "most": most,
        "moves": moves,
        "samples": samples,
        "over_budget": max(s["resident"] - s["budget"] for s in samples),
    }


def _now() -> float:
    return time.perf_counter()


def _generate(
    model: Model, options: argparse.Namespace, begin: float, mover: threading.Thread, bar: Bar
) -> list[dict[str, Any]]:
    """Samples of steps, until the time is over and every budget has come."""
    from pliant.memory.budget import measure

    samples: list[dict[str, Any]] = []
    sessions = [model.session() for _ in range(options.batch)]
    for session in sessions:
        session.reserve(CONTEXT)
    tokens = [int(session.feed([1 + n]).argmax()) for n, session in enumerate(sessions)]
    while (start := _now()) - begin < options.walk or mover.is_alive():
        if len(sessions[0]) >= CONTEXT:
            for session in sessions:
                session.rewind([*session.tokens[:1], 0])
        tokens = model.step_all(sessions, tokens).argmax(-1).tolist()
        end, depth = _now(), model.depth
        if not samples or end - begin - samples[-1]["seconds"] >= APART:
            samples.append(
                {
                    "seconds": end - begin,
                    "budget": model.budget or 0,
                    "resident": measure().now,
                    "bits_per_weight": depth.bits_per_weight,
                    "expected_kl": depth.expected_kl,
                    "tokens_per_second": options.batch / (end - start),
                }
            )
        bar("walking", min((end - begin) / options.walk, 1.0))
    for session in sessions:
        session.close()
    return samples


def show_walk(answer: dict[str, Any]) -> None:
    """The figures as text."""
    moves, samples = answer["moves"], answer["samples"]
    pairs = [(b, b["budget"] < a["budget"]) for a, b in pairwise(moves)]
    shrinks = [move["acknowledged"] for move, down in pairs if down]
    grows = [move["done"] for move, down in pairs if not down]
    print(
        f"{len(moves)} budgets from {format_size(answer['least'])} to "
        f"{format_size(answer['most'])}, {len(samples)} samples, batch {answer['batch']}"
    )
    print(f"less memory: given back after at most {1e3 * max(shrinks):.0f} ms")
    print(f"more memory: in use after at most {1e3 * max(grows):.0f} ms, beside the answers")
    over = answer["over_budget"]
    where = (
        f"up to {format_size(over)} above" if over > 0 else f"at least {format_size(-over)} below"
    )
    print(f"resident set: {where} the budget")


def plot_walk(answer: dict[str, Any], path: Path) -> None:
    """Budget and resident set, bits per weight, and speed over time."""
    from matplotlib.figure import Figure

    samples = answer["samples"]
    seconds = [s["seconds"] for s in samples]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    memory, bits, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    memory.step(
        seconds, [s["budget"] / MIB for s in samples], where="post", color="#c0504d", label="budget"
    )
    memory.fill_between(
        seconds,
        [s["resident"] / MIB for s in samples],
        color="#1f5fa8",
        alpha=0.5,
        label="resident set",
    )
    memory.set_ylim(0)
    memory.set_ylabel("MiB")
    memory.legend(loc="lower left", ncols=2)
    memory.set_title(f"{Path(answer['pack']).name}: the budget moves while it answers")
    bits.step(seconds, [s["bits_per_weight"] or 0 for s in samples], where="pre", color="#4f8f3f")
    bits.set_ylim(0)
    bits.set_ylabel("bits a weight")
    # Single steps scatter: the mean of those of a quarter of a second.
    speed.plot(*_smooth(samples), color="#555555")
    speed.set_ylim(0)
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("seconds")
    for axes in (memory, bits, speed):
        axes.grid(alpha=0.25)
        axes.margins(x=0)
    save_figure(figure, path)


def _smooth(samples: list[dict[str, Any]], width: float = 0.25) -> tuple[list[float], list[float]]:
    """Middle and mean speed of each stretch of `width` seconds."""
    x, y, group = [], [], list[dict[str, Any]]()
    for sample in samples:
        group.append(sample)
        if sample["seconds"] - group[0]["seconds"] >= width:
            x.append((sample["seconds"] + group[0]["seconds"]) / 2)
            y.append(len(group) / sum(1 / s["tokens_per_second"] for s in group))
            group = []
    return x, y
