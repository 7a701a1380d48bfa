"""The codec: the Gaussian tree, the rotation, plies and back, importance, the ladder."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pliant.codec import feedback, importance, ladder, plies
from pliant.codec.rotate import hadamard, rotate
from pliant.codec.tree import (
    LEVELS,
    MAX_DEPTH,
    SCALE_STEPS,
    THRESHOLDS,
    distortion,
    levels,
)

Floats = NDArray[np.float64]

# dB, of a unit Gaussian: the depths up to 4 are those of Lloyd and Max and their merges.
TABLE = (0.0, -4.396, -9.198, -14.578, -20.222, -25.980, -31.807, -37.682, -43.591)


def decibels(value: float) -> float:
    return 10 * math.log10(value)


def encode(
    weight: torch.Tensor, blocks: list[int], upper: torch.Tensor | None = None
) -> tuple[plies.Scales, list[plies.EncodedBlock]]:
    """A matrix whose rows and columns are in stored order already."""

    def read(start: int, stop: int) -> torch.Tensor:
        return weight[start:stop].clone()

    scales = plies.fit(read, weight.shape[1], blocks)
    coded = [plies.encode_block(read, scales, block, upper) for block in range(len(blocks))]
    return scales, coded


def decode(scales: plies.Scales, coded: list[plies.EncodedBlock], depth: int) -> Floats:
    parts, start = [], 0
    for index, block in enumerate(coded):
        rows = scales.row_scale[start : start + block.rows]
        depths = [depth] * scales.group_scale.shape[1]
        parts.append(plies.decode_block(block, rows, scales.group_scale[index], depths))
        start += block.rows
    return np.concatenate(parts).astype(np.float64)


def slow_row(
    block: plies.EncodedBlock, group: int, row: int, depth: int, outer: float
) -> list[float]:
    """One row of a unit, bit by bit as docs/format.md section 4 puts it, on the bytes of plies."""
    padded = -(-block.rows // 32) * 32
    code_bytes = -(-(padded // 2) // 64) * 64
    record = bytes(block.records()[group])
    assert plies.ply_bytes(block.rows, 1) == code_bytes + padded * 8
    assert plies.ply_bytes(block.rows, 8) == padded * 8
    assert len(record) == code_bytes + 8 * padded * 8
    planes = [record[code_bytes + ply * padded * 8 :] for ply in range(depth)]
    byte = record[16 * (row // 32) + row % 16]
    scale = float(SCALE_STEPS[byte & 15 if row % 32 < 16 else byte >> 4]) * outer
    values = []
    for column in range(64):
        half, j, m = column // 32, column % 32 // 4, column % 4
        index = 0
        for plane in planes:
            place = (row // 16 * 2 + half) * 64 + row % 16 * 4 + m
            index = 2 * index + (plane[place] >> j & 1)
        values.append(float(LEVELS[2**depth - 2 + index]) * scale if depth else 0.0)
    return [
        sum(v * (-1) ** bin(i & j).count("1") for j, v in enumerate(values)) / 8 for i in range(64)
    ]


# --- the tree


def test_distortions_are_those_stated() -> None:
    for depth, stated in enumerate(TABLE):
        assert decibels(distortion(depth)) == pytest.approx(stated, abs=0.001)
    for depth in (-1, 9):
        with pytest.raises(ValueError, match="depth"):
            distortion(depth)
    for depth in (0, 9):
        with pytest.raises(ValueError, match="depth"):
            levels(depth)


def test_distortions_are_the_integrals_over_the_tables() -> None:
    x = (np.arange(-(9 << 16), 9 << 16) + 0.5) / (1 << 16)
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) / (1 << 16)
    leaf = np.searchsorted(THRESHOLDS, x)
    for depth in range(1, MAX_DEPTH + 1):
        error = levels(depth).astype(np.float64)[leaf >> (MAX_DEPTH - depth)] - x
        assert float((error**2 * density).sum()) == pytest.approx(distortion(depth), rel=1e-3)
        # Centres of mass: within a cell the errors cancel.
        cells = np.bincount(leaf >> (MAX_DEPTH - depth), weights=error * density)
        assert np.abs(cells).max() < 1e-6


def test_the_tree_is_nested_symmetric_and_lloyd_max_at_four_bits() -> None:
    assert THRESHOLDS.dtype == np.float64
    assert THRESHOLDS.shape == (255,)
    assert (np.diff(THRESHOLDS) > 0).all()
    np.testing.assert_allclose(THRESHOLDS, -THRESHOLDS[::-1], atol=1e-12)
    assert LEVELS.dtype == np.float32
    assert LEVELS.shape == (510,)
    for depth in range(1, MAX_DEPTH + 1):
        own = levels(depth).astype(np.float64)
        assert len(own) == 2**depth
        assert (np.diff(own) > 0).all()
        edges = THRESHOLDS[(1 << (8 - depth)) - 1 :: 1 << (8 - depth)]
        assert (own[:-1] < edges).all()
        assert (edges < own[1:]).all()
        if depth == 4:
            np.testing.assert_allclose(edges, 0.5 * (own[1:] + own[:-1]), atol=1e-6)
    assert (np.diff(ladder.benefits()) < 0).all()
    assert ladder.benefits().sum() == pytest.approx(1 - distortion(8))


# --- the rotation


def test_the_rotation_undoes_itself() -> None:
    matrix = hadamard()
    for i, j in ((0, 0), (1, 1), (5, 3), (63, 63), (62, 1)):
        assert matrix[i, j] == (-1) ** bin(i & j).count("1") / 8
    np.testing.assert_array_equal(matrix, matrix.T)
    values = torch.randn(7, 3, 192, generator=torch.Generator().manual_seed(1))
    twice = rotate(rotate(values))
    torch.testing.assert_close(twice, values, rtol=0, atol=2e-6)
    torch.testing.assert_close(rotate(values).norm(), values.norm())
    with pytest.raises(ValueError, match="multiple of 64"):
        rotate(torch.zeros(2, 65))


# --- plies


@settings(max_examples=12, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 3), max_size=2).map(lambda b: [32 * n for n in b]),
    last=st.integers(1, 70),
    columns=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_every_prefix_decodes_as_specified(
    blocks: list[int], last: int, columns: int, seed: int
) -> None:
    """Against a decoder that reads single bits; odd rows and columns make padding."""
    random = torch.Generator().manual_seed(seed)
    cuts = [*blocks, last]
    weight = torch.randn(sum(cuts), columns, generator=random)
    weight *= torch.exp(torch.randn(len(weight), 1, generator=random))
    scales, coded = encode(weight, cuts)
    groups = -(-columns // 64)
    assert scales.row_scale.dtype == np.float16
    assert scales.group_scale.shape == (len(cuts), groups)
    picks = np.random.default_rng(seed)
    for depth in range(MAX_DEPTH + 1):
        decoded = decode(scales, coded, depth)
        assert decoded.shape == (len(weight), 64 * groups)
        for _ in range(4):
            index = int(picks.integers(len(cuts)))
            row, group = int(picks.integers(cuts[index])), int(picks.integers(groups))
            at = sum(cuts[:index]) + row
            outer = float(scales.row_scale[at]) * float(scales.group_scale[index, group])
            slow = slow_row(coded[index], group, row, depth, outer)
            fast = decoded[at, 64 * group : 64 * group + 64]
            np.testing.assert_allclose(fast, slow, atol=1e-5 * (1e-9 + np.abs(slow).max()))


@given(tiles=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 999))
def test_packing_of_planes_and_codes_is_undone(tiles: int, groups: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = 32 * tiles
    leaves = random.integers(0, 256, (rows, 64 * groups), np.uint8)
    planes = plies.pack_planes(leaves)
    assert planes.shape == (groups, 8, rows * 8)
    np.testing.assert_array_equal(plies.unpack_planes(planes), leaves)
    kept = int(random.integers(1, 9))
    prefix = leaves >> (8 - kept) << (8 - kept)
    np.testing.assert_array_equal(plies.unpack_planes(planes[:, :kept]), prefix)
    codes = random.integers(0, 16, (rows, groups), np.uint8)
    packed = plies.pack_codes(codes)
    assert packed.shape == (groups, -(-rows // 128) * 64)
    assert not packed[:, rows // 2 :].any()
    np.testing.assert_array_equal(plies.unpack_codes(packed, rows), codes)
    block = plies.EncodedBlock(rows - 1, packed, planes)
    again = plies.EncodedBlock.from_records(rows - 1, block.records())
    np.testing.assert_array_equal(again.codes, packed)
    np.testing.assert_array_equal(again.planes, planes)


def test_gaussian_weights_lose_what_the_table_says() -> None:
    """Scales, codes and all; rows and groups of very different size."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(1024, 640, generator=random)
    weight *= torch.exp(0.7 * torch.randn(1024, 1, generator=random))
    weight *= torch.exp(0.5 * torch.randn(10, generator=random)).repeat_interleave(64)
    scales, coded = encode(weight, [512, 512])
    exact = weight.numpy().astype(np.float64)
    for depth, stated in enumerate(TABLE):
        error = ((decode(scales, coded, depth) - exact) ** 2).reshape(1024, 10, 64).sum(axis=2)
        relative = float((error / (exact**2).reshape(1024, 10, 64).sum(axis=2)).mean())
        assert decibels(relative) < stated + 0.05, depth


