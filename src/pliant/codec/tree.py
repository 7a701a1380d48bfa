"""The Gaussian tree: one 8-bit scalar quantiser whose every prefix is a good quantiser.

The 15 thresholds of the 16-level Lloyd-Max quantiser of a unit Gaussian (Lloyd 1957, Max 1960)
are computed first. Merging neighbouring cells gives the cells of 3, 2 and 1 bits; splitting each
cell in two, at the threshold that is best for that cell alone, gives those of 5, 6, 7 and 8 bits.
A prefix of n bits decodes to the centre of mass of its cell.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAVES", "LEVELS", "MAX_DEPTH", "SCALE_STEPS", "THRESHOLDS", "distortion", "levels"]

MAX_DEPTH = 8
LEAVES = 1 << MAX_DEPTH
_SEED_BITS = 4

F64 = NDArray[np.float64]


def _mass(edges: F64) -> F64:
    """Probability of each cell between neighbouring `edges` (may be infinite) under N(0, 1)."""
    # The upper tail is used for positive edges: differences of values near 1 lose all digits.
    low = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
    high = np.array([0.5 * math.erfc(e / math.sqrt(2)) for e in edges])
    mass: F64 = np.where(edges[1:] > 0, high[:-1] - high[1:], low[1:] - low[:-1])
    return mass


def _centres(edges: F64) -> F64:
    """Centre of mass of each cell between neighbouring `edges` under N(0, 1)."""
    density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    centres: F64 = (density[:-1] - density[1:]) / _mass(edges)
    return centres


def _lloyd_max(bits: int) -> F64:
    """Thresholds of the optimal quantiser with 2**bits levels for N(0, 1)."""
    edges = np.concatenate([[-np.inf], np.linspace(-2.4, 2.4, 2**bits - 1), [np.inf]])
    for _ in range(4000):
        centres = _centres(edges)
        inner = 0.5 * (centres[:-1] + centres[1:])
        inner = 0.5 * (inner - inner[::-1])  # exactly symmetric
        if np.max(np.abs(inner - edges[1:-1])) < 1e-13:
            break
        edges[1:-1] = inner
    return edges


def _split(edges: F64) -> F64:
    """`edges` with the best threshold (two-level Lloyd-Max) put into each cell."""
    cells = len(edges) - 1
    low, high = edges[:-1].copy(), edges[1:].copy()
    start = _centres(edges)
    for _ in range(200):
        triples = np.stack([low, start, high])
        halves = np.array([_centres(triples[:, c]) for c in range(cells)])
        middle = halves.mean(axis=1)
        if np.max(np.abs(middle - start)) < 1e-13:
            break
        start = middle
    start = 0.5 * (start - start[::-1])
    out = np.empty(2 * cells + 1)
    out[0::2] = edges
    out[1::2] = start
    return out


def _build() -> F64:
    edges = _lloyd_max(_SEED_BITS)
    for _ in range(_SEED_BITS, MAX_DEPTH):
        edges = _split(edges)
    return edges


_EDGES: F64 = _build()

THRESHOLDS: F64 = _EDGES[1:-1].copy()
"""float64 [255], rising: leaf i holds the values between THRESHOLDS[i - 1] and THRESHOLDS[i]."""

LEVELS: NDArray[np.float32] = np.concatenate(
    [_centres(_EDGES[:: LEAVES >> n]) for n in range(1, MAX_DEPTH + 1)]
).astype(np.float32)
"""float32 [510]: the levels of depth n are the 2**n values from index 2**n - 2, rising."""

# Fine where most groups are (their logarithms spread by 0.16 octaves), coarse toward the rare large
# ones: a group whose scale is too small loses 6 dB an octave, and much more if it is saturated.
_STEP_OCTAVES = (
    *(-1.6, -0.9, -0.55, -0.36, -0.22, -0.11, 0.0, 0.11),
    *(0.22, 0.35, 0.52, 0.8, 1.25, 1.85, 2.6, 3.5),
)

SCALE_STEPS: NDArray[np.float32] = np.exp2(np.array(_STEP_OCTAVES)).astype(np.float32)
"""float32 [16], rising: the factors that the 4-bit scale codes stand for."""

for _table in (THRESHOLDS, LEVELS, SCALE_STEPS):
    _table.flags.writeable = False


def levels(depth: int) -> NDArray[np.float32]:
    """Levels of `depth` plies, float32 [2**depth], rising.

    Raises ValueError unless 1 <= depth <= 8.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth is 1 to {MAX_DEPTH}, not {depth}")
    return LEVELS[2**depth - 2 : 2 ** (depth + 1) - 2]


def distortion(depth: int) -> float:
    """Mean squared error of a unit Gaussian coded with `depth` plies (0 to 8), exact integral."""
    if depth == 0:
        return 1.0
    if not 0 < depth <= MAX_DEPTH:
        raise ValueError(f"depth is 0 to {MAX_DEPTH}, not {depth}")
    edges = _EDGES[:: LEAVES >> depth]
    # E[x^2] = 1 and the levels are centres of mass, so the error is 1 - E[level^2].
    return float(1.0 - np.sum(_mass(edges) * _centres(edges) ** 2))
