"""pliant at llama.cpp's sizes: ``python benchmarks/rivals/compare.py PACK --llama JSON``.

Loads the pack with ``weights`` of the very bytes of each file that run_llama.py measured, and at
further sizes where there is no such file, and scores it with the same windows and the same source
logits. Writes benchmarks/results/pliant_MODEL.json, prints the table, draws the picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Reference, load_average, machine, markdown, write_json
from plot import RESULTS, draw

import pliant

SIZES = (45, 55, 65, 72, 89, 105)  # 10^6 bytes
# What pliant wants of itself: at most this share of the KL of a file of the same bytes.
SHARE = 0.3
NEAR_LOSSLESS = ("Q6_K", "Q8_0")  # here: no more KL than the file has


def speed(pack: Path, sizes: list[dict[str, Any]], threads: int) -> None:
    """Add to each size what ``pliant bench`` measures, in a process of its own."""
    command = [sys.executable, "-m", "pliant", "bench", str(pack), "--json"]
    command += ["--threads", str(threads)]
    for size in sizes:
        size |= {"threads": threads, "load_average": load_average()}
        command_of_size = [*command, "--weights", str(size["weights"])]
        done = subprocess.run(command_of_size, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command_of_size)} failed:\n{done.stderr}")
        told = json.loads(done.stdout)["sizes"][0]
        for kind in ("prefill", "decode"):
            size[f"{kind}_tokens_per_second"] = round(told[f"{kind}_tokens_per_second"], 1)
            size[f"{kind}_range"] = [round(rate, 1) for rate in told[f"{kind}_range"]]
        size["bandwidth"] = round(told["bandwidth"])


def quality(
    pack: Path, weights: int, reference: Reference, threads: int, before: list[dict[str, Any]]
) -> dict[str, Any]:
    """Score of one size. ``weights``: most bytes of resident plies and scales.

    Sizes with the very same plies resident have the same figures, so these are taken from those
    that were scored ``before`` in this run.
    """
    with pliant.load(pack, weights=weights, threads=threads) as model:
        depth = model.depth
        for size in before:
            if size["resident_weights"] == depth.weights:
                return {**size, "weights": weights}
        score = reference.score(lambda ids: model.logits(ids.tolist()))
    if depth.weights > weights:
        raise RuntimeError(f"{depth.weights} bytes of weights are resident, {weights} were allowed")
    return {
        "weights": weights,
        "resident_weights": depth.weights,
        "bits_per_weight": depth.bits_per_weight,
        "expected_kl": depth.expected_kl,
        **score,
    }


def measured(out: Path, reference: Reference) -> dict[int, dict[str, Any]]:
    """The sizes that OUT has from the same windows, by their bytes."""
    if not out.exists():
        return {}
    sizes = json.loads(out.read_text(encoding="utf-8"))["sizes"]
    return {size["weights"]: size for size in sizes if size["tokens"] == reference.ids.size}


def target(name: str, file: dict[str, Any]) -> float | None:
    """Largest wanted ratio of KLs; None where the source itself is in this format."""
    if file["source_share"] > 0.5:
        return None
    return 1.0 if name in NEAR_LOSSLESS else SHARE


def rates(figures: dict[str, Any]) -> str:
    """Decode and prefill, tokens a second."""
    found = [figures.get(f"{kind}_tokens_per_second") for kind in ("decode", "prefill")]
    return " / ".join(f"{rate:.0f}" if rate else "-" for rate in found)


def table(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, list[str]]:
    """The comparison as markdown, and the names of the files where the target is missed."""
    sizes = {size["weights"]: size for size in ours["sizes"]}
    files = {file["file_bytes"]: name for name, file in theirs["files"].items() if name != "F32"}
    rows, missed = [], []
    for weights in sorted(sizes):
        size = sizes[weights]
        row = [f"{weights / 1e6:.1f}", f"{size['kl']:.4f}", f"{size['top1']:.3f}"]
        row += [f"{size['perplexity']:.2f}", rates(size)]
        name = files.get(weights)
        if name is None:
            rows.append([*row, "no file", *["-"] * 7])
            continue
        file = theirs["files"][name]
        # The better of its two figures, so that the comparison does not live off its activations.
        if file["tokens"] != size["tokens"]:
            counts = f"{file['tokens']} and {size['tokens']}"
            raise ValueError(f"{name} and pliant were scored on different text: {counts} tokens")
        wanted = target(name, file)
        ratio = 0.0 if wanted is None else size["kl"] / min(file["kl"], file["kl_weights"])
        if wanted is not None and ratio > wanted:
            missed.append(f"{name}: {ratio:.2f} of the KL, wanted at most {wanted}")
        row += [name + (" (format of the source)" if wanted is None else "")]
        helped = f"{file['imatrix']['kl']:.4f}" if "imatrix" in file else "-"
        row += [
            f"{file['kl']:.4f}",
            f"{file['kl_weights']:.4f}",
            helped,
            f"{file['top1']:.3f}",
            f"{file['perplexity']:.2f}",
        ]
        rows.append([*row, rates(file), "-" if wanted is None else f"{ratio:.2f}"])
    head = [
        "pliant, MB",
        "KL",
        "top-1",
        "perplexity",
        "decode / prefill",
        "llama.cpp",
        "KL",
        "weights alone",
    ]
    return markdown(
        [*head, "imatrix", "top-1", "perplexity", "decode / prefill", "KL ratio"], rows
    ), missed


def brief(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The table of the README: what a pack is at each size, and the file of the same bytes."""
    files = {file["file_bytes"]: name for name, file in theirs["files"].items() if name != "F32"}
    rows = []
    for size in ours["sizes"]:
        row = [f"{size['weights'] / 1e6:.1f} MB", f"{size['bits_per_weight']:.2f}"]
        row += [short(size["kl"]), short(size["expected_kl"]), f"{size['top1']:.3f}"]
        name = files.get(size["weights"])
        if name is None:
            rows.append([*row, "none", "", ""])
            continue
        file = theirs["files"][name]
        same = " (format of the source)" if target(name, file) is None else ""
        rows.append([*row, name + same, short(file["kl"]), short(file["kl_weights"])])
    head = ["weights", "bits a weight", "KL", "expected by the pack", "top-1"]
    return markdown(
        [*head, "llama.cpp file of these bytes", "its KL", "its weights alone"], rows
    ).replace("|---|---:|---:|---:|---:|---:|", "|---:|---:|---:|---:|---:|---|")


