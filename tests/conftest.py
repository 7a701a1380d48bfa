"""At the end of every test that had a model: the ledger adds up, and the kernel agrees with it.

Here too is what several files of tests use as a fixture.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fakes import FakeExecutor
from pliant.engine.model import Model
from pliant.sizes import MIB

if TYPE_CHECKING:
    from packs import Reader

SANITIZED = any(name in os.environ.get("LD_PRELOAD", "") for name in ("libasan", "libtsan"))
"""Whether `make sanitize` or `make races` runs this, with freed memory kept and a shadow of all."""


def audit(model: Model, alone: bool = True) -> None:
    """free + held = total, and for a real model what is held is what the kernel counts.

    PyTorch, once another test has loaded it, takes and gives memory back when it likes, so the
    kernel's count is compared roughly then, and strictly in tests that run in their own process.
    Where a test uses it itself beside the model, the count says nothing.
    """
    ledger = model.ledger
    assert ledger.free + ledger.held == ledger.total
    if alone and not SANITIZED and not isinstance(model._executor, FakeExecutor):
        found = model.audit()
        good = found.ok or ("torch" in sys.modules and found.difference < 64 * MIB)
        assert good, f"{found.difference} bytes of {found.resident} belong to nobody: {found}"


@pytest.fixture(autouse=True, scope="module")
def settled() -> None:
    """What the tests before have left goes now, and not while a ledger is compared with what it
    measured as the interpreter's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True)
def audited(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Audits every model when it is closed, and at the end of the test."""
    alone = request.node.get_closest_marker("torch_beside") is None
    models: weakref.WeakSet[Model] = weakref.WeakSet()
    make, close = Model.__init__, Model.close
    failures: list[AssertionError] = []

    def noted(self: Model, *arguments: object, **options: object) -> None:
        make(self, *arguments, **options)  # type: ignore[arg-type]
        models.add(self)

    def audited_close(self: Model) -> None:
        if not self._closed:
            try:
                audit(self, alone)
            except AssertionError as error:
                failures.append(error)
        close(self)

    monkeypatch.setattr(Model, "__init__", noted)
    monkeypatch.setattr(Model, "close", audited_close)
    yield
    for model in models:
        if not model._closed:
            audit(model, alone)
    if failures:
        raise failures[0]


@pytest.fixture(scope="session")
def reader() -> Reader:
    """The independent reader of docs/format.md: `matrix(pack, name, shards)` of section 9."""
    document = Path(__file__).parents[1] / "docs" / "format.md"
    section = document.read_text(encoding="utf-8").split("\n## 9. ")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(compile(block[1], str(document), "exec"), names)
    found: Reader = names["matrix"]
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test with the marker `own_process` in a pytest of its own."""
    own = "PLIANT_OWN_PROCESS"
    if pyfuncitem.get_closest_marker("own_process") is None or own in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    done = subprocess.run(
        command,
        env={**os.environ, own: "1"},
        cwd=pyfuncitem.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True
