"""The quality curve of a pack: KL divergence to the source at some prefixes of its ladder."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.codec import ladder as ladders
from pliant.pack.calibrate import Windows, linear_modules, logits_chunks
from pliant.pack.coded import CodedModel

__all__ = ["measure_quality"]

_DECODERS = 2  # each has the work of one row block
_BITS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)  # of 8: shares of all plies


@torch.no_grad()
def measure_quality(
    model: Any,
    coded: CodedModel,
    ladder: NDArray[np.uint32],
    sizes: NDArray[np.int64],
    windows: Windows,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, float]]:
    """Mean KL divergence (nats) over `windows` with decoded weights in the place of the source's.

    Returns pairs (bytes of plies and scales, KL), bytes rising and KL falling. The weights of
    `model` are overwritten. Memory: a copy of the head, and the work of decoding two row blocks.
    """
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    weights = {name: module.weight for name, module in linear_modules(model).items()}
    weights["embed"] = embedding.weight
    weights["head"] = output.weight
    source_head = output.weight.detach().clone()
    ids = [torch.tensor(window) for window in windows]
    reference = [model.model(i[None], use_cache=False)[0][0] for i in ids]

    scale_bytes = coded.scale_bytes()
    prefix = ladders.prefix_bytes(ladder, sizes)
    wanted = [int(prefix[-1]) * bits / 8 for bits in _BITS]
    places = sorted({int(np.searchsorted(prefix, w, side="right")) - 1 for w in wanted})
    outs = [weights[m.name] for m in coded.matrices]
    points: list[tuple[int, float]] = []
    for done, plies in enumerate(places):
        depths = ladders.depths_at(ladder, coded.units, plies)
        parts = [
            depths[m.first_unit : m.first_unit + m.units].reshape(len(m.blocks), -1)
            for m in coded.matrices
        ]
        with ThreadPoolExecutor(_DECODERS) as pool:  # NumPy uses one processor for most of it
            list(pool.map(coded.decode, coded.matrices, parts, outs))
        loss = 0.0
        for one, final in zip(ids, reference, strict=True):
            hidden = model.model(one[None], use_cache=False)[0][0]
            pairs = zip(
                logits_chunks(final, source_head, softcap),
                logits_chunks(hidden, output.weight, softcap),
                strict=True,
            )
            for (_, want, _), (_, have, _) in pairs:
                p = torch.log_softmax(want, dim=1)
                q = torch.log_softmax(have, dim=1)
                loss += float((p.exp() * (p - q)).sum())
        points.append((int(prefix[plies]) + scale_bytes, loss / sum(map(len, ids))))
        if progress is not None:
            progress(done + 1, len(places))
    # More plies cannot be expected to be worse; what the few windows say otherwise is noise.
    kls = np.minimum.accumulate([max(kl, 0.0) for _, kl in points])
    return [(size, float(kl)) for (size, _), kl in zip(points, kls, strict=True)]
