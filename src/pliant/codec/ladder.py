"""The ladder: all plies of a model in the order in which they are worth their bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pliant.codec.tree import MAX_DEPTH, distortion

__all__ = ["benefits", "depths_at", "greedy_order", "prefix_bytes"]


def benefits() -> NDArray[np.float64]:
    """Fall of the distortion of a unit Gaussian with ply 1 .. 8, float64 [8]."""
    table = np.array([distortion(n) for n in range(MAX_DEPTH + 1)])
    falls: NDArray[np.float64] = table[:-1] - table[1:]
    return falls


def greedy_order(gains: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Units in ladder order: the n-th time that a unit comes stands for its ply n.

    `gains` float64 [units, plies] is what each ply of each unit earns, `sizes` int64 [units,
    plies] its bytes. Plies of a unit stay in order: a run of plies that earns more as a whole
    than its first alone counts as a whole, so the result is the greedy order of the concave hull,
    which is optimal at every prefix that ends on a hull point. Ties go to the lower unit.
    """
    units, plies = gains.shape
    rate = np.empty((units, plies))
    cum_gain = np.concatenate([np.zeros((units, 1)), np.cumsum(gains, axis=1)], axis=1)
    cum_size = np.concatenate([np.zeros((units, 1)), np.cumsum(sizes, axis=1)], axis=1)
    at = np.zeros(units, np.int64)
    everyone = np.arange(units)
    while (active := everyone[at < plies]).size:
        start = at[active]
        rise = cum_gain[active] - cum_gain[active, start][:, None]
        run = cum_size[active] - cum_size[active, start][:, None]
        slope = np.where(run > 0, rise / np.maximum(run, 1), -np.inf)
        # The farthest of the steepest points is the next corner of the hull.
        corner = plies - np.argmax(slope[:, ::-1], axis=1)
        value = slope[np.arange(len(active)), corner]
        for ply in range(plies):
            inside = (ply >= start) & (ply < corner)
            rate[active[inside], ply] = value[inside]
        at[active] = corner
    ply_of = np.broadcast_to(np.arange(plies), (units, plies)).ravel()
    unit_of = np.repeat(everyone, plies)
    order = np.lexsort((ply_of, unit_of, -rate.ravel()))
    return unit_of[order].astype(np.uint32)


def depths_at(ladder: NDArray[np.uint32], units: int, plies: int) -> NDArray[np.int64]:
    """Depth of every unit when the first `plies` plies of the ladder are resident."""
    return np.bincount(ladder[:plies].astype(np.int64), minlength=units)


def prefix_bytes(ladder: NDArray[np.uint32], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of the first 0, 1, 2 ... plies of the ladder, int64 [plies + 1].

    `sizes` int64 [units, 8] has the bytes of each ply of each unit.
    """
    units = ladder.astype(np.int64)
    order = np.argsort(units, kind="stable")
    first = np.searchsorted(units[order], np.arange(len(sizes)))
    ply = np.empty(len(units), np.int64)
    ply[order] = np.arange(len(units)) - first[units[order]]
    return np.concatenate([[0], np.cumsum(sizes[units, ply])])
