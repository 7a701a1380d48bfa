"""From an open pack to an executor, and the rungs that are read into it later."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from pliant.engine.seam import Executor, Location, Tokenizer
from pliant.errors import ChecksumError, FormatError, PackError, UsageError
from pliant.memory.plan import PackSizes
from pliant.store import Pack
from pliant.store.files import RegularFile

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "RungFiles",
    "build_executor",
    "default_threads",
    "open_tokenizer",
    "pack_sizes",
    "read_ahead",
]

_PIECE = 2**20  # bytes of a file that are looked at together


def default_threads(threads: int | None) -> int:
    """`threads`, or the CPUs that this process may use; UsageError unless it is 1 to 1024."""
    if threads is None:
        from pliant._core import usable_cpus

        return usable_cpus()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise UsageError(f"threads must be from 1 to 1024, and not {threads!r}")
    return threads


def build_executor(
    pack: Pack, *, threads: int, isa: str = "auto", chunk: int = 128, coded_kv: bool = False
) -> Executor:
    """An executor of the model without any rung.

    Takes the arrays out of `pack.base` as it copies them, so that they are in memory once. `isa`
    names the kernels to use; `chunk` is how many tokens are computed at once; `coded_kv`: full
    pages of the KV cache are coded in plies, which the pack must know how to do. Raises UsageError
    for kernels that this machine does not have, ModelError for a decoder that is not supported.
    """
    from pliant import _core

    if isa != "auto" and isa not in _core.cpu_isa():
        raise UsageError(
            f"the kernels {isa!r} cannot run here; these can: {', '.join(_core.cpu_isa())}"
        )
    executor = _core.Executor(asdict(pack.manifest.model), threads=threads, isa=isa, chunk=chunk)
    base, coded = pack.base, [m for m in pack.manifest.matrices if m.coding == "plies"]
    for name in list(base):
        if name.endswith(("norm", ".bias")):
            executor.set_vector(name, base.pop(name))
        elif name.endswith(".weight"):
            executor.set_plain(name.removesuffix(".weight"), base.pop(name))
    if coded:
        executor.set_tree(base.pop("tree"), base.pop("scale_steps"))
    for matrix in coded:
        executor.add_coded(
            matrix.name,
            matrix.rows,
            matrix.columns,
            list(matrix.blocks),
            base[f"order.{matrix.input}"],
            base.pop(f"{matrix.name}.row_order", None),
            base.pop(f"{matrix.name}.row_scale").view(np.uint16),
            base.pop(f"{matrix.name}.group_scale"),
        )
    kv = pack.manifest.kv
    if coded_kv and kv is not None:
        executor.set_kv_ladder(base["kv.ladder"], list(kv.rungs), base["kv.thresholds"])
        mean, scale, order = (base[f"kv.{part}"] for part in ("mean", "scale", "order"))
        for layer, head, kind in np.ndindex(mean.shape[:3]):
            executor.set_kv_turn(
                layer, head, bool(kind), *(part[layer, head, kind] for part in (mean, scale, order))
            )
    rungs = pack.manifest.rungs
    executor.set_ladder(pack.ladder, rungs.plies.tolist(), rungs.bytes.tolist())
    executor.finish()
    base.clear()
    return executor


def open_tokenizer(pack: Pack) -> Tokenizer:
    """The tokenizer of a pack, mapped, after its digest was checked in small pieces."""
    from pliant._core import Tokenizer as CoreTokenizer

    name = "tokenizer.bin"
    path, digest = pack.file_path(name), pack.manifest.files[name]
    hashed, buffer = hashlib.sha256(), np.empty(_PIECE, np.uint8)
    try:
        with RegularFile(path) as file:
            file.expect(digest.bytes)
            for left in range(digest.bytes, 0, -_PIECE):
                file.fill(piece := buffer[: min(left, _PIECE)])
                hashed.update(piece.data)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing: copy or download it again") from None
    if hashed.hexdigest() != digest.sha256:
        raise ChecksumError(f"{path} is not the file that was written: copy or download it again")
    tokenizer = CoreTokenizer(str(path))
    if tokenizer.vocab_size > pack.manifest.model.vocab:
        raise FormatError(
            f"{path} has {tokenizer.vocab_size} tokens, and the model {pack.manifest.model.vocab}"
        )
    return tokenizer


def pack_sizes(pack: Pack, executor: Executor, chunk: int = 0) -> PackSizes:
    """What the model takes at each number of rungs that are here, for plans; `chunk`: tokens that
    are computed at once."""
    count = pack.rungs_available
    kv_rungs = executor.kv_rung_bytes
    kv = pack.manifest.kv if kv_rungs else None
    scales = pack.units.scale_bytes
    return PackSizes(
        weights=[scales + size for size in pack.layout.payload[: count + 1].tolist()],
        arena=[0, *accumulate(pack.manifest.rungs.bytes[:count].tolist())],
        coded=sum(m.rows * m.columns for m in pack.manifest.matrices if m.coding == "plies"),
        quality=[(point.bytes, point.kl) for point in pack.manifest.quality],
        context=pack.manifest.model.context,
        kv_page_tokens=executor.kv_page_tokens,
        kv_page_bytes=executor.kv_page_bytes,
        kv_rungs=kv_rungs,
        kv_quality=kv.quality if kv is not None else (),
        kv_global=executor.kv_global_bytes if executor.kv_local_age else (),
        kv_local_age=executor.kv_local_age,
        # A chunk may begin and end inside a page.
        kv_chunk=chunk // executor.kv_page_tokens + 1,
    )


def read_ahead(pack: Pack, most: int) -> None:
    """Have the kernel read the first rungs into its cache, `most` bytes of them, while something
    else goes on. Nothing depends on it; what goes wrong is met again when they are read."""
    from pliant._core import is_cached

    rungs = min(int(np.searchsorted(pack.layout.payload, most)), pack.rungs_available)
    parts, first = [], 0
    for shard in pack.manifest.shards:
        if first >= rungs:
            break
        begin = pack.rung_location(first)
        end = pack.rung_location(min(first + shard.rungs, rungs) - 1)
        parts.append((begin.path, begin.offset, end.offset + end.bytes - begin.offset))
        first += shard.rungs

    def ask() -> None:
        with suppress(PackError, OSError):
            for path, offset, size in parts:
                with RegularFile(path) as file:
                    fd = file.fileno()
                    if not is_cached(fd, offset, size):  # to ask for what is there takes time, too
                        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)

    # It waits where the disk has enough to do.
    threading.Thread(target=ask, name="read ahead", daemon=True).start()


class RungFiles:
    """The shards of a pack, each opened when its first rung is needed, and then kept open.

    A shard that is replaced or deleted later does no harm: what was opened stays readable.
    """

    __slots__ = ("_files", "_pack")

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._files: dict[Path, RegularFile] = {}

    def location(self, rung: int) -> Location:
        """What `Executor.read_rungs` needs. PackError if the file cannot be opened."""
        place = self._pack.rung_location(rung)
        file = self._files.get(place.path)
        if file is None:
            try:
                file = RegularFile(place.path)
            except FileNotFoundError:
                raise PackError(
                    f"{place.path} cannot be opened: it is not there any more; copy or download "
                    "it again"
                ) from None
            self._files[place.path] = file
        return file.fileno(), place.offset, place.bytes, place.crc32

    def close(self) -> None:
        """Close all of them."""
        while self._files:
            self._files.popitem()[1].close()
