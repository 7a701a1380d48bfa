"""Headers of safetensors files: a reader that trusts nothing, and a writer.

A file is a u64 length, that many bytes of JSON, then the tensors end to end. The JSON maps each
name to `dtype`, `shape` and `data_offsets` (start and end, from the end of the header). Source: the
README of https://github.com/huggingface/safetensors. BF16 has no numpy type and is uint16 here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pliant.errors import FormatError
from pliant.store.files import RegularFile
from pliant.store.strict import Fields, integer, loads, show

__all__ = ["DTYPES", "MAX_HEADER_BYTES", "Header", "TensorInfo", "encode_header", "read_header"]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}
MAX_HEADER_BYTES = 64 * 2**20
_MAX_DIMENSIONS = 8


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """`tensors` in the order in which they lie, the byte at which they begin, the raw bytes."""

    tensors: dict[str, TensorInfo]
    data_start: int
    raw: bytes


def read_header(file: RegularFile, *, at_most: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of an open file, which is left at the first tensor.

    The tensors are contiguous from the end of the header to the end of the file, and each has the
    bytes of its shape. Raises FormatError otherwise, also for a header longer than `at_most`, for
    duplicate names, unknown dtypes and `__metadata__`, which packs do not have.
    """
    where = str(file.path)
    if file.size < 8:
        raise FormatError(f"{where} has {file.size} bytes, too few for a safetensors file")
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if length > min(at_most, MAX_HEADER_BYTES):
        raise FormatError(
            f"{where}: a header of {length} bytes, and at most {min(at_most, MAX_HEADER_BYTES)} "
            "are allowed here"
        )
    if length > file.size - 8:
        raise FormatError(f"{where}: a header of {length} bytes in a file of {file.size}")
    raw = prefix + file.read(length)
    if raw[8:9] != b"{":
        raise FormatError(f"{where}: the header does not begin with an object")
    value = loads(raw[8:], f"{where}: header", beside=file.size)
    tensors = {name: _tensor(item, f"{where}: {show(name)}") for name, item in value.items()}
    tensors = dict(sorted(tensors.items(), key=lambda entry: entry[1].start))
    end = 0
    for name, info in tensors.items():
        if info.start != end:
            problem = "a hole" if info.start > end else "an overlap"
            raise FormatError(
                f"{where}: {problem} before {show(name)}, at {info.start} instead of {end}"
            )
        end = info.stop
    if 8 + length + end != file.size:
        raise FormatError(
            f"{where} has {file.size} bytes, and by its header {8 + length + end}: copy or "
            "download it again"
        )
    return Header(tensors, 8 + length, raw)


def _tensor(value: object, where: str) -> TensorInfo:
    fields = Fields(value, where, ("dtype", "shape", "data_offsets"))
    dtype = fields.choice("dtype", tuple(DTYPES))
    shape = fields.items("shape", integer)
    offsets = fields.items("data_offsets", integer)
    if len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{where}: {len(shape)} dimensions")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where}: data_offsets must be a start and an end")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if size != offsets[1] - offsets[0]:
        raise FormatError(
            f"{where}: {dtype} {list(shape)} has {size} bytes, and its offsets say "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, shape, *offsets)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, alignment: int = 64
) -> bytes:
    """The header, its length included, of a file with these names, dtypes and shapes, end to end.

    Padded with spaces so that the first tensor begins at a multiple of `alignment` bytes.
    """
    entries, end = {}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
