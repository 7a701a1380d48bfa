"""The control socket: a running `pliant run` can be told its budget from another terminal.

A Unix-domain socket for each process, in a folder that only this user can open. A request is one
line of JSON, {"method": "GET"} or {"method": "PUT", "memory": "200MiB"}; the answer is one line:
what `BudgetControl` gives, or {"error": {"type": ..., "message": ...}}.

One thread serves all connections, and each has bounds: on the length of a line, on the time to send
it and to take the answer, and on how many there are. So a client that sends garbage, nothing, or
too much is told so, or cut off, and the others are served.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Any

from pliant import errors
from pliant.engine.control import BudgetControl
from pliant.errors import EngineError, PliantError, UsageError
from pliant.store.closing import Closing

__all__ = ["ControlSocket", "ask", "control_folder", "error_from", "running"]

MAX_LINE = 4096
MAX_CLIENTS = 32
PATIENCE = 5.0  # seconds for a request, and for taking the answer


def control_folder() -> Path:
    """The folder of the sockets of this user; made if it is not there.

    EngineError if it belongs to somebody else or others may look inside.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base, "pliant") if base else Path("/tmp", f"pliant-{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise EngineError(f"{folder} cannot be used: {error.strerror}") from error
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.getuid():
        raise EngineError(f"{folder} is not a folder that only you can open: remove it")
    return folder


def running() -> dict[int, Path]:
    """The sockets of processes that run, by process id; those of dead ones are removed."""
    found = {}
    for path in sorted(control_folder().glob("*.sock")):
        if path.stem.isdecimal() and path.stem.isascii():
            if Path("/proc", path.stem).exists():
                found[int(path.stem)] = path
            else:
                path.unlink(missing_ok=True)
    return found


def ask(path: Path, request: dict[str, Any], seconds: float = 60.0) -> dict[str, Any]:
    """Send one request to a socket and return the answer; raises the error that it names."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(seconds)
        try:
            _connect(client, path, seconds)
            client.sendall(json.dumps(request).encode() + b"\n")
            data = bytearray()
            while not data.endswith(b"\n"):
                piece = client.recv(65536)
                if not piece:
                    raise EngineError(f"{path} closed the connection without an answer")
                data += piece
        except OSError as error:
            raise EngineError(f"{path} does not answer: {error}") from error
    answer = json.loads(data)
    if "error" in answer:
        raise error_from(answer["error"])
    found: dict[str, Any] = answer
    return found


def _connect(client: socket.socket, path: Path, seconds: float) -> None:
    """Also where so many wait that the kernel asks to try again."""
    end = time.monotonic() + seconds
    while True:
        try:
            return client.connect(str(path))
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def error_from(told: dict[str, Any]) -> PliantError:
    """The exception that an answer names, by the name of its class."""
    found = getattr(errors, str(told.get("type")), EngineError)
    if not (isinstance(found, type) and issubclass(found, PliantError)):
        found = EngineError
    return found(str(told.get("message")))


class _Client:
    __slots__ = ("answer", "deadline", "line")

    def __init__(self) -> None:
        self.line = bytearray()
        self.answer = bytearray()
        self.deadline = time.monotonic() + PATIENCE


class ControlSocket(Closing):
    """Serves the requests for one model until it is closed; a context manager."""

    def __init__(self, control: BudgetControl, folder: Path | None = None) -> None:
        """Begins to listen. `folder`: instead of that of this user; EngineError if it cannot."""
        self._control = control
        self.path = (folder or control_folder()) / f"{os.getpid()}.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._clients: dict[socket.socket, _Client] = {}
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.path.unlink(missing_ok=True)
            self._socket.bind(str(self.path))
            self.path.chmod(0o600)
            self._socket.listen(MAX_CLIENTS)
        except OSError as error:
            self._release()
            raise EngineError(f"{self.path} cannot be made: {error}") from error
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="pliant-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the socket. Nothing happens the second time."""
        if not self._closed:
            self._closed = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self.path.unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        self._socket.close()
        self._selector.close()
        os.close(self._wake)

    def _serve(self) -> None:
        while not self._closed:
            ends = [client.deadline for client in self._clients.values()]
            left = max(min(ends) - time.monotonic(), 0) if ends else None
            for key, events in self._selector.select(left):
                if key.fileobj is self._socket:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._turn(key.fileobj, events)
            now = time.monotonic()
            for late in [s for s, client in self._clients.items() if client.deadline <= now]:
                self._drop(late)
        for client in list(self._clients):
            self._drop(client)

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except OSError:  # gone already, or no descriptor is left
            time.sleep(0.01)
            return
        # The folder keeps others out; should somebody have opened it, this does.
        peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", peer)[1] not in (os.getuid(), 0):
            client.close()
            return
        client.setblocking(False)
        self._clients[client] = _Client()
        self._selector.register(client, selectors.EVENT_READ)
        if len(self._clients) > MAX_CLIENTS:
            self._answer(client, _error(EngineError("too many clients at once; try again")))
            self._drop(client)

    def _turn(self, client: socket.socket, events: int) -> None:
        state = self._clients[client]
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(client)
                return
            data = client.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        state.line += data
        line, found, rest = state.line.partition(b"\n")
        if found:
            state.line = bytearray(rest)
            self._answer(client, self._handle(line))
            if rest:  # one request at a time: the next follows the answer
                self._drop(client)
        elif len(state.line) >= MAX_LINE:
            what = UsageError(f"a request is one line of less than {MAX_LINE} bytes")
            self._answer(client, _error(what))
            self._drop(client)

    def _handle(self, line: bytes | bytearray) -> dict[str, Any]:
        try:
            try:
                request = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"a request is one line of JSON: {error}") from None
            if not isinstance(request, dict):
                raise UsageError('a request is an object such as {"method": "GET"}')
            method = request.pop("method", None)
            if method == "GET" and not request:
                return self._control.get()
            if method == "PUT":
                return self._control.put(request)
            raise UsageError('a request is {"method": "GET"} or {"method": "PUT", "memory": ...}')
        except Exception as error:  # noqa: BLE001 - whatever it is, others must be served
            return _error(error)

    def _answer(self, client: socket.socket, answer: dict[str, Any]) -> None:
        state = self._clients[client]
        state.answer += json.dumps(answer).encode() + b"\n"
        state.deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            self._flush(client)

    def _flush(self, client: socket.socket) -> None:
        state = self._clients[client]
        with contextlib.suppress(BlockingIOError):
            del state.answer[: client.send(state.answer)]
        # While an answer waits to be taken, nothing more is read.
        wanted = selectors.EVENT_WRITE if state.answer else selectors.EVENT_READ
        self._selector.modify(client, wanted)

    def _drop(self, client: socket.socket) -> None:
        del self._clients[client]
        self._selector.unregister(client)
        client.close()


def _error(error: BaseException) -> dict[str, Any]:
    kind = type(error).__name__ if isinstance(error, PliantError | OSError) else "EngineError"
    return {"error": {"type": kind, "message": str(error)}}
