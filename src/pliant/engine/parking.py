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

    __slots__ = ("_descriptor", "_page_bytes", "pages", "tokens")

    def __init__(self, pages: Iterator[Page], tokens: int, page_bytes: int) -> None:
        """Write pages of `page_bytes` bytes, which hold `tokens` tokens; OSError if it fails."""
        folder = parking_folder()
        self._descriptor = _nameless(folder)
        self._page_bytes = page_bytes
        self.tokens = tokens
        self.pages = 0
        try:
            for page in pages:
                check = zlib.crc32(page.data).to_bytes(4, "little")
                left = [page.data, memoryview(check)]
                while left:
                    done = os.writev(self._descriptor, left)
                    while left and done >= len(left[0]):
                        done -= len(left.pop(0))
                    if left:
                        left[0] = left[0][done:]
                self.pages += 1
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.pages * (self._page_bytes + 4)

    def read(self, page: int, into: Page) -> None:
        """Fill uint8 [page_bytes] with a page. OSError, or ChecksumError if it is damaged."""
        check, at = bytearray(4), page * (self._page_bytes + 4)
        got = os.preadv(self._descriptor, [into.data, check], at)
        if got != self._page_bytes + 4 or zlib.crc32(into.data) != int.from_bytes(check, "little"):
            raise ChecksumError(f"page {page} of what was parked is not as it was written")

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
