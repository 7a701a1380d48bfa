"""Running the server: load a model, listen, and stop with grace."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.lifespan.on
import uvicorn.loops.asyncio
import uvicorn.protocols.http.h11_impl
from starlette.applications import Starlette

from pliant.engine.control import BudgetControl
from pliant.engine.control_socket import ControlSocket
from pliant.engine.loading import load
from pliant.engine.pace import Pace
from pliant.engine.seam import Tokenizer
from pliant.errors import EngineError, UsageError
from pliant.server.app import log_move, make_app
from pliant.server.grammar import Compiler
from pliant.server.guard import JsonLines, is_loopback
from pliant.store import Pack

__all__ = ["Settings", "open_app", "read_keys", "serve", "set_up_log"]

WORKING = 8 * 2**20
"""Bytes kept free in the budget for requests, connections and threads."""

LOG = logging.getLogger("pliant.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to serve. `load`: arguments of `pliant.load`. Times are in seconds."""

    pack: str
    load: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()
    body_limit: int = 2**20
    connections: int = 512
    most_running: int = 16
    most_waiting: int = 256
    patience: float = 30.0
    grammars: bool = True
    pace: Pace | None = None
    log_level: str = "info"


def read_keys(path: str) -> list[str]:
    """The API keys in a file, one in each line; UsageError if it cannot be read."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of API keys {path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UsageError(f"the file of API keys {path} has none")
    return keys


@contextmanager
def open_app(settings: Settings) -> Iterator[Starlette]:
    """The application over a model that is loaded for it. Whatever `pliant.load` raises.

    The modules of the server are in memory before anything is measured, so their bytes are part of
    the interpreter's in the ledger.
    """
    made: list[Compiler] = []

    def prepare(pack: Pack, tokenizer: Tokenizer) -> int:
        if settings.grammars and pack.manifest.tokens.eos:
            made.append(Compiler(tokenizer, pack.manifest.tokens.eos))
        return WORKING

    with load(
        settings.pack,
        answers=settings.most_running,
        also=("server", prepare),
        log=log_move,
        early=True,
        **settings.load,
    ) as model:
        yield make_app(
            model,
            name=settings.name or model.pack.path.resolve().name,
            compiler=made[0] if made else None,
            keys=settings.keys,
            local=is_loopback(settings.host),
            body_limit=settings.body_limit,
            most_running=settings.most_running,
            most_waiting=settings.most_waiting,
            patience=settings.patience,
            pace=settings.pace,
        )


def serve(settings: Settings, told: Callable[[str], None]) -> None:
    """Load and serve until SIGINT or SIGTERM. `told` is called once it listens, with the address.

    Whatever `pliant.load` raises; EngineError if the address cannot be used.
    """
    set_up_log(settings.log_level)
    if not is_loopback(settings.host):
        keyed = "with API keys" if settings.keys else "and without API keys: anyone may use it"
        LOG.warning(f"listening beyond this machine, {keyed}")
    with (
        closing(_listen(settings.host, settings.port)) as listener,
        open_app(settings) as app,
        _control(app.state.control),
    ):
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,  # it is made by the loop that we have no use for
            limit_concurrency=settings.connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(settings.patience) + 1,
        )
        port = listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        told(f"http://{host}:{port}")
        # uvicorn stops with grace, and then raises the signal again for whoever was there before.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        _Server(config).run(sockets=[listener])


def _control(control: BudgetControl) -> AbstractContextManager[object]:
    """The socket through which `pliant budget` finds the server without an address."""
    try:
        return ControlSocket(control)
    except EngineError as error:
        LOG.warning(f"only --url reaches the budget: {error}")
        return nullcontext()


class _Server(uvicorn.Server):
    """Sleeps until it is told to end, where uvicorn looks ten times a second."""

    _ended: asyncio.Event | None = None
    _loop: asyncio.AbstractEventLoop

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        if not self.should_exit:
            await self._ended.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._ended is not None:
            self._loop.call_soon_threadsafe(self._ended.set)


def _listen(host: str, port: int) -> socket.socket:
    """The socket is taken before the model is read, so that a port in use is known at once.

    EngineError, with the address and the way out, if it cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
            listener.set_inheritable(False)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise EngineError(
            f"port {port} of {host} cannot be listened on: {error.strerror}; choose others with "
            "--port and --host"
        ) from error
    return listener


def set_up_log(level: str) -> None:
    """Lines of JSON on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("pliant").setLevel(level.upper())
    # What uvicorn says of a connection that broke off is of no use to anyone.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
