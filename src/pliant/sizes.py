"""Sizes in bytes, as people write them: `300MiB`, `1.5GB`, `4096`.

The units are those of IEC 80000-13: `MB` is 10^6 bytes and `MiB` is 2^20. A single letter (`M`) is
refused, because half of all programs mean the one by it and half the other.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pliant.errors import UsageError

__all__ = ["GB", "GIB", "KIB", "MAX_SIZE", "MB", "MIB", "format_mb", "format_size", "parse_size"]

KIB = 2**10
MIB = 2**20
GIB = 2**30
MB = 10**6
GB = 10**9
MAX_SIZE = 2**53 - 1  # as in the pack format: exact in every JSON reader

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": MB,
    "gb": GB,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,17}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*([A-Za-z]*)", re.ASCII)


def parse_size(value: str | int, what: str = "size") -> int:
    """The number of bytes that `value` names: an int, or text such as `300MiB`, `1.5 GB`, `4096`.

    Fractions of a byte are cut off. `what` names the argument in the message. Raises UsageError for
    anything else, for zero, and for more than 2^53 - 1 bytes.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{what}: {value!r} is not a size; write for example 300MiB or 1.5GB")
    if isinstance(value, int):
        size = value
    else:
        found = _SIZE.fullmatch(value.strip())
        if not found:
            raise UsageError(f"{what}: {value!r} is not a size; write for example 300MiB or 1.5GB")
        number, unit = found.groups()
        if unit.lower() not in _UNITS:
            raise UsageError(
                f"{what}: {unit!r} in {value!r} is not a unit; write B, KB, MB, GB, TB (powers of "
                "1000) or KiB, MiB, GiB, TiB (powers of 1024)"
            )
        size = int(Fraction(number) * _UNITS[unit.lower()])
    if size < 1:
        raise UsageError(f"{what}: {value!r} must be at least one byte")
    if size > MAX_SIZE:
        raise UsageError(f"{what}: {value!r} is more than 2^53 - 1 bytes")
    return size


def format_size(size: int) -> str:
    """`size` in binary units with one digit after the point: `71.3 MiB`; below 1 KiB in bytes."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size < KIB:
        return f"{sign}{size} B"
    unit, name = KIB, "KiB"
    for larger, its_name in ((MIB, "MiB"), (GIB, "GiB")):
        if size >= larger - unit // 20:  # 1023.95 would be shown as 1024.0
            unit, name = larger, its_name
    return f"{sign}{size / unit:.1f} {name}"


def format_mb(size: int) -> str:
    """`size` in 10^6 bytes with one digit after the point, the unit of `--weights`: `71.9 MB`."""
    return f"{size / MB:.1f} MB"
