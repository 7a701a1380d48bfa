"""How far answers with a coded KV cache are from those with an exact one.

The same weights, the same text, and the mean KL divergence between both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from pliant.engine.build import RungFiles
from pliant.engine.compare import Divergence
from pliant.engine.loading import Parts, open_parts
from pliant.engine.seam import Floats
from pliant.engine.turns import Turns
from pliant.engine.weights import Weights
from pliant.memory.plan import Wish, kv_levels, rungs_within

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["kv_quality"]

_STEP = 128  # tokens of a step: whole pages, so that all of them can be seen coded
_QUARTERS = 4


def kv_quality(
    path: str | PathLike[str],
    windows: Sequence[Sequence[int]],
    bits: Sequence[float],
    *,
    weights: int | None = None,
    threads: int | None = None,
    isa: str = "auto",
    progress: Callable[[float], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Measure a cache of at most each of `bits` bits a value, scales included, against 16.

    Each token is read in two ways: as models run, with the newest page exact, and with every page
    coded, the worst case. Returns for each of `bits`, falling: `bits`, `rungs`, `bytes_per_token`,
    `expected_kl`, and `all_coded` and `as_run`, each with what `Divergence.values` gives and
    `by_position`: the KL in each quarter of the windows. Memory: two models of `weights` bytes, and
    the logits of one window twice. UsageError if the pack does not know how to code KV.
    """
    exact = _ready(path, threads, isa, weights, coded=False)
    coded = _ready(path, threads, isa, weights, coded=True)
    sizes = coded.sizes
    levels = sorted({kv_levels(sizes, Wish(kv_bits=one))[-1] for one in bits}, reverse=True)
    ways = [(level, way) for level in levels for way in ("all_coded", "as_run")]
    sums = {key: Divergence() for key in ways}
    parts = {key: [Divergence() for _ in range(_QUARTERS)] for key in ways}
    vocab = exact.pack.manifest.model.vocab
    for number, ids in enumerate(windows):
        theirs = np.empty((len(ids), vocab), np.float32)
        for start, block in _logits(exact, ids):
            theirs[start : start + len(block)] = block
        for index, (level, way) in enumerate(ways):
            executor: Any = coded.executor
            executor.set_kv_level(level)
            executor.code_newest(way == "all_coded")
            sums[level, way].begin_window()
            for start, block in _logits(coded, ids):
                end = start + len(block)
                sums[level, way].add(block, ids[start + 1 : end + 1], theirs[start:end])
                quarter = parts[level, way][min(start * _QUARTERS // len(ids), _QUARTERS - 1)]
                quarter.add(block, ids[start + 1 : end + 1], theirs[start:end])
            progress((number + (index + 1) / len(ways)) / len(windows))
    return [
        {
            "bits": sizes.kv_bits(level),
            "rungs": level,
            "bytes_per_token": sizes.page_bytes(level) // sizes.kv_page_tokens,
            "expected_kl": sizes.kv_divergence(level),
            **{
                way: {
                    **sums[level, way].values(),
                    "by_position": [part.values()["kl"] for part in parts[level, way]],
                }
                for way in ("all_coded", "as_run")
            },
        }
        for level in levels
    ]


def _ready(
    path: str | PathLike[str], threads: int | None, isa: str, weights: int | None, *, coded: bool
) -> Parts:
    parts = open_parts(path, threads=threads, isa=isa, chat=False, coded_kv=coded)
    sizes = parts.sizes
    rungs = sizes.rungs if weights is None else rungs_within(sizes, weights)
    with closing(RungFiles(parts.pack)) as files:
        held = Weights(parts.executor, files, sizes, Turns(lambda on: None))
        held.grow(rungs, held.limit(rungs), alone=True)
    parts.executor.reserve_kv(sizes.pages(sizes.context))
    return parts


def _logits(parts: Parts, ids: Sequence[int]) -> Iterator[tuple[int, Floats]]:
    """Where a block of logits begins, and the block."""
    executor = parts.executor
    sequence = executor.open_sequence()
    try:
        for start in range(0, len(ids), _STEP):
            part = np.array(ids[start : start + _STEP], np.int32)
            rows = executor.step([sequence], [len(part)], part, [2], whole=True)
            assert rows is not None  # nobody is in a hurry
            yield start, rows
    finally:
        executor.close_sequence(sequence)
