"""Reading packs: the specification of docs/format.md in code, validation, and the places of rungs.

Needs numpy and nothing else. Writing is in `pliant.pack.writer`.
"""

from __future__ import annotations

from pliant.store.base import BaseTensor, base_tensors
from pliant.store.layout import Layout, Unit, UnitTable
from pliant.store.manifest import (
    Calibration,
    FileDigest,
    Manifest,
    MatrixSpec,
    QualityPoint,
    Rungs,
    Shard,
    Source,
    Tokens,
)
from pliant.store.model import ModelSpec, Rope
from pliant.store.pack import Pack, RungLocation

__all__ = [
    "BaseTensor",
    "Calibration",
    "FileDigest",
    "Layout",
    "Manifest",
    "MatrixSpec",
    "ModelSpec",
    "Pack",
    "QualityPoint",
    "Rope",
    "RungLocation",
    "Rungs",
    "Shard",
    "Source",
    "Tokens",
    "Unit",
    "UnitTable",
    "base_tensors",
]
