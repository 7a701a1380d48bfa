"""Who holds how many bytes: free + held = total at any moment, and the kernel can be asked."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from pliant.errors import BudgetError
from pliant.memory.budget import TOLERANCE, measure
from pliant.sizes import format_size

__all__ = ["Audit", "Ledger", "sum_lines"]


def sum_lines(parts: Mapping[str, int] | tuple[tuple[str, int], ...], total: str = "sum") -> str:
    """A column sum as text, a line for each part that is not zero, and one for the sum."""
    items = [(n, b) for n, b in dict(parts).items() if b]
    items.append((total, sum(b for _, b in items)))
    wide = max(len(name) for name, _ in items)
    return "\n".join(f"  {name:<{wide}}  {format_size(size):>11}" for name, size in items)


@dataclass(frozen=True, slots=True)
class Audit:
    """The ledger beside the kernel's count, in bytes."""

    touched: int
    """What the owners say they have in memory."""
    resident: int
    """What the kernel says that the process has."""
    tolerance: int

    @property
    def difference(self) -> int:
        """Bytes that the kernel counts and nobody owns; negative if owners claim too much."""
        return self.resident - self.touched

    @property
    def ok(self) -> bool:
        """Whether the two agree within the tolerance."""
        return abs(self.difference) <= self.tolerance


class Ledger:
    """Bytes by owner. Every method is safe to call from any thread.

    An owner *holds* what was promised to it, and has *touched* what is in memory: a KV cache
    holds room for the whole context and touches it as the context fills.
    """

    __slots__ = ("_held", "_lock", "_total", "_touched")

    def __init__(self, total: int) -> None:
        """`total`: all bytes there are to give."""
        self._lock = threading.Lock()
        self._total = total
        self._held: dict[str, int] = {}
        self._touched: dict[str, int] = {}

    @property
    def total(self) -> int:
        """All bytes there are to give."""
        return self._total

    @property
    def held(self) -> int:
        """Bytes that somebody holds."""
        with self._lock:
            return sum(self._held.values())

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        with self._lock:
            return self._total - sum(self._held.values())

    def owners(self) -> dict[str, tuple[int, int]]:
        """For each owner the bytes it holds and those it has touched."""
        with self._lock:
            return {name: (size, self._touched[name]) for name, size in self._held.items()}

    def hold(self, owner: str, size: int, *, touched: int | None = None) -> None:
        """Set what `owner` holds to `size` bytes; BudgetError, and no change, if that is too much.

        `touched` is how much of it is in memory: all of it, if not given.
        """
        if size < 0:
            raise ValueError(f"{owner} cannot hold {size} bytes")
        with self._lock:
            self._fits({**self._held, owner: size}, self._total)
            self._held[owner] = size
            self._touched[owner] = size if touched is None else touched

    def touch(self, owner: str, size: int) -> None:
        """Say that `size` bytes of what `owner` holds are in memory now."""
        with self._lock:
            if owner not in self._held:
                raise KeyError(owner)
            self._touched[owner] = size

    def move(self, held: Mapping[str, int], total: int) -> None:
        """Change the total and what some owners hold at once; BudgetError if it does not fit."""
        with self._lock:
            after = {**self._held, **held}
            self._fits(after, total)
            self._held, self._total = after, total
            for name in held:
                self._touched.setdefault(name, 0)

    def audit(self, tolerance: int = TOLERANCE) -> Audit:
        """Compare with the resident set that the kernel reports now."""
        with self._lock:
            touched = sum(self._touched.values())
        return Audit(touched, measure().now, tolerance)

    @staticmethod
    def _fits(held: Mapping[str, int], total: int) -> None:
        if sum(held.values()) > total:
            raise BudgetError(
                f"the budget is {format_size(total)}, and needed are:\n{sum_lines(held)}"
            )
