"""What `base.safetensors` must contain: docs/format.md section 3 in code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pliant.errors import FormatError
from pliant.store.manifest import KvLadder, Manifest, MatrixSpec, kv_units
from pliant.store.model import ModelSpec
from pliant.store.safetensors import TensorInfo
from pliant.store.strict import show

__all__ = ["BaseTensor", "base_tensors", "check_infos", "check_kv_ladder", "check_values"]

TREE_VALUES = 2**9 - 2  # levels of depths 1 to 8
TREE_THRESHOLDS = 255
MOST_STEP = 2.0**64  # kernels multiply steps by 2^23
LEAST_TURN, MOST_TURN = 1e-12, 1e12  # scales of channels of keys and values
SCALE_STEPS = 16
_CHUNK = 2**18  # values of an order that are looked at together

Array = npt.NDArray[Any]


class BaseTensor(NamedTuple):
    """A tensor that may stand in base.safetensors; `check` is how its values are looked at."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    required: bool
    check: str


def base_tensors(
    model: ModelSpec, matrices: tuple[MatrixSpec, ...], plies: int, kv: KvLadder | None
) -> Iterator[BaseTensor]:
    """All tensors that base.safetensors of this model may have, optional ones included.

    `plies` is the length of the ladder.
    """

    def vector(name: str, length: int, required: bool) -> BaseTensor:
        return BaseTensor(name, "F32", (length,), required, "finite")

    yield vector("final_norm", model.hidden, True)
    for layer in range(model.layers):
        at = f"layers.{layer}."
        for part in ("attn", "ffn"):
            yield vector(f"{at}{part}_norm", model.hidden, True)
            yield vector(f"{at}{part}_post_norm", model.hidden, False)
        for part in ("q", "k"):
            yield vector(f"{at}{part}_norm", model.head_dim, False)
    orders: dict[str, int] = {}
    for matrix in matrices:
        name, rows = matrix.name, matrix.rows
        if name.startswith("layers."):
            yield vector(f"{name}.bias", rows, False)
        if matrix.coding == "plies":
            if name in ("embed", "head"):
                yield BaseTensor(f"{name}.row_order", "U32", (rows,), False, "order")
            yield BaseTensor(f"{name}.row_scale", "F16", (rows,), True, "scale")
            shape = (len(matrix.blocks), matrix.groups)
            yield BaseTensor(f"{name}.group_scale", "F32", shape, True, "scale")
            orders[matrix.input or ""] = matrix.columns
        else:
            dtype = "F32" if matrix.coding == "f32" else "BF16"
            yield BaseTensor(f"{name}.weight", dtype, (rows, matrix.columns), True, "finite")
    for source, columns in orders.items():
        yield BaseTensor(f"order.{source}", "U16", (columns,), True, "order")
    if orders:
        yield BaseTensor("tree", "F32", (TREE_VALUES,), True, "tree")
        yield BaseTensor("scale_steps", "F32", (SCALE_STEPS,), True, "steps")
        yield BaseTensor("ladder", "U32", (plies,), True, "ladder")
    if kv is not None:
        channels = (model.layers, model.kv_heads, 2, model.head_dim)
        yield BaseTensor("kv.mean", "F32", channels, True, "finite")
        yield BaseTensor("kv.scale", "F32", channels, True, "turns")
        yield BaseTensor("kv.order", "U16", channels, True, "orders")
        yield BaseTensor("kv.ladder", "U32", (sum(kv.rungs),), True, "ladder")
        yield BaseTensor("kv.thresholds", "F32", (TREE_THRESHOLDS,), True, "thresholds")


