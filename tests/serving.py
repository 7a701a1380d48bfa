"""A real server on loopback, in a thread, over a small random model."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

import pliant
from pliant.server.app import make_app
from pliant.server.grammar import Compiler

__all__ = ["Reply", "Server", "running_server", "wait_until"]

WAIT = 30.0


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of the answer; it must have the form of OpenAI's."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert isinstance(found["message"], str)
        assert found["message"]
        return found  # type: ignore[no-any-return]

    @property
    def events(self) -> list[Any]:
        """The data of a stream of events, the mark of its end left out."""
        lines = self.body.decode().split("\n\n")
        data = [line.split("data: ", 1)[1] for line in lines if "data: " in line]
        return [json.loads(item) for item in data if item != "[DONE]"]


class Server:
    """The address of a running server, and plain requests to it."""

    def __init__(self, port: int, app: Any, model: pliant.Model) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.app = app
        self.model = model
        self.kitchen = app.state.kitchen
        self.scheduler = self.kitchen.bridge.scheduler

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        heads = {"Content-Type": "application/json"} if data is not None else {}
        connection = self.connect()
        try:
            connection.request(method, path, data, {**heads, **(headers or {})})
            reply = connection.getresponse()
            names = {key.lower(): value for key, value in reply.getheaders()}
            return Reply(reply.status, names, reply.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        return self.send("POST", path, body, headers)

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return self.send("GET", path, None, headers)


@contextmanager
def running_server(model: pliant.Model, **options: Any) -> Iterator[Server]:
    """Serve `model`; `options` go to make_app. Afterwards no page may be left."""
    compiler = Compiler(model.tokenizer, model.pack.manifest.tokens.eos)
    app = make_app(model, **{"name": "tiny", "compiler": compiler, "patience": 5.0, **options})
    config = uvicorn.Config(
        app, port=0, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(port, app, model)
    finally:
        server.should_exit = True
        thread.join(WAIT)
    assert not thread.is_alive()
    assert model._executor.kv_pages_used == 0
    assert not model._holdings.cache._entries


def wait_until(condition: Any, seconds: float = WAIT) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
