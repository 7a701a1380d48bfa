"""What may be asked of a running model from outside: its budget, read and set.

The same two requests come through the control socket of `pliant run` and, in the same process,
through a server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pliant.errors import UsageError

if TYPE_CHECKING:
    from pliant.engine.model import Model

__all__ = ["BudgetControl"]

_KEYS = ("memory", "keep_free")


class BudgetControl:
    """The budget of one model, as plain values. Every method is safe to call from any thread."""

    def __init__(self, model: Model, log: Callable[[str], None] | None = None) -> None:
        """`log`: called with a line for each move of a governor that is begun here."""
        self._model = model
        self._log = log

    def get(self) -> dict[str, Any]:
        """The budget, what holds under it, and who holds how many bytes; docs/memory.md."""
        return self._state(hurry=False)

    def _state(self, *, hurry: bool) -> dict[str, Any]:
        model = self._model
        report, change, governor = model.report(hurry=hurry), model.change, model.governor
        mode = "fixed" if report.budget is not None else "none"
        return {
            "pid": os.getpid(),
            "pack": report.pack,
            "mode": "auto" if governor is not None else mode,
            "memory": report.budget,
            "least": model.least_plan().total,
            "most": model.plan_for().total,
            "resident": report.resident,
            "peak": report.peak,
            "rungs": report.rungs,
            "rungs_available": report.rungs_available,
            "weights": report.weights,
            "bits_per_weight": report.bits_per_weight,
            "expected_kl": report.expected_kl,
            "context": report.context,
            "in_flight": report.in_flight,
            "parked": report.parked,
            "parked_bytes": report.parked_bytes,
            "park": asdict(report.park),
            "growing": change is not None and not change.done,
            "failed": None if change is None or change.error is None else str(change.error),
            "total": report.total,
            "free": report.free,
            "ledger": report.to_dict()["ledger"],
            "governor": None if governor is None else governor.report(),
        }

    def put(self, request: object) -> dict[str, Any]:
        """Set the budget, and return what `get` does.

        `request` is a mapping with `memory`: a number of bytes, a text such as `200MiB`, `auto`, or
        None for no limit; with `auto` also `keep_free`. When this returns, what had to shrink has
        shrunk; what grows is read in the background, and `growing` says so. Raises UsageError for
        anything else, BudgetError for what does not fit; nothing has changed then.
        """
        if not isinstance(request, Mapping) or "memory" not in request:
            raise UsageError('a request is an object such as {"memory": "200MiB"}')
        for key in request:
            if key not in _KEYS:
                raise UsageError(f"{key!r} is not known here; these are: {', '.join(_KEYS)}")
        memory, keep_free = request["memory"], request.get("keep_free")
        if memory == "auto":
            self._model.govern(keep_free=keep_free, log=self._log)
        elif keep_free is not None:
            raise UsageError('keep_free belongs to "memory": "auto"')
        else:
            self._model.move(memory=memory)
        return self._state(hurry=True)  # whoever asked for memory need not wait for a step
