"""`pliant plan`: what fits into how many bytes, and how good it is."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pliant.cli.common import (
    add_engine_options,
    add_json_option,
    add_limits,
    load_options,
    print_json,
    table,
)
from pliant.sizes import MIB, format_mb, format_size

if TYPE_CHECKING:
    from pliant.engine.loading import Parts
    from pliant.memory.plan import Plan, Wish

STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10_000, 20_000)
ROWS = 10


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="show what fits into how many bytes",
        description="Show for sizes of the whole process what fits: bytes and bits of the weights, "
        "expected KL divergence to the source, estimated tokens a second, and context. With "
        "--memory, show the sum for that size.",
    )
    parser.add_argument("pack", metavar="PACK", help="directory made by pliant pack")
    add_json_option(parser)
    add_limits(parser, sessions=True)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from pliant import _core
    from pliant.engine.build import default_threads
    from pliant.engine.loading import kv_wish, open_parts
    from pliant.memory.plan import Wish, make_plan, smallest

    given = load_options(options)
    threads = default_threads(given.pop("threads", None))
    coded, kv_bits = kv_wish(given.pop("kv_bits", 16), given.get("kv_floor"))
    parts = open_parts(options.pack, threads=threads, isa=given.pop("isa"), coded_kv=coded)
    wish = Wish(**given, kv_bits=kv_bits)
    bandwidth = _core.read_bandwidth(64, threads, 3)
    least = smallest(parts.sizes, parts.fixed, wish)
    answer: dict[str, Any] = {
        "pack": options.pack,
        "source": parts.pack.manifest.source.name,
        "threads": threads,
        "bandwidth": bandwidth,
        "rungs_of_pack": len(parts.pack.manifest.rungs),
        "rungs_available": parts.pack.rungs_available,
        "smallest": _entry(parts, least, wish, bandwidth),
    }
    if wish.memory is not None:
        answer["plan"] = _entry(parts, make_plan(parts.sizes, parts.fixed, wish), wish, bandwidth)
    else:
        answer["sizes"] = [
            _entry(
                parts,
                make_plan(parts.sizes, parts.fixed, replace(wish, memory=size)),
                wish,
                bandwidth,
            )
            for size in _sizes(parts, wish, least)
        ]
    if options.json:
        print_json(answer)
    elif wish.memory is not None:
        _show_one(answer)
    else:
        _show_all(answer)
    return 0


def _sizes(parts: Parts, wish: Wish, least: Plan) -> list[int]:
    """About ROWS sizes, from the smallest possible to that at which all rungs fit."""
    from pliant.memory.plan import make_plan

    most = make_plan(parts.sizes, parts.fixed, wish)
    # With all weights, and as much KV as the rule for small budgets would give.
    free = most.total - most.kv - sum(size for _, size in parts.fixed)
    whole = most.total - most.kv + max(least.kv, min(most.kv, free // 4))
    first, last = -(-least.total // MIB), -(-whole // MIB)
    step = next((s for s in STEPS if (last - first) / s <= ROWS), STEPS[-1])
    middle = range((first // step + 1) * step, last, step)
    return [size * MIB for size in (first, *middle, last)]


def _entry(parts: Parts, plan: Plan, wish: Wish, bandwidth: float) -> dict[str, Any]:
    from pliant.memory.plan import floor_rungs, kv_levels, tokens_per_second

    sizes = parts.sizes
    # The largest context at this size: the weights as shallow as the floor of quality allows.
    rungs = plan.rungs if wish.weights is not None else floor_rungs(sizes, wish)
    room = (plan.memory or plan.total) - sum(b for _, b in plan.fixed) - sizes.arena[rungs]
    level = plan.kv_level if wish.kv_bits is not None else kv_levels(sizes, wish, plan.context)[0]
    room -= sizes.kv_in_chunk(level, sizes.context)
    largest = sizes.kv_context(level, room // plan.sessions)
    base = sum(array_bytes for name, array_bytes in plan.fixed if name == "base")
    return {
        "memory": plan.memory or plan.total,
        "total": plan.total,
        "parts": dict(plan.lines()),
        "rungs": plan.rungs,
        "weights": plan.weights,
        "bits_per_weight": plan.bits_per_weight,
        "expected_kl": plan.expected_kl,
        "kv_bits": plan.kv_bits,
        "tokens_per_second": tokens_per_second(
            plan.weights if plan.bits_per_weight is not None else base, bandwidth
        ),
        "context": plan.context,
        "largest_context": min(largest, sizes.context),
        "sessions": plan.sessions,
    }


def _cells(entry: dict[str, Any]) -> list[str]:
    bits, kl = entry["bits_per_weight"], entry["expected_kl"]
    return [
        format_size(entry["memory"]),
        format_mb(entry["weights"]),
        "-" if bits is None else f"{bits:.2f}",
        "-" if kl is None else f"{kl:.3g}",
        f"{entry['tokens_per_second']:.0f}",
        str(entry["context"]),
        str(entry["largest_context"]),
    ]


HEAD = ("memory", "weights", "bits", "KL", "tokens/s", "context", "at most")


def _show_all(answer: dict[str, Any]) -> None:
    print(f"{answer['source']}: {_rungs(answer)}, {answer['threads']} threads\n")
    rows = [_cells(entry) for entry in answer["sizes"]]
    lines = table(HEAD, rows).splitlines()
    lines[1] += "  smallest"
    lines[-1] += "  all of it"
    print("\n".join(lines))
    print(
        "\nmemory is the whole process, weights the resident plies and scales; KL is the\n"
        "expected divergence to the source in nats; tokens/s are estimated from the read\n"
        f"bandwidth of this machine, {answer['bandwidth'] / 1e9:.1f} GB/s; context is what a "
        "conversation\nmay have, at most with the shallowest weights allowed."
    )


def _show_one(answer: dict[str, Any]) -> None:
    entry = answer["plan"]
    rows = [[name, format_size(size)] for name, size in entry["parts"].items()]
    rows.append(["sum", format_size(entry["total"])])
    print(table(("part", "bytes"), rows, left=1))
    print(f"\n{table(HEAD, [_cells(entry)])}")
    kv = "" if entry["kv_bits"] == 16 else f"KV in {entry['kv_bits']:.2f} bits; "
    print(f"\n{_rungs(answer, entry['rungs'])}; {kv}smallest possible: {_mib(answer['smallest'])}")


def _rungs(answer: dict[str, Any], used: int | None = None) -> str:
    here, all_of_it = answer["rungs_available"], answer["rungs_of_pack"]
    text = f"{all_of_it} rungs" if used is None else f"{used} of {all_of_it} rungs"
    return text if here == all_of_it else f"{text}, of which {here} are here"


def _mib(entry: dict[str, Any]) -> str:
    return f"{-(-int(entry['total']) // MIB)}MiB"
