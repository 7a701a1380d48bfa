"""Units, plies and rungs as numbers: how many bytes each has, and which are resident at a size.

Everything is vectorised and works through the ladder in chunks, so that checking a hostile ladder
takes no more memory than the ladder itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pliant.errors import FormatError
from pliant.store.manifest import ALIGNMENT, MatrixSpec, Rungs

__all__ = ["MAX_DEPTH", "Layout", "Unit", "UnitTable", "occurrences"]

MAX_DEPTH = 8
_CHUNK = 2**16  # plies that are looked at together

Units = npt.NDArray[np.uint32]


class Unit(NamedTuple):
    """A unit of the ladder: `rows` rows from `first_row` on, in one group of one matrix."""

    matrix: MatrixSpec
    block: int
    group: int
    first_row: int
    rows: int


class UnitTable:
    """The units of a pack, numbered as in docs/format.md section 3.

    `matrices` are those coded in plies, `first[i]` is the number of the first unit of matrix i
    (int64, one more entry than matrices), `rows` the rows of each unit (int32 [units]).
    """

    __slots__ = ("first", "matrices", "rows")

    def __init__(self, matrices: Sequence[MatrixSpec]) -> None:
        self.matrices = tuple(matrix for matrix in matrices if matrix.coding == "plies")
        self.first = np.zeros(len(self.matrices) + 1, np.int64)
        np.cumsum([matrix.units for matrix in self.matrices], out=self.first[1:])
        self.rows = np.empty(int(self.first[-1]), np.int32)
        for matrix, start in zip(self.matrices, self.first, strict=False):
            table = self.rows[start : start + matrix.units].reshape(-1, matrix.groups)
            table[:] = np.array(matrix.blocks, np.int32)[:, None]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def first_ply_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of ply 1 of each unit: scale codes, padded to 64, and a plane; int64 [units]."""
        return self._plane(self.rows) + self._codes(self.rows)

    @property
    def next_ply_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each of the plies 2 to 8 of each unit: a plane; int64 [units]."""
        return self._plane(self.rows)

    @property
    def scale_bytes(self) -> int:
        """Bytes of row_scale and group_scale of all matrices."""
        return sum(2 * matrix.rows + 4 * matrix.units for matrix in self.matrices)

    def bytes_of(self, units: Units, bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Bytes of the plies `bits` (1 to 8) of `units`, both of one length."""
        rows = self.rows[units]
        codes = self._codes(rows)
        codes[bits != 1] = 0
        return self._plane(rows) + codes

    def locate(self, unit: int) -> Unit:
        """What a unit is; IndexError if there is none of that number."""
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} of {len(self)}")
        index = int(np.searchsorted(self.first, unit, "right")) - 1
        matrix = self.matrices[index]
        block, group = divmod(unit - int(self.first[index]), matrix.groups)
        return Unit(matrix, block, group, sum(matrix.blocks[:block]), matrix.blocks[block])

    def number(self, name: str, block: int, group: int) -> int:
        """The number of a unit; KeyError if the matrix is not coded in plies."""
        for matrix, first in zip(self.matrices, self.first.tolist(), strict=False):
            if matrix.name == name:
                if not (0 <= block < len(matrix.blocks) and 0 <= group < matrix.groups):
                    raise IndexError(f"block {block}, group {group} of {name}")
                return int(first) + block * matrix.groups + group
        raise KeyError(name)

    @staticmethod
    def _plane(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        return (rows.astype(np.int64) + 31) // 32 * 256

    @staticmethod
    def _codes(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        return (rows.astype(np.int64) + 127) // 128 * 64


def occurrences(ladder: Units, units: int, where: str = "ladder") -> npt.NDArray[np.uint8]:
    """Which ply of its unit each entry of a ladder is, 1 to 8; uint8 [plies].

    Raises FormatError for a unit that does not exist, or one that is named more than 8 times.
    """
    if len(ladder) > MAX_DEPTH * units:
        raise FormatError(
            f"{where}: {len(ladder)} plies, and {units} units have at most {MAX_DEPTH * units}"
        )
    counts = np.zeros(units, np.uint8)
    bits = np.empty(len(ladder), np.uint8)
    for start in range(0, len(ladder), _CHUNK):
        chunk = ladder[start : start + _CHUNK]
        highest = int(chunk.max())
        if highest >= units:
            raise FormatError(f"{where} names unit {highest}, and there are {units}")
        order = np.argsort(chunk, kind="stable")
        found = chunk[order]
        # Within the chunk: the rank in each run of equal units; before it: what was counted.
        begins = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1])))
        lengths = np.diff(begins, append=len(found))
        rank = np.arange(1, len(found) + 1) - np.repeat(begins, lengths)
        rank += counts[found]
        most = int(rank.argmax())
        if rank[most] > MAX_DEPTH:
            raise FormatError(f"{where} names unit {found[most]} more than {MAX_DEPTH} times")
        bits[start + order] = rank
        counts[found[begins]] += lengths.astype(np.uint8)
    return bits


