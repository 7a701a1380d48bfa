"""What the process holds, as the kernel counts it, and which part of it is what.

The budget of pliant is the resident set (VmRSS) of the whole process, and its peak (VmHWM): those
are the numbers by which a container is killed. Source: proc_pid_status(5) of Linux; elsewhere
getrusage(2), which knows only the peak.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pliant.sizes import MIB

__all__ = [
    "LIMIT_FILES",
    "MARGIN",
    "TOLERANCE",
    "Group",
    "Meter",
    "Resident",
    "margin",
    "measure",
    "memory_groups",
    "read_fields",
    "read_number",
    "system_limit",
]

MARGIN = 3 * MIB
"""Kept free under every budget: for what the interpreter and the allocator take beyond the parts
that are counted (texts and tokens of a conversation, fragments, stacks of threads)."""

HUGE_MARGIN = 4 * MIB
"""Kept free in addition where the kernel hands out huge pages without being asked: one at the end
of the weights and one at the end of the KV cache may be half used."""

TOLERANCE = 8 * MIB
"""How far the sum of the ledger may be from what the kernel reports."""


@dataclass(frozen=True, slots=True)
class Resident:
    """The resident set of this process in bytes: now, and the most it ever was."""

    now: int
    peak: int


def measure(root: Path = Path("/proc/self")) -> Resident:
    """Ask the kernel. `root` is replaced in tests."""
    try:
        text = (root / "status").read_text("ascii", "replace")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return Resident(peak, peak)
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM"):
            found[key] = int(value.split()[0]) * 1024
    now = found.get("VmRSS", 0)
    # The two counters are not updated together: the peak may lag behind by some pages.
    return Resident(now, max(now, found.get("VmHWM", 0)))


def margin(root: Path = Path("/")) -> int:
    """The bytes that a plan leaves free on this machine. `root` is replaced in tests."""
    try:
        enabled = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text("ascii")
    except OSError:
        return MARGIN
    return MARGIN + (HUGE_MARGIN if "[always]" in enabled else 0)


def system_limit(root: Path = Path("/")) -> int:
    """The most bytes that this process can have: physical memory, or less if its cgroup says so.

    Reads the limits of the own control group and all groups above it. `root` is replaced in tests.
    """
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        limit = 2**53 - 1
    total = read_fields(root / "proc/meminfo").get("MemTotal")
    if total is not None:
        limit = total * 1024
    for group in memory_groups(root):
        for name in LIMIT_FILES[group.version]:
            limit = min(limit, read_number(group.path / name, limit))
    return limit


class Group(NamedTuple):
    """A directory of a control group that bounds the memory of this process."""

    path: Path
    version: int


LIMIT_FILES = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
"""Files with a number of bytes that a group must not, or should not, exceed."""


def memory_groups(root: Path = Path("/")) -> list[Group]:
    """The own control group of memory and all above it, outermost first; versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, version = root / "sys/fs/cgroup", 2
        elif "memory" in controllers.split(","):
            base, version = root / "sys/fs/cgroup/memory", 1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += [Group(base.joinpath(*parts[:n]), version) for n in range(len(parts) + 1)]
    return found


def read_number(path: Path, otherwise: int) -> int:
    """The number in a file; `otherwise` if there is none, as for `max`."""
    try:
        text = path.read_text("ascii", "replace").strip()
    except OSError:
        return otherwise
    return int(text) if text.isdecimal() and text.isascii() else otherwise


class Meter:
    """Attributes the growth of the resident set to what was done since the mark before.

    >>> meter = Meter()                  # all that is there already: the interpreter
    >>> table = bytearray(32 * MIB)
    >>> meter.mark("tokenizer")
    >>> dict(meter.parts)["tokenizer"] >= 32 * MIB
    True
    """

    __slots__ = ("_last", "_parts")

    def __init__(self, first: str = "interpreter") -> None:
        self._last = measure().now
        self._parts: dict[str, int] = {first: self._last}

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of each part, in order; their sum is the resident set at the last mark."""
        return tuple(self._parts.items())

    def mark(self, name: str) -> int:
        """Give what was added since the last mark to `name`; returns it. May be negative."""
        now = measure().now
        grown = now - self._last
        self._parts[name] = self._parts.get(name, 0) + grown
        self._last = now
        return grown


def read_fields(path: Path) -> dict[str, int]:
    """Names and numbers of a file such as `meminfo` or `memory.stat`; empty if it is not there."""
    try:
        lines = path.read_text("ascii", "replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        key, _, number = line.replace(":", " ").partition(" ")
        value = number.split()
        if value and value[0].isdecimal() and value[0].isascii():
            found[key] = int(value[0])
    return found
