"""The report of a running model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pliant.engine.holdings import Holdings
from pliant.engine.kinds import Report
from pliant.engine.seam import Executor
from pliant.memory.budget import measure

if TYPE_CHECKING:
    from pliant.store import Pack

__all__ = ["make_report"]


def make_report(pack: Pack, executor: Executor, holdings: Holdings) -> Report:
    """What the process holds, and with what quality it answers; called with the turn taken."""
    depth, cache, ledger = holdings.depth, holdings.cache, holdings.ledger
    parked, parked_bytes = cache.parked
    now = measure()
    return Report(
        pack=str(pack.path),
        budget=holdings.wish.memory,
        resident=now.now,
        peak=now.peak,
        total=ledger.total,
        free=ledger.free,
        ledger=ledger.owners(),
        rungs=depth.rungs,
        rungs_available=pack.rungs_available,
        rungs_of_pack=len(pack.manifest.rungs),
        weights=depth.weights,
        bits_per_weight=depth.bits_per_weight,
        expected_kl=depth.expected_kl,
        kv_bits=depth.kv_bits,
        context=cache.context,
        sessions=holdings.plan.sessions,
        in_flight=cache.in_flight,
        parked=parked,
        parked_bytes=parked_bytes,
        park=cache.park.report(),
        threads=executor.threads,
        isa=executor.isa,
        matrices=_matrix_depths(pack, executor.depths()),
    )


def _matrix_depths(pack: Pack, depths: npt.NDArray[np.uint8]) -> dict[str, float]:
    """The mean plies of each coded matrix, over its weights."""
    units, result = pack.units, {}
    for matrix, start in zip(units.matrices, units.first.tolist(), strict=False):
        part = slice(start, start + matrix.units)
        rows = units.rows[part]
        result[matrix.name] = float((depths[part] * rows).sum() / max(int(rows.sum()), 1))
    return result
