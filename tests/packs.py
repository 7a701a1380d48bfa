"""Random packs of small models, and a slow decoder that follows docs/format.md word for word.

For every test that needs a pack: no torch, no real model, the same bytes for the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pliant.codec.tree import LEVELS, SCALE_STEPS, THRESHOLDS
from pliant.pack.writer import write_pack
from pliant.store import Pack, UnitTable
from pliant.store.manifest import VERSION

__all__ = [
    "Reader",
    "gaussian_tree",
    "random_base",
    "random_ladder",
    "random_manifest",
    "random_plies",
    "slow_matrix",
    "write_random_pack",
]

Floats = npt.NDArray[np.float32]
# A matrix out of a pack: directory, name of the matrix, how many shards are there.
Reader = Callable[[str, str, int], Floats]
Base = dict[str, npt.NDArray[Any]]

INPUTS = {
    "q": "attn",
    "k": "attn",
    "v": "attn",
    "o": "o",
    "gate": "ffn",
    "up": "ffn",
    "down": "down",
}


def gaussian_tree() -> Floats:
    """The levels of the codec as the executor has them: up to depth 7 whole steps, then sums.

    With this tree it computes what the decoders of the tests give.
    """
    tree = np.array(LEVELS, np.float64)
    for n, steps in enumerate((63, 42, 62, 63, 127, 2032, 2032), 1):
        levels = tree[2**n - 2 : 2 ** (n + 1) - 2]
        step = np.abs(levels).max() / steps
        levels[:] = np.rint(levels / step) * step
    # At depth 8 each of plies 6 to 8 adds something in a block; in the last one levels are 127ths.
    unit = tree[-1] / 2032
    blocks = np.array(LEVELS[-128:], np.float64).reshape(16, 8) / unit
    bits = np.array([[i >> 2, i >> 1 & 1, i & 1] for i in range(8)])
    design = np.hstack([np.ones((8, 1)), bits])
    adds = np.rint(np.linalg.lstsq(design, blocks.T, rcond=None)[0].T[:, 1:]) @ bits.T
    sums = np.rint((blocks - adds).mean(1, keepdims=True)) + adds
    sums[-1] = np.rint(blocks[-1] / 16) * 16
    tree[-128:] = sums.ravel() * unit
    tree[-256:-128] = -tree[-128:][::-1]
    return tree.astype(np.float32)


def random_manifest(
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 160,
    tied: bool = True,
    coding: str | Mapping[str, str] = "plies",
    block_rows: int = 0,
    embed_block_rows: int = 64,
    tokens: Mapping[str, Any] | None = None,
    quality: Sequence[Mapping[str, Any]] = (),
    kv: bool = True,
    **model: Any,
) -> dict[str, Any]:
    """The manifest of a small model as plain values, without rungs, shards and files.

    `coding` is that of all matrices, or maps names of matrices to codings (the rest is in plies).
    `block_rows` cuts matrices into row blocks (0: one block), `embed_block_rows` those of embedding
    and head. `kv`: the pack says how to code a KV cache, if anything is in plies.
    Whatever else `model` has, such as `layer_window`, replaces the default.
    """
    described: dict[str, Any] = {
        "family": "llama",
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn": ffn,
        "vocab": vocab,
        "context": 512,
        "norm_eps": 1e-5,
        "activation": "silu",
        "tied": tied,
        "embed_scale": 1.0,
        "attn_scale": head_dim**-0.5,
        "attn_softcap": None,
        "logit_softcap": None,
        "ropes": [
            {"inv_freq": [1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)], "scale": 1.0}
        ],
        "layer_rope": [0] * layers,
        "layer_window": [0] * layers,
    }
    assert not model.keys() - described.keys(), "not a key of a model"
    described.update(model)
    queries, keys = heads * head_dim, kv_heads * head_dim
    shapes = {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn),
    }  # fmt: skip
    named = [("embed", (vocab, hidden), "embed")]
    if not tied:
        named.append(("head", (vocab, hidden), "head"))
    for layer in range(layers):
        for part, shape in shapes.items():
            named.append((f"layers.{layer}.{part}", shape, f"layers.{layer}.{INPUTS[part]}"))
    matrices = []
    for name, (rows, columns), source in named:
        chosen = coding if isinstance(coding, str) else coding.get(name, "plies")
        matrix: dict[str, Any] = {"name": name, "rows": rows, "columns": columns, "coding": chosen}
        if chosen == "plies":
            cut = block_rows if name.startswith("layers.") else embed_block_rows
            matrix |= {"input": source, "blocks": _blocks(rows, cut)}
        matrices.append(matrix)
    plies = any(matrix["coding"] == "plies" for matrix in matrices)
    return {
        "format": "pliant-pack",
        "version": VERSION,
        "writer": "tests",
        "source": {"name": "random", "origin": "tests/packs.py", "license": None},
        "model": described,
        "tokens": dict(tokens or {"bos": 0, "eos": [1], "add_bos": False}),
        "matrices": matrices,
        "quality": [dict(point) for point in quality],
        "calibration": {"text": "none", "tokens": 0, "sha256": "0" * 64},
        "kv": kv_manifest(described) if kv and plies else None,
    }


def kv_manifest(model: Mapping[str, Any]) -> dict[str, Any]:
    """One rung of two plies for each unit that has channels, then one for each ply more."""
    units = model["layers"] * model["kv_heads"] * 2 * -(-model["head_dim"] // 32)
    return {"rungs": [2 * units] + [units] * 6, "quality": [0.25**n for n in range(1, 8)]}


def kv_base(model: Mapping[str, Any], rng: np.random.Generator) -> Base:
    """Means, scales, orders and the ladder for `kv_manifest`."""
    shape = (model["layers"], model["kv_heads"], 2, model["head_dim"])
    orders = [rng.permutation(model["head_dim"]) for _ in range(int(np.prod(shape[:3])))]
    heads, halves = int(np.prod(shape[:3])), -(-model["head_dim"] // 64) * 2
    units = [
        head * halves + half for head in range(heads) for half in range(-(-model["head_dim"] // 32))
    ]
    return {
        "kv.mean": rng.normal(0, 0.1, shape).astype(np.float32),
        "kv.scale": rng.uniform(0.5, 2.0, shape).astype(np.float32),
        "kv.order": np.stack(orders).reshape(shape).astype(np.uint16),
        "kv.ladder": np.tile(np.array(units, np.uint32), 8),
        "kv.thresholds": THRESHOLDS.astype(np.float32),
    }


def _blocks(rows: int, cut: int) -> list[int]:
    if not cut:
        return [rows]
    return [min(cut, rows - first) for first in range(0, rows, cut)]


def random_base(
    manifest: Mapping[str, Any],
    seed: int = 0,
    *,
    post_norms: bool = False,
    qk_norms: bool = False,
    biases: bool = False,
    row_orders: bool = True,
) -> Base:
    """Base tensors without the ladder, of magnitudes that a trained model could have."""
    rng = np.random.default_rng([seed, 1])
    model = manifest["model"]

    def norm(length: int) -> Floats:
        return rng.uniform(0.5, 1.5, length).astype(np.float32)

    base: Base = {"final_norm": norm(model["hidden"])}
    for layer in range(model["layers"]):
        at = f"layers.{layer}."
        for part in ("attn", "ffn"):
            base[f"{at}{part}_norm"] = norm(model["hidden"])
            if post_norms:
                base[f"{at}{part}_post_norm"] = norm(model["hidden"])
        if qk_norms:
            base[at + "q_norm"], base[at + "k_norm"] = (
                norm(model["head_dim"]),
                norm(model["head_dim"]),
            )
    for matrix in manifest["matrices"]:
        name, rows, columns = matrix["name"], matrix["rows"], matrix["columns"]
        if biases and name.startswith("layers."):
            base[name + ".bias"] = rng.normal(0, 0.02, rows).astype(np.float32)
        if matrix["coding"] == "plies":
            base["order." + matrix["input"]] = rng.permutation(columns).astype(np.uint16)
            if row_orders and len(matrix["blocks"]) > 1 and name in ("embed", "head"):
                base[name + ".row_order"] = rng.permutation(rows).astype(np.uint32)
            scale = columns**-0.5
            base[name + ".row_scale"] = rng.uniform(0.5 * scale, 1.5 * scale, rows).astype(
                np.float16
            )
            shape = (len(matrix["blocks"]), -(-columns // 64))
            base[name + ".group_scale"] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            weight = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
            if matrix["coding"] == "bf16":
                weight = (weight.view(np.uint32) >> 16).astype(np.uint16)
            base[name + ".weight"] = weight
    if any(matrix["coding"] == "plies" for matrix in manifest["matrices"]):
        base["tree"] = gaussian_tree()
        base["scale_steps"] = np.array(SCALE_STEPS)
    if manifest["kv"] is not None:
        base |= kv_base(model, rng)
    return base


def random_ladder(
    manifest: Mapping[str, Any], seed: int = 0, *, least: int = 0, most: int = 8
) -> npt.NDArray[np.uint32]:
    """Every unit `least` to `most` times, in any order."""
    rng = np.random.default_rng([seed, 2])
    units = sum(
        len(matrix["blocks"]) * -(-matrix["columns"] // 64)
        for matrix in manifest["matrices"]
        if matrix["coding"] == "plies"
    )
    counts = rng.integers(least, most + 1, units)
    return rng.permutation(np.repeat(np.arange(units, dtype=np.uint32), counts))


def random_plies(
    manifest: Mapping[str, Any], seed: int = 0, plane_byte: int | None = None
) -> Callable[[int, int], npt.NDArray[np.uint8]]:
    """The bytes of any ply: random planes and scale codes, zeros where zeros must be.

    All bytes of all planes are `plane_byte`, if that is given.
    """
    rows = [
        -(-count // 32) * 32
        for matrix in manifest["matrices"]
        if matrix["coding"] == "plies"
        for count in matrix["blocks"]
        for _ in range(-(-matrix["columns"] // 64))
    ]

    def ply_bytes(unit: int, bit: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng([seed, 3, unit, bit])
        plane: npt.NDArray[np.uint8] = rng.integers(0, 256, rows[unit] * 8, dtype=np.uint8)
        if plane_byte is not None:
            plane[:] = plane_byte
        if bit > 1:
            return plane
        codes = rng.integers(0, 256, rows[unit] // 2, dtype=np.uint8)
        return np.concatenate((codes, np.zeros(-len(codes) % 64, np.uint8), plane))

    return ply_bytes


def write_random_pack(
    path: Path,
    *,
    seed: int = 0,
    least: int = 0,
    most: int = 8,
    post_norms: bool = False,
    qk_norms: bool = False,
    biases: bool = False,
    row_orders: bool = True,
    tree: Floats | None = None,
    plane_byte: int | None = None,
    rung_bytes: int | None = 8192,
    shard_bytes: int | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
    **manifest: Any,
) -> Path:
    """Write a pack with random weights and return its path.

    `manifest` goes to random_manifest; `least` and `most` are the plies of a unit; `tree` is used
    instead of gaussian_tree(), `plane_byte` instead of random bits; `extra_files` replaces the
    content of the files beside it, of which `tokenizer.bin` is a placeholder.
    """
    described = random_manifest(**manifest)
    base = random_base(
        described, seed,
        post_norms=post_norms, qk_norms=qk_norms, biases=biases, row_orders=row_orders,
    )  # fmt: skip
    if tree is not None:
        base["tree"] = tree
    write_pack(
        path,
        manifest=described,
        base=base,
        ladder=random_ladder(described, seed, least=least, most=most),
        ply_bytes=random_plies(described, seed, plane_byte),
        extra_files={"tokenizer.bin": b"placeholder", **(extra_files or {})},
        rung_bytes=rung_bytes,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    return path


def slow_matrix(path: Path, name: str, rungs: int | None = None) -> Floats:
    """A matrix of the source model, decoded with the first `rungs` rungs, all if None.

    Bit by bit as docs/format.md section 4 says it, and so slow; float64 inside.
    """
    pack = Pack.open(path)
    matrix = next(m for m in pack.manifest.matrices if m.name == name)
    if matrix.coding == "f32":
        return np.array(pack.base[name + ".weight"])
    if matrix.coding == "bf16":
        return (pack.base[name + ".weight"].astype(np.uint32) << 16).view(np.float32)
    planes: dict[int, list[bytes]] = {}
    codes: dict[int, bytes] = {}
    units = UnitTable(pack.manifest.matrices)
    position = 0
    for rung in range(len(pack.manifest.rungs) if rungs is None else rungs):
        data, offset = pack.read_rung(rung), 0
        for unit in pack.ladder[position : position + pack.manifest.rungs.plies[rung]].tolist():
            padded = -(-units.locate(unit).rows // 32) * 32
            if unit not in planes:
                planes[unit], codes[unit] = [], data[offset : offset + padded // 2]
                offset += -(-(padded // 2) // 64) * 64
            planes[unit].append(data[offset : offset + padded * 8])
            offset += padded * 8
        position += int(pack.manifest.rungs.plies[rung])
    hadamard = np.ones((1, 1))
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    stored = np.zeros((matrix.rows, matrix.groups * 64))
    for unit, bits in planes.items():
        place = units.locate(unit)
        if place.matrix.name != name:
            continue
        index = np.zeros((-(-place.rows // 32) * 32, 64), np.int64)
        for plane in bits:
            for at, byte in enumerate(plane):
                tile, rest = divmod(at, 128)
                half, low = divmod(rest, 64)
                for bit in range(8):
                    row, column = 16 * tile + low // 4, 32 * half + 4 * bit + low % 4
                    index[row, column] = 2 * index[row, column] + (byte >> bit & 1)
        levels = pack.base["tree"][2 ** len(bits) - 2 : 2 ** (len(bits) + 1) - 2]
        for row in range(place.rows):
            block, within = divmod(row, 32)
            code = codes[unit][16 * block + within % 16] >> (4 * (within // 16)) & 15
            scale = (
                float(pack.base[name + ".row_scale"][place.first_row + row])
                * float(pack.base[name + ".group_scale"][place.block, place.group])
                * float(pack.base["scale_steps"][code])
            )
            values = levels[index[row]].astype(np.float64) * scale
            columns = slice(64 * place.group, 64 * place.group + 64)
            stored[place.first_row + row, columns] = hadamard @ values / 8
    weight = np.empty((matrix.rows, matrix.columns), np.float32)
    row_order = pack.base.get(name + ".row_order", np.arange(matrix.rows)).astype(np.int64)
    order = pack.base[f"order.{matrix.input}"].astype(np.int64)
    weight[np.ix_(row_order, order)] = stored[:, : matrix.columns]
    return weight
