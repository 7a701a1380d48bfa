"""What the process holds, who holds it, and what fits."""

from __future__ import annotations
