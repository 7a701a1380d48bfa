"""What every request passes first: who asks, how large it is, and the line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pliant.engine.answers import Answer
from pliant.server.problems import Problem

__all__ = ["Guard", "JsonLines", "body_of", "is_loopback", "note", "who_asks"]

LOG = logging.getLogger("pliant.server")

BODY_SECONDS = 30.0
"""How long a client may take to send the body of a request."""

_READ_PAST = 16
"""A body up to so many times too large is read to its end and thrown away: many clients see the
answer only once they have sent everything."""

_BODIES = 4
"""Bodies of the largest size that may be in memory at once."""

_OPEN = frozenset({"/", "/page.css", "/page.js", "/health", "/ready"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_PORT = re.compile(r":[0-9]*$")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def who_asks(request: Request) -> str:
    """Who gets one share of the work: a key, or an address where there are no keys."""
    who: str = request.scope.get("pliant.who", "")
    return who


def body_of(request: Request) -> bytes:
    """The body of a request. It can be taken once, so that nobody keeps it."""
    body: bytes = request.scope.pop("pliant.body", b"")
    return body


def note(request: Request, *, answers: Sequence[Answer], user: str | None) -> None:
    """The body has become these answers: what the log shall say of the request."""
    request.scope["pliant.answers"] = list(answers)
    request.scope["pliant.user"] = user
    request.scope["pliant.bytes"].free()


class _Bytes:
    """How much of the memory for bodies a request holds."""

    __slots__ = ("_all", "_mine", "_most")

    def __init__(self, held: list[int], most: int) -> None:
        self._all = held
        self._most = most
        self._mine = 0

    def take(self, count: int) -> bool:
        if self._all[0] + count > self._most:
            return False
        self._all[0] += count
        self._mine += count
        return True

    def free(self) -> None:
        self._all[0] -= self._mine
        self._mine = 0


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Guard:
    """ASGI middleware. With keys, all but the page and its state of health needs one; without, only
    requests that name this machine are taken, so that no web page can reach the server by a name
    that it made point here."""

    def __init__(
        self, app: ASGIApp, *, keys: Iterable[str] = (), body_limit: int, local: bool
    ) -> None:
        self._app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._body_limit = body_limit
        self._local = local and not self._keys
        self._held = [0]  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        name = f"req_{os.urandom(8).hex()}"
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", name.encode()), *_HEADERS]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        held = scope["pliant.bytes"] = _Bytes(self._held, _BODIES * self._body_limit)
        try:
            self._check(scope)
            scope["pliant.body"] = await self._body(scope, receive, held)
            await self._app(scope, receive, watched)
        except Problem as problem:
            if not status:
                await _refuse(problem, watched)
        except ClientDisconnect:
            status = status or 499
        finally:
            held.free()
            self._log(scope, name, status, time.perf_counter() - begin)

    def _check(self, scope: Scope) -> None:
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        client = scope.get("client")
        who = client[0] if client else "local"
        if self._local:
            host = headers.get(b"host", "")
            if _PORT.sub("", host).lower() not in _LOCAL:
                raise Problem(
                    403,
                    f"requests for the host {host!r} are not taken: this server has no API keys, "
                    "and answers only to localhost; start it with API keys to reach it by others",
                )
        elif self._keys and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", "")
            kind, _, key = given.partition(" ")
            digest = hashlib.sha256(key.strip().encode()).digest()
            matches = [hmac.compare_digest(digest, one) for one in self._keys]
            if kind.lower() != "bearer" or not any(matches):
                raise Problem(
                    401, "a valid API key is needed, in the header Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            who = digest.hex()[:12]
        scope["pliant.who"] = who
        if scope["method"] in ("POST", "PUT"):
            kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(
                    415, f"the body must be JSON: Content-Type: application/json, not {kind!r}"
                )

    async def _body(self, scope: Scope, receive: Receive, held: _Bytes) -> bytes:
        if scope["method"] not in ("POST", "PUT"):
            return b""
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= self._body_limit:
                        if not held.take(len(chunk)):
                            raise Problem(
                                429, "too many large requests come at once: try again later",
                                code="too_many_bytes", headers={"Retry-After": "1"},
                            )  # fmt: skip
                        chunks.append(chunk)
                    elif size > _READ_PAST * self._body_limit:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError as error:
            raise Problem(408, f"the body did not come within {BODY_SECONDS:g} seconds") from error
        if size > self._body_limit:
            raise self._too_large()
        return b"".join(chunks)

    def _too_large(self) -> Problem:
        return Problem(413, f"the body may have {self._body_limit} bytes", code="body_too_large")

    def _log(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        answers: list[Answer] = scope.get("pliant.answers", [])
        quiet = scope["path"] in ("/health", "/ready", "/metrics", "/v1/state")
        if not LOG.isEnabledFor(logging.DEBUG if quiet else logging.INFO):
            return
        fields: dict[str, Any] = {
            "request": name,
            "who": scope.get("pliant.who"),
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if scope.get("pliant.user") is not None:
            fields["user"] = scope["pliant.user"]
        if answers:
            fields["prompt_tokens"] = len(answers[0].request.prompt)
            fields["cached_tokens"] = answers[0].cached
            fields["answer_tokens"] = sum(len(answer.tokens) for answer in answers)
            fields |= {
                key: value
                for key, value in answers[0].track.values().items()
                if key in ("bits_per_weight", "expected_kl")
            }
        LOG.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


async def _refuse(problem: Problem, send: Send) -> None:
    data = json.dumps(problem.body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(data)),
        (b"connection", b"close"),
        *((key.lower().encode(), value.encode()) for key, value in problem.headers.items()),
    ]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
