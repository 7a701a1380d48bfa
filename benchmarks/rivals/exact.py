"""The engine without quantisation: ``python benchmarks/rivals/exact.py PACK ...``.

Packs made by ``pliant pack --plain f32`` or ``--plain bf16`` hold the matrices as they are, so what
differs from the source model is the engine's arithmetic alone, and its KL says whether norms,
rotary tables, attention and activation functions are those of the model. Each pack is scored
against the logits that reference.py has computed with the same matrices (for bf16 packs with its
option ``--matrices bf16``). Writes benchmarks/results/exact_MODEL.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import Reference, machine, markdown, write_json
from plot import RESULTS

import pliant
from pliant.store import Pack

# Two programs that add float32 numbers in another order differ by some 1e-7 in the mean.
LARGEST_KL = 5e-6


def measure(path: Path, work: Path, model: str, windows: int, threads: int) -> dict[str, Any]:
    """Coding and figures of one pack. ValueError if a matrix of it is in plies."""
    codings = {matrix.coding for matrix in Pack.open(path).manifest.matrices}
    if len(codings) != 1 or codings == {"plies"}:
        raise ValueError(f"{path} has matrices in {sorted(codings)}; pack it with --plain")
    coding = codings.pop()
    name = model if coding == "f32" else f"{model}-{coding}"
    reference = Reference.read(work / name, windows)
    with pliant.load(path, threads=threads, chat=False) as engine:
        score = reference.score(lambda ids: engine.logits(ids.tolist()))
    return {"matrices": coding, **score}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("packs", type=Path, nargs="+", metavar="PACK")
    parser.add_argument("--model", required=True, help="name of the GGUF file, as in reference.py")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="as in reference.py")
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens (default 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/exact_MODEL.json")
    parser.add_argument("--check", action="store_true", help=f"fail above a KL of {LARGEST_KL}")
    args = parser.parse_args()
    found = [
        measure(path, args.work, args.model, args.windows, args.threads) for path in args.packs
    ]
    result = {
        "model": args.model,
        "engine": f"pliant {pliant.__version__}",
        "machine": machine(),
        "packs": found,
    }
    write_json(args.out or RESULTS / f"exact_{args.model}.json", result)
    rows = [
        [pack["matrices"], f"{pack['kl']:.2e}", f"{pack['top1']:.4f}", f"{pack['tokens']}"]
        for pack in found
    ]
    print(markdown(["matrices", "KL", "top-1", "tokens"], rows))
    if args.check and any(pack["kl"] > LARGEST_KL for pack in found):
        sys.exit(f"a KL is above {LARGEST_KL}: the engine computes another model")


if __name__ == "__main__":
    main()
