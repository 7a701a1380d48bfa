"""Texts that say again what they have said: what a KV cache is kept for.

Of ordinary text a next token needs little of what is far away, so its gradients say little of the
heads that find single facts again. Here records of random names and numbers come a second time in
another order, and passages are quoted word for word, so that what follows can only be known from
the context. Looked at for the coding of the KV cache alone (pliant.pack.kv).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

__all__ = ["echo_windows"]

_NAMES = (
    *("abel", "beatriz", "chen", "dagny", "emeka", "farah", "goran", "hana", "ines", "jonas"),
    *("kofi", "leila", "mats", "noor", "oskar", "priya", "quim", "rosa", "soren", "tomoko"),
)
_PARTS = (
    *("axle", "bracket", "clamp", "damper", "flange", "gasket", "hinge", "impeller", "joint"),
    *("lever", "nozzle", "piston", "rotor", "spindle", "tappet", "washer"),
)
_FORMS = ("{name} -> {value}", "{name} = {value}", "| {part} | {value} |", '  "{name}": {value},')
_RECORD = 24  # tokens of a window for each record, which has about half as many
_QUOTES = 4  # one window in so many quotes passages
_QUOTED, _BETWEEN = 1.4, 0.9  # characters for each token of a window


def echo_windows(
    tokenizer: Any, passages: Sequence[str], *, count: int, length: int, bos: int | None, seed: int
) -> list[list[int]]:
    """`count` windows of at most `length` tokens.

    `tokenizer` is one of transformers; `passages` are texts to quote from, those that are long
    enough; without any all windows have records. With `bos` every window begins with it.
    """
    dice = random.Random(seed)
    quoted, between = int(length * _QUOTED), int(length * _BETWEEN)
    long = [text for text in passages if len(text) >= quoted]
    head = [] if bos is None else [bos]
    windows = []
    for number in range(count):
        if long and number % _QUOTES == 0:
            first, other = dice.choice(long)[:quoted], dice.choice(long)[:between]
            text = f"{first}\n\n{other}\n\nAs quoted above:\n\n{first}"
        else:
            text = _records(dice, max(length // _RECORD, 1))
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        windows.append((head + ids)[:length])
    return windows


def _records(dice: random.Random, count: int) -> str:
    """A list of records, and as many of them again among each other."""
    form = dice.choice(_FORMS)
    lines = [
        form.format(
            name=f"{dice.choice(_NAMES)}_{dice.randrange(100, 1000)}",
            part=f"{dice.choice(_PARTS)} {dice.choice('ABCDEFGH')}{dice.randrange(10, 100)}",
            value=dice.randrange(1000, 100_000),
        )
        for _ in range(count)
    ]
    return "\n".join(lines + [dice.choice(lines) for _ in range(count)])
