"""Reading the header of a GGUF file (versions 2 and 3) with every count checked first.

Layout (little-endian): magic, u32 version, u64 tensors, u64 keys; the key/value pairs; the
descriptions of the tensors; then, aligned, their data. Each count is compared with the bytes
that are left before anything of that size is made, so a hostile header costs nothing.
Specification: the GGUF document of the ggml project.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pliant.errors import SourceError

__all__ = ["GgufFile", "GgufTensor"]

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_STRING = 16 << 20
_MAX_ITEMS = 1 << 23  # items of one array; the largest vocabularies have about 2^18
_MAX_STRINGS = 1 << 24  # strings of all arrays together, since each takes 50 bytes and more here
_MAX_DIMENSIONS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
# code -> (struct format, numpy type) of the plain values
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in numpy order (rows first), `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    type_name: str
    offset: int
    size: int
    block: int


class GgufFile:
    """Metadata and the places of the tensors of one GGUF file.

    `metadata` maps keys to int, float, bool, str, list[str] or a numpy array.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin
        try:
            self.size = path.stat().st_size
            with path.open("rb", buffering=1 << 20) as file:
                self._parse(_Reader(file, self.size, f"{origin}: {path.name}"))
        except OSError as error:
            raise SourceError(f"{origin}: {path.name} cannot be read ({error.strerror}).") from None

    def read(
        self, tensor: GgufTensor, start: int, stop: int
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes of rows `start` to `stop` of a tensor, [rows, bytes of a row]."""
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.size // rows
        count = (stop - start) * row_bytes
        data = np.fromfile(
            self.path, dtype=np.uint8, count=count, offset=tensor.offset + start * row_bytes
        )
        if data.size != count:
            raise SourceError(f"{self.origin}: {self.path.name} became shorter while it was read.")
        return data.reshape(stop - start, row_bytes)

    def _parse(self, reader: _Reader) -> None:
        where = reader.where
        if self.size < 24 or reader.take(4) != b"GGUF":
            raise SourceError(f"{where} is not a GGUF file ({self.size} bytes).")
        version = reader.number("<I")
        if version & 0xFFFF == 0:
            raise SourceError(f"{where} is a big-endian GGUF file; convert it to little-endian.")
        if version not in (2, 3):
            raise SourceError(f"{where} has GGUF version {version}; versions 2 and 3 are read.")
        self.version = version
        tensors, keys = reader.number("<Q"), reader.number("<Q")
        # A key takes 13 bytes at least, the description of a tensor 24.
        reader.check_count("keys", keys, _MAX_KEYS, 13)
        reader.check_count("tensors", tensors, _MAX_TENSORS, 24)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = reader.text("key")
            if key in self.metadata:
                raise SourceError(f"{where}: the key {key[:80]!r} is there twice.")
            self.metadata[key] = reader.value(key)
        described = [self._describe(reader) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in {1 << n for n in range(3, 21)}:
            raise SourceError(f"{where}: alignment {alignment!r} is not a power of two up to 2^20.")
        base = -(-reader.position // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for tensor in described:
            if tensor.name in self.tensors:
                raise SourceError(f"{where}: the tensor {tensor.name[:80]!r} is there twice.")
            placed = GgufTensor(**{**tensor.__dict__, "offset": base + tensor.offset})
            if placed.offset + placed.size > self.size:
                raise SourceError(
                    f"{where} is cut off: tensor {placed.name} ends at byte "
                    f"{placed.offset + placed.size}, the file has {self.size}. Fetch it again."
                )
            self.tensors[tensor.name] = placed
        end = 0
        for placed in sorted(self.tensors.values(), key=lambda t: t.offset):
            if placed.offset < end:
                raise SourceError(
                    f"{where}: the bytes of {placed.name} belong to another tensor too."
                )
            end = placed.offset + placed.size

    @staticmethod
    def _describe(reader: _Reader) -> GgufTensor:
        name = reader.text("tensor name")
        count = reader.number("<I")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise SourceError(f"{reader.where}: tensor {name[:80]!r} has {count} dimensions.")
        shape = tuple(reversed([reader.number("<Q") for _ in range(count)]))
        code = reader.number("<I")
        offset = reader.number("<Q")
        type_name, block, block_bytes = _tensor_type(code, name, reader.where)
        if 0 in shape or shape[-1] % block or math.prod(shape) > 1 << 48:
            raise SourceError(
                f"{reader.where}: tensor {name[:80]!r} of type {type_name} cannot have the shape "
                f"{list(shape)}."
            )
        size = math.prod(shape) // block * block_bytes
        return GgufTensor(name, shape, code, type_name, offset, size, block)


def _tensor_type(code: int, name: str, where: str) -> tuple[str, int, int]:
    """Name, values in a block and bytes of a block of the tensor type `code`."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(code)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise SourceError(
            f"{where}: tensor {name[:80]!r} has the unknown type {code}. A newer 'gguf' package "
            "may know it: pip install -U gguf"
        ) from None
    return kind.name, block, size


class _Reader:
    """A position in a file that never goes past its end."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file = file
        self._size = size
        self.where = where
        self.position = 0
        self._strings = 0

    def take(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size - self.position else b""
        if len(data) != count:
            raise SourceError(
                f"{self.where} is cut off or damaged: {count} bytes are needed at byte "
                f"{self.position}, the file has {self._size}. Fetch it again."
            )
        self.position += count
        return data

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def check_count(self, what: str, count: int, most: int, least_bytes: int) -> None:
        left = self._size - self.position
        if count > most or count * least_bytes > left:
            raise SourceError(
                f"{self.where}: {count} {what} are announced, {left} bytes are left and {most} is "
                "the most. The file is damaged or not what it says; fetch it again."
            )

    def text(self, what: str) -> str:
        length = self.number("<Q")
        self.check_count(f"characters of a {what}", length, _MAX_STRING, 1)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise SourceError(f"{self.where}: a {what} is not valid UTF-8.") from None

    def value(self, key: str) -> Any:
        code = self.number("<I")
        if code == _STRING:
            return self.text(f"value of {key[:80]!r}")
        if code == _ARRAY:
            return self._array(key)
        if code not in _SCALARS:
            raise SourceError(f"{self.where}: the key {key[:80]!r} has the unknown type {code}.")
        form = _SCALARS[code][0]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def _array(self, key: str) -> Any:
        code, count = self.number("<I"), self.number("<Q")
        if code == _STRING:
            self._strings += count
            self.check_count(f"strings of {key[:80]!r}", count, _MAX_ITEMS, 8)
            self.check_count("strings in all", self._strings, _MAX_STRINGS, 0)
            return [self.text(f"string of {key[:80]!r}") for _ in range(count)]
        if code not in _SCALARS:
            raise SourceError(f"{self.where}: {key[:80]!r} is an array of the unknown type {code}.")
        kind = np.dtype(_SCALARS[code][1])
        self.check_count(f"items of {key[:80]!r}", count, _MAX_ITEMS, kind.itemsize)
        values = np.frombuffer(self.take(count * kind.itemsize), dtype=kind)
        return values.astype(bool) if code == _BOOL else values