def test_a_group_far_out_of_the_range_of_its_row_is_not_cut_off() -> None:
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 512, generator=random)
    weight[5, 64:128] *= 9
    weight[6, 64:128] *= 60
    weight[7, 3] = 400.0
    scales, coded = encode(weight, [64])
    exact = weight.numpy().astype(np.float64)
    error = ((decode(scales, coded, 8) - exact) ** 2).sum(axis=1) / (exact**2).sum(axis=1)
    assert decibels(float(error.max())) < -35


def test_rows_of_zeros_and_weights_that_are_no_numbers() -> None:
    weight = torch.zeros(40, 100)
    scales, coded = encode(weight, [32, 8])
    for depth in (0, 1, 8):
        assert not decode(scales, coded, depth).any()
    weight[3] = torch.randn(100, generator=torch.Generator().manual_seed(0))
    scales, coded = encode(weight, [32, 8])
    decoded = decode(scales, coded, 8)
    assert not np.delete(decoded, 3, axis=0).any()
    np.testing.assert_allclose(decoded[3, :100], weight[3].numpy(), atol=0.06)
    for bad in (math.nan, math.inf):
        weight[1, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            encode(weight, [32, 8])
    tiny = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * 1e-12
    scales, coded = encode(tiny, [32])
    ratio = np.abs(decode(scales, coded, 8) - tiny.numpy()).max() / float(tiny.abs().max())
    assert ratio < 0.05


def test_error_feedback_helps_all_plies_and_leaves_prefixes() -> None:
    random = torch.Generator().manual_seed(5)
    inputs = torch.randn(2000, 192, generator=random)
    inputs[:, 7] = 30 + inputs[:, 7]  # one large, nearly constant channel
    inputs[:, 64:] += inputs[:, :128] * 0.8
    moments = inputs.T @ inputs / len(inputs)
    weight = torch.randn(256, 192, generator=random)
    upper = feedback.factor(moments, torch.arange(192))
    plain, shaped = encode(weight, [256]), encode(weight, [256], upper)

    def output_error(coded: tuple[plies.Scales, list[plies.EncodedBlock]], depth: int) -> float:
        error = torch.from_numpy(decode(*coded, depth)).float() - weight
        return float((inputs @ error.T).square().mean())

    assert output_error(shaped, 8) < 0.5 * output_error(plain, 8)
    for depth in (1, 2, 3, 4):
        ratio = output_error(shaped, depth) / output_error(plain, depth)
        assert abs(decibels(ratio)) < 0.7, depth


# --- importance


def test_channels_are_put_in_order_of_what_an_error_in_them_costs() -> None:
    one, two = np.array([1.0, 5.0, 2.0, 2.0]), np.array([3.0, 0.0, 0.0, 3.5])
    assert importance.channel_order([one, two]).tolist() == [3, 1, 0, 2]


@settings(max_examples=30)
@given(rows=st.integers(1, 3000), blocks=st.integers(1, 9), seed=st.integers(0, 99))
def test_row_blocks_add_up(rows: int, blocks: int, seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).lognormal(0, 2, rows))[::-1]
    cuts = importance.row_blocks(values, blocks)
    assert sum(cuts) == rows
    assert 1 <= len(cuts) <= blocks
    assert all(cut % 32 == 0 for cut in cuts[:-1])
    assert min(cuts) >= min(rows, 97)


