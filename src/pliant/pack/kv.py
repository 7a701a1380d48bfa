"""The ladder of the KV cache: how keys and values are turned, and which plies are worth keeping.

From the gradients that calibration takes anyway: g is the gradient of the log-likelihood of sampled
next tokens at a key (after its rotary embedding) or a value x, so noise e of a coded vector costs
about 1/2 sum((g e)^2) nats (the diagonal of the Fisher information). docs/kv.md has the formulas
and what each part of them brings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.codec import ladder as ladders
from pliant.codec.tree import MAX_DEPTH, THRESHOLDS, distortion

__all__ = ["KvCoding", "KvMoments", "make_kv", "moment_bytes"]

GROUP = 64  # channels that share a scale
HALF = 32  # channels of a unit
LEAST = 2  # plies that every unit has in the first rung
_PLY = HALF * 32 // 8  # bytes, for a page of 32 tokens
_RIDGE = 1e-4  # of the mean: what is added to moments before they are divided
_RUNGS_A_PLY = 6  # about: steps from one mean depth to the next

F64 = NDArray[np.float64]


def moment_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes that KvMoments takes."""
    return layers * 2 * kv_heads * (head_dim * (2 * head_dim + 4)) * 8


@dataclass(frozen=True)
class KvCoding:
    """What a pack says of its KV cache: tensors of the base, and the entry of the manifest."""

    tensors: dict[str, NDArray[Any]]
    manifest: dict[str, Any]


class _Head:
    """Sums over tokens for the keys, or the values, of one layer: float64, first axis the heads."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: list[torch.Tensor] = []

    def count(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """`x`, `g`: float32 [heads, tokens, channels]."""
        x, g2 = x.double(), g.double().square_()
        weight = g2.sum(dim=2)
        parts = [
            weight.sum(dim=1),  # [heads]
            torch.einsum("ht,htc->hc", weight, x),
            x.sum(dim=1),
            x.square().sum(dim=1),
            g2.sum(dim=1),
            torch.einsum("hta,htb->hab", x, g2),
            torch.einsum("hta,htb->hab", x.square(), g2),
        ]
        self.tokens += x.shape[1]
        if self.sums:
            for mine, part in zip(self.sums, parts, strict=True):
                mine += part
        else:
            self.sums = parts


class KvMoments:
    """Gathers what `make_kv` needs while a transformers decoder runs forward and backward."""

    def __init__(self) -> None:
        self.heads: dict[tuple[int, int], _Head] = {}
        """By layer and kind: 0 keys, 1 values."""

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Look at keys, values and their gradients inside."""
        from transformers import modeling_utils

        functions: Any = modeling_utils.ALL_ATTENTION_FUNCTIONS
        name = model.config._attn_implementation
        eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
        usual = functions.get_interface(name, eager)

        def attention(
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *a: Any,
            **k: Any,
        ) -> Any:
            for kind, x in enumerate((key, value)):
                if x.requires_grad:
                    head = self.heads.setdefault((module.layer_idx, kind), _Head())
                    seen, hook = x.detach()[0], cast("Any", x.register_hook)
                    hook(lambda g, head=head, seen=seen: head.count(seen, g[0]))
            return usual(module, query, key, value, *a, **k)

        functions[name] = attention
        try:
            yield
        finally:
            del functions[name]  # the usual one comes to light again


