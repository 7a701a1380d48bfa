"""JSON from files that nobody vouches for: parsed within a bound, and read field by field.

Nothing here knows about packs. `loads` bounds the memory that parsing may take before it parses;
`Fields` reads an object whose keys must be exactly the expected ones, each of the right type and
within limits. Every defect is a FormatError that names the place and the value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from pliant.errors import FormatError

__all__ = ["MAX_INTEGER", "Fields", "integer", "integers", "loads", "number", "show", "text"]

MAX_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""

FREE_ALLOWANCE = 8 * 2**20
"""Bytes that parsing may always take, however small the files beside it are."""

_DEEPEST = 16
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number with a fraction",
    type(None): "null",
}
_T = TypeVar("_T")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def show(value: object, limit: int = 60) -> str:
    """A value as it may stand in a message: ASCII, on one line, and short."""
    if isinstance(value, (dict, list)):
        return f"{_KINDS[type(value)]} of {len(value)}"
    shown = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _parse_cost(data: bytes) -> int:
    """An upper estimate of the bytes that json.loads(data) takes, from counts of its characters."""
    wide = not data.isascii() or b"\\u" in data
    objects, lists = data.count(b"{"), data.count(b"[")
    values = data.count(b",") + objects + lists
    # Text and its copy as values (up to 4 bytes a character in each), then slots and objects.
    return (
        len(data) * (9 if wide else 2)
        + 48 * values
        + 88 * lists
        + 320 * objects
        + 80 * (data.count(b'"') // 2)
    )


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) in (dict, list)
        ]
        if not level:
            return False
    return True


def loads(data: bytes, where: str, *, beside: int = 0) -> Any:
    """Parse JSON strictly and within a bound.

    `where` names the file in messages. `beside` is the size in bytes of the files that `data`
    describes: parsing may take as much memory as that and FREE_ALLOWANCE more, so that a small
    download cannot take a large part of memory. Raises FormatError for text that is not UTF-8 or
    not JSON, duplicate keys, the literals NaN and Infinity, and deep nesting.
    """

    def fail(problem: str) -> NoReturn:
        raise FormatError(f"{where}: {problem}")

    def parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            fail(f"the key {show(twice)} is there twice in one object")
        return result

    cost, allowance = _parse_cost(data), FREE_ALLOWANCE + beside
    if cost > allowance:
        fail(
            f"{len(data)} bytes of JSON that would take about {cost} bytes of memory to read, out "
            f"of proportion to the {beside} bytes that they describe"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=lambda literal: fail(f"the number {literal} is not allowed"),
            object_pairs_hook=parse_object,
        )
    except UnicodeDecodeError as error:
        fail(f"not UTF-8: byte {error.start} cannot be decoded")
    except RecursionError:
        fail(f"nested deeper than {_DEEPEST} levels")
    except ValueError as error:
        fail(f"not JSON: {error}")
    if type(value) in (dict, list) and _depth_exceeds(value, _DEEPEST):
        fail(f"nested deeper than {_DEEPEST} levels")
    return value


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def integer(value: object, where: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    """An integer in [low, high]; true and 1.0 are none."""
    if type(value) is not int:
        raise FormatError(f"{where} is {show(value)}, and must be an integer")
    if not low <= value <= high:
        raise FormatError(f"{where} is {show(value)}, and must lie in {low} ... {high}")
    return value


def integers(
    value: object, where: str, low: int = 0, high: int = MAX_INTEGER
) -> npt.NDArray[np.int64]:
    """A list of integers in [low, high], as int64 [length]."""
    if type(value) is not list:
        raise FormatError(f"{where} is {show(value)}, and must be a list of integers")
    if not (
        set(map(type, value)) <= {int}
        and min(value, default=low) >= low
        and max(value, default=high) <= high
    ):
        for index, item in enumerate(value):
            integer(item, f"{where}[{index}]", low, high)
    return np.array(value, np.int64)


def number(
    value: object, where: str, *, positive: bool = False, least: float | None = None
) -> float:
    """A finite number; integers are numbers too."""
    if type(value) not in (int, float):
        raise FormatError(f"{where} is {show(value)}, and must be a number")
    if type(value) is int and abs(value) > MAX_INTEGER:
        raise FormatError(f"{where} is {show(value)}, and must be at most {MAX_INTEGER}")
    result = float(value)  # type: ignore[arg-type]
    if not math.isfinite(result):  # a literal such as 1e400
        raise FormatError(f"{where} is {show(value)}, and must be finite")
    if positive and not result > 0:
        raise FormatError(f"{where} is {show(value)}, and must be above 0")
    if least is not None and result < least:
        raise FormatError(f"{where} is {show(value)}, and must be at least {least:g}")
    return result


def text(value: object, where: str, limit: int) -> str:
    """Text of at most `limit` characters, all printable: it may be shown in a terminal."""
    if type(value) is not str:
        raise FormatError(f"{where} is {show(value)}, and must be text")
    if len(value) > limit:
        raise FormatError(f"{where} has {len(value)} characters, and may have {limit}")
    if not value.isprintable():
        raise FormatError(f"{where} is {show(value)}, and has characters that cannot be printed")
    return value


class Fields:
    """A JSON object with exactly the given keys.

    The methods read one key each and raise FormatError with the full name of the place, such as
    `pliant.json: model.heads`.
    """

    __slots__ = ("_values", "where")

    def __init__(self, value: object, where: str, keys: Iterable[str]) -> None:
        if type(value) is not dict:
            raise FormatError(f"{where} is {show(value)}, and must be an object")
        expected = set(keys)
        if value.keys() != expected:
            unknown = sorted(value.keys() - expected)
            missing = sorted(expected - value.keys())
            problem = f"unknown key {show(unknown[0])}" if unknown else f"no key {show(missing[0])}"
            raise FormatError(f"{where}: {problem}; its keys are {', '.join(sorted(expected))}")
        self._values: dict[str, Any] = value
        self.where = where

    def at(self, key: str) -> str:
        """The name of a field in messages."""
        return f"{self.where}{'.' if not self.where.endswith('.json') else ': '}{key}"

    def raw(self, key: str) -> Any:
        """The value as it is, for a caller that checks it."""
        return self._values[key]

    def integer(self, key: str, low: int = 0, high: int = MAX_INTEGER) -> int:
        return integer(self._values[key], self.at(key), low, high)

    def optional_integer(self, key: str, low: int = 0, high: int = MAX_INTEGER) -> int | None:
        return None if self._values[key] is None else self.integer(key, low, high)

    def integers(self, key: str, low: int = 0, high: int = MAX_INTEGER) -> npt.NDArray[np.int64]:
        return integers(self._values[key], self.at(key), low, high)

    def number(self, key: str, *, positive: bool = False, least: float | None = None) -> float:
        return number(self._values[key], self.at(key), positive=positive, least=least)

    def optional_number(self, key: str, *, positive: bool = False) -> float | None:
        return None if self._values[key] is None else self.number(key, positive=positive)

    def numbers(self, key: str) -> tuple[float, ...]:
        return self.items(key, number)

    def flag(self, key: str) -> bool:
        value = self._values[key]
        if type(value) is not bool:
            raise FormatError(f"{self.at(key)} is {show(value)}, and must be true or false")
        return value

    def text(self, key: str, limit: int) -> str:
        return text(self._values[key], self.at(key), limit)

    def optional_text(self, key: str, limit: int) -> str | None:
        return None if self._values[key] is None else self.text(key, limit)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self._values[key]
        for choice in choices:  # gives back our own string, so that equal ones are one object
            if value == choice and type(value) is str:
                return choice
        raise FormatError(
            f"{self.at(key)} is {show(value)}, and must be one of {', '.join(choices)}"
        )

    def sha256(self, key: str) -> str:
        value = self._values[key]
        if type(value) is not str or not _SHA256.fullmatch(value):
            raise FormatError(f"{self.at(key)} is {show(value)}, and must be 64 hexadecimal digits")
        return value

    def items(self, key: str, read: Callable[[Any, str], _T]) -> tuple[_T, ...]:
        """A list, each item of it read by `read(value, place)`."""
        value, where = self._values[key], self.at(key)
        if type(value) is not list:
            raise FormatError(f"{where} is {show(value)}, and must be a list")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))
