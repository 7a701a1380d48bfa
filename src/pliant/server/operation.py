"""What is not an answer: models, tokens, the budget, health, metrics, the page."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from pliant.engine.control import BudgetControl
from pliant.errors import BudgetError, PliantError
from pliant.server.chat import template_messages
from pliant.server.guard import body_of
from pliant.server.metrics import Metrics
from pliant.server.prepare import Kitchen
from pliant.server.problems import Problem
from pliant.server.replies import json_reply
from pliant.server.schema import BudgetRequest, DetokenizeRequest, TokenizeRequest, parse

__all__ = [
    "budget",
    "detokenize",
    "health",
    "metrics",
    "model",
    "models",
    "page",
    "ready",
    "set_budget",
    "state",
    "tokenize",
]

PAGE = Path(__file__).parent / "page"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)


def _kitchen(request: Request) -> Kitchen:
    kitchen: Kitchen = request.app.state.kitchen
    return kitchen


async def models(request: Request) -> Response:
    """GET /v1/models"""
    return json_reply({"object": "list", "data": [_model(request)]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME"""
    _kitchen(request).check_name(request.path_params["name"])
    return json_reply(_model(request))


def _model(request: Request) -> dict[str, Any]:
    kitchen = _kitchen(request)
    return {
        "id": kitchen.name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "pliant",
        "context": kitchen.model.context,
        "pliant": kitchen.quality_now(),
    }


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    kitchen = _kitchen(request)
    asked = parse(body_of(request), TokenizeRequest)
    kitchen.check_name(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise Problem(400, "give either prompt or messages", param="prompt")
    if asked.messages is not None:
        ids = await kitchen.chat_ids(template_messages(asked.messages))
    else:
        prompt, special = asked.prompt, asked.add_special_tokens
        ids = await kitchen.bridge.work(
            lambda: kitchen.model.tokenize(prompt or "", special=special)
        )
    return json_reply({"tokens": ids, "count": len(ids), "max_model_len": kitchen.model.context})


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    kitchen = _kitchen(request)
    asked = parse(body_of(request), DetokenizeRequest)
    kitchen.check_name(asked.model)
    vocab = kitchen.model.tokenizer.vocab_size
    for token in asked.tokens:
        if not 0 <= token < vocab:
            raise Problem(400, f"token {token} is not one of {vocab}", param="tokens")
    return json_reply({"prompt": await kitchen.bridge.work(kitchen.model.detokenize, asked.tokens)})


# --- the budget


def _control(request: Request) -> BudgetControl:
    control: BudgetControl = request.app.state.control
    return control


async def budget(request: Request) -> Response:
    """GET /v1/budget"""
    return json_reply(await _kitchen(request).bridge.work(_control(request).get))


async def set_budget(request: Request) -> Response:
    """PUT /v1/budget: answers once all that shrinks has shrunk, or refuses and changes nothing."""
    kitchen = _kitchen(request)
    asked = parse(body_of(request), BudgetRequest)
    wish = {"memory": asked.memory, "keep_free": asked.keep_free}
    counted: Metrics = request.app.state.metrics
    try:
        state = await kitchen.bridge.move(_control(request), wish)
    except PliantError as error:
        counted.moves.labels("refused" if isinstance(error, BudgetError) else "failed").inc()
        raise
    counted.moves.labels("done").inc()
    return json_reply(state)


# --- operation


async def health(request: Request) -> Response:
    """GET /health: whether the process lives."""
    failure = _kitchen(request).bridge.scheduler.failure
    if failure is not None:
        return json_reply({"status": "failed", "reason": str(failure)}, 500)
    return json_reply({"status": "ok"})


async def ready(request: Request) -> Response:
    """GET /ready: whether requests are taken."""
    if _kitchen(request).bridge.scheduler.alive:
        return json_reply({"status": "ready"})
    return json_reply({"status": "stopping"}, 503)


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    kitchen = _kitchen(request)
    counted: Metrics = request.app.state.metrics

    def text() -> bytes:
        return counted.text(kitchen.bridge.scheduler.state(), kitchen.model.report())

    return Response(
        await kitchen.bridge.work(text), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


async def state(request: Request) -> Response:
    """GET /v1/state: what the page and `pliant top` show."""
    kitchen = _kitchen(request)

    def whole() -> dict[str, Any]:
        now, report = kitchen.bridge.scheduler.state(), kitchen.model.report()
        return {
            "model": kitchen.name,
            "time": time.time(),
            "waiting": now.waiting,
            "running": now.running,
            "kv": {"bytes": now.kv, "used": now.kv_used, "pages": now.pages, "kept": now.kept},
            "counters": asdict(now.counters),
            "budget": _control(request).get(),
            "threads": report.threads,
            "isa": report.isa,
            "matrices": report.matrices,
        }

    return json_reply(await kitchen.bridge.work(whole))


async def page(request: Request) -> Response:
    """GET /: the page and its two files."""
    name = {"/": "page.html"}.get(request.url.path, request.url.path.removeprefix("/"))
    return FileResponse(
        PAGE / name,
        headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"},
    )
