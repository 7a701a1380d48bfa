"""The exceptions of pliant: one tree, so that one `except PliantError` catches all of it.

    PliantError
    ├── UsageError         wrong arguments: an unknown option, a size that cannot be parsed
    ├── SourceError        a model to pack cannot be found, read or understood
    ├── PackError          a pack cannot be used
    │   ├── FormatError    its files contradict the specification (docs/format.md)
    │   ├── ChecksumError  its bytes are not those that were written
    │   └── VersionError   it was written for another version of the format
    ├── BudgetError        something does not fit in the bytes that were given
    ├── ModelError         the architecture or a feature of it is not supported
    └── EngineError        the engine refused or could not finish a request
        ├── BusyError      its queue is full: try again later
        └── DeadlineError  an answer was not done when it had to be

Every message names the cause, the numbers, and the way out.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "BusyError",
    "ChecksumError",
    "DeadlineError",
    "EngineError",
    "FormatError",
    "ModelError",
    "PackError",
    "PliantError",
    "SourceError",
    "UsageError",
    "VersionError",
]


class PliantError(Exception):
    """Base of every error that pliant raises on purpose."""


class UsageError(PliantError):
    """An argument is wrong, has no meaning, or contradicts another."""


class SourceError(PliantError):
    """A model to be packed cannot be found, read or understood."""


class PackError(PliantError):
    """A pack cannot be used."""


class FormatError(PackError):
    """A file of a pack contradicts the specification in docs/format.md."""


class ChecksumError(PackError):
    """The bytes of a pack are not the bytes that were written."""


class VersionError(PackError):
    """A pack was written for a version of the format that this program does not read."""


class BudgetError(PliantError):
    """Something does not fit in the bytes that were given; the message shows the sum."""


class ModelError(PliantError):
    """The architecture of a model, or a feature of it, is not supported."""


class EngineError(PliantError):
    """The engine refused a request or could not finish it."""


class BusyError(EngineError):
    """The queue is full. `retry_after`: seconds after which it may have room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(EngineError):
    """An answer was not done when it had to be."""
