"""`pliant eval --kv`: what a coded KV cache costs, in KL and in single facts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli.common import natural, number, print_json, save_figure, say, table, text_windows
from pliant.errors import UsageError
from pliant.sizes import format_mb

if TYPE_CHECKING:
    from pliant.engine.model import Model
    from pliant.engine.recall import Sample

_TASKS = ("needle", "lookup", "copy", "sum", "turns")  # recall.TASKS, without importing numpy
_LENGTHS = (1024, 4096, 8192)
_SAMPLES = 4
_WAYS = {"all_coded": "every token coded", "as_run": "newest page exact"}
_HALF = 0.5


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """--kv and what belongs to it."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--kv",
        metavar="BITS",
        type=float,
        nargs="+",
        help="measure instead what a KV cache of at most so many bits a value costs, against an "
        "exact one, at the first of --weights (default: all rungs)",
    )
    group.add_argument(
        "--tasks",
        metavar="NAME[,NAME]",
        help="with --kv: also how often single facts out of a long context are right, and their "
        f"log-likelihood: all, or some of {', '.join(_TASKS)}",
    )
    group.add_argument(
        "--lengths",
        metavar="N",
        type=natural,
        nargs="+",
        help="tokens of a context of --tasks with a question (default: those of "
        f"{', '.join(map(str, _LENGTHS))} that the model was made for)",
    )
    group.add_argument(
        "--samples",
        metavar="N",
        type=natural,
        help=f"contexts of each length and kind (default: {_SAMPLES}); errors need at least 2",
    )
    group.add_argument("--seed", metavar="N", type=int, help="of what --tasks draw (default: 0)")


def check_kv_options(options: argparse.Namespace) -> None:
    """UsageError for options that do not go together."""
    if options.kv is None and options.tasks is not None:
        raise UsageError("--tasks belongs to --kv")
    for name in ("lengths", "samples", "seed"):
        if options.tasks is None and getattr(options, name) is not None:
            raise UsageError(f"--{name} belongs to --tasks")
    if options.seed is not None and options.seed < 0:
        raise UsageError("--seed must not be below 0")
    if options.kv is not None and (
        options.source is not None or options.memory or len(options.weights) > 1
    ):
        raise UsageError("--kv goes with one --weights, and without --memory and --source")


def run_kv(options: argparse.Namespace, text: str, limits: dict[str, Any]) -> int:
    """Measure, and show; returns the exit code. `limits`: threads and isa for the engine."""
    from pliant.cli.progress import progress_bar
    from pliant.engine.kv_quality import Caches, kv_quality, kv_recall
    from pliant.engine.loading import load

    weights = options.weights[0] if options.weights else None
    with load(options.pack, weights=weights, **limits) as model:
        windows = text_windows(model, text, options.tokens, options.window)
        samples = _samples(model, text, options)
        begin = model.pack.manifest.tokens.begin
        depth = model.depth
    caches = Caches(options.pack, options.kv, weights=weights, **limits)
    with progress_bar(quiet=options.json) as bar:
        found = kv_quality(caches, windows, progress=lambda done: bar("measuring KL", done))
        answer = {
            "pack": options.pack,
            "text": str(options.text),
            "tokens": sum(map(len, windows)),
            "window": options.window,
            "weights": depth.weights,
            "bits_per_weight": depth.bits_per_weight,
            "exact_perplexity": found["exact"]["perplexity"],
            "kv": found["coded"],
        }
        if samples:
            answer["seed"] = options.seed or 0
            answer |= kv_recall(
                caches, samples, begin=begin, progress=lambda done: bar("asking", done)
            )
    if options.plot is not None:
        _plot(answer, options.plot)
    if options.json:
        print_json(answer)
        return 0
    _show(answer)
    if options.plot is not None:
        say(f"wrote {options.plot}")
    return 0


def _samples(model: Model, text: str, options: argparse.Namespace) -> list[Sample]:
    """What --tasks ask for; nothing without it."""
    from pliant.engine.recall import make_samples

    if options.tasks is None:
        return []
    most = model.context // 32 * 32  # contexts end with whole pages where all of them are coded
    lengths = options.lengths or [length for length in _LENGTHS if length <= most] or [most]
    for length in lengths:
        if length > most:
            raise UsageError(f"--lengths {length}: at most {most}, which the model was made for")
    return make_samples(
        model.tokenizer,
        text,
        tasks=_TASKS if options.tasks == "all" else options.tasks.split(","),
        lengths=lengths,
        samples=options.samples or _SAMPLES,
        seed=options.seed or 0,
        begin=model.pack.manifest.tokens.begin,
    )


