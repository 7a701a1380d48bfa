"""Matrices to plies and back: scales, leaf codes and the layout of docs/format.md, section 4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pliant.codec.feedback import choose_leaves
from pliant.codec.rotate import GROUP, hadamard
from pliant.codec.tree import MAX_DEPTH, SCALE_STEPS, THRESHOLDS, levels

if TYPE_CHECKING:
    import torch

__all__ = [
    "EncodedBlock",
    "Scales",
    "decode_block",
    "encode_block",
    "fit",
    "groups_of",
    "pack_codes",
    "pack_planes",
    "padded_rows",
    "ply_bytes",
    "unpack_codes",
    "unpack_planes",
]

U8 = NDArray[np.uint8]
Rows = Callable[[int, int], "torch.Tensor"]

_CODE_DEPTH = 4  # the depth whose error decides on a scale code
_TILE = 16
_ROUND = 32
_ALIGN = 64


def groups_of(columns: int) -> int:
    """Groups of a matrix with so many columns."""
    return -(-columns // GROUP)


def padded_rows(rows: int) -> int:
    """Rows of a unit as stored: rounded up to a multiple of 32."""
    return -(-rows // _ROUND) * _ROUND


def ply_bytes(rows: int, ply: int) -> int:
    """Bytes of ply `ply` (1 to 8) of a unit with `rows` rows."""
    plane = padded_rows(rows) * 8
    if ply > 1:
        return plane
    return plane + -(-padded_rows(rows) // (2 * _ALIGN)) * _ALIGN


def _transpose_bits(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each word as an 8 x 8 matrix of bits (byte, bit), transposed. Hacker's Delight, 7-3."""
    x = words.copy()
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0xF0F0F0F0)):
        swap = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
        x ^= swap ^ (swap << np.uint64(shift))
    return x


def pack_planes(leaves: U8) -> U8:
    """Leaf codes, uint8 [rows, 64 groups] (rows a multiple of 32), as planes.

    Returns uint8 [groups, 8, rows * 8]: planes of each group, the most significant first.
    """
    rows, columns = leaves.shape
    tiles, groups = rows // _TILE, columns // GROUP
    # Column 32 h + 4 j + m of a group is bit j of a byte: j goes last, eight leaves to a word.
    cube = leaves.reshape(tiles, _TILE, groups, 2, 8, 4).transpose(2, 0, 3, 1, 5, 4)
    words = np.ascontiguousarray(cube).view("<u8")[..., 0]
    planes = _transpose_bits(words)[..., None].view(np.uint8)[..., ::-1]
    return np.ascontiguousarray(np.moveaxis(planes, -1, 1)).reshape(groups, MAX_DEPTH, rows * 8)


def unpack_planes(planes: U8) -> U8:
    """The inverse of `pack_planes` for the first n planes: uint8 [groups, n, rows * 8].

    Returns uint8 [rows, 64 groups] leaf codes whose bits below the first n are zero.
    """
    groups, depth, size = planes.shape
    rows = size // 8
    tiles = rows // _TILE
    full = np.zeros((groups, tiles, 2, _TILE, 4, 8), np.uint8)
    view = planes.reshape(groups, depth, tiles, 2, _TILE, 4)
    full[..., MAX_DEPTH - depth :] = np.moveaxis(view, 1, -1)[..., ::-1]
    bits = _transpose_bits(full.view("<u8")[..., 0])[..., None].view(np.uint8)
    cube = bits.transpose(1, 3, 0, 2, 5, 4)
    return np.ascontiguousarray(cube).reshape(rows, groups * GROUP)


def pack_codes(codes: U8) -> U8:
    """Scale codes, uint8 [rows, groups] below 16 (rows a multiple of 32), as stored.

    Returns uint8 [groups, padded bytes]: two to a byte, with zeros to a multiple of 64.
    """
    rows, groups = codes.shape
    pairs = codes.T.reshape(groups, rows // _ROUND, 2, _TILE)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(groups, rows // 2)
    padding = -(rows // 2) % _ALIGN
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, padding))))


