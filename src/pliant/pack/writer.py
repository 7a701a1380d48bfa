"""Writing a pack: all of it or nothing.

Everything goes to a directory beside the target, `.NAME.partial-PID`, which is opened as a pack and
then renamed. Whatever happens before that, the target is as it was.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pliant.errors import FormatError, PackError, UsageError
from pliant.store import Layout, Manifest, Pack, UnitTable, base_tensors
from pliant.store.base import check_values
from pliant.store.manifest import (
    ALIGNMENT,
    FORMAT,
    LISTED_FILES,
    VERSION,
    encode,
    rung_name,
    shard_name,
)
from pliant.store.pack import BASE, MANIFEST, Progress
from pliant.store.safetensors import DTYPES, encode_header

__all__ = ["write_pack"]

_MIB = 2**20
_CHUNK = 2**20
_NO_DIGEST = {"bytes": 0, "sha256": "0" * 64}

PlyBytes = Callable[[int, int], "bytes | npt.NDArray[np.uint8]"]


def write_pack(
    out: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Any],
    base: Mapping[str, npt.NDArray[Any]],
    ladder: npt.NDArray[np.uint32],
    ply_bytes: PlyBytes,
    extra_files: Mapping[str, bytes | Path],
    rung_bytes: int | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a pack to the directory `out`.

    manifest:    `pliant.json` as plain values, without `rungs`, `shards` and `files`; `format`,
                 `version`, `quality` and `kv` may be left out
    base:        the tensors of base.safetensors but the ladder, by name, with the dtypes of
                 docs/format.md section 3. BF16 is given as its bits in uint16: whether a matrix is
                 BF16 follows from its coding
    ladder:      uint32 [plies], the unit of each ply; empty if no matrix is coded in plies
    ply_bytes:   `ply_bytes(unit, bit)` gives the bytes of ply 1 to 8 of a unit as in section 4; it
                 is called once for each entry of the ladder, in order
    extra_files: content or path of `tokenizer.bin` and the other files of section 1
    rung_bytes:  most bytes of plies in a rung; by default a 1024th of all, 64 KiB to 1 MiB
    shard_bytes: about the bytes of rungs in a shard; by default a quarter of all in the first,
                 which is a model by itself, and a 12th (4 MiB to 1 GiB) in each of the others
    overwrite:   replace a pack that is there
    progress:    called with the bytes of rungs that are written and the bytes in all

    Raises UsageError if the target may not be replaced, FormatError if the content is not what the
    format allows, PackError if it cannot be written. The parent directory must exist.
    """
    target = Path(os.path.realpath(out))
    _check_target(target, overwrite)
    _check_names(extra_files)
    draft = {"format": FORMAT, "version": VERSION, "quality": [], "kv": None, **manifest}
    for key in ("rungs", "shards", "files"):
        if key in draft:
            raise UsageError(f"`{key}` of the manifest is made by the writer")
    layout = _plan_rungs(draft, ladder, extra_files, rung_bytes)
    headers = _plan_shards(draft, layout.padded, shard_bytes)
    parsed = Manifest.from_json(encode(draft))
    tensors = _check_base(parsed, base, ladder)
    _check_space(target, parsed)

    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in extra_files.items():
            draft["files"][name] = _write_file(partial / name, _pieces_of(content))
        draft["files"][BASE] = _write_file(partial / BASE, _base_pieces(tensors))
        draft["rungs"]["crc32"] = _write_shards(
            partial, parsed, layout, headers, ply_bytes, progress
        )
        final = Manifest.from_json(encode(draft)).to_json()  # keys in the usual order
        _write_file(partial / MANIFEST, iter([final]))
        _sync_directory(partial)
        Pack.open(partial)
        _publish(partial, target, overwrite)
    except OSError as error:
        raise PackError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a directory: make it first")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise UsageError(f"{target} is there and is not a pack: choose another name")
    if not overwrite:
        raise UsageError(f"{target} is there: remove it, or say that it may be overwritten")
    for entry in target.iterdir():
        known = entry.name in (*LISTED_FILES, MANIFEST) or (
            entry.name.startswith("plies-") and entry.name.endswith(".safetensors")
        )
        if not known or entry.is_dir():
            raise UsageError(
                f"{target} has {entry.name!r}, no part of a pack, which would be lost: move it"
            )


