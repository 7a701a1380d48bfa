"""A model in plies while it is being packed: encoded matrix by matrix into a scratch file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.codec import importance, plies
from pliant.codec.tree import LEVELS, MAX_DEPTH, SCALE_STEPS
from pliant.pack.calibrate import Importance

__all__ = ["CodedMatrix", "CodedModel"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class CodedMatrix:
    """One matrix in plies. Orders are stored place -> place in the source."""

    name: str
    input: str
    rows: int
    columns: int
    blocks: tuple[int, ...]
    row_order: NDArray[np.int64] | None
    row_scale: NDArray[np.float16]
    group_scale: NDArray[np.float32]
    costs: F64
    """What leaving out each unit costs in nats a token, float64 [blocks, groups]."""
    first_unit: int
    offsets: tuple[int, ...]
    """Where the records of each row block begin in the scratch file."""

    @property
    def groups(self) -> int:
        return plies.groups_of(self.columns)

    @property
    def units(self) -> int:
        return len(self.blocks) * self.groups


class CodedModel:
    """Matrices in plies; `scratch` is an empty file that is open for reading and writing."""

    def __init__(self, scratch: BinaryIO) -> None:
        self._file = scratch
        self._end = 0
        self.matrices: list[CodedMatrix] = []
        self.orders: dict[str, NDArray[np.int64]] = {}

    @property
    def units(self) -> int:
        return sum(m.units for m in self.matrices)

    def set_order(
        self, name: str, shared: Sequence[tuple[torch.Tensor, Sequence[Importance]]]
    ) -> None:
        """Decide on the channel order `name` of the matrices `shared`, each with its uses."""
        costs = [_column_costs(weight, use) for weight, uses in shared for use in uses]
        self.orders[name] = importance.channel_order(costs)

    def add(
        self,
        name: str,
        order: str,
        weight: torch.Tensor,
        uses: Sequence[Importance],
        *,
        blocks: int = 1,
        upper: torch.Tensor | None = None,
    ) -> CodedMatrix:
        """Encode `weight`, float32 [rows, columns], that the model uses as `uses` say.

        With `blocks` above 1 the rows are put in order of importance and cut; within a block they
        are in their own order, so that what belongs to them is put in order by reading as many
        streams. `upper` is the factor of its inputs for error feedback (codec/feedback.py).
        """
        rows, columns = weight.shape
        channels = torch.from_numpy(self.orders[order])
        row_order: NDArray[np.int64] | None = None
        cuts = [rows]
        if blocks > 1:
            cost = np.sum([_row_costs(weight, use) for use in uses], axis=0)
            row_order = np.argsort(-cost, kind="stable")
            cuts = importance.row_blocks(cost[row_order], blocks)
            parts = np.split(row_order, np.cumsum(cuts[:-1]))
            row_order = np.concatenate([np.sort(part) for part in parts])
        at = None if row_order is None else torch.from_numpy(row_order)

        def read(start: int, stop: int) -> torch.Tensor:
            part = weight[start:stop] if at is None else weight[at[start:stop]]
            return part[:, channels].float()

        scales = plies.fit(read, columns, cuts)
        costs = np.zeros((len(cuts), plies.groups_of(columns)))
        for use in uses:
            row_fisher = use.rows if row_order is None else use.rows[row_order]
            column_fisher = use.columns[self.orders[order]]
            costs += importance.unit_costs(scales.energy, row_fisher, column_fisher, cuts)
        offsets = []
        for block in range(len(cuts)):
            offsets.append(self._end)
            records = plies.encode_block(read, scales, block, upper).records()
            self._end += self._file.write(records.tobytes())
        coded = CodedMatrix(
            name=name,
            input=order,
            rows=rows,
            columns=columns,
            blocks=tuple(cuts),
            row_order=row_order,
            row_scale=scales.row_scale,
            group_scale=scales.group_scale,
            costs=costs,
            first_unit=self.units,
            offsets=tuple(offsets),
        )
        self.matrices.append(coded)
        return coded

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each ply of each unit, int64 [units, 8]."""
        table = np.empty((self.units, MAX_DEPTH), np.int64)
        for m in self.matrices:
            view = table[m.first_unit : m.first_unit + m.units].reshape(
                len(m.blocks), -1, MAX_DEPTH
            )
            for block, rows in enumerate(m.blocks):
                view[block] = [plies.ply_bytes(rows, ply) for ply in range(1, MAX_DEPTH + 1)]
        return table

    def scale_bytes(self) -> int:
        """Bytes of the row and group scales of all matrices."""
        return sum(m.row_scale.nbytes + m.group_scale.nbytes for m in self.matrices)

    def costs(self) -> F64:
        """What leaving out each unit costs in nats a token, float64 [units]."""
        return np.concatenate([m.costs.ravel() for m in self.matrices])

    def locate(self, unit: int) -> tuple[CodedMatrix, int, int]:
        """Matrix, row block and group of a unit."""
        starts = [m.first_unit for m in self.matrices]
        matrix = self.matrices[int(np.searchsorted(starts, unit, side="right")) - 1]
        block, group = divmod(unit - matrix.first_unit, matrix.groups)
        return matrix, block, group

    def ply(self, unit: int, bit: int) -> bytes:
        """Bytes of ply `bit` (1 to 8) of a unit."""
        self._file.flush()
        matrix, block, group = self.locate(unit)
        rows = matrix.blocks[block]
        first, plane = plies.ply_bytes(rows, 1), plies.ply_bytes(rows, 2)
        record = matrix.offsets[block] + group * (first + (MAX_DEPTH - 1) * plane)
        if bit == 1:
            return os.pread(self._file.fileno(), first, record)
        return os.pread(self._file.fileno(), plane, record + first + (bit - 2) * plane)

    @torch.no_grad()
    def decode(self, matrix: CodedMatrix, depths: NDArray[np.int64], out: torch.Tensor) -> None:
        """Put the weights at `depths` [blocks, groups] into `out` [rows, columns], source order.

        Threads may decode matrices side by side.
        """
        self._file.flush()
        channels = torch.from_numpy(self.orders[matrix.input])
        inverse = torch.empty_like(channels)
        inverse[channels] = torch.arange(matrix.columns)
        start = 0
        for block, rows in enumerate(matrix.blocks):
            size = sum(plies.ply_bytes(rows, p) for p in range(1, MAX_DEPTH + 1))
            data = os.pread(self._file.fileno(), size * matrix.groups, matrix.offsets[block])
            records = np.frombuffer(data, np.uint8).reshape(matrix.groups, size)
            coded = plies.EncodedBlock.from_records(rows, records)
            values = plies.decode_block(
                coded,
                matrix.row_scale[start : start + rows],
                matrix.group_scale[block],
                depths[block].tolist(),
            )
            ordered = torch.from_numpy(values).index_select(1, inverse)
            if matrix.row_order is None:
                out[start : start + rows] = ordered
            else:
                out[torch.from_numpy(matrix.row_order[start : start + rows])] = ordered
            start += rows

    def base_tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors of base.safetensors that belong to matrices in plies, but the ladder."""
        base: dict[str, NDArray[Any]] = {"tree": LEVELS, "scale_steps": SCALE_STEPS}
        for name, order in self.orders.items():
            base[f"order.{name}"] = order.astype(np.uint16)
        for m in self.matrices:
            if m.row_order is not None:
                base[f"{m.name}.row_order"] = m.row_order.astype(np.uint32)
            base[f"{m.name}.row_scale"] = m.row_scale
            base[f"{m.name}.group_scale"] = m.group_scale
        return base


def _column_costs(weight: torch.Tensor, use: Importance) -> F64:
    """What an error in each column costs: Fisher information times energy, float64 [columns]."""
    sums = torch.zeros(weight.shape[1], dtype=torch.float64)
    rows = torch.from_numpy(use.rows).float()
    step = max(1, (1 << 20) // weight.shape[1])
    for s in range(0, weight.shape[0], step):
        sums += rows[s : s + step] @ weight[s : s + step].float().square()
    return sums.numpy() * use.columns / max(use.total, 1e-300)


def _row_costs(weight: torch.Tensor, use: Importance) -> F64:
    """What an error in each row costs, float64 [rows]."""
    sums = np.empty(weight.shape[0])
    columns = torch.from_numpy(use.columns).float()
    step = max(1, (1 << 20) // weight.shape[1])
    for s in range(0, weight.shape[0], step):
        sums[s : s + step] = (weight[s : s + step].float().square() @ columns).numpy()
    return sums * use.rows / max(use.total, 1e-300)
