"""KV pages of an idle session or answer on disk, until it goes on.

Each has a file of its own, which has no name: nobody else can open it, and it is gone when
it is closed or the process ends, however that happens. It holds page after page as the core has
them in memory, each followed by its CRC-32 in 4 bytes, little-endian.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pliant.errors import ChecksumError, EngineError

__all__ = ["Parked", "parking_folder"]

Page = npt.NDArray[np.uint8]


def parking_folder() -> Path:
    """TMPDIR if it is set; otherwise /var/tmp, since /tmp is often in memory, or else /tmp."""
    given = os.environ.get("TMPDIR")
    for folder in (given, "/var/tmp", "/tmp"):
        if folder and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise EngineError("no folder for temporary files can be written: set TMPDIR to one")


class Parked:
    """The pages of one sequence."""

    __slots__ = ("_descriptor", "_places", "tokens")

    def __init__(self, pages: Iterator[tuple[int, Page]], tokens: int) -> None:
        """Write pages, each with its rungs (0: exact), which hold `tokens` tokens; OSError if it
        fails."""
        folder = parking_folder()
        self._descriptor = _nameless(folder)
        self._places: list[tuple[int, int]] = []  # rungs, and where the page ends
        self.tokens = tokens
        try:
            for rungs, page in pages:
                check = zlib.crc32(page.data).to_bytes(4, "little")
                left = [page.data, memoryview(check)]
                while left:
                    done = os.writev(self._descriptor, left)
                    while left and done >= len(left[0]):
                        done -= len(left.pop(0))
                    if left:
                        left[0] = left[0][done:]
                self._places.append((rungs, self.bytes + len(page) + 4))
        except BaseException:
            self.close()
            raise

    @property
    def pages(self) -> int:
        """How many there are."""
        return len(self._places)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._places[-1][1] if self._places else 0

    def read(self, page: int) -> tuple[int, Page]:
        """The rungs of a page, and its bytes. OSError, or ChecksumError if it is damaged."""
        rungs, end = self._places[page]
        begin = self._places[page - 1][1] if page else 0
        check, data = bytearray(4), np.empty(end - begin - 4, np.uint8)
        got = os.preadv(self._descriptor, [data.data, check], begin)
        if got != end - begin or zlib.crc32(data.data) != int.from_bytes(check, "little"):
            raise ChecksumError(f"page {page} of what was parked is not as it was written")
        return rungs, data

    def close(self) -> None:
        """Delete the file."""
        os.close(self._descriptor)


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # not on this filesystem
        path = folder / f"pliant-{os.getpid()}-{os.urandom(8).hex()}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        path.unlink()
        return descriptor