def test_row_blocks_are_the_best_cuts() -> None:
    values = np.concatenate([np.full(192, 100.0), np.full(512, 3.0), np.full(256, 0.1)])
    assert importance.row_blocks(values, 3) == [192, 512, 256]
    random = np.sort(np.random.default_rng(1).lognormal(0, 2, 32 * 20))[::-1]

    def cost(cuts: tuple[int, ...]) -> float:
        parts = np.split(random, [32 * c for c in cuts])
        return sum(len(p) * math.log(p.mean()) for p in parts)

    choices = [
        c for c in itertools.combinations(range(4, 17), 2) if c[1] - c[0] >= 4 and c[1] <= 16
    ]
    best = min(choices, key=cost)
    found = importance.row_blocks(random, 3)
    assert found == [32 * best[0], 32 * (best[1] - best[0]), 32 * (20 - best[1])]


def test_costs_of_units_are_those_of_white_errors() -> None:
    """An error of the size of the unit, spread by the rotation, times the Fisher information."""
    random = np.random.default_rng(2)
    rows, columns, cuts = 96, 130, [64, 32]
    weight = np.zeros((rows, 192))
    weight[:, :columns] = random.standard_normal((rows, columns))
    fisher_rows, share = random.random(rows), random.random(columns)
    fisher_columns = share / share.sum() * fisher_rows.sum()
    energy = (weight**2).reshape(rows, 3, 64).sum(axis=2)
    found = importance.unit_costs(energy, fisher_rows, fisher_columns, cuts)
    fisher = np.zeros((rows, 192))
    fisher[:, :columns] = np.outer(fisher_rows, fisher_columns) / fisher_rows.sum()
    for block, part in enumerate((slice(0, 64), slice(64, 96))):
        for group in range(3):
            at = slice(64 * group, 64 * group + 64)
            variance = energy[part, group, None] / 64
            expected = 0.5 * float((fisher[part, at] * variance).sum())
            assert found[block, group] == pytest.approx(expected)


