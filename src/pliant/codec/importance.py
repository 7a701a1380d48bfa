"""Orders and blocks: which channels and rows go together, and what an error in each unit costs.

The Fisher information of a weight (r, k) is taken to be rows[r] * columns[k] / total. The error of
a coded group is white after the rotation, so a unit of rows B and channels G costs
D(depth) * sum_B(rows[r] * |W[r, G]|^2) * mean_G(columns) / total / 2 nats a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pliant.codec.rotate import GROUP

__all__ = ["channel_order", "row_blocks", "shrink", "unit_costs"]

F64 = NDArray[np.float64]


def shrink(values: F64, weight: float) -> F64:
    """`values` pulled toward their mean: 0 leaves them, 1 gives the mean everywhere."""
    return (1 - weight) * values + weight * float(values.mean())


def channel_order(importances: Sequence[F64]) -> NDArray[np.int64]:
    """Order of the input channels shared by some matrices, the most important first.

    Each of `importances` [columns] is what an error in each channel of one matrix costs.
    """
    return np.argsort(-np.sum(importances, axis=0), kind="stable")


def row_blocks(importance: F64, blocks: int, *, unit: int = 32, least: int = 4) -> list[int]:
    """Rows of each of `blocks` row blocks for rows in falling order of `importance`.

    The cuts minimise sum(n_b log(mean importance of b)): the logarithm of the loss that is left
    when bits are given to blocks as they earn them. Every cut is a multiple of `unit` rows and
    every block has at least `least` units; fewer blocks come out where the matrix is small.
    """
    rows = len(importance)
    cells = -(-rows // unit)
    blocks = max(1, min(blocks, cells // least))
    if blocks == 1:
        return [rows]
    # At most 512 places to cut, closer together at the important end.
    places = np.unique(np.rint(np.geomspace(least, cells, 512)).astype(np.int64))
    places = np.concatenate([[0], places])
    edges = np.minimum(places * unit, rows)
    sums = np.concatenate([[0.0], np.cumsum(importance, dtype=np.float64)])[edges]
    floor = max(sums[-1], 1e-300) * 1e-12 / rows
    size = edges[None, :] - edges[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = size * np.log(np.maximum((sums[None, :] - sums[:, None]) / size, floor))
    cost[places[None, :] - places[:, None] < least] = np.inf
    best = cost[0]
    back: list[NDArray[np.int64]] = []
    for _ in range(blocks - 1):
        table = best[:, None] + cost
        back.append(np.argmin(table, axis=0))
        best = np.min(table, axis=0)
    if not np.isfinite(best[-1]):
        return row_blocks(importance, blocks - 1, unit=unit, least=least)
    at = len(edges) - 1
    cuts = [rows]
    for choice in reversed(back):
        at = int(choice[at])
        cuts.append(int(edges[at]))
    cuts.append(0)
    return [int(b - a) for a, b in zip(cuts[::-1], cuts[-2::-1], strict=False)]


def unit_costs(energy: F64, rows: F64, columns: F64, blocks: Sequence[int]) -> F64:
    """What leaving out each unit wholly costs, in nats a token: float64 [blocks, groups].

    `energy` [rows, groups] is the sum of squares of each row in each group, `rows` [rows] and
    `columns` [columns] the sums of the Fisher information, all in stored order.
    """
    groups = energy.shape[1]
    total = float(columns.sum())
    padded = np.zeros(groups * GROUP)
    padded[: len(columns)] = columns
    share = (
        padded.reshape(groups, GROUP).sum(axis=1) / GROUP / total if total > 0 else padded[:groups]
    )
    weighted = rows[:, None] * energy
    starts = np.concatenate([[0], np.cumsum(blocks)[:-1]])
    return 0.5 * np.add.reduceat(weighted, starts, axis=0) * share[None, :]