class Layout:
    """The ladder cut into rungs.

    `ladder` uint32 [plies] and `bits` uint8 [plies] say which ply is where; `starts` int64
    [rungs + 1] is the first ply of each rung; `payload` int64 [rungs + 1] the bytes of all plies
    before it, without padding.
    """

    __slots__ = ("bits", "ladder", "payload", "starts", "units")

    def __init__(
        self, units: UnitTable, ladder: Units, plies: npt.NDArray[np.int64], where: str = "ladder"
    ) -> None:
        """`plies` says how many plies each rung has. Raises FormatError as `occurrences` does."""
        if sum(plies.tolist()) != len(ladder):
            raise FormatError(
                f"{where} has {len(ladder)} plies, and the rungs have {sum(plies.tolist())}"
            )
        self.units = units
        self.ladder = ladder
        self.bits = occurrences(ladder, len(units), where)
        self.starts = np.zeros(len(plies) + 1, np.int64)
        np.cumsum(plies, out=self.starts[1:])
        self.payload = np.zeros(len(plies) + 1, np.int64)
        total = done = 0
        for start in range(0, len(ladder), _CHUNK):
            stop = min(start + _CHUNK, len(ladder))
            sums = np.cumsum(units.bytes_of(ladder[start:stop], self.bits[start:stop])) + total
            last = int(np.searchsorted(self.starts, stop, "right"))
            self.payload[done + 1 : last] = sums[self.starts[done + 1 : last] - start - 1]
            total, done = int(sums[-1]), last - 1

    @property
    def padded(self) -> npt.NDArray[np.int64]:
        """Bytes of each rung in its file; int64 [rungs]."""
        return -(-np.diff(self.payload) // ALIGNMENT) * ALIGNMENT

    def check(self, rungs: Rungs, where: str) -> None:
        """Raise FormatError unless each rung has the bytes that its plies add up to."""
        wrong = np.flatnonzero(self.padded != rungs.bytes)
        if len(wrong):
            first = int(wrong[0])
            raise FormatError(
                f"{where}: rung {first} has {rungs.bytes[first]} bytes, and its "
                f"{rungs.plies[first]} plies add up to {self.padded[first]} with padding"
            )

    def plies_of(self, rung: int) -> tuple[Units, npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Units, bits and offsets from the start of the rung, of the plies of one rung."""
        begin, end = int(self.starts[rung]), int(self.starts[rung + 1])
        units, bits = self.ladder[begin:end], self.bits[begin:end]
        offsets = np.zeros(end - begin, np.int64)
        np.cumsum(self.units.bytes_of(units, bits)[:-1], out=offsets[1:])
        return units, bits, offsets

    def resident_bytes(self, rungs: int) -> int:
        """Bytes of plies and scales (section 6) with the first `rungs` rungs resident."""
        return self.units.scale_bytes + int(self.payload[rungs])

    def rungs_for(self, weight_bytes: int) -> int:
        """How many rungs fit into `weight_bytes` of plies and scales; 0 if the scales do not."""
        room = weight_bytes - self.units.scale_bytes
        return max(int(np.searchsorted(self.payload, room, "right")) - 1, 0)

    def depths(self, rungs: int) -> npt.NDArray[np.uint8]:
        """How many plies each unit has with the first `rungs` rungs resident; uint8 [units]."""
        result = np.zeros(len(self.units), np.uint8)
        for start in range(0, int(self.starts[rungs]), _CHUNK):
            stop = min(start + _CHUNK, int(self.starts[rungs]))
            np.maximum.at(result, self.ladder[start:stop], self.bits[start:stop])
        return result