# --- the ladder


def test_the_ladder_is_in_order_and_counts_its_bytes() -> None:
    random = np.random.default_rng(0)
    gains = random.lognormal(0, 3, (50, 1)) * ladder.benefits()[None]
    sizes = np.repeat(random.integers(1, 9, (50, 1)) * 256, 8, axis=1)
    sizes[:, 0] += 64
    order = ladder.greedy_order(gains, sizes)
    assert order.dtype == np.uint32
    assert (np.bincount(order, minlength=50) == 8).all()
    total = ladder.prefix_bytes(order, sizes)
    assert total[0] == 0
    assert total[-1] == sizes.sum()
    seen = np.zeros(50, int)
    rates = []
    for place, unit in enumerate(order):
        ply = seen[unit]
        assert total[place + 1] - total[place] == sizes[unit, ply]
        rates.append(gains[unit, ply] / sizes[unit, ply])
        seen[unit] += 1
        if place in (0, 17, 200):
            np.testing.assert_array_equal(ladder.depths_at(order, 50, place + 1), seen)
    assert (np.diff(rates) <= 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), units=st.integers(1, 3))
def test_the_greedy_ladder_is_optimal(seed: int, units: int) -> None:
    """No choice of depths with at most the bytes of a prefix loses less (convex distortion)."""
    random = np.random.default_rng(seed)
    gains = -np.sort(-random.random((units, 4)), axis=1) * random.lognormal(0, 1, (units, 1))
    sizes = np.repeat(random.integers(1, 5, (units, 1)), 4, axis=1)
    order = ladder.greedy_order(gains, sizes)
    total = ladder.prefix_bytes(order, sizes)
    gained = np.concatenate([np.zeros((units, 1)), np.cumsum(gains, axis=1)], axis=1)
    choices = [
        (
            sum(int(sizes[u, :d].sum()) for u, d in enumerate(depths)),
            sum(float(gained[u, d]) for u, d in enumerate(depths)),
        )
        for depths in itertools.product(range(5), repeat=units)
    ]
    for place in range(len(order) + 1):
        depths = ladder.depths_at(order, units, place)
        own = sum(float(gained[u, d]) for u, d in enumerate(depths))
        assert own >= max(g for size, g in choices if size <= total[place]) - 1e-9


def test_a_ply_that_earns_nothing_alone_comes_with_the_next() -> None:
    """Where the distortion is not convex, the run of plies is worth its mean."""
    gains = np.array([[0.1, 3.0], [1.2, 0.2]])
    sizes = np.ones((2, 2), np.int64)
    assert ladder.greedy_order(gains, sizes).tolist() == [0, 0, 1, 1]


def test_the_codec_imports_no_torch() -> None:
    names = ["feedback", "importance", "ladder", "plies", "rotate", "tree"]
    lines = [f"import pliant.codec.{name}" for name in names]
    code = "\n".join([*lines, "import sys", "assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", code], check=True)
