"""JSON files of a source and of a pack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pliant.errors import SourceError

__all__ = ["read_json", "write_json"]

_MAX_JSON = 64 << 20


def read_json(path: Path, origin: str, most: int = _MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file; SourceError where it is none or has more than `most` bytes."""
    try:
        size = path.stat().st_size
        if size > most:
            raise SourceError(f"{origin}: {path.name} has {size} bytes; {most} is the most.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{origin}: {path.name} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{origin}: {path.name} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise SourceError(f"{origin}: {path.name} holds no JSON object.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON that reads well and is the same for equal values."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
