from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import UsageError
from pliant.sizes import MAX_SIZE, format_mb, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300MiB", 300 * 2**20),
        ("1.5GB", 1_500_000_000),
        (" 2 gib ", 2**31),
        ("4096", 4096),
        ("4096B", 4096),
        (".5KiB", 512),
        ("1.KB", 1000),
        ("0.1MB", 100_000),  # exact, not through a float
        ("7kb", 7000),
        (1, 1),
        (MAX_SIZE, MAX_SIZE),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "MiB",
            "300M",
            "3 0MB",
            "1e6",
            "-5MB",
            "00",
            "0.4B",
            "auto",
            "1,5GB",
            "９MB",
            "1.5.2KB",
        ),
        *("99999TB", "1" * 4000, 0, -3, 2**53),
    ],
)
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_size(text, "--memory")


@pytest.mark.parametrize("value", [None, 1.5, True, b"300MiB"])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(UsageError):
        parse_size(value)  # type: ignore[arg-type]


def test_a_wrong_unit_is_named() -> None:
    with pytest.raises(UsageError, match="'M' in '300M' is not a unit"):
        parse_size("300M")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (int(71.3 * 2**20), "71.3 MiB"),
        (2**40, "1024.0 GiB"),
        (-(3 * 2**20), "-3.0 MiB"),
    ],
)
def test_sizes_are_shown(size: int, text: str) -> None:
    assert format_size(size) == text


def test_megabytes() -> None:
    assert format_mb(71_949_000) == "71.9 MB"


@given(st.integers(1, 2**52))
def test_what_is_shown_is_read_back_nearly(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.051 * size


@given(st.text(max_size=20))
def test_any_text_gives_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert 1 <= parse_size(text) <= MAX_SIZE
