"""Pages of beginnings in a folder, found by their keys after a restart: docs/parking.md, section 2.

A file is a page. It is written under another name and renamed, so two processes may use a folder at
the same time: whoever comes second replaces a page with an equal one. What is not as it must be is
removed, told once, and computed again.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from pliant.engine.parked_page import (
    TOKENS,
    VERSION,
    Label,
    Page,
    ParkedPage,
    Stored,
    page_size,
    write_page,
)
from pliant.errors import FormatError, PackError, UsageError
from pliant.memory.kv_ages import Form

__all__ = ["PageFolder"]

_NAME = re.compile(rf"[0-9a-f]{{32}}-[0-9a-f]{{32}}\.kv[1-{VERSION}]")
_TEMPORARY = re.compile(r"\.[0-9]+-[0-9a-f]{16}\.tmp")
_SLICE = 16  # of the limit: so much may be written before the folder is looked through again
_STALE = 3600.0  # seconds after which what was not renamed is from a process that has ended
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class PageFolder:
    """The pages of one pack in a folder, beside those of others.

    path, limit: the folder, and the bytes that all pages in it may take
    bytes: what they take, as far as this process knows
    broken: how many were removed because they were not as they must be
    """

    def __init__(self, path: Path, limit: int, origin: bytes, stored: Stored) -> None:
        """Make the folder if it is not there. UsageError if it cannot be used, or belongs to
        somebody else, or others may look inside. `stored`: as in `pliant.engine.parked_page`."""
        self.path = path
        self.limit = limit
        self.bytes = 0
        self.broken = 0
        self._origin = origin
        self._stored = stored
        # What a page has whose file is so large.
        forms = [Form(r, whole) for whole in (False, True) for r in range(len(stored[whole]))]
        self._forms = {page_size(stored, form): form for form in forms}
        self._room = 0  # bytes that may be written until the next look
        self._told: set[str] = set()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise UsageError(
                    f"{path} is not a folder that only you can open, and pages tell what was "
                    "asked: `chmod 700` it, or name another"
                )
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise UsageError(f"{path} cannot be written: name another folder")
            self._make_room(0)
        except OSError as error:
            raise UsageError(f"{path} cannot be used for pages: {error.strerror}") from error

    def has(self, key: bytes) -> bool:
        """Whether there is a file for the page."""
        try:
            return self._path(key).is_file()
        except OSError:
            return False

    def read(self, key: bytes, most: int) -> tuple[Form, Page] | None:
        """What a page has, with at most so many rungs, and its bytes as it is stored with them;
        None if it is not there, or not as it must be."""
        path = self._path(key)
        try:
            file = os.open(path, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._reject(path, error, remove=error.errno == errno.ELOOP)
            return None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise FormatError("it is not a file of this user")
            page = ParkedPage(file, 0, Label(self._origin, key), self._stored)
            if page.bytes != status.st_size:
                raise FormatError(f"it has {status.st_size} bytes, and its page {page.bytes}")
            rungs, whole = page.form
            if (rungs == 0) != (most == 0):
                raise FormatError(f"it has {rungs} rungs, and up to {most} are due")
            return Form(min(rungs, most), whole), page.read(most)
        except (OSError, PackError) as error:
            self._reject(path, error, remove=isinstance(error, PackError))
            return None
        finally:
            os.close(file)

    def write(self, key: bytes, form: Form, data: Page, used: int) -> bool:
        """Keep a page, which was used at `used` (nanoseconds since 1970). False: it has no room, or
        the disk refuses it."""
        size = page_size(self._stored, form)
        temporary = self.path / f".{os.getpid()}-{os.urandom(8).hex()}.tmp"
        try:
            if size > self._room and not self._make_room(size):
                return False
            file = os.open(temporary, _WRITE, 0o600)
            try:
                write_page(file, Label(self._origin, key), self._stored, TOKENS, form, data)
                os.utime(file, ns=(used, used))
            finally:
                os.close(file)
            temporary.rename(self._path(key))
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._tell("written", f"pages cannot be written to {self.path}: {error.strerror}")
            return False
        self._room -= size
        self.bytes += size
        return True

    def touch(self, key: bytes, used: int, form: Form | None = None) -> bool:
        """A page was used at `used`; False if it is not there, or does not have all that `form`
        says."""
        path = self._path(key)
        try:
            if form is not None and not self._has_all(path.lstat().st_size, form):
                return False
            os.utime(path, ns=(used, used), follow_symlinks=False)
        except OSError:
            return False
        return True

    # --- inside

    def _has_all(self, size: int, form: Form) -> bool:
        """Whether the page in a file of so many bytes has all that `form` says."""
        found = self._forms.get(size)
        if found is None or (found.rungs == 0) != (form.rungs == 0):
            return False
        return found.rungs >= form.rungs and found.whole >= form.whole

    def _path(self, key: bytes) -> Path:
        return self.path / f"{self._origin.hex()}-{key.hex()}.kv{VERSION}"

    def _make_room(self, size: int) -> bool:
        """Look through the folder, and remove what was used longest ago until `size` more bytes
        have room, and a slice besides."""
        if size > self.limit:
            return False
        found: list[tuple[int, int, str]] = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process was faster
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                        continue
                    if _NAME.fullmatch(entry.name):
                        found.append((status.st_mtime_ns, status.st_size, entry.name))
                    elif (
                        _TEMPORARY.fullmatch(entry.name) and time.time() - status.st_mtime > _STALE
                    ):
                        (self.path / entry.name).unlink()
        total, wanted = sum(size for _, size, _ in found), max(size, self.limit // _SLICE)
        found.sort(reverse=True)
        while found and total + wanted > self.limit:
            _, freed, name = found.pop()
            (self.path / name).unlink(missing_ok=True)
            total -= freed
        self.bytes, self._room = total, wanted
        return True

    def _reject(self, path: Path, error: Exception, *, remove: bool) -> None:
        """Count a file that cannot be used; `remove` it if it is of this user."""
        self.broken += 1
        with suppress(OSError):
            if remove and path.lstat().st_uid == os.geteuid():
                path.unlink()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self._tell("read", f"{path} cannot be used, and its page is computed again: {reason}")

    def _tell(self, kind: str, text: str) -> None:
        """A line in the log, the first time."""
        if kind in self._told:
            return
        self._told.add(kind)
        import logging  # only where there is something to say

        logging.getLogger("pliant.park").warning(text)
