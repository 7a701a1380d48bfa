"""Draw KL against bytes: ``python benchmarks/rivals/plot.py smollm2 gemma3 --out docs/images/kl``.

Reads llama_cpp_MODEL.json and pliant_MODEL.json (or what there is of them) from
benchmarks/results and writes OUT.svg and OUT.png: one panel a model, pliant as a line, since one
pack has every size on it, and the files of llama.cpp as points.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent.parent / "results"
Result = dict[str, Any]
OURS, THEIRS, INK = "#0b6e4f", "#c2502e", "#333333"


def read(path: Path) -> Result | None:
    """A result, or None where it has not been measured."""
    if not path.exists():
        return None
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def panel(axes: Axes, ours: Result | None, theirs: Result | None) -> None:
    """One model: bytes in 10^6 across, mean KL up, logarithmic."""
    title = ""
    if theirs is not None:
        title = theirs["model"]
        files = {name: file for name, file in theirs["files"].items() if name != "F32"}
        points = [(file["file_bytes"] / 1e6, file["kl"], name) for name, file in files.items()]
        same = [point for point in points if files[point[2]]["source_share"] > 0.5]
        fair = [point for point in points if point not in same]
        axes.plot(*zip(*[p[:2] for p in fair], strict=True), "o", color=THEIRS, label="llama.cpp")
        if same:
            label = "llama.cpp, format of the source"
            position = list(zip(*[p[:2] for p in same], strict=True))
            axes.plot(*position, "o", color=THEIRS, fillstyle="none", label=label)
        helped = [
            (file["imatrix"]["file_bytes"] / 1e6, file["imatrix"]["kl"])
            for file in files.values()
            if "imatrix" in file
        ]
        if helped:
            label = "llama.cpp with an importance matrix"
            axes.plot(*zip(*helped, strict=True), "x", color=THEIRS, ms=5, label=label)
        lowest = min(point[0] for point in points)
        widest = max(point[0] for point in points)
        for megabytes, kl, name in points:
            # The name stands to the left at the edge of the picture, and where another point is
            # in its way.
            right = megabytes > lowest + 0.85 * (widest - lowest) or any(
                0 < other - megabytes < 0.15 * (widest - lowest) and 0.8 < near / kl < 1.25
                for other, near, _ in points
            )
            axes.annotate(
                name,
                (megabytes, kl),
                xytext=(-6 if right else 6, 3),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=8,
                color=THEIRS,
            )
    if ours is not None:
        title = ours["model"]
        line = sorted((size["weights"] / 1e6, size["kl"]) for size in ours["sizes"])
        label = "pliant, one pack"
        axes.plot(*zip(*line, strict=True), "o-", color=OURS, ms=4, lw=1.8, label=label)
    axes.set_yscale("log")
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel("weights, MB", color=INK)
    axes.grid(True, which="major", color="#dddddd", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def draw(pairs: list[tuple[Result | None, Result | None]], out: Path) -> None:
    """Write OUT.svg and OUT.png: a panel for each pair of results, ours and llama.cpp's."""
    plt.rcParams["svg.hashsalt"] = "pliant"  # the same figures give the same file
    figure, axes = plt.subplots(1, len(pairs), figsize=(6.4 * len(pairs), 4.2), squeeze=False)
    for axis, (ours, theirs) in zip(axes[0], pairs, strict=True):
        panel(axis, ours, theirs)
    axes[0][0].set_ylabel("mean KL to the source model, nats", color=INK)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(out.with_suffix(".png"), dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="+", help="as in the names of the results, e.g. smollm2")
    parser.add_argument("--out", type=Path, required=True, help="picture, without its suffix")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    pairs = []
    for model in args.models:
        ours = read(args.results / f"pliant_{model}.json")
        theirs = read(args.results / f"llama_cpp_{model}.json")
        pairs.append((ours, theirs))
        if ours is None and theirs is None:
            parser.error(f"no result for {model} in {args.results}")
    draw(pairs, args.out)


if __name__ == "__main__":
    main()
