"""How far answers with a coded KV cache are from those with an exact one.

The same weights, the same text: the mean KL divergence between both, and tasks in which single
facts matter (`pliant.engine.recall`), since means over a text hide what is lost of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from pliant.engine.build import RungFiles
from pliant.engine.compare import Divergence
from pliant.engine.loading import Parts, open_parts
from pliant.engine.recall import Asked, Sample, Score, score, summarise
from pliant.engine.seam import Floats
from pliant.engine.turns import Turns
from pliant.engine.weights import Weights
from pliant.memory.plan import Wish, kv_levels, rungs_within

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["WAYS", "Caches", "compared", "kv_quality", "kv_recall"]

WAYS = ("all_coded", "as_run")
_STEP = 128  # tokens of a step: whole pages, so that all of them can be seen coded
_QUARTERS = 4
_HELD = 2**29  # bytes of exact logits in memory at once; of longer windows fewer pages are compared


class Caches:
    """One model twice: with an exact KV cache, and with a coded one at several bits.

    Tokens are read in two ways: as models run, with the newest page exact, and with every page
    coded, the worst case. Memory: two models of `weights` bytes (None: all rungs). UsageError if
    the pack does not know how to code KV, or not with so few of `bits` a value, scales included:
    the mean at the end of a text.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        bits: Sequence[float],
        *,
        weights: int | None = None,
        threads: int | None = None,
        isa: str = "auto",
    ) -> None:
        self._exact = _ready(path, threads, isa, weights, coded=False)
        self._coded = _ready(path, threads, isa, weights, coded=True)
        self.sizes = self._coded.sizes
        self.vocab = self._exact.pack.manifest.model.vocab
        self.bits = sorted(set(bits), reverse=True)
        for one in self.bits:
            self._level(one, self.sizes.context)

    def exact(self) -> _Reader:
        """A sequence in the exact cache."""
        return _Reader(self._exact, pad=False)

    def coded(self, bits: float, way: str, tokens: int) -> _Reader:
        """A sequence in the coded cache, which no other may be in, and which will have at most so
        many bits once it has so many tokens."""
        executor: Any = self._coded.executor
        seen = self.sizes.schedule(self._level(bits, tokens)).seen.tolist()
        executor.set_kv_ages(seen, seen, self.sizes.kv_local_age)
        executor.code_newest(way == "all_coded")
        return _Reader(self._coded, pad=way == "all_coded")

    def figures(self, bits: float, tokens: int) -> dict[str, Any]:
        """What the cache has after so many tokens: `name`, `bits`, `bytes_per_token`, and the
        `expected_kl` there."""
        sizes, level = self.sizes, self._level(bits, tokens)
        full = max(tokens // sizes.kv_page_tokens, 1)
        return {
            "name": f"{bits:g}",
            "bits": sizes.kv_bits(level, tokens),
            "bytes_per_token": round(
                sizes.schedule(level).total(full) / (full * sizes.kv_page_tokens)
            ),
            "expected_kl": sizes.kv_divergence(level, tokens),
        }

    def _level(self, bits: float, tokens: int) -> int:
        return kv_levels(self.sizes, Wish(kv_bits=bits), tokens)[-1]


class _Reader:
    """One sequence that is fed. `pad`: what is read is made up to whole pages, because only these
    are ever seen coded; no token sees what comes after it."""

    def __init__(self, parts: Parts, *, pad: bool) -> None:
        self._executor = parts.executor
        self._page = parts.sizes.kv_page_tokens
        self._pad = pad
        self._sequence = parts.executor.open_sequence()

    def close(self) -> None:
        """Forget the sequence."""
        self._executor.close_sequence(self._sequence)

    def feed(
        self, ids: Sequence[int], wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Floats]]:
        """Read `ids` page by page, from the end of a page on. Yields for each page that is `wanted`
        where in `ids` it begins, and the logits of its tokens: float32 [tokens, vocabulary]."""
        filled = list(ids)
        if self._pad:
            filled += [filled[-1]] * (-len(ids) % self._page)
        at = 0
        while at < len(filled):
            want = wanted(at)
            end = at
            while end < len(filled) and end - at < _STEP and wanted(end) == want:
                end += self._page
            part = np.array(filled[at:end], np.int32)
            rows = self._executor.step(
                [self._sequence], [len(part)], part, [2 if want else 0], whole=True
            )
            if want:
                assert rows is not None  # nobody is in a hurry
                yield at, rows[: len(ids) - at]
            at = end

    def answer(self, start: int, branch: Sequence[Asked], rest: Sequence[int]) -> list[Score]:
        """Scores of a branch, read after the first `start` tokens that are there already, whole
        pages, and the `rest` of the context."""
        left = self._executor.truncate(self._sequence, start)
        assert left == start  # whole pages can always be kept
        ids, spans = list(rest), []
        for one in branch:
            ids += one.question
            spans.append((len(ids) - 1, len(ids) - 1 + len(one.answer)))
            ids += one.answer
        rows = {at for begin, end in spans for at in range(begin, end)}
        pages = {at // self._page for at in rows}
        found: dict[int, Floats] = {}
        for at, block in self.feed(ids, lambda at: at // self._page in pages):
            found |= {at + n: block[n].copy() for n in range(len(block)) if at + n in rows}
        return [
            score(np.stack([found[at] for at in range(begin, end)]), one.answer)
            for one, (begin, end) in zip(branch, spans, strict=True)
        ]

    def answers(self, sample: Sample) -> list[list[Score]]:
        """The context is read once, and each branch goes on from it."""
        start = len(sample.context) // self._page * self._page
        for _ in self.feed(sample.context[:start], lambda at: False):
            pass
        rest = sample.context[start:]
        return [self.answer(start, branch, rest) for branch in sample.branches]


def compared(tokens: int, vocab: int, page: int) -> int:
    """Of how many pages of a window the last is compared: 1, all, unless the logits of the window
    are larger than 512 MiB."""
    held = max(1, _HELD // (page * vocab * 4))
    return math.ceil(max(1, tokens // page) / held)


def kv_quality(
    caches: Caches,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Compare logits, window after window.

    Returns `exact`, what `Divergence.values` gives for the exact cache alone, and `coded`: for each
    of the bits, falling, `Caches.figures`, and for each of `WAYS` what `Divergence.values` gives
    and `by_position`: the KL in each quarter of the windows. Of windows whose logits are larger
    than 512 MiB evenly spread pages are compared. Memory: those, besides the caches.
    """
    tokens = max(map(len, windows))
    ways = [(bits, way) for bits in caches.bits for way in WAYS]
    sums = {key: Divergence() for key in ways}
    parts = {key: np.zeros((_QUARTERS, 2)) for key in ways}  # KL and positions
    original = Divergence()
    page = caches.sizes.kv_page_tokens
    for number, ids in enumerate(windows):
        every = compared(len(ids), caches.vocab, page)

        def wanted(at: int, every: int = every) -> bool:
            return at // page % every == every - 1

        theirs: dict[int, Floats] = {}
        original.begin_window()
        with closing(caches.exact()) as reader:
            for start, block in reader.feed(ids, wanted):
                original.add(block, ids[start + 1 : start + len(block) + 1])
                for at in range(0, len(block), page):
                    theirs[start + at] = block[at : at + page]
        for index, (bits, way) in enumerate(ways):
            sums[bits, way].begin_window()
            with closing(caches.coded(bits, way, tokens)) as reader:
                for begin, rows in reader.feed(ids, wanted):
                    for at in range(0, len(rows), page):
                        start, block = begin + at, rows[at : at + page]
                        following = ids[start + 1 : start + len(block) + 1]
                        kl = sums[bits, way].add(block, following, theirs[start])
                        quarter = (start + np.arange(len(kl))) * _QUARTERS // len(ids)
                        np.add.at(parts[bits, way], quarter, np.stack([kl, np.ones_like(kl)], 1))
            progress((number + (index + 1) / len(ways)) / len(windows))
    coded = []
    for bits in caches.bits:
        found = caches.figures(bits, tokens)
        for way in WAYS:
            quarters = [
                float(total / count) if count else None for total, count in parts[bits, way]
            ]
            found[way] = {**sums[bits, way].values(), "by_position": quarters}
        coded.append(found)
    return {"exact": original.values(), "coded": coded}


def kv_recall(
    caches: Caches,
    samples: Sequence[Sample],
    *,
    begin: Sequence[int] = (),
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Ask what `samples` ask, with an exact cache and each coded one.

    Returns `answers`: for each answer `task`, `length`, `sample`, `depth` (where in the context its
    first fact is, from 0 to 1), `alone` (its log-likelihood after `begin` and the branch, without
    the context) and `caches`: from `exact`, and for each of the bits `NAME WAY`, to its `Score`
    as a dictionary; and `tasks`, what `summarise` makes of them.
    """
    names = [(f"{bits:g} {way}", bits, way) for bits in caches.bits for way in WAYS]
    answers: list[dict[str, Any]] = []
    whole = sum(len(sample.context) for sample in samples) * (len(names) + 1)
    done = 0
    for sample in samples:
        found: dict[str, list[list[Score]]] = {}
        for name, bits, way in [("exact", 0.0, ""), *names]:
            reader = caches.coded(bits, way, sample.length) if bits else caches.exact()
            with closing(reader):
                found[name] = reader.answers(sample)
            done += len(sample.context)
            progress(done / whole)
        for index, branch in enumerate(sample.branches):
            with closing(caches.exact()) as reader:
                alone = reader.answer(0, branch, begin)
            for place, one in enumerate(branch):
                answers.append(
                    {
                        "task": one.task,
                        "length": sample.length,
                        "sample": sample.number,
                        "depth": one.at[0] / len(sample.context),
                        "alone": alone[place].likelihood,
                        "caches": {name: scores[index][place] for name, scores in found.items()},
                    }
                )
    tasks = summarise(answers)
    for answer in answers:
        answer["caches"] = {
            name: {"right": one.right, "likelihood": one.likelihood}
            for name, one in answer["caches"].items()
        }
    return {"tasks": tasks, "answers": answers}


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
