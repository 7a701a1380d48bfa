"""One page of the KV cache as it is on disk: docs/parking.md, section 1.

`stored` are the sizes of a page in bytes: exact, and with 1, 2, ... rungs (`kv_stored_bytes` of the
executor). Whatever a file says is held against them before memory is taken for it.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pliant.errors import ChecksumError, FormatError

__all__ = ["TOKENS", "Label", "Page", "ParkedPage", "header_bytes", "part_sizes", "write_page"]

Page = npt.NDArray[np.uint8]

MAGIC, VERSION, TOKENS = b"PLIANTKV", 1, 32
_FIXED = struct.Struct("<8sII16s16sI")
_CHECK = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Label:
    """What a page must be of: pack and program, and its key, which names tokens and state."""

    origin: bytes = bytes(16)
    key: bytes = bytes(16)


def header_bytes(rungs: int) -> int:
    """Bytes before the payload."""
    return _FIXED.size + 8 * max(rungs, 1) + _CHECK.size


def part_sizes(stored: Sequence[int], rungs: int) -> list[int]:
    """Bytes of the parts of a page of so many rungs (0: exact)."""
    if not rungs:
        return [stored[0]]
    return [stored[r] - (stored[r - 1] if r > 1 else 0) for r in range(1, rungs + 1)]


def write_page(
    file: int, label: Label, stored: Sequence[int], tokens: int, rungs: int, data: Page
) -> None:
    """Write a page at the position of an open file; OSError."""
    parts, at = b"", 0
    for size in part_sizes(stored, rungs):
        parts += struct.pack("<II", size, zlib.crc32(data[at : at + size].data))
        at += size
    head = _FIXED.pack(MAGIC, VERSION, rungs, label.origin, label.key, tokens) + parts
    left = [memoryview(head + _CHECK.pack(zlib.crc32(head))), data.data]
    while left:
        done = os.writev(file, left)
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


class ParkedPage:
    """A page in an open file, from byte `at` on, whose header was read and holds.

    rungs: how many it has; 0: exact
    tokens: how many of its tokens count
    bytes: its size on disk
    """

    __slots__ = ("_at", "_checks", "_file", "_sizes", "bytes", "rungs", "tokens")

    def __init__(self, file: int, at: int, label: Label, stored: Sequence[int]) -> None:
        """FormatError if it is another page than the one that `label` names, or none; OSError."""
        head = os.pread(file, header_bytes(len(stored) - 1), at)
        if len(head) < _FIXED.size:
            raise FormatError("the file ends before the page")
        magic, version, rungs, origin, key, tokens = _FIXED.unpack_from(head)
        if magic != MAGIC:
            raise FormatError("it is no parked page")
        if version != VERSION:
            raise FormatError(f"its version is {version}, and {VERSION} is read")
        if rungs >= len(stored):
            most = len(stored) - 1
            raise FormatError(f"it has {rungs} rungs, and a page here has at most {most}")
        size = header_bytes(rungs)
        check = zlib.crc32(head[: size - 4]).to_bytes(4, "little")
        if len(head) < size or head[size - 4 : size] != check:
            raise FormatError("its header is not as it was written")
        if Label(origin, key) != label:
            raise FormatError("it is of another pack, text or state, or another version of pliant")
        if not 1 <= tokens <= TOKENS or (tokens < TOKENS and (rungs or any(key))):
            raise FormatError(f"{tokens} of its tokens cannot count")
        parts = [struct.unpack_from("<II", head, _FIXED.size + 8 * n) for n in range(max(rungs, 1))]
        self._sizes = [part[0] for part in parts]
        if self._sizes != part_sizes(stored, rungs):
            raise FormatError("its parts are not of the size that rungs of this pack have")
        self._checks = [part[1] for part in parts]
        self._file = file
        self._at = at + size
        self.rungs = rungs
        self.tokens = tokens
        self.bytes = size + sum(self._sizes)

    def read(self, most: int | None = None, *, above: int = 0) -> Page:
        """The payload: of a coded page rungs `above` + 1 to `most` (all if None).

        ChecksumError if it is not as it was written, OSError.
        """
        last = len(self._sizes) if most is None or not self.rungs else min(most, self.rungs)
        sizes = self._sizes[above:last]
        data = np.empty(sum(sizes), np.uint8)
        got = os.preadv(self._file, [data.data], self._at + sum(self._sizes[:above]))
        at = 0
        for size, check in zip(sizes, self._checks[above:last], strict=True):
            if got < at + size or zlib.crc32(data[at : at + size].data) != check:
                raise ChecksumError("a parked page is not as it was written")
            at += size
        return data
