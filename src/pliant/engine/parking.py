"""KV pages of an idle session or answer on disk, until it goes on.

Each has a file of its own, which has no name: nobody else can open it, and it is gone when it is
closed or the process ends, however that happens. It holds page after page (docs/parking.md).
"""

from __future__ import annotations

import os
from pathlib import Path

from pliant.engine.parked_page import Label, Page, ParkedPage, Stored, page_size, write_page
from pliant.errors import EngineError
from pliant.memory.kv_ages import Form

__all__ = ["Parked", "parking_folder"]

_NO_LABEL = Label()


def parking_folder() -> Path:
    """TMPDIR if it is set; otherwise /var/tmp, since /tmp is often in memory, or else /tmp."""
    given = os.environ.get("TMPDIR")
    for folder in (given, "/var/tmp", "/tmp"):
        if folder and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    raise EngineError("no folder for temporary files can be written: set TMPDIR to one")


class Parked:
    """The first pages of one sequence."""

    __slots__ = ("_descriptor", "_places", "_stored")

    def __init__(self, stored: Stored) -> None:
        """Without pages yet; `stored` as in `pliant.engine.parked_page`. OSError."""
        self._descriptor = _nameless(parking_folder())
        self._stored = stored
        self._places: list[tuple[int, Form]] = []  # where each page begins, and what it has

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        if not self._places:
            return 0
        begin, form = self._places[-1]
        return begin + page_size(self._stored, form)

    def append(self, tokens: int, form: Form, data: Page) -> None:
        """Write one page more, with the tokens in it and what it has. OSError, and no change, if it
        fails."""
        begin = os.lseek(self._descriptor, self.bytes, os.SEEK_SET)
        write_page(self._descriptor, _NO_LABEL, self._stored, tokens, form, data)
        self._places.append((begin, form))

    def cut(self, pages: int) -> None:
        """Forget the pages from number `pages` on."""
        del self._places[pages:]

    def form(self, number: int) -> Form:
        """What a page has."""
        return self._places[number][1]

    def page(self, number: int) -> ParkedPage:
        """A page, whose bytes are not read yet. FormatError if its header is damaged, OSError."""
        return ParkedPage(self._descriptor, self._places[number][0], _NO_LABEL, self._stored)

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