def check_infos(
    manifest: Manifest, tensors: Mapping[str, TensorInfo], where: str
) -> dict[str, str]:
    """Check names, dtypes and shapes against the manifest, from the header alone.

    Returns for each name how `check_values` has to look at it. Raises FormatError.
    """
    checks: dict[str, str] = {}
    plies = sum(manifest.rungs.plies.tolist())
    for wanted in base_tensors(manifest.model, manifest.matrices, plies, manifest.kv):
        info = tensors.get(wanted.name)
        if info is None:
            if wanted.required:
                raise FormatError(f"{where}: the tensor {wanted.name} is missing")
            continue
        if (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
            raise FormatError(
                f"{where}: {wanted.name} is {info.dtype} {show_shape(info.shape)}, and must be "
                f"{wanted.dtype} {show_shape(wanted.shape)}"
            )
        checks[wanted.name] = wanted.check
    if len(checks) != len(tensors):
        stray = next(name for name in tensors if name not in checks)
        raise FormatError(f"{where}: a tensor {show(stray)} is not expected")
    layers = manifest.model.layers
    for part in ("attn_post_norm", "ffn_post_norm"):
        count = sum(f"layers.{layer}.{part}" in tensors for layer in range(layers))
        if count not in (0, layers):
            raise FormatError(
                f"{where}: {part} is there in {count} of {layers} layers: it must be in all or none"
            )
    return checks


def show_shape(shape: tuple[int, ...]) -> str:
    """A shape as it stands in messages."""
    return show(tuple(shape)).replace("(", "[").replace(",)", "]").replace(")", "]")


def check_values(array: Array, check: str, where: str) -> None:
    """Check the values of one tensor; `check` is what `check_infos` gave. Raises FormatError.

    Takes no memory to speak of beyond the array.
    """
    if check == "order":
        _check_permutation(array, where)
    elif check == "orders":
        for index, row in enumerate(array.reshape(-1, array.shape[-1])):
            _check_permutation(row, f"{where}, row {index}")
    elif check != "ladder":
        if not _finite(array):
            raise FormatError(f"{where}: NaN or infinity")
        if check == "scale" and array.size and array.min() < 0:
            raise FormatError(f"{where}: a scale of {array.min():g} is negative")
        if check == "steps" and not array.min() > 0:
            raise FormatError(f"{where}: a step of {array.min():g}, and all must be above 0")
        if check == "steps" and array.max() > MOST_STEP:
            raise FormatError(
                f"{where}: a step of {array.max():g}, and none may be above {MOST_STEP:g}"
            )
        if check == "turns" and not (array.min() >= LEAST_TURN and array.max() <= MOST_TURN):
            raise FormatError(
                f"{where}: scales from {array.min():g} to {array.max():g}, and they must be from "
                f"{LEAST_TURN:g} to {MOST_TURN:g}"
            )
        if check == "thresholds" and not (array[1:] > array[:-1]).all():
            raise FormatError(f"{where} do not rise")
        if check == "tree":
            for depth in range(1, 9):
                levels = array[2**depth - 2 : 2 ** (depth + 1) - 2]
                if not (levels[1:] > levels[:-1]).all():
                    raise FormatError(f"{where}: the levels of depth {depth} do not rise")
                if not np.array_equal(levels, -levels[::-1]):
                    raise FormatError(f"{where}: the levels of depth {depth} are not symmetric")


def check_kv_ladder(ladder: npt.NDArray[np.uint32], model: ModelSpec, where: str) -> None:
    """Check that units exist and have at most 8 plies. Raises FormatError."""
    units = kv_units(model)
    if int(ladder.max()) >= units:
        raise FormatError(f"{where} names unit {ladder.max()}, and there are {units}")
    counts = np.bincount(ladder, minlength=units)
    if int(counts.max()) > 8:
        raise FormatError(
            f"{where} has {counts.max()} plies of unit {counts.argmax()}, and 8 is most"
        )


def _finite(array: Array) -> bool:
    """Whether a float array, or bfloat16 as uint16, has neither NaN nor infinity."""
    if not array.size:
        return True
    if array.dtype.itemsize == 2:
        # As bits: all-ones exponents are the highest numbers of either sign.
        infinity = 0x7C00 if array.dtype.kind == "f" else 0x7F80
        highest_negative = int(array.view("<u2").max())
        return highest_negative < infinity + 0x8000 and int(array.view("<i2").max()) < infinity
    return bool(np.isfinite(array.max()) and np.isfinite(array.min()))


def _check_permutation(order: Array, where: str) -> None:
    highest = int(order.max())
    if highest >= len(order):
        raise FormatError(f"{where} names {highest}, and there are {len(order)}")
    seen = np.zeros(len(order), np.bool_)
    for start in range(0, len(order), _CHUNK):
        seen[order[start : start + _CHUNK]] = True
    if not seen.all():
        raise FormatError(f"{where} is no permutation: {int(seen.argmin())} is missing")