def _show(answer: dict[str, Any]) -> None:
    print(
        f"{answer['tokens']} tokens of {answer['text']} in windows of {answer['window']}, "
        f"weights {format_mb(answer['weights'])}\nreference: the same weights, KV in 16 bits, "
        f"perplexity {number(answer['exact_perplexity'], '.4g')}\n"
    )
    rows = []
    for one in answer["kv"]:
        run = one["as_run"]
        error = "" if run["kl_error"] is None else f" ± {run['kl_error']:.1g}"
        rows.append(
            [
                f"{one['bits']:.2f}",
                str(one["bytes_per_token"]),
                number(one["expected_kl"], ".3g"),
                number(one["all_coded"]["kl"], ".3g"),
                number(run["kl"], ".3g") + error,
                number(run["top1"], ".1%"),
                number(run["perplexity"], ".4g"),
            ]
        )
    head = ("KV bits", "B/token", "expected", "all coded", "as run", "top-1", "perplexity")
    print(table(head, rows))
    print("\nKL as run, by quarter of the window:\n")
    quarters = [
        [f"{one['bits']:.2f}", *(number(kl, ".3g") for kl in one["as_run"]["by_position"])]
        for one in answer["kv"]
    ]
    print(table(("KV bits", "first", "second", "third", "last"), quarters))
    if "tasks" in answer:
        _show_tasks(answer)


def _show_tasks(answer: dict[str, Any]) -> None:
    rows, weak = [], False
    for task in answer["tasks"]:
        exact = task["caches"]["exact"]
        mark = "*" if exact["right"] < _HALF else ""
        weak = weak or bool(mark)
        names = [f"{task['task']}{mark}", str(task["length"]), str(task["answers"])]
        rows.append([*names, "none", "", f"{task['alone']:.2f}", "", ""])
        rows.append(
            ["", "", "", "16", f"{exact['right']:.0%}", f"{exact['likelihood']:.2f}", "", ""]
        )
        for one in answer["kv"]:
            coded = task["caches"][f"{one['name']} as_run"]
            worst = task["caches"][f"{one['name']} all_coded"]
            rows.append(
                [
                    *("", "", "", f"{one['bits']:.2f}", f"{coded['right']:.0%}"),
                    *(f"{coded['likelihood']:.2f}", _change(coded), _change(worst)),
                ]
            )
    print(
        "\nSingle facts out of long contexts: answers that are right, their log-likelihood\n"
        "in nats, and its change by coding, with the standard error over contexts.\n"
        "KV bits none: the question without its context.\n"
    )
    head = ("task", "tokens", "answers", "KV bits", "right", "nats", "as run", "all coded")
    print(table(head, rows, left=1))
    if weak:
        print("\n* exact KV itself has fewer than half of these right")


def _change(figures: dict[str, float | None]) -> str:
    change, error = figures["likelihood_change"], figures["likelihood_change_error"]
    return f"{change:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def _plot(answer: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    tasks = answer.get("tasks", [])
    figure = Figure(figsize=(9 if tasks else 7, 11 if tasks else 4.5), layout="constrained")
    parts = figure.subplots(
        3 if tasks else 1, squeeze=False, height_ratios=[4, 3, 3][: 3 if tasks else 1]
    )
    axes = parts[0, 0]
    bits = [one["bits"] for one in answer["kv"]]
    for way, label in _WAYS.items():
        axes.plot(bits, [one[way]["kl"] for one in answer["kv"]], "o-", label=label)
    axes.plot(bits, [one["expected_kl"] for one in answer["kv"]], "x--", color="#999999",
              label="expected")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits per value of keys and values, scales included")
    axes.set_ylabel("mean KL divergence to exact KV, nats")
    axes.set_title(f"{Path(answer['pack']).name} on {Path(answer['text']).name}")
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    if tasks:
        _plot_tasks(answer, parts[1, 0], parts[2, 0])
    save_figure(figure, path)


def _plot_tasks(answer: dict[str, Any], right: Any, change: Any) -> None:
    """Bars for each task and length: answers that are right, and changes of log-likelihood."""
    tasks = answer["tasks"]
    caches = [("exact", "exact")]
    caches += [(f"{one['name']} as_run", f"{one['bits']:.2f} bits") for one in answer["kv"]]
    wide = 0.8 / len(caches)
    for index, (name, label) in enumerate(caches):
        places = [at + (index - (len(caches) - 1) / 2) * wide for at in range(len(tasks))]
        found = [task["caches"][name] for task in tasks]
        color = "#999999" if name == "exact" else f"C{index - 1}"
        right.bar(places, [100 * one["right"] for one in found], wide, label=label, color=color)
        if name != "exact":
            errors = [one["likelihood_change_error"] or 0.0 for one in found]
            change.errorbar(places, [one["likelihood_change"] for one in found], errors,
                            fmt="o", capsize=3, label=label, color=color)  # fmt: skip
    labels = [f"{task['task']}\n{task['length']}" for task in tasks]
    for axes in (right, change):
        axes.set_xticks(range(len(tasks)), labels)
        axes.set_xlim(-0.5, len(tasks) - 0.5)
        axes.grid(axis="y", alpha=0.25)
        axes.legend()
    right.set_ylabel("right answers, %")
    change.axhline(0, color="#999999")
    change.set_ylabel("change of log-likelihood, nats")
