"""The decoder in plain numpy, float64: no batches, no integers; of a cache only its precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["oracle_logits"]

Array = npt.NDArray[np.float64]


def _norm(x: Array, weight: npt.NDArray[Any], eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def oracle_logits(
    model: Mapping[str, Any],
    base: Mapping[str, npt.NDArray[Any]],
    matrix: Callable[[str], npt.NDArray[Any]],
    ids: list[int],
    coded: Callable[[Array, str], Array] = lambda x, name: x,
) -> Array:
    """Logits [tokens, vocab] of one sequence.

    `matrix(name)` gives the weights [rows, columns], `coded(x, name)` what is left of the inputs x
    [tokens, columns] of a matrix when they are coded.
    """
    heads, kv_heads, dim = model["heads"], model["kv_heads"], model["head_dim"]
    eps, count = model["norm_eps"], len(ids)
    weights: dict[str, Array] = {}

    def times(x: Array, name: str) -> Array:
        if name not in weights:
            weights[name] = matrix(name).astype(np.float64)
        y: Array = coded(x, name) @ weights[name].T
        return y + base[name + ".bias"] if name + ".bias" in base else y

    embed = matrix("embed").astype(np.float64)
    h = embed[ids] * model["embed_scale"]
    positions = np.arange(count)
    for layer in range(model["layers"]):
        at = f"layers.{layer}."
        x = _norm(h, base[at + "attn_norm"], eps)
        q = times(x, at + "q").reshape(count, heads, dim)
        k = times(x, at + "k").reshape(count, kv_heads, dim)
        v = times(x, at + "v").reshape(count, kv_heads, dim)
        if at + "q_norm" in base:
            q, k = _norm(q, base[at + "q_norm"], eps), _norm(k, base[at + "k_norm"], eps)
        rope = model["ropes"][model["layer_rope"][layer]]
        angle = positions[:, None, None] * np.array(rope["inv_freq"])
        cos, sin = np.cos(angle) * rope["scale"], np.sin(angle) * rope["scale"]

        def rotate(x: Array, cos: Array = cos, sin: Array = sin) -> Array:
            a, b = x[..., : dim // 2], x[..., dim // 2 :]
            return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

        q, k = rotate(q), rotate(k)
        k, v = (z.astype(np.float16).astype(np.float64) for z in (k, v))
        k, v = (np.repeat(z, heads // kv_heads, 1) for z in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * model["attn_scale"]
        if model["attn_softcap"]:
            scores = model["attn_softcap"] * np.tanh(scores / model["attn_softcap"])
        back = positions[:, None] - positions[None, :]
        seen = back >= 0
        if model["layer_window"][layer]:
            seen &= back < model["layer_window"][layer]
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        y = times(np.einsum("hqk,khd->qhd", p, v).reshape(count, heads * dim), at + "o")
        if at + "attn_post_norm" in base:
            y = _norm(y, base[at + "attn_post_norm"], eps)
        h = h + y
        x = _norm(h, base[at + "ffn_norm"], eps)
        gate = times(x, at + "gate")
        active = gate / (1 + np.exp(-gate)) if model["activation"] == "silu" else _gelu_tanh(gate)
        y = times(active * times(x, at + "up"), at + "down")
        if at + "ffn_post_norm" in base:
            y = _norm(y, base[at + "ffn_post_norm"], eps)
        h = h + y
    h = _norm(h, base["final_norm"], eps)
    head = "embed" if model["tied"] else "head"
    logits: Array = coded(h, head) @ matrix(head).astype(np.float64).T
    if model["logit_softcap"]:
        logits = model["logit_softcap"] * np.tanh(logits / model["logit_softcap"])
    return logits
