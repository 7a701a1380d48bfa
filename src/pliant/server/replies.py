"""Sending: JSON, streams of events, and noticing that a client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pliant.engine.answers import Choice, Piece
from pliant.errors import EngineError, PliantError
from pliant.server.bridge import Flow
from pliant.server.problems import Problem, problem_of

__all__ = [
    "Events",
    "Gathered",
    "collect",
    "event",
    "json_reply",
    "made_reply",
    "piece_problem",
    "while_here",
]

T = TypeVar("T")

WRITE_SECONDS = 60.0
"""How long a client may take to accept a piece of a stream before it counts as gone."""

_encoder = msgspec.json.Encoder()


def json_reply(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON."""
    return Response(_encoder.encode(value), status, dict(headers or {}), "application/json")


def made_reply(body: Mapping[str, Any]) -> Response:
    """A whole answer, with the quality in its field `pliant` in the headers too."""
    return json_reply(body, headers=_quality_headers(body["pliant"]))


def _quality_headers(made: Mapping[str, Any]) -> dict[str, str]:
    """With what an answer was made, for its headers: `bits_per_weight` and `expected_kl`, where
    they are known."""
    headers = {}
    if made["bits_per_weight"] is not None:
        headers["Pliant-Bits-Per-Weight"] = f"{made['bits_per_weight']:.4f}"
    if made["expected_kl"] is not None:
        headers["Pliant-Expected-KL"] = f"{made['expected_kl']:.6g}"
    return headers


def event(value: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    data = value if isinstance(value, bytes) else _encoder.encode(value)
    return head + b"data: " + data + b"\n\n"


@dataclass(slots=True)
class Gathered:
    """An answer as far as it has come."""

    text: list[str] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece in; a Problem if it is an error."""
        problem = piece_problem(piece)
        if problem is not None:
            raise problem
        if piece.text:
            self.text.append(piece.text)
        self.choices += piece.choices
        self.reason = piece.finish_reason


def piece_problem(piece: Piece) -> Problem | None:
    """What is wrong with a piece."""
    error = piece.error
    if error is None and piece.finish_reason == "cancelled":
        error = EngineError("the server is stopping, and this answer was not finished")
    return None if error is None else problem_of(error)


async def collect(flow: Flow) -> list[Gathered]:
    """All of some answers. The flow is closed in any case."""
    gathered = [Gathered() for _ in flow.answers]
    try:
        async for at, piece in flow.pieces():
            gathered[at].add(piece)
    finally:
        flow.close()
    return gathered


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_here(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves: then ClientDisconnect."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class Events(Response):
    """A stream of server-sent events that ends with its client. An error after the beginning is an
    event too. `made`: the quality at the beginning, for the headers."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        flow: Flow,
        made: Mapping[str, Any],
        *,
        last: bytes = b"data: [DONE]\n\n",
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, {**headers, **_quality_headers(made)})
        del self.headers["content-length"]
        self._events = events
        self._flow = flow
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}

        async def put(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        async def write() -> None:
            try:
                async for data in self._events:
                    await put(data)
            except (Problem, PliantError) as error:
                problem = error if isinstance(error, Problem) else problem_of(error)
                await put(event(problem.body))
            await put(self._last, more=False)

        try:
            await send(start)
            writer, watch = asyncio.ensure_future(write()), asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait({writer, watch}, return_when=asyncio.FIRST_COMPLETED)
                if writer.done():
                    with suppress(TimeoutError):
                        writer.result()
            finally:
                for one in (writer, watch):
                    one.cancel()
                await asyncio.gather(writer, watch, return_exceptions=True)
        finally:
            self._flow.close()
