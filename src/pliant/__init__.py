"""Run a language model inside one memory budget, and change the budget while it runs.

    import pliant

    model = pliant.load("smollm2.pack", memory="300MiB")
    for piece in model.generate("Once upon a time", max_tokens=64):
        print(piece, end="", flush=True)
    model.budget = "200MiB"

Names are imported when they are first used, so that `import pliant` stays small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.engine.generation import Generation
    from pliant.engine.kinds import Depth, GenerationResult, Report
    from pliant.engine.loading import load
    from pliant.engine.model import Model
    from pliant.engine.session import Session
    from pliant.errors import (
        BudgetError,
        ChecksumError,
        EngineError,
        FormatError,
        ModelError,
        PackError,
        PliantError,
        SourceError,
        UsageError,
        VersionError,
    )
    from pliant.memory.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "ChecksumError",
    "Depth",
    "EngineError",
    "FormatError",
    "Generation",
    "GenerationResult",
    "Model",
    "ModelError",
    "PackError",
    "Plan",
    "PliantError",
    "Report",
    "Session",
    "SourceError",
    "UsageError",
    "VersionError",
    "__version__",
    "load",
]

_PLACES = {
    "Depth": "pliant.engine.kinds",
    "Generation": "pliant.engine.generation",
    "GenerationResult": "pliant.engine.kinds",
    "Model": "pliant.engine.model",
    "Plan": "pliant.memory.plan",
    "Report": "pliant.engine.kinds",
    "Session": "pliant.engine.session",
    "load": "pliant.engine.loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pliant' has no attribute {name!r}")
    value = getattr(import_module(_PLACES.get(name, "pliant.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
