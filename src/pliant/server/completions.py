"""/v1/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pliant.engine.answers import Choice
from pliant.server.bridge import Flow
from pliant.server.guard import body_of, note, who_asks
from pliant.server.prepare import Kitchen, finish_reason, quality, usage_of, wants_usage
from pliant.server.problems import Problem
from pliant.server.replies import Events, collect, event, made_reply, piece_problem, while_here
from pliant.server.schema import CompletionRequest, parse
from pliant.server.tools import new_id

__all__ = ["completions", "prompts_of"]

DEFAULT_TOKENS = 16
MOST_PROMPTS = 128


async def completions(request: Request) -> Response:
    """Continue texts."""
    kitchen: Kitchen = request.app.state.kitchen
    asked = parse(body_of(request), CompletionRequest)
    kitchen.check_name(asked.model)
    usage = wants_usage(asked)
    prompts = await kitchen.bridge.work(prompts_of, kitchen, asked.prompt)
    n = asked.n or 1
    if n * len(prompts) > MOST_PROMPTS:
        raise Problem(400, f"{len(prompts)} prompts with {n} answers each: a request may have "
                      f"{MOST_PROMPTS} answers", param="n")  # fmt: skip
    flow = await kitchen.submit(
        asked,
        prompts,
        who=who_asks(request),
        n=n,
        max_tokens=asked.max_tokens or DEFAULT_TOKENS,
        stop=asked.stop,
        top_logprobs=asked.logprobs,
        form=kitchen.form_of(asked.response_format, None),
    )
    note(request, answers=flow.answers, user=asked.user)
    reply = _Reply(kitchen, flow, len(prompts), asked.logprobs is not None)
    if asked.stream:
        return Events(reply.events(usage), flow, kitchen.quality_now())
    return await while_here(request, reply.whole())


def prompts_of(kitchen: Kitchen, given: Any, name: str = "prompt") -> list[list[int]]:
    """The prompts of a request, which it has under `name`: a text, ids, or a list of either."""

    def ids(value: list[Any]) -> list[int]:
        vocab = kitchen.model.pack.manifest.model.vocab
        for token in value:
            if not 0 <= token < vocab:
                raise Problem(400, f"{name}: token {token} is not one of {vocab}", param=name)
        return value

    def is_ids(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int for item in value)

    if isinstance(given, str):
        return [kitchen.model.tokenize(given)]
    if isinstance(given, list) and given:
        if is_ids(given):
            return [ids(given)]
        if len(given) > MOST_PROMPTS:
            raise Problem(400, f"{name}: {len(given)} texts, and a request may have "
                          f"{MOST_PROMPTS}", param=name)  # fmt: skip
        if all(isinstance(item, str) for item in given):
            return [kitchen.model.tokenize(item) for item in given]
        if all(is_ids(item) and item for item in given):
            return [ids(item) for item in given]
    raise Problem(
        400, f"{name} must be a text, a list of texts, a list of token ids, or a list of such "
        "lists", param=name,
    )  # fmt: skip


class _Reply:
    def __init__(self, kitchen: Kitchen, flow: Flow, prompts: int, logprobs: bool) -> None:
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": kitchen.name,
        }
        self._tokenizer = kitchen.model.tokenizer
        self._flow = flow
        self._prompts = prompts
        self._logprobs = logprobs
        self._offsets = [0] * len(flow.answers)

    async def whole(self) -> Response:
        """The answers in one piece."""
        choices = [
            {
                "index": index,
                "text": "".join(one.text),
                "logprobs": self._logs(index, one.choices),
                "finish_reason": finish_reason(one.reason),
            }
            for index, one in enumerate(await collect(self._flow))
        ]
        body = {
            **self._head,
            "choices": choices,
            "usage": usage_of(self._flow.answers, self._prompts),
            "pliant": quality(self._flow.answers),
        }
        return made_reply(body)

    async def events(self, usage: bool) -> AsyncIterator[bytes]:
        """The answers as they come."""
        async for at, piece in self._flow.pieces():
            problem = piece_problem(piece)
            if problem is not None:
                raise problem
            choice = {
                "index": at,
                "text": piece.text,
                "logprobs": self._logs(at, piece.choices),
                "finish_reason": finish_reason(piece.finish_reason),
            }
            if piece.text or piece.last or self._logprobs:
                yield event({**self._head, "choices": [choice]})
        end: dict[str, Any] = {"pliant": quality(self._flow.answers)}
        if usage:
            end["usage"] = usage_of(self._flow.answers, self._prompts)
        yield event({**self._head, "choices": [], **end})

    def _logs(self, index: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None

        def text(token: int) -> str:
            return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

        tokens = [text(choice.token) for choice in choices]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{text(t): value for t, value in c.top} for c in choices],
            "text_offset": offsets,
        }
