"""Whether pages are read or computed: by how fast either was until now."""

from __future__ import annotations

__all__ = ["Rate", "Rates"]

_FADES = 0.9  # what an observation still counts when the next one comes
_AGAIN = 32  # pages of beginnings after which one is read in any case, to see how that is now


class Rate:
    """An amount a second over the last observations; larger ones count for more."""

    __slots__ = ("_amount", "_seconds")

    def __init__(self, value: float | None = None) -> None:
        self._amount, self._seconds = (0.0, 0.0) if value is None else (value, 1.0)

    def add(self, amount: float, seconds: float) -> None:
        """Something took so long."""
        self._amount = self._amount * _FADES + amount
        self._seconds = self._seconds * _FADES + seconds

    @property
    def value(self) -> float | None:
        """None before the first observation."""
        return self._amount / self._seconds if self._seconds > 0 else None


class Rates:
    """Reading in bytes a second, checks and copies included, and prompts in tokens a second.

    reads, computes: how many pages were read, and computed, because that was expected to be faster
    """

    __slots__ = ("_slower", "computes", "prefill", "read", "reads")

    def __init__(self, read: float | None = None, prefill: float | None = None) -> None:
        """Both may be given; what is not known is measured first."""
        self.read = Rate(read)
        self.prefill = Rate(prefill)
        self.reads = self.computes = 0
        self._slower = 0  # pages that were computed since one was read

    def choose(self, size: int, tokens: int, pages: int = 1) -> bool:
        """Whether to read `size` bytes instead of computing so many tokens in so many pages: where
        that is expected to be faster, or not known."""
        read, prefill = self.read.value, self.prefill.value
        slower = read is not None and prefill is not None and size * prefill > tokens * read
        if slower and pages == 1:
            self._slower += 1
        if slower and self._slower < _AGAIN:
            self.computes += pages
            return False
        self._slower = 0
        self.reads += pages
        return True
