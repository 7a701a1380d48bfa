"""Is our tokenizer exact, small and fast? Compared with the `tokenizers` library on one model.

    python benchmarks/tokenizer.py DIRECTORY [--text PATH ...] [--megabytes N] [--json]

DIRECTORY holds a tokenizer.json; PATH is a file, or a directory searched for text files. Python's
own sources and generated Unicode are always part of the text. Exit status 1 if any id differs.

What limits the figures: loading is one mmap and one header, so it waits for the kernel; encoding
waits for look-ups in the table of merges, most of which miss the first-level cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SUFFIXES = {".txt", ".md", ".py", ".html", ".rst", ".c", ".h", ".json", ".po", ".xml", ""}
CHUNK = 1 << 15


def chunks(paths: list[Path], limit: int) -> Iterator[str]:
    """Pieces of text files, of all of them alike, up to about `limit` characters."""
    files = []
    for path in paths:
        files += sorted(p for p in path.rglob("*")) if path.is_dir() else [path]
    random.Random(0).shuffle(files)
    total = 0
    for file in files:
        if total >= limit:
            return
        if file.suffix not in SUFFIXES or not file.is_file():
            continue
        with file.open("rb") as stream:
            data = stream.read(CHUNK)
        if b"\0" in data:
            continue
        # Broken UTF-8 becomes U+FFFD, as in Python.
        text = data.decode("utf-8", "replace")
        total += len(text)
        yield text


def generated(special: list[str], count: int) -> Iterator[str]:
    """Every script, emoji, spaces of all kinds, and special tokens inside text."""
    rng = random.Random(1)
    planes = [
        *((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700)),
        *((0x900, 0xE00), (0xE00, 0x1100), (0x1100, 0x1200), (0x2000, 0x2100), (0x3000, 0x3100)),
        *((0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1F300, 0x1FAFF), (0x10000, 0x110000)),
    ]
    spaces = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u2581",
        "\u200d",
        "'",
        "'s",
    ]
    for _ in range(count):
        words = []
        for _ in range(200):
            low, high = rng.choice(planes)
            words += [chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))]
            words.append(
                rng.choice(spaces) if rng.random() < 0.9 else rng.choice(special or spaces)
            )
        yield "".join(words)
    for low, high in planes:
        for at in range(low, high, 4096):
            block = "".join(map(chr, range(at, min(high, at + 4096))))
            yield block.encode("utf-8", "replace").decode()


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def run(kind: str, path: str, texts: list[str], queue: Any) -> None:
    """In a fresh process: load, encode, and report time and memory."""
    import tokenizers

    from pliant import _core

    encode: Callable[[str], object]
    before = resident()
    begin = time.perf_counter()
    if kind == "pliant":
        encode = _core.Tokenizer(path).encode
    else:
        reference = tokenizers.Tokenizer.from_file(path)
        encode = partial(reference.encode, add_special_tokens=False)
    load = time.perf_counter() - begin
    loaded = resident() - before
    size = sum(len(t.encode()) for t in texts)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for text in texts:
            encode(text)
        times.append(time.perf_counter() - begin)
    queue.put(
        {
            "load_ms": load * 1e3,
            "loaded_mib": loaded / 2**20,
            "used_mib": (resident() - before) / 2**20,
            "encode_mb_s": size / statistics.median(times) / 1e6,
        }
    )


def measure(kind: str, path: Path, texts: list[str]) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run, args=(kind, str(path), texts, queue))
    process.start()
    result: dict[str, float] = queue.get(timeout=600)
    process.join()
    return result


def compare(source: Path, packed: Path, texts: list[str]) -> dict[str, int]:
    """Counts what was compared, and what was not equal."""
    from tokenizers import Tokenizer as Reference

    from pliant._core import Tokenizer

    ours, reference = Tokenizer(str(packed)), Reference.from_file(str(source))
    count = {
        "characters": 0,
        "ids": 0,
        "texts": len(texts),
        "encode_differs": 0,
        "decode_differs": 0,
    }
    rng = random.Random(2)
    for index, text in enumerate(texts):
        parse, special = index % 3 != 0, index % 2 == 0
        reference.encode_special_tokens = not parse
        expected = reference.encode(text, add_special_tokens=special).ids
        ids = ours.encode(text, special, parse)
        count["characters"] += len(text)
        count["ids"] += len(ids)
        count["encode_differs"] += ids != expected
        stray = [rng.randrange(ours.vocab_size) for _ in range(100)]
        for some in (ids, stray):
            skip = rng.random() < 0.5
            count["decode_differs"] += ours.decode(some, skip) != reference.decode(
                some, skip_special_tokens=skip
            )
    for one in range(ours.vocab_size):
        count["decode_differs"] += ours.decode([one]) != reference.decode(
            [one], skip_special_tokens=False
        )
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--megabytes", type=float, default=2.0, help="text from each source")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    from pliant.pack.tokenizer import build_tokenizer

    source = options.directory / "tokenizer.json"
    added = json.loads(source.read_text(encoding="utf-8"))["added_tokens"]
    limit = int(options.megabytes * 1e6)
    code = Path(sysconfig.get_path("stdlib"))
    texts = [*chunks(options.text, limit), *chunks([code], limit)]
    unicode = list(generated([t["content"] for t in added], 400))
    with tempfile.TemporaryDirectory() as directory:
        packed = Path(directory) / "tokenizer.bin"
        begin = time.perf_counter()
        build_tokenizer(source, packed)
        report: dict[str, Any] = {
            "pack_s": time.perf_counter() - begin,
            "file_mib": packed.stat().st_size / 2**20,
            "equality": compare(source, packed, texts + unicode),
            "pliant": measure("pliant", packed, texts),
            "tokenizers": measure("tokenizers", source, texts),
        }
    if options.json:
        print(json.dumps(report))
    else:
        equality = report["equality"]
        print(", ".join(f"{k} {v}" for k, v in equality.items()))
        print(f"packed in {report['pack_s']:.1f} s to {report['file_mib']:.1f} MiB")
        for kind in ("pliant", "tokenizers"):
            r = report[kind]
            print(
                f"{kind:11} load {r['load_ms']:8.2f} ms, {r['loaded_mib']:6.1f} MiB; after "
                f"encoding {r['used_mib']:6.1f} MiB; {r['encode_mb_s']:6.2f} MB/s"
            )
    return int(bool(report["equality"]["encode_differs"] or report["equality"]["decode_differs"]))


if __name__ == "__main__":
    sys.exit(main())
