"""At the end of every test that had a model: the ledger adds up, and the kernel agrees with it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator

import pytest

from fakes import FakeExecutor
from pliant.engine.model import Model


def audit(model: Model) -> None:
    """free + held = total, and for a real model what is held is what the kernel counts."""
    ledger = model.ledger
    assert ledger.free + ledger.held == ledger.total
    if not isinstance(model._executor, FakeExecutor):
        found = model.audit()
        assert found.ok, f"{found.difference} bytes of {found.resident} belong to nobody: {found}"


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """What the tests before have left goes now, and not while a ledger is compared with what it
    measured as the interpreter's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True)
def audited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Audits every model when it is closed, and at the end of the test."""
    models: weakref.WeakSet[Model] = weakref.WeakSet()
    make, close = Model.__init__, Model.close
    failures: list[AssertionError] = []

    def noted(self: Model, *arguments: object, **options: object) -> None:
        make(self, *arguments, **options)  # type: ignore[arg-type]
        models.add(self)

    def audited_close(self: Model) -> None:
        if not self._closed:
            try:
                audit(self)
            except AssertionError as error:
                failures.append(error)
        close(self)

    monkeypatch.setattr(Model, "__init__", noted)
    monkeypatch.setattr(Model, "close", audited_close)
    yield
    for model in models:
        if not model._closed:
            audit(model)
    if failures:
        raise failures[0]
