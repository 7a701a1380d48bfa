"""Errors as the OpenAI API writes them."""

from __future__ import annotations

import math
from typing import Any

from pliant.errors import (
    BudgetError,
    BusyError,
    DeadlineError,
    EngineError,
    PliantError,
    UsageError,
)

__all__ = ["Problem", "problem_of"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Problem(Exception):
    """An answer that is an error: status, and what the body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def problem_of(error: PliantError) -> Problem:
    """The answer to an error of pliant."""
    text = str(error)
    if isinstance(error, BusyError):
        wait = str(math.ceil(error.retry_after))
        return Problem(429, text, code="queue_full", headers={"Retry-After": wait})
    if isinstance(error, DeadlineError):
        return Problem(504, text, code="deadline_exceeded")
    if isinstance(error, UsageError):
        return Problem(400, text)
    if isinstance(error, BudgetError):
        return Problem(409, text, code="budget_too_small")
    if isinstance(error, EngineError):
        return Problem(503, text, code="engine_error")
    return Problem(500, text)
