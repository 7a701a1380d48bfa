"""Second moments of the inputs of all matrices, for error feedback (codec/feedback.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pliant.pack.calibrate import Windows, linear_modules

__all__ = ["gather_moments", "moment_bytes"]

# One matrix stands for all that read the same input.
_READERS = {"q": "attn", "o": "o", "gate": "ffn", "down": "down"}


def moment_bytes(widths: list[int], layers: int) -> int:
    """Bytes of the moments of inputs of these widths in each layer."""
    return 4 * layers * sum(width * width for width in widths)


@torch.no_grad()
def gather_moments(
    model: Any, windows: Windows, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ for each input of a transformers decoder, float32 [width, width].

    By the names of channel orders: `layers.i.attn`, `.o`, `.ffn`, `.down`, and `head`.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = sum(map(len, windows))

    def count(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        if name not in sums:
            sums[name] = torch.zeros(x.shape[-1], x.shape[-1])
        sums[name].addmm_(flat.T, flat, alpha=1 / tokens)

    handles = []
    for name, module in linear_modules(model).items():
        layer, part = name.rsplit(".", 1)
        if part in _READERS:
            key = f"{layer}.{_READERS[part]}"
            handles.append(
                module.register_forward_pre_hook(lambda _, given, key=key: count(key, given[0]))
            )
    try:
        for done, window in enumerate(windows):
            count("head", model.model(torch.tensor([window]), use_cache=False)[0])
            if progress is not None:
                progress(done + 1, len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return sums
