"""Reading files that nobody vouches for: regular ones only, of a known size, in full."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pliant.errors import BudgetError, FormatError, PackError
from pliant.store.closing import Closing

__all__ = ["RegularFile", "size_of"]


class RegularFile(Closing):
    """A regular file that is open for reading, and its size when it was opened.

    A symbolic link is followed, since caches of model hubs are made of them, but what it leads to
    must be a regular file: opening never waits for a pipe and never reads a device.
    """

    __slots__ = ("_descriptor", "path", "position", "size")

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError if there is none, PackError if it cannot be opened."""
        flags = os.O_RDONLY
        for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
            flags |= getattr(os, name, 0)
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise PackError(f"{path} cannot be opened: {_reason(error)}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path} is not a regular file")
        except BaseException:
            os.close(descriptor)
            raise
        self.path = path
        self.size = status.st_size
        self.position = 0
        self._descriptor = descriptor

    def close(self) -> None:
        """Close the file; it must not be used afterwards."""
        os.close(self._descriptor)

    def fileno(self) -> int:
        """The descriptor, which stays open as long as this object."""
        return self._descriptor

    def expect(self, size: int) -> None:
        """Raise FormatError unless the file has exactly `size` bytes."""
        if self.size != size:
            how = "shorter" if self.size < size else "longer"
            raise FormatError(
                f"{self.path} has {self.size} bytes and is {how} than the {size} in the manifest: "
                "copy or download it again"
            )

    def seek(self, position: int) -> None:
        """Go on reading at `position`, in bytes from the start."""
        self.position = os.lseek(self._descriptor, position, os.SEEK_SET)

    def fill(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Read the next len(buffer) bytes; FormatError if the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = os.readv(self._descriptor, [buffer[done : done + 2**30].data])
            except OSError as error:
                raise PackError(f"{self.path} cannot be read: {_reason(error)}") from error
            if not count:
                raise FormatError(
                    f"{self.path} ended at byte {self.position} of {self.size} while it was read"
                )
            done += count
            self.position += count

    def read(self, count: int) -> bytes:
        """The next `count` bytes; the caller has bounded the number by the size of the file."""
        try:
            pieces = bytearray(count)
        except MemoryError:
            raise BudgetError(f"{self.path}: {count} bytes do not fit into memory") from None
        self.fill(np.frombuffer(pieces, np.uint8))
        return bytes(pieces)


def size_of(path: Path) -> int | None:
    """The size of a regular file in bytes, None if there is none; PackError for anything else."""
    try:
        with RegularFile(path) as file:
            return file.size
    except FileNotFoundError:
        return None


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