def make_kv(moments: KvMoments) -> KvCoding:
    """The coding of a model's KV cache: docs/format.md, sections 2.3 and 3."""
    layers = 1 + max(layer for layer, _ in moments.heads)
    _, channels = moments.heads[0, 0].sums[1].shape
    groups = -(-channels // GROUP)
    turns: list[tuple[F64, F64, NDArray[np.int64]]] = []
    costs: list[F64] = []
    for layer in range(layers):
        both = [
            [_turn(part, head, groups) for head in range(part.sums[0].shape[0])]
            for part in (moments.heads[layer, 0], moments.heads[layer, 1])
        ]
        for keys, values in zip(*both, strict=True):  # units go by head, then keys and values
            for mean, scale, order, cost in (keys, values):
                turns.append((mean, scale, order))
                costs.append(cost)
    ladder, rungs, quality = _ladder(np.concatenate(costs))
    shape = (layers, len(turns) // layers // 2, 2, channels)
    tensors: dict[str, NDArray[Any]] = {
        "kv.mean": np.stack([t[0] for t in turns]).reshape(shape).astype(np.float32),
        "kv.scale": np.stack([t[1] for t in turns]).reshape(shape).astype(np.float32),
        "kv.order": np.stack([t[2] for t in turns]).reshape(shape).astype(np.uint16),
        "kv.ladder": ladder,
        "kv.thresholds": THRESHOLDS.astype(np.float32),
    }
    return KvCoding(tensors, {"rungs": rungs, "quality": quality})


def _turn(part: _Head, head: int, groups: int) -> tuple[F64, F64, NDArray[np.int64], F64]:
    """Mean, scale, order [channels], and the cost of each unit left out, [2 groups]."""
    weight, weighted, x1, x2, g2, cross1, cross2 = (
        np.asarray(total[head].numpy(), np.float64) for total in part.sums
    )
    tokens = part.tokens
    # The mean weighted by the squared gradient: the first token draws most of the attention and
    # has keys and values of its own, which a plain mean would move away from zero.
    mean = weighted / weight if weight > 0 else np.zeros_like(weighted)
    spread = np.maximum(x2 - 2 * mean * x1 + tokens * mean**2, 0) / tokens
    fisher = g2 / tokens
    spread, fisher = (v + _RIDGE * v.mean() + 1e-30 for v in (spread, fisher))
    scale = (fisher / spread) ** 0.25
    order = np.argsort(-(fisher * spread), kind="stable")
    for first in range(0, len(order), HALF):
        block = order[first : first + HALF]
        scale[block] /= np.sqrt((spread[block] * scale[block] ** 2).sum() / HALF)
    scale = np.clip(scale, 1e-6, 1e6)
    # Sums over tokens of the squared centred channel a times the squared gradient of channel b.
    both = np.maximum(cross2 - 2 * mean[:, None] * cross1 + mean[:, None] ** 2 * g2, 0)
    both = both * scale[:, None] ** 2 / scale**2
    cost = np.zeros(2 * groups)
    for unit in range(2 * groups):
        first = unit // 2 * GROUP
        group, block = order[first : first + GROUP], order[unit * HALF : (unit + 1) * HALF]
        coded = HALF * (1 + (len(group) > HALF))  # values that the scale is made of
        cost[unit] = 0.5 * both[np.ix_(group, block)].sum() / coded / tokens
    return mean, scale, order, cost


def _ladder(costs: F64) -> tuple[NDArray[np.uint32], list[int], list[float]]:
    """Plies in order, how many each rung has, and the expected KL with each rung."""
    there = np.flatnonzero(costs > 0)
    if not len(there):
        there = np.arange(len(costs))
    first = np.repeat(there, LEAST)
    gains = costs[there, None] * ladders.benefits()[None, LEAST:]
    rest = there[ladders.greedy_order(gains, np.full(gains.shape, _PLY)).astype(np.int64)]
    # A rung is a multiple of 4096 bytes: so many plies.
    whole = 4096 // _PLY
    step = max(1, round(len(there) / _RUNGS_A_PLY / whole)) * whole
    rungs = [len(first)]
    while sum(rungs) < len(first) + len(rest):
        rungs.append(min(step, len(first) + len(rest) - sum(rungs)))
    ladder = np.concatenate([first, rest]).astype(np.uint32)
    # Inside a rung the order is free: what a head reads together lies together.
    ladder = np.concatenate([np.sort(part) for part in np.split(ladder, np.cumsum(rungs)[:-1])])
    table = np.array([distortion(depth) for depth in range(MAX_DEPTH + 1)])
    quality = []
    for end in np.cumsum(rungs).tolist():
        depth = np.bincount(ladder[:end].astype(np.int64), minlength=len(costs))
        quality.append(float((costs * table[depth]).sum()))
    return ladder, rungs, quality
