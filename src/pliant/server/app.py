"""The application: routes, and how errors become answers."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pliant.engine.control import BudgetControl
from pliant.engine.model import Model
from pliant.engine.pace import Pace
from pliant.errors import PliantError
from pliant.server import operation
from pliant.server.bridge import Bridge
from pliant.server.chat import chat_completions
from pliant.server.completions import completions
from pliant.server.embeddings import embeddings
from pliant.server.grammar import Compiler
from pliant.server.guard import Guard
from pliant.server.metrics import Metrics
from pliant.server.prepare import Kitchen
from pliant.server.problems import Problem, problem_of
from pliant.server.replies import json_reply
from pliant.server.responses import responses

__all__ = ["log_move", "make_app"]

LOG = logging.getLogger("pliant.server")

_ROUTES = [
    Route("/v1/models", operation.models, methods=["GET"]),
    Route("/v1/models/{name:path}", operation.model, methods=["GET"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/budget", operation.budget, methods=["GET"]),
    Route("/v1/budget", operation.set_budget, methods=["PUT"]),
    Route("/v1/state", operation.state, methods=["GET"]),
    Route("/tokenize", operation.tokenize, methods=["POST"]),
    Route("/detokenize", operation.detokenize, methods=["POST"]),
    Route("/health", operation.health, methods=["GET"]),
    Route("/ready", operation.ready, methods=["GET"]),
    Route("/metrics", operation.metrics, methods=["GET"]),
    Route("/", operation.page, methods=["GET"]),
    Route("/page.css", operation.page, methods=["GET"]),
    Route("/page.js", operation.page, methods=["GET"]),
]


def make_app(
    model: Model,
    *,
    name: str,
    compiler: Compiler | None = None,
    keys: Iterable[str] = (),
    local: bool = True,
    body_limit: int = 2**20,
    most_running: int = 16,
    most_waiting: int = 256,
    patience: float = 30.0,
    pace: Pace | None = None,
) -> Starlette:
    """An ASGI application that serves `model` under `name`.

    `compiler`: for answers of a given form; without, they are refused. `keys`: API keys; none are
    needed if there are none. `local`: take only requests that name this machine, if there are no
    keys. `most_running`: answers in a step; the model must have been loaded for as many.
    `patience`: seconds in which answers may be finished when the application stops. `pace`: how
    prompts are read beside answers.
    """
    bridge = Bridge(model, most_running=most_running, most_waiting=most_waiting, pace=pace)
    counted = Metrics()
    bridge.begun = counted.begin
    bridge.watch = counted.piece

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        bridge.start()
        try:
            yield
        finally:
            await bridge.stop(patience)

    app = Starlette(
        routes=_ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(Guard, keys=tuple(keys), body_limit=body_limit, local=local)],
        exception_handlers={
            Problem: _problem,
            PliantError: _pliant_error,
            HTTPException: _http_error,
            Exception: _mistake,
        },
    )
    app.router.redirect_slashes = False
    app.state.kitchen = Kitchen(bridge, name, compiler)
    app.state.metrics = counted
    app.state.control = BudgetControl(model, log=log_move)
    app.state.started = int(time.time())
    return app


def log_move(line: str) -> None:
    """A line of a governor, for the log."""
    LOG.info("memory", extra={"fields": {"move": line}})


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return json_reply(error.body, error.status, error.headers)


async def _pliant_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PliantError)
    return await _problem(request, problem_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    text = {404: f"there is no {what} here", 405: f"{what} is not a method of this path"}
    problem = Problem(error.status_code, text.get(error.status_code, error.detail))
    return json_reply(problem.body, error.status_code, error.headers)


async def _mistake(request: Request, error: Exception) -> Response:
    LOG.error("mistake", exc_info=error)
    problem = Problem(500, "the server made a mistake; its log says more")
    return json_reply(problem.body, 500)
