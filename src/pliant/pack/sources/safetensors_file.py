"""Reading one safetensors file without mapping it, every number checked before it is used.

The format: a u64 with the length of a JSON header, the header, the data. The header gives for
each tensor its type, shape and the two ends of its bytes, counted from the end of the header.
Mapped files would count in the resident set of the process as they are touched, so tensors are
read with plain reads.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from pliant.errors import ModelError, SourceError

__all__ = ["SafetensorsFile", "StoredTensor"]

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 100 << 20
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `dtype` by its name in the format, offset from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class SafetensorsFile:
    """The tensors of one file; SourceError for one that is cut off or contradicts itself."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin
        self.tensors = self._read_header()

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as float32; ModelError for types that are no plain numbers."""
        stored = self.tensors[name]
        return self._bytes(name, stored, 0, stored.size).reshape(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the matrix `name` as float32."""
        stored = self.tensors[name]
        row = stored.size // stored.shape[0]
        part = self._bytes(name, stored, start * row, (stop - start) * row)
        return part.reshape(stop - start, *stored.shape[1:])

    def _bytes(self, name: str, stored: StoredTensor, skip: int, size: int) -> torch.Tensor:
        dtype = _DTYPES.get(stored.dtype)
        if dtype is None:
            raise ModelError(
                f"{self.origin}: tensor {name} is stored as {stored.dtype}, so it is quantised. "
                "Pack the original in float32, bfloat16 or float16."
            )
        if size == 0:
            return torch.empty(0, dtype=torch.float32)
        data = bytearray(size)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(stored.offset + skip)
                view, done = memoryview(data), 0
                while done < size and (count := file.readinto(view[done : done + (1 << 30)])):
                    done += count
        except OSError as error:
            raise SourceError(
                f"{self.origin}: {self.path.name} cannot be read ({error})."
            ) from None
        if done != size:
            raise SourceError(f"{self.origin}: {self.path.name} became shorter while it was read.")
        return torch.frombuffer(data, dtype=dtype).float()

    def _read_header(self) -> dict[str, StoredTensor]:
        where = f"{self.origin}: {self.path.name}"
        try:
            total = self.path.stat().st_size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if total < 8 or length > min(total - 8, _MAX_HEADER):
                    raise SourceError(
                        f"{where} is no safetensors file or is cut off: it has {total} bytes, its "
                        f"header claims {length}. Fetch it again."
                    )
                header = json.loads(file.read(length))
        except OSError as error:
            raise SourceError(f"{where} cannot be read ({error.strerror}).") from None
        except (ValueError, RecursionError):
            raise SourceError(f"{where} is no safetensors file: its header is not JSON.") from None
        if not isinstance(header, dict):
            raise SourceError(f"{where} is no safetensors file: its header is no object.")
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = {name: self._entry(name, entry, base, total) for name, entry in header.items()}
        end = base
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
            if stored.offset < end and stored.size:
                raise SourceError(f"{where}: the bytes of tensor {name} belong to another one too.")
            end = max(end, stored.offset + stored.size)
        return tensors

    def _entry(self, name: str, entry: object, base: int, total: int) -> StoredTensor:
        where = f"{self.origin}: {self.path.name}: tensor {name}"
        if not isinstance(entry, dict):
            raise SourceError(f"{where} has no description.")
        dtype, shape, ends = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if (
            not isinstance(dtype, str)
            or not _is_counts(shape)
            or len(shape) > _MAX_DIMENSIONS
            or not _is_counts(ends)
            or len(ends) != 2
        ):
            raise SourceError(f"{where} is described wrongly.")
        start, stop = ends
        if not start <= stop <= total - base:
            raise SourceError(
                f"{where} ends at byte {base + stop}, the file has {total}: it is cut off. Fetch "
                "it again."
            )
        known = _DTYPES.get(dtype)
        if known is not None and math.prod(shape) * known.itemsize != stop - start:
            raise SourceError(
                f"{where}: {stop - start} bytes do not make a {dtype} tensor of shape {shape}."
            )
        return StoredTensor(dtype, tuple(shape), base + start, stop - start)


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    )
