"""One page of the KV cache as it is on disk: docs/parking.md, section 1.

`stored` are the sizes of a page in bytes, exact, and with 1, 2, ... rungs, first of one without its
local layers, then of a whole one (`kv_stored_bytes` of the executor). Whatever a file says is held
against them before memory is taken for it.
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
from pliant.memory.kv_ages import Form

__all__ = [
    *("TOKENS", "VERSION", "Label", "Page", "ParkedPage", "Stored"),
    *("header_bytes", "page_size", "part_sizes", "write_page"),
]

Page = npt.NDArray[np.uint8]
Stored = Sequence[Sequence[int]]

MAGIC, VERSION, TOKENS = b"PLIANTKV", 2, 32
_FIXED = struct.Struct("<8sII16s16sII")
_CHECK = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Label:
    """What a page must be of: pack and program, and its key, which names tokens and state."""

    origin: bytes = bytes(16)
    key: bytes = bytes(16)


def header_bytes(rungs: int) -> int:
    """Bytes before the payload."""
    return _FIXED.size + 8 * max(rungs, 1) + _CHECK.size


def part_sizes(stored: Stored, form: Form) -> list[int]:
    """Bytes of the parts of a page."""
    sizes = stored[form.whole]
    if not form.rungs:
        return [sizes[0]]
    return [sizes[r] - (sizes[r - 1] if r > 1 else 0) for r in range(1, form.rungs + 1)]


def page_size(stored: Stored, form: Form) -> int:
    """Bytes of a page on disk."""
    return header_bytes(form.rungs) + stored[form.whole][form.rungs]


def write_page(
    file: int, label: Label, stored: Stored, tokens: int, form: Form, data: Page
) -> None:
    """Write a page at the position of an open file; OSError."""
    parts, at = b"", 0
    for size in part_sizes(stored, form):
        parts += struct.pack("<II", size, zlib.crc32(data[at : at + size].data))
        at += size
    fixed = MAGIC, VERSION, form.rungs, label.origin, label.key, tokens, int(form.whole)
    head = _FIXED.pack(*fixed) + parts
    left = [memoryview(head + _CHECK.pack(zlib.crc32(head))), data.data]
    while left:
        done = os.writev(file, left)
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


class ParkedPage:
    """A page in an open file, from byte `at` on, whose header was read and holds.

    form: what it has
    tokens: how many of its tokens count
    bytes: its size on disk
    """

    __slots__ = ("_at", "_checks", "_file", "_sizes", "bytes", "form", "tokens")

    def __init__(self, file: int, at: int, label: Label, stored: Stored) -> None:
        """FormatError if it is another page than the one that `label` names, or none; OSError."""
        most = len(stored[True]) - 1
        head = os.pread(file, header_bytes(most), at)
        if len(head) < _FIXED.size:
            raise FormatError("the file ends before the page")
        magic, version, rungs, origin, key, tokens, whole = _FIXED.unpack_from(head)
        if magic != MAGIC:
            raise FormatError("it is no parked page")
        if version != VERSION:
            raise FormatError(f"its version is {version}, and {VERSION} is read")
        if rungs > most:
            raise FormatError(f"it has {rungs} rungs, and a page here has at most {most}")
        size = header_bytes(rungs)
        check = zlib.crc32(head[: size - 4]).to_bytes(4, "little")
        if len(head) < size or head[size - 4 : size] != check:
            raise FormatError("its header is not as it was written")
        if Label(origin, key) != label:
            raise FormatError("it is of another pack, text or state, or another version of pliant")
        if whole > 1 or (not whole and list(stored[False]) == list(stored[True])):
            raise FormatError(f"it has layers of the kind {whole}, which no page here has")
        if not 1 <= tokens <= TOKENS or (tokens < TOKENS and (rungs or not whole or any(key))):
            raise FormatError(f"{tokens} of its tokens cannot count")
        self.form = Form(rungs, bool(whole))
        parts = [struct.unpack_from("<II", head, _FIXED.size + 8 * n) for n in range(max(rungs, 1))]
        self._sizes = [part[0] for part in parts]
        if self._sizes != part_sizes(stored, self.form):
            raise FormatError("its parts are not of the size that rungs of this pack have")
        self._checks = [part[1] for part in parts]
        self._file = file
        self._at = at + size
        self.tokens = tokens
        self.bytes = size + sum(self._sizes)

    def read(self, most: int | None = None, *, above: int = 0) -> Page:
        """The payload: of a coded page rungs `above` + 1 to `most` (all if None).

        ChecksumError if it is not as it was written, OSError.
        """
        rungs = self.form.rungs
        last = len(self._sizes) if most is None or not rungs else min(most, rungs)
        sizes = self._sizes[above:last]
        data = np.empty(sum(sizes), np.uint8)
        got = os.preadv(self._file, [data.data], self._at + sum(self._sizes[:above]))
        at = 0
        for size, check in zip(sizes, self._checks[above:last], strict=True):
            if got < at + size or zlib.crc32(data[at : at + size].data) != check:
                raise ChecksumError("a parked page is not as it was written")
            at += size
        return data
