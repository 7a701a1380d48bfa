"""The engine: from a pack to answers."""

from __future__ import annotations
