"""Tasks in which single facts matter: what they ask, and how answers count.

Pure data: a seed and a tokenizer give contexts as token ids, with questions whose answers lie in
the context, and scores come from logits. Nothing here knows a model or a cache.

A context of text has facts between pieces of the user's file:

needle: "The secret number of the NAME is 48213.", asked for the number
copy:   "Remember these words: ...", given the first four, asked for the next eight
sum:    "The NAME holds 3 coins.", asked to say that of two of them, and to add; after one example
turns:  some of each, one after the other: a turn sees all turns before it, with the right answers

A context of a table has nothing but lines "NAME: 4821" (before them text, if there are not enough):

lookup: asked for the number of a name

Names, numbers and words are drawn, so no model knows them. An answer is right if each of its tokens
is the likeliest after the ones before: then greedy decoding gives just it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pliant.engine.compare import log_softmax
from pliant.engine.seam import Floats, Tokenizer
from pliant.errors import UsageError

__all__ = ["TASKS", "Asked", "Sample", "Score", "make_samples", "score", "summarise"]

TASKS = ("needle", "lookup", "copy", "sum", "turns")

_NEEDLES, _PASSAGES, _SUMS, _LOOKUPS = 5, 4, 3, 8
_CUE, _COPIED = 4, 8  # words of a passage that are given, and asked for
_NEAR = 64  # a fact is put at the end of a line, if there is one within so many tokens
_FIRST = [
    "amber", "ancient", "bitter", "black", "blue", "bold", "brave", "bright", "broad", "bronze",
    "calm", "clear", "clever", "cold", "copper", "coral", "crimson", "dark", "deep", "dry",
    "early", "eager", "empty", "faint", "famous", "fast", "fine", "foggy", "formal", "fresh",
    "gentle", "giant", "golden", "grand", "gray", "green", "happy", "heavy", "hidden", "hollow",
    "honest", "humble", "icy", "iron", "ivory", "jolly", "large", "late", "lonely", "loud",
    "lucky", "magic", "mild", "modern", "narrow", "noble", "pale", "plain", "proud", "quick",
    "quiet", "rapid", "rare", "red",
]  # fmt: skip
_SECOND = [
    "anchor", "apple", "arrow", "barn", "basket", "beach", "bell", "bird", "boat", "bottle",
    "branch", "bridge", "bucket", "button", "cabin", "camera", "candle", "castle", "chair",
    "cloud", "coat", "corner", "desert", "door", "dragon", "drum", "eagle", "engine", "farm",
    "feather", "field", "fire", "fish", "flag", "flower", "forest", "fox", "garden", "gate",
    "glass", "guitar", "hammer", "harbor", "hill", "horse", "island", "jacket", "kettle", "key",
    "kite", "ladder", "lake", "lamp", "leaf", "lion", "market", "meadow", "mirror", "moon",
    "mountain", "needle", "ocean", "river", "rocket",
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A question about a context, and its answer, as token ids.

    `at`: where in the context the facts begin that the answer needs, rising.
    """

    task: str
    question: tuple[int, ...]
    answer: tuple[int, ...]
    at: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A context and what is asked about it. Each branch follows the context itself; within a branch
    a question follows the questions before it and their answers.

    `length`: context and any branch together have at most so many tokens.
    """

    length: int
    number: int
    context: tuple[int, ...]
    branches: tuple[tuple[Asked, ...], ...]


@dataclass(frozen=True)
class Score:
    """Of one answer: whether all of it is likeliest, and its log-likelihood in nats."""

    right: bool
    likelihood: float


def score(logits: Floats, answer: Sequence[int]) -> Score:
    """Score an answer by the logits from which its tokens are predicted: float32 [tokens,
    vocabulary], each after the right tokens before."""
    chances = log_softmax(logits)
    found = chances[np.arange(len(answer)), list(answer)]
    right = bool((chances.argmax(-1) == np.array(answer)).all())
    return Score(right, float(found.sum()))


def make_samples(
    tokenizer: Tokenizer,
    text: str,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (1024,),
    samples: int = 4,
    seed: int = 0,
    begin: Sequence[int] = (),
) -> list[Sample]:
    """For each of `lengths` so many contexts of text and of a table as the tasks need.

    `begin` comes before each context, such as a token that begins a text. The same arguments give
    the same samples; a context does not depend on which `tasks` are asked about it. UsageError if a
    task is unknown, a length too short for the facts, or `text` too short for a length.
    """
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"there is no task {task!r}: there are {', '.join(TASKS)}")
    made = []
    writer = _Writer(tokenizer, text, tuple(begin))
    for length in lengths:
        for number in range(samples):
            if set(tasks) - {"lookup"}:
                sample = writer.with_facts(length, number, seed)
                branches = tuple(b for b in sample.branches if b[0].task in tasks)
                made.append(Sample(length, number, sample.context, branches))
            if "lookup" in tasks:
                made.append(writer.with_table(length, number, seed))
    return made


class _Writer:
    """Puts contexts together from a text and from what is drawn."""

    def __init__(self, tokenizer: Tokenizer, text: str, begin: tuple[int, ...]) -> None:
        self._encode = tokenizer.encode
        self._begin = begin
        self._text = self._ids(text)
        ends = {token for token in set(self._text) if tokenizer.token_bytes(token).endswith(b"\n")}
        self._ends = [at + 1 for at, token in enumerate(self._text) if token in ends]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(text, add_special=False, parse_special=False))

    def with_facts(self, length: int, number: int, seed: int) -> Sample:
        """Text with facts, and a branch for each fact and for the turns."""
        rng = np.random.default_rng([seed, number, 0])
        names = _names(rng)
        facts: list[_Fact] = []
        for _ in range(_NEEDLES):
            start, value = f"The secret number of the {names.pop()} is ", _digits(rng, 5)
            facts.append(_Fact("needle", start, value, ".\n"))
        for _ in range(_PASSAGES):
            words = rng.choice(_FIRST + _SECOND, _CUE + _COPIED, replace=False).tolist()
            start = "Remember these words: " + " ".join(words[:_CUE])
            facts.append(_Fact("copy", start, " " + " ".join(words[_CUE:]), ".\n"))
        boxes = []
        for _ in range(2 * _SUMS + 2):  # the first two are the example
            name, value = names.pop(), str(rng.integers(1, 10))
            boxes.append((name, value))
            facts.append(_Fact("sum", f"The {name} holds ", value, " coins.\n"))
        # Facts of a kind are spread evenly, each anywhere in its own part of the context.
        places = []
        for kind in ("needle", "copy", "sum"):
            count = sum(fact.task == kind for fact in facts)
            places += list(((np.arange(count) + rng.uniform(0.1, 0.9, count)) / count).tolist())
            if kind == "sum":  # the two of a question are neighbours only in `boxes`
                places[-count:] = rng.permutation(places[-count:]).tolist()

        asked = [
            Asked(fact.task, self._ids("\n\n" + fact.start), self._ids(fact.value), (index,))
            for index, fact in enumerate(facts)
            if fact.task != "sum"
        ]
        first = len(facts) - len(boxes)
        example = "".join(_added(boxes[0], boxes[1]))
        for index in range(2, len(boxes), 2):
            question, answer = _added(boxes[index], boxes[index + 1])
            ids = self._ids(f"\n\n{example}.\n{question}")
            asked.append(Asked("sum", ids, self._ids(answer), (first + index, first + index + 1)))
        order = rng.permutation(len(asked)).tolist()
        turns = [asked[index] for index in order[: len(order) * 2 // 3]]
        branches: list[tuple[Asked, ...]] = [(one,) for one in asked]
        branches.append(tuple(Asked("turns", one.question, one.answer, one.at) for one in turns))

        pieces = [self._piece(fact) for fact in facts]
        room = self._room(length, branches) - sum(len(piece) for piece, _ in pieces)
        text = self._filler(length, room, rng)
        context, at = list(self._begin), [0] * len(facts)
        done = 0
        for index in sorted(range(len(facts)), key=places.__getitem__):
            cut = min(room, max(done, self._line_end(text, int(places[index] * room))))
            context += self._text[text + done : text + cut]
            done = cut
            piece, before = pieces[index]
            at[index] = len(context) + before
            context += piece
        context += self._text[text + done : text + room]
        found = tuple(
            tuple(
                Asked(one.task, one.question, one.answer, tuple(sorted(at[i] for i in one.at)))
                for one in branch
            )
            for branch in branches
        )
        return Sample(length, number, tuple(context), found)

    def with_table(self, length: int, number: int, seed: int) -> Sample:
        """A table, and a branch for each name that is asked for."""
        rng = np.random.default_rng([seed, number, 1])
        names = _names(rng)
        values = [_digits(rng, 4) for _ in names]
        longest = max(names, key=lambda name: len(self._ids(name)))
        worst = (Asked("lookup", self._ids(f"{longest}: "), self._ids("0000"), ()),)
        room = self._room(length, [worst])
        lines: list[tuple[int, ...]] = []
        for name, value in zip(names, values, strict=True):
            line = self._ids(f"{name}: ") + self._ids(value) + self._ids("\n")
            if len(line) > room:
                break
            room -= len(line)
            lines.append(line)
        if len(lines) < 2 * _LOOKUPS:
            raise UsageError(
                f"{length} tokens are too few for a table: only {len(lines)} lines fit, and at "
                f"least {2 * _LOOKUPS} are needed; give longer --lengths"
            )
        text = self._filler(length, room, rng)
        context = [*self._begin, *self._text[text : text + room]]
        starts = []
        for line in lines:
            starts.append(len(context))
            context += line
        branches: list[tuple[Asked, ...]] = []
        for part in range(_LOOKUPS):
            index = int((part + rng.uniform(0.1, 0.9)) / _LOOKUPS * len(lines))
            question, answer = self._ids(f"{names[index]}: "), self._ids(values[index])
            at = starts[index] + len(question)
            branches.append((Asked("lookup", question, answer, (at,)),))
        return Sample(length, number, tuple(context), tuple(branches))

    def _piece(self, fact: _Fact) -> tuple[tuple[int, ...], int]:
        """A fact as ids, and where in them its value begins."""
        start = self._ids(fact.start)
        return start + self._ids(fact.value) + self._ids(fact.end), len(start)

    def _room(self, length: int, branches: Sequence[Sequence[Asked]]) -> int:
        """Tokens of a context that all branches can follow."""
        longest = max(sum(len(a.question) + len(a.answer) for a in b) for b in branches)
        return length - longest - len(self._begin)

    def _filler(self, length: int, room: int, rng: np.random.Generator) -> int:
        """Where in the text to begin, so that `room` tokens follow."""
        if room < 0:
            raise UsageError(
                f"{length} tokens are too few: facts and questions alone take {length - room}; "
                "give longer --lengths"
            )
        if room > len(self._text):
            raise UsageError(
                f"the text has {len(self._text)} tokens, and contexts of {length} need {room} of "
                "them: give a longer --text, or shorter --lengths"
            )
        return int(rng.integers(0, len(self._text) - room + 1))

    def _line_end(self, start: int, offset: int) -> int:
        """The offset from `start` at which the next line ends, if that is near."""
        index = bisect_left(self._ends, start + offset)
        if index < len(self._ends) and self._ends[index] - start - offset <= _NEAR:
            return self._ends[index] - start
        return offset


@dataclass(frozen=True)
class _Fact:
    task: str
    start: str
    value: str
    end: str


def _names(rng: np.random.Generator) -> list[str]:
    """All names, in random order."""
    numbers = rng.permutation(len(_FIRST) * len(_SECOND)).tolist()
    return [f"{_FIRST[n // len(_SECOND)]} {_SECOND[n % len(_SECOND)]}" for n in numbers]


def _digits(rng: np.random.Generator, count: int) -> str:
    return str(rng.integers(10 ** (count - 1), 10**count))


def _added(one: tuple[str, str], other: tuple[str, str]) -> tuple[str, str]:
    """The question for a sum, and its answer."""
    (name, value), (second, more) = one, other
    answer = f"{value} coins and the {second} holds {more} coins: "
    answer += f"{value} + {more} = {int(value) + int(more)}"
    return f"Add the {name} and the {second}. The {name} holds ", answer


def summarise(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by task and length, and what each cache changes, with errors paired by context.

    Each of `answers` has `task`, `length`, `sample`, `alone` (its log-likelihood without any
    context) and `caches`: from the name of a cache to its `Score`; one of them is `exact`, and
    those that not all answers of a task and length have are left out. A result has the `answers`
    and `contexts` counted, `alone`, and `caches`: from names to `right` (a share), `likelihood`,
    and, but for `exact`, `right_change` and `likelihood_change`, each with `_error`: the standard
    error of the mean over contexts, None if there is only one.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in answers:
        groups.setdefault((one["task"], one["length"]), []).append(one)
    order = {task: index for index, task in enumerate(TASKS)}
    results = []
    for (task, length), group in sorted(groups.items(), key=lambda g: (order[g[0][0]], g[0][1])):
        caches: dict[str, dict[str, float | None]] = {}
        for cache in group[0]["caches"]:
            if any(cache not in one["caches"] for one in group):
                continue
            found = caches[cache] = {}
            for figure in ("right", "likelihood"):
                values = [float(getattr(one["caches"][cache], figure)) for one in group]
                found[figure] = float(np.mean(values))
                if cache == "exact":
                    continue
                exact = [float(getattr(one["caches"]["exact"], figure)) for one in group]
                change = [a - b for a, b in zip(values, exact, strict=True)]
                by_context: dict[Any, list[float]] = {}
                for one, value in zip(group, change, strict=True):
                    by_context.setdefault(one["sample"], []).append(value)
                means = [float(np.mean(values)) for values in by_context.values()]
                found[f"{figure}_change"] = float(np.mean(change))
                found[f"{figure}_change_error"] = (
                    float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
                )
        results.append(
            {
                "task": task,
                "length": length,
                "answers": len(group),
                "contexts": len({one["sample"] for one in group}),
                "alone": float(np.mean([one["alone"] for one in group])),
                "caches": caches,
            }
        )
    return results
