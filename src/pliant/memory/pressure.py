"""Signs of memory pressure, as the kernel gives them in files.

What is available is the least of what the machine has (MemAvailable, and what lies in the lists of
its processors) and what each control group leaves (limit less usage, where clean cache does not
count as used). PSI, the pressure stall information, is taken from the own group; that of the whole
machine also rises for others who fill their own containers, so it is marked as such
(docs/memory.md). Sources: proc_meminfo(5), and the documents of Linux on cgroup v1, cgroup v2 and
PSI.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from dataclasses import dataclass
from pathlib import Path

from pliant.memory.budget import (
    LIMIT_FILES,
    measure,
    memory_groups,
    read_fields,
    read_number,
    system_limit,
)

__all__ = ["Signals", "Sources", "Trigger"]

NO_LIMIT = 2**62

_USAGE_FILES = {1: "memory.usage_in_bytes", 2: "memory.current"}
_CACHE_FIELDS = {1: "total_inactive_file", 2: "inactive_file"}

# Pages in the list of one processor, as zoneinfo counts them.
_LISTED = re.compile(rb"\n +count: +(\d{1,15})\n")

# Told when somebody waited for memory for so many microseconds of a window: the first if allowed,
# else the one that needs no privilege. The kernel overwrites the last byte.
_TRIGGERS = (b"some 100000 1000000\0", b"some 200000 2000000\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What was seen at one moment. Sizes in bytes, stalls in percent of the last ten seconds.

    available: what programs can still take before somebody must give something back
    bound:     where that comes from: `machine`, or the path of a control group
    total:     the most that this process could have
    resident:  what this process has
    some, full: how much of the time some, or all, programs waited for memory
    own_stalls: whether that is of the own control group and not of the whole machine
    """

    available: int
    bound: str
    total: int
    resident: int
    some: float = 0.0
    full: float = 0.0
    own_stalls: bool = False


class Sources:
    """The files below `root`, which tests replace."""

    __slots__ = ("_groups", "_root", "_total", "stall_file")

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._groups = memory_groups(root)
        self._total = system_limit(root)
        self.stall_file: tuple[Path, bool] | None = None
        """Where PSI is read, and whether it is of the own group."""
        own = [group.path for group in self._groups if group.version == 2][1:]
        for path, mine in (
            *((group / "memory.pressure", True) for group in reversed(own[-1:])),
            (root / "proc/pressure/memory", False),
        ):
            if os.access(path, os.R_OK):
                self.stall_file = path, mine
                break

    def read(self) -> Signals:
        """Look at everything now. What cannot be read does not limit."""
        memory = read_fields(self._root / "proc/meminfo")
        available = memory.get("MemAvailable", NO_LIMIT // 1024) * 1024 + self._listed()
        bound = "machine"
        for group in self._groups:
            limits = [read_number(group.path / n, NO_LIMIT) for n in LIMIT_FILES[group.version]]
            limit = min(limits)
            if limit >= NO_LIMIT:
                continue
            used = read_number(group.path / _USAGE_FILES[group.version], 0)
            stat = read_fields(group.path / "memory.stat")
            left = limit - used + stat.get(_CACHE_FIELDS[group.version], 0)
            if left < available:
                available, bound = left, str(group.path)
        some, full = self._stalls()
        return Signals(
            available=max(available, 0),
            bound=bound,
            total=self._total,
            resident=measure(self._root / "proc/self").now,
            some=some,
            full=full,
            own_stalls=self.stall_file is not None and self.stall_file[1],
        )

    def _listed(self) -> int:
        """Bytes of free memory that MemAvailable does not count.

        What is given back goes to a list of the processor at first; since Linux 6.7 that may be
        hundreds of MiB for some seconds. Whoever needs memory gets it from there.
        """
        try:
            zones = (self._root / "proc/zoneinfo").read_bytes()
        except OSError:
            return 0
        return sum(map(int, _LISTED.findall(zones))) * os.sysconf("SC_PAGE_SIZE")

    def _stalls(self) -> tuple[float, float]:
        if self.stall_file is None:
            return 0.0, 0.0
        try:
            lines = self.stall_file[0].read_text("ascii", "replace").splitlines()
        except OSError:
            return 0.0, 0.0
        found = {"some": 0.0, "full": 0.0}
        for line in lines:
            kind, _, fields = line.partition(" ")
            for field in fields.split():
                key, _, value = field.partition("=")
                if kind in found and key == "avg10":
                    with contextlib.suppress(ValueError):
                        found[kind] = float(value)
        return found["some"], found["full"]


class Trigger:
    """Sleeps until the kernel reports a stall, somebody wakes it, or the time is over."""

    __slots__ = ("_poll", "_stalls", "_wake")

    def __init__(self, stall_file: Path | None) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._stalls: int | None = None
        for text in _TRIGGERS if stall_file is not None else ():
            try:
                assert stall_file is not None
                descriptor = os.open(stall_file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                break  # not permitted: the time alone
            try:
                os.write(descriptor, text)
            except OSError:
                os.close(descriptor)
                continue
            self._stalls = descriptor
            self._poll.register(descriptor, select.POLLPRI)
            break

    @property
    def armed(self) -> bool:
        """Whether the kernel will report stalls."""
        return self._stalls is not None

    def wait(self, seconds: float) -> bool:
        """True if a stall was reported, False if the time is over or `wake` was called."""
        stalled = False
        for descriptor, events in self._poll.poll(seconds * 1000):
            if descriptor == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif events & select.POLLERR:  # the group is gone
                self._poll.unregister(descriptor)
            else:
                stalled = True
        return stalled

    def wake(self) -> None:
        """End the wait, from another thread."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Give the descriptors back; nobody may wait."""
        os.close(self._wake)
        if self._stalls is not None:
            os.close(self._stalls)
