"""A file of requests to a file of answers, in the format of OpenAI's batches.

The requests go through the same application as over HTTP, without the network.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import msgspec
from starlette.applications import Starlette

from pliant.engine.pace import Pace
from pliant.errors import UsageError
from pliant.server.serve import Settings, open_app
from pliant.server.tools import new_id

__all__ = ["Progress", "run_batch"]

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")

_PREFIX = 256  # characters in which prompts are looked upon as beginning alike

Show = Callable[["Progress"], None]


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Usage(msgspec.Struct):
    total_tokens: int = 0


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Response(msgspec.Struct):
    status_code: int = 0


class _Answered(msgspec.Struct):
    custom_id: str
    response: _Response | None = None


@dataclass(slots=True)
class Progress:
    """How far a batch is. Times are in seconds; `answered` and `failed` are of this run."""

    total: int
    skipped: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Requests that have an answer."""
        return self.skipped + self.answered

    @property
    def tokens_per_second(self) -> float:
        """Tokens of prompts and answers."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        left = self.total - self.done
        return self.seconds / self.answered * left if self.answered else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the speed."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a request is in the file, and by what it is put in order."""

    id: str
    offset: int
    length: int
    start: str
    rest: int


def run_batch(settings: Settings, source: str, target: str, show: Show) -> Progress:
    """Answer the requests in `source` that have no answer in `target`, and append those.

    UsageError if a line is no request, before anything is loaded; whatever `pliant.load` raises.
    """
    with open(source, "rb") as requests:  # noqa: PTH123 - kept open for the whole run
        places = list(_places(requests, settings.body_limit))
        names = {place.id for place in places}
        if len(names) < len(places):
            raise UsageError(f"{source}: a custom_id is there twice")
        done = _answered(target)
        left = in_order([place for place in places if place.id not in done])
        progress = Progress(len(places), skipped=len(places) - len(left))
        if left:
            # The lines of the file are the queue, and nobody waits for a single token.
            settings = replace(settings, most_waiting=2**20, pace=Pace(stretch=math.inf, least=256))
            with open_app(settings) as app, open(target, "ab") as answers:  # noqa: PTH123
                asyncio.run(_Batch(app, settings, requests, answers, progress, show).run(left))
    return progress


def _places(requests: BinaryIO, limit: int) -> Iterator[_Place]:
    offset = 0
    for number, line in enumerate(iter(lambda: requests.readline(limit + 1), b""), 1):
        where = f"{requests.name}, line {number}"
        if len(line) > limit:
            raise UsageError(f"{where}: more than {limit} bytes")
        if line.strip():
            try:
                asked = msgspec.json.decode(line, type=_Line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise UsageError(f"{where} is no request of a batch: {error}") from error
            if asked.method != "POST" or asked.url not in URLS:
                raise UsageError(f"{where}: {asked.method} {asked.url} is not one of {URLS}")
            text = _prompt_text(asked.body, where)
            yield _Place(asked.custom_id, offset, len(line), text[:_PREFIX], len(text))
        offset += len(line)


def _prompt_text(body: bytes, where: str) -> str:
    """Something that begins alike where prompts do."""
    try:
        values = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    if values.get("stream"):
        raise UsageError(f"{where}: a batch has no streams; leave out stream")
    return msgspec.json.encode(
        [values.get(name) for name in ("tools", "instructions", "messages", "input", "prompt")]
    ).decode()


def in_order(places: list[_Place]) -> list[_Place]:
    """Requests that begin alike together, so that their beginning is computed once; the groups with
    the longest first, so that none of these is left over at the end."""
    groups: dict[str, list[_Place]] = {}
    for place in places:
        groups.setdefault(place.start, []).append(place)
    for group in groups.values():
        group.sort(key=lambda place: -place.rest)
    ordered = sorted(groups.values(), key=lambda group: (-group[0].rest, group[0].start))
    return [place for group in ordered for place in group]


def _answered(target: str) -> set[str]:
    """The requests that have an answer; half a line at the end is cut off."""
    done: set[str] = set()
    if not os.path.exists(target):  # noqa: PTH110
        return done
    whole = 0
    with open(target, "r+b") as file:  # noqa: PTH123
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                done.add(msgspec.json.decode(line, type=_Answered).custom_id)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise UsageError(
                    f"{target} holds something else than answers of a batch: {error}"
                ) from error
            whole += len(line)
        file.truncate(whole)
    return done


class _Batch:
    def __init__(
        self,
        app: Starlette,
        settings: Settings,
        requests: BinaryIO,
        answers: BinaryIO,
        progress: Progress,
        show: Show,
    ) -> None:
        self._app = app
        self._at_once = settings.most_running * 2  # so that there is always one to follow
        self._requests = requests
        self._answers = answers
        self._progress = progress
        self._show = show
        self._begin = time.perf_counter()

    async def run(self, places: list[_Place]) -> None:
        """Answer all."""
        left = iter(places)
        async with self._app.router.lifespan_context(self._app), asyncio.TaskGroup() as tasks:
            for _ in range(min(self._at_once, len(places))):
                tasks.create_task(self._work(left))

    async def _work(self, left: Iterator[_Place]) -> None:
        for place in left:
            self._requests.seek(place.offset)
            asked = msgspec.json.decode(self._requests.read(place.length), type=_Line)
            status, body = await self._ask(asked)
            response = {
                "status_code": status,
                "request_id": new_id("req_"),
                "body": msgspec.Raw(body),
            }
            line = {
                "id": new_id("batch_req_"),
                "custom_id": asked.custom_id,
                "response": response,
                "error": None,
            }
            self._answers.write(msgspec.json.encode(line) + b"\n")
            self._answers.flush()
            now = self._progress
            now.answered += 1
            now.failed += status != 200
            if status == 200:
                usage = msgspec.json.decode(body, type=_Body).usage
                now.tokens += usage.total_tokens if usage is not None else 0
            now.seconds = time.perf_counter() - self._begin
            self._show(now)

    async def _ask(self, asked: _Line) -> tuple[int, bytes]:
        body = bytes(asked.body)
        sent, status, parts = False, 0, list[bytes]()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # this client never leaves
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": asked.url,
            "raw_path": asked.url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("batch", 0),
            "server": ("localhost", 0),
        }
        await self._app(scope, receive, send)
        return status, b"".join(parts)