def short(kl: float) -> str:
    """Three figures, and at most four places."""
    return f"{kl:.3f}" if kl >= 0.1 else f"{kl:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="JSON of run_llama.py")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="as in reference.py")
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES, help="more sizes, 10^6 B")
    parser.add_argument(
        "--files", nargs="*", help="at the bytes of these alone; other sizes in OUT stay"
    )
    parser.add_argument("--windows", type=int, help="fewer than the reference has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/pliant_MODEL.json")
    parser.add_argument("--plot", type=Path, help="default: docs/images/kl_MODEL")
    parser.add_argument(
        "--only",
        choices=("quality", "speed", "table"),
        help="other figures in OUT stay as they are",
    )
    parser.add_argument("--brief", action="store_true", help="print the table of the README")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    args = parser.parse_args()

    theirs: dict[str, Any] = json.loads(args.llama.read_text(encoding="utf-8"))
    name = theirs["model"]
    out = args.out or RESULTS / f"pliant_{name}.json"
    plot = args.plot or RESULTS.parent.parent / "docs" / "images" / f"kl_{name}"
    ours: dict[str, Any] = {
        "model": name,
        "engine": f"pliant {pliant.__version__}",
        "machine": machine(),
        "sizes": [],
    }
    if args.only in ("speed", "table"):
        ours["sizes"] = json.loads(out.read_text(encoding="utf-8"))["sizes"]
    else:
        files = args.files
        if files is None:
            files = [key for key in theirs["files"] if key != "F32"]
        wanted = {round(size * 1e6) for size in args.sizes}
        wanted |= {theirs["files"][key]["file_bytes"] for key in files}
        reference = Reference.read(args.work / name, args.windows)
        sizes = {} if args.files is None else measured(out, reference)
        scored: list[dict[str, Any]] = []
        for weights in sorted(wanted):
            size = quality(args.pack, weights, reference, args.threads, scored)
            scored.append(size)
            sizes[weights] = size
            print(f"{weights / 1e6:.1f} MB: KL {size['kl']:.6f}", file=sys.stderr)
            ours["sizes"] = [sizes[key] for key in sorted(sizes)]
            write_json(out, ours)
    if args.only in (None, "speed"):
        speed(args.pack, ours["sizes"], args.threads)
        write_json(out, ours)
    text, missed = table(ours, theirs)
    print(brief(ours, theirs) if args.brief else text)
    draw([(ours, theirs)], plot)
    for line in missed:
        print(line, file=sys.stderr)
    if args.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