def _check_names(extra_files: Mapping[str, bytes | Path]) -> None:
    for name in extra_files:
        if name not in LISTED_FILES or name == BASE:
            raise UsageError(f"{name!r} is not the name of a file of a pack")
    if "tokenizer.bin" not in extra_files:
        raise UsageError("tokenizer.bin is missing, and a pack must have one")


def _plan_rungs(
    draft: dict[str, Any],
    ladder: npt.NDArray[np.uint32],
    extra_files: Mapping[str, bytes | Path],
    rung_bytes: int | None,
) -> Layout:
    """Cut the ladder into rungs; puts `rungs` and drafts of `shards` and `files` into the draft."""
    draft["rungs"] = {"plies": [], "bytes": [], "crc32": []}
    draft["shards"] = []
    draft["files"] = dict.fromkeys((*extra_files, BASE), _NO_DIGEST)
    units = UnitTable(Manifest.from_json(encode(draft)).matrices)
    ladder = np.ascontiguousarray(ladder)
    if ladder.dtype != np.uint32 or ladder.ndim != 1:
        raise UsageError(f"the ladder is {ladder.dtype} {list(ladder.shape)}, not uint32 [plies]")
    # As if each ply were a rung, which gives the bytes before each.
    ends = Layout(units, ladder, np.ones(len(ladder), np.int64)).payload
    if rung_bytes is None:
        rung_bytes = min(max(-(-int(ends[-1]) // 1024 // 2**16) * 2**16, 2**16), _MIB)
    if rung_bytes < 1:
        raise UsageError(f"rung_bytes is {rung_bytes}, and must be above 0")
    cuts = [0]
    while cuts[-1] < len(ladder):
        fits = int(np.searchsorted(ends, ends[cuts[-1]] + rung_bytes, "right")) - 1
        cuts.append(max(fits, cuts[-1] + 1))
    counts = [end - begin for begin, end in itertools.pairwise(cuts)]
    layout = Layout(units, ladder, np.array(counts, np.int64))
    draft["rungs"] = {
        "plies": counts,
        "bytes": layout.padded.tolist(),
        "crc32": [0] * len(counts),
    }
    return layout


def _plan_shards(
    draft: dict[str, Any], sizes: npt.NDArray[np.int64], shard_bytes: int | None
) -> list[bytes]:
    """Put `shards` into the draft; returns their headers."""
    total = int(sizes.sum())
    if shard_bytes is None:
        first, later = max(total // 4, 4 * _MIB), min(max(total // 12, 4 * _MIB), 1024 * _MIB)
    elif shard_bytes > 0:
        first = later = shard_bytes
    else:
        raise UsageError(f"shard_bytes is {shard_bytes}, and must be above 0")
    rest = max(total - first, 0)
    count = max(round(rest / later), 1)
    bounds = first + np.arange(count) * (rest / count)
    # A rung belongs to the shard that its middle is in.
    shard_of = np.searchsorted(bounds, np.cumsum(sizes) - sizes / 2)
    cuts = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(sizes)]
    headers = []
    for number, (begin, end) in enumerate(itertools.pairwise(cuts if total else [])):
        names = ((rung_name(i), "U8", (int(sizes[i]),)) for i in range(begin, end))
        header = encode_header(names, alignment=ALIGNMENT)
        size = len(header) + int(sizes[begin:end].sum())
        draft["shards"].append({"file": shard_name(number), "rungs": end - begin, "bytes": size})
        headers.append(header)
    return headers


def _check_base(
    manifest: Manifest, base: Mapping[str, npt.NDArray[Any]], ladder: npt.NDArray[np.uint32]
) -> list[tuple[str, str, npt.NDArray[Any]]]:
    """Name, dtype and array of each tensor in the order of the file; checks all of them."""
    left = dict(base)
    if any(matrix.units for matrix in manifest.matrices):
        left["ladder"] = ladder
    tensors = []
    for wanted in base_tensors(manifest.model, manifest.matrices, len(ladder), manifest.kv):
        array = left.pop(wanted.name, None)
        if array is None:
            if wanted.required:
                raise FormatError(f"the tensor {wanted.name} is missing")
            continue
        if array.dtype != DTYPES[wanted.dtype] or array.shape != wanted.shape:
            raise FormatError(
                f"{wanted.name} is {array.dtype} {list(array.shape)}, and must be "
                f"{wanted.dtype} {list(wanted.shape)}"
            )
        check_values(array, wanted.check, wanted.name)
        tensors.append((wanted.name, wanted.dtype, array))
    if left:
        raise FormatError(f"a tensor {next(iter(left))!r} is not expected")
    # The widest first keeps each aligned to its own size.
    return sorted(tensors, key=lambda item: -item[2].dtype.itemsize)


def _check_space(target: Path, manifest: Manifest) -> None:
    needed = sum(shard.bytes for shard in manifest.shards)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise PackError(f"{target.parent} has {free} bytes free, and the rungs alone need {needed}")


def _pieces_of(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece


def _base_pieces(tensors: list[tuple[str, str, npt.NDArray[Any]]]) -> Iterator[bytes | memoryview]:
    yield encode_header((name, dtype, array.shape) for name, dtype, array in tensors)
    for _, _, array in tensors:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_file(path: Path, pieces: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write a file and return its entry in `files`."""
    hashed, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
            hashed.update(piece)
            size += len(piece)
        _sync(file)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def _write_shards(
    directory: Path,
    manifest: Manifest,
    layout: Layout,
    headers: list[bytes],
    ply_bytes: PlyBytes,
    progress: Progress | None,
) -> list[int]:
    """Write all shards and return the checksum of each rung."""
    checksums: list[int] = []
    total, done = int(layout.payload[-1]), 0
    for shard, header in zip(manifest.shards, headers, strict=True):
        with (directory / shard.file).open("xb") as file:
            file.write(header)
            for _ in range(shard.rungs):
                rung = _rung(layout, len(checksums), ply_bytes)
                file.write(rung.data)
                checksums.append(zlib.crc32(rung.data))
                done = int(layout.payload[len(checksums)])
                if progress is not None:
                    progress(done, total)
            _sync(file)
    return checksums


def _rung(layout: Layout, index: int, ply_bytes: PlyBytes) -> npt.NDArray[np.uint8]:
    """The bytes of a rung with their padding."""
    payload = int(layout.payload[index + 1] - layout.payload[index])
    rung = np.zeros(-(-payload // ALIGNMENT) * ALIGNMENT, np.uint8)
    units, bits, offsets = layout.plies_of(index)
    ends = [*offsets[1:].tolist(), payload]
    for unit, bit, start, end in zip(
        units.tolist(), bits.tolist(), offsets.tolist(), ends, strict=True
    ):
        data = ply_bytes(unit, bit)
        ply = np.frombuffer(data, np.uint8)
        if len(ply) != end - start:
            raise FormatError(f"ply {bit} of unit {unit} has {len(ply)} bytes, not {end - start}")
        rung[start:end] = ply
    return rung


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename the finished directory; a pack that is there is moved away, and back if need be."""
    _check_target(target, overwrite)  # again: packing takes minutes
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    replaces = (target / MANIFEST).is_file()
    if replaces:
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if replaces:
            old.rename(target)
        raise
    _sync_directory(target.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