def unpack_codes(packed: U8, rows: int) -> U8:
    """The inverse of `pack_codes`: uint8 [groups, padded bytes] as uint8 [rows, groups]."""
    groups = packed.shape[0]
    halves = packed[:, : rows // 2].reshape(groups, rows // _ROUND, 1, _TILE)
    pairs = np.concatenate([halves & 15, halves >> 4], axis=2)
    return np.ascontiguousarray(pairs.reshape(groups, rows).T)


@dataclass(frozen=True)
class EncodedBlock:
    """One row block of a matrix: all its units, ready to be written."""

    rows: int
    """Rows in use; the arrays have `padded_rows(rows)`."""
    codes: U8
    """Scale codes as stored, uint8 [groups, padded bytes]."""
    planes: U8
    """Planes as stored, uint8 [groups, 8, padded rows * 8]."""

    def records(self) -> U8:
        """All plies of each unit one after the other, uint8 [groups, bytes of 8 plies]."""
        flat = self.planes.reshape(len(self.planes), -1)
        return np.concatenate([self.codes, flat], axis=1)

    @classmethod
    def from_records(cls, rows: int, records: U8) -> EncodedBlock:
        """The inverse of `records`; the arrays are views where that is possible."""
        plane = padded_rows(rows) * 8
        start = ply_bytes(rows, 1) - plane
        planes = records[:, start:].reshape(len(records), MAX_DEPTH, plane)
        return cls(rows, records[:, :start], planes)


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix and what is left to do: rows in stored order."""

    blocks: tuple[int, ...]
    row_scale: NDArray[np.float16]
    """float16 [rows]."""
    group_scale: NDArray[np.float32]
    """float32 [blocks, groups]."""
    nearest: U8
    """The scale code nearest to the root mean square of each group, uint8 [rows, groups]."""
    energy: NDArray[np.float64]
    """Sum of squares of each row in each group, float64 [rows, groups]."""


def _fit_scales(
    rms: NDArray[np.float64], blocks: Sequence[int]
) -> tuple[NDArray[np.float16], NDArray[np.float32], U8]:
    """Row scales, group scales and nearest codes for `rms` [rows, groups], the ideal scales.

    The logarithms are fitted by alternating medians: a row or group with a few odd members does
    not pull the others out of the range of the codes. Rows of zeros get scale 0.
    """
    rows, groups = rms.shape
    largest = rms.max(axis=1, initial=0.0)
    # Channels that a row does not use (padding, zeros) say nothing about its scale.
    floor = np.maximum(largest * 2.0**-12, np.finfo(np.float64).tiny)
    known = rms > floor[:, None]
    logs = np.where(known, np.log2(np.maximum(rms, floor[:, None])), np.nan)
    row = np.zeros(rows)
    group = np.zeros((len(blocks), groups))
    bounds = np.cumsum([0, *blocks])
    with np.errstate(all="ignore"):
        for _ in range(4):
            spread = np.repeat(group, blocks, axis=0)
            row = _median(logs - spread, axis=1)
            for b in range(len(blocks)):
                part = slice(bounds[b], bounds[b + 1])
                group[b] = _median(logs[part] - row[part, None], axis=0)
    # Groups above the largest factor would saturate; those of such a row that are too small for
    # the smallest lose less.
    top = np.log2(float(SCALE_STEPS[-1]))
    above = logs - row[:, None] - np.repeat(group, blocks, axis=0) - top
    row = row + np.maximum(np.nan_to_num(above, nan=-np.inf).max(axis=1, initial=0.0), 0.0)
    used = largest > 0
    centre = float(np.median(row[used])) if used.any() else 0.0
    row_scale = np.where(used, np.exp2(np.clip(row - centre, -24, 15.9)), 0.0).astype(np.float16)
    group_scale = np.exp2(group + centre).astype(np.float32)
    stored = np.log2(np.maximum(row_scale.astype(np.float64), 2.0**-26))
    rest = np.nan_to_num(logs, nan=-99.0) - stored[:, None]
    rest -= np.log2(np.repeat(group_scale.astype(np.float64), blocks, axis=0))
    steps = np.log2(SCALE_STEPS.astype(np.float64))
    codes = np.searchsorted(0.5 * (steps[1:] + steps[:-1]), rest).astype(np.uint8)
    return row_scale, group_scale, codes


def _median(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Median without the NaNs; 0 where there is nothing else."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nan_to_num(np.nanmedian(values, axis=axis))


def _rotated(read: Rows, start: int, stop: int) -> torch.Tensor:
    """Rows start .. stop, rotated: float32 [rows, groups, 64]."""
    import torch

    from pliant.codec.rotate import rotate

    part = read(start, stop)
    if not bool(torch.isfinite(part).all()):
        raise ValueError("a weight is not finite")
    part = torch.nn.functional.pad(part, (0, -part.shape[1] % GROUP))
    return rotate(part).reshape(stop - start, -1, GROUP)


def _pieces(start: int, stop: int, groups: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of about 2**20 weights: small enough for the second-level caches' shadow."""
    step = max(1, (1 << 20) // (groups * GROUP))
    for at in range(start, stop, step):
        yield at, min(at + step, stop)


def fit(read: Rows, columns: int, blocks: Sequence[int]) -> Scales:
    """Scales of a matrix.

    `read(start, stop)` gives rows in stored order as a float32 tensor [rows, columns]; `blocks`
    are the rows of each row block. Raises ValueError for a weight that is not finite.
    """
    rows, groups = sum(blocks), groups_of(columns)
    energy = np.empty((rows, groups), np.float64)
    for start, stop in _pieces(0, rows, groups):
        energy[start:stop] = _rotated(read, start, stop).square().sum(dim=2).numpy()
    row_scale, group_scale, nearest = _fit_scales(np.sqrt(energy / GROUP), blocks)
    return Scales(tuple(blocks), row_scale, group_scale, nearest, energy)


def encode_block(
    read: Rows, scales: Scales, block: int, upper: torch.Tensor | None = None
) -> EncodedBlock:
    """Leaf and scale codes of one row block, as stored; `read` as for `fit`.

    With `upper` (from `feedback.factor`) leaves make good for the errors of the columns before.

    The scale code of a group is, of the nearest and its two neighbours, the one with the least
    error at depth 4.
    """
    import torch

    first_row = sum(scales.blocks[:block])
    rows = scales.blocks[block]
    groups = scales.energy.shape[1]
    steps = torch.from_numpy(SCALE_STEPS.copy())
    thresholds = torch.from_numpy(THRESHOLDS.astype(np.float32))
    width = 1 << (MAX_DEPTH - _CODE_DEPTH)
    coarse = thresholds[width - 1 :: width].contiguous()
    table = torch.from_numpy(levels(_CODE_DEPTH).copy())
    finest = torch.from_numpy(levels(MAX_DEPTH).copy())
    leaves = np.zeros((padded_rows(rows), groups * GROUP), np.uint8)
    codes = np.zeros((padded_rows(rows), groups), np.uint8)
    outer = torch.from_numpy(scales.group_scale[block].copy())
    for start, stop in _pieces(first_row, first_row + rows, groups):
        values = _rotated(read, start, stop)
        base = torch.from_numpy(scales.row_scale[start:stop].astype(np.float32))[:, None] * outer
        inverse = torch.where(base > 0, 1 / base, torch.zeros(()))
        nearest = torch.from_numpy(scales.nearest[start:stop].astype(np.int64))
        chosen = nearest
        least = torch.full(base.shape, torch.inf)
        for shift in (0, -1, 1):
            trial = (nearest + shift).clamp(0, 15)
            scaled = values * (inverse / steps[trial])[..., None]
            index = torch.bucketize(scaled, coarse, out_int32=True)
            error = (table[index] - scaled).square().sum(dim=2) * steps[trial].square()
            better = error < least
            least = torch.where(better, error, least)
            chosen = torch.where(better, trial, chosen)
        if upper is None:
            scaled = values * (inverse / steps[chosen])[..., None]
            leaf = torch.bucketize(scaled, thresholds, out_int32=True)
        else:
            leaf = choose_leaves(values, base * steps[chosen], thresholds, finest, upper)
        at = slice(start - first_row, stop - first_row)
        leaves[at] = leaf.to(torch.uint8).reshape(stop - start, -1).numpy()
        codes[at] = chosen.to(torch.uint8).numpy()
    return EncodedBlock(rows, pack_codes(codes), pack_planes(leaves))


def decode_block(
    block: EncodedBlock,
    row_scale: NDArray[np.float16],
    group_scale: NDArray[np.float32],
    depths: Sequence[int],
) -> NDArray[np.float32]:
    """Weights of a row block with `depths[g]` plies of each group resident: the reference.

    `row_scale` has [rows], `group_scale` [groups]. Returns float32 [rows, 64 groups], stored order.
    """
    groups, rows = len(depths), block.rows
    leaves = unpack_planes(block.planes).reshape(-1, groups, GROUP)[:rows]
    scale = SCALE_STEPS[unpack_codes(block.codes, padded_rows(rows))[:rows]]
    scale = scale * row_scale.astype(np.float32)[:, None] * group_scale[None, :]
    index = leaves + (np.asarray(depths, np.int32) << MAX_DEPTH)[None, :, None]
    values = np.take(_leaf_levels(), index)
    values *= scale[..., None]
    return (values.reshape(-1, GROUP) @ hadamard()).reshape(rows, groups * GROUP)


@cache
def _leaf_levels() -> NDArray[np.float32]:
    """Level of each leaf at depth 0 .. 8, float32 [9 * 256]; 0 at depth 0."""
    table = np.zeros((MAX_DEPTH + 1, 1 << MAX_DEPTH), np.float32)
    for depth in range(1, MAX_DEPTH + 1):
        table[depth] = np.repeat(levels(depth), 1 << (MAX_DEPTH - depth))
    return table.ravel()
