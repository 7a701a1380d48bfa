"""How far one model's predictions are from another's: KL divergence, perplexity, top-1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pliant.engine.seam import Floats

__all__ = ["Divergence", "log_softmax"]

Doubles = npt.NDArray[np.float64]

_ROWS = 8  # looked at together: small enough to stay in the cache


def log_softmax(logits: Floats) -> Doubles:
    """Natural logarithm of the probabilities along the last axis: float64, shaped as `logits`."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


class Divergence:
    """Means over positions, summed up block by block.

    Without a reference only the perplexity is counted. The standard error treats the windows of
    text as the sample, since neighbouring positions are not independent.
    """

    __slots__ = ("_agree", "_kl", "_loss", "_positions", "_targets", "_window")

    def __init__(self) -> None:
        self._window: list[tuple[float, int]] = []  # sum of KL and positions, for each window
        self._kl: list[Doubles] = []
        self._agree = self._positions = self._targets = 0
        self._loss = 0.0

    def begin_window(self) -> None:
        """What is added from now on belongs to another piece of text."""
        self._window.append((0.0, 0))

    def add(
        self, logits: Floats, following: Sequence[int], reference: Floats | None = None
    ) -> Doubles:
        """Count a block: float32 [rows, vocabulary] of both models for the same positions.

        `following`: the token after each position; may be one shorter than the block, at the end.
        Returns the KL of each position, nothing without a reference.
        """
        if not self._window:
            self.begin_window()
        before = len(self._kl)
        for start in range(0, len(logits), _ROWS):
            stop = min(start + _ROWS, len(logits))
            mine = log_softmax(logits[start:stop])
            targets = np.array(following[start:stop], np.int64)
            self._loss -= float(mine[np.arange(len(targets)), targets].sum())
            self._targets += len(targets)
            self._positions += stop - start
            if reference is None:
                continue
            theirs = log_softmax(reference[start:stop])
            self._agree += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            np.subtract(theirs, mine, out=mine)
            mine *= np.exp(theirs)
            each = np.maximum(mine.sum(-1), 0.0)  # below zero only by rounding
            self._kl.append(each)
            total, count = self._window[-1]
            self._window[-1] = (total + float(each.sum()), count + len(each))
        return np.concatenate([*self._kl[before:], np.empty(0)])

    def values(self) -> dict[str, float | int | None]:
        """`positions`, `perplexity`, mean `kl` (nats), `kl_error`, `kl_median`, `kl_99`, `top1`."""
        result: dict[str, float | int | None] = {
            "positions": self._positions,
            "perplexity": math.exp(self._loss / self._targets) if self._targets else None,
            **dict.fromkeys(("kl", "kl_error", "kl_median", "kl_99", "top1")),
        }
        if self._kl:
            each = np.concatenate(self._kl)
            means = [total / count for total, count in self._window if count]
            error = None
            if len(means) > 1:
                error = float(np.std(means, ddof=1) / math.sqrt(len(means)))
            result |= {
                "kl": float(each.mean()),
                "kl_error": error,
                "kl_median": float(np.median(each)),
                "kl_99": float(np.quantile(each, 0.99)),
                "top1": self._agree / self._positions,
            }
        return result
