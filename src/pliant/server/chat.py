"""/v1/chat/completions"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pliant.engine.answers import Choice
from pliant.engine.seam import Tokenizer
from pliant.server.bridge import Flow
from pliant.server.guard import body_of, note, who_asks
from pliant.server.prepare import (
    Kitchen,
    ToolUse,
    finish_reason,
    quality,
    usage_of,
    wants_usage,
)
from pliant.server.problems import Problem
from pliant.server.replies import Events, collect, event, made_reply, piece_problem, while_here
from pliant.server.schema import ChatRequest, Message, NamedTool, Part, parse
from pliant.server.tools import Call, new_id

__all__ = ["chat_completions", "template_messages", "text_of", "tool_dict"]


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    kitchen: Kitchen = request.app.state.kitchen
    asked = parse(body_of(request), ChatRequest)
    kitchen.check_name(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    usage = wants_usage(asked)
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise Problem(400, "max_tokens and max_completion_tokens are the same: give one of them",
                      param="max_tokens")  # fmt: skip
    choice = asked.tool_choice
    use = kitchen.tool_use(
        [tool_dict(tool) for tool in asked.tools or ()],
        choice if isinstance(choice, str) else None,
        choice.function.name if isinstance(choice, NamedTool) else None,
        asked.parallel_tool_calls,
    )
    form = kitchen.form_of(asked.response_format, use)
    prompt = await kitchen.chat_ids(template_messages(asked.messages), use)
    flow = await kitchen.submit(
        asked,
        [prompt],
        who=who_asks(request),
        n=asked.n or 1,
        max_tokens=asked.max_tokens or asked.max_completion_tokens,
        stop=asked.stop,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        form=form,
    )
    reply = _Reply(kitchen, flow, use, bool(asked.logprobs))
    note(request, answers=flow.answers, user=asked.user)
    if asked.stream:
        return Events(reply.events(usage), flow, kitchen.quality_now())
    return await while_here(request, reply.whole())


class _Reply:
    def __init__(self, kitchen: Kitchen, flow: Flow, use: ToolUse | None, logprobs: bool) -> None:
        self._head = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": kitchen.name,
        }
        self._tokenizer = kitchen.model.tokenizer
        self._flow = flow
        self._use = use
        self._logprobs = logprobs

    async def whole(self) -> Response:
        """The answer in one piece."""
        choices = []
        for index, one in enumerate(await collect(self._flow)):
            text, calls = "".join(one.text), list[Call]()
            if self._use is not None:
                reader = self._use.reader()
                text = reader.push(text)
                rest, calls = reader.finish()
                text += rest
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message["content"] = text or None
                message["tool_calls"] = [_call_dict(call) for call in calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logs(one.choices),
                    "finish_reason": "tool_calls" if calls else finish_reason(one.reason),
                }
            )
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(self._flow.answers, 1),
            "pliant": quality(self._flow.answers),
        }
        return made_reply(body)

    async def events(self, usage: bool) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        count = len(self._flow.answers)
        for index in range(count):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        readers = [None if self._use is None else self._use.reader() for _ in range(count)]
        async for at, piece in self._flow.pieces():
            problem = piece_problem(piece)
            if problem is not None:
                raise problem
            reader, calls = readers[at], list[Call]()
            text = piece.text if reader is None else reader.push(piece.text)
            if piece.last and reader is not None:
                rest, calls = reader.finish()
                text += rest
            if text or (piece.choices and self._logprobs):
                yield self._chunk(at, {"content": text}, logs=self._logs(piece.choices))
            for number, call in enumerate(calls):
                yield self._chunk(at, {"tool_calls": [{"index": number, **_call_dict(call)}]})
            if piece.last:
                reason = "tool_calls" if calls else finish_reason(piece.finish_reason)
                yield self._chunk(at, {}, reason=reason)
        end: dict[str, Any] = {"pliant": quality(self._flow.answers)}
        if usage:
            end["usage"] = usage_of(self._flow.answers, 1)
        yield event({**self._head, "object": "chat.completion.chunk", "choices": [], **end})

    def _chunk(
        self, index: int, delta: dict[str, Any], *, reason: str | None = None, logs: Any = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logs, "finish_reason": reason}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def _logs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [log_dict(self._tokenizer, c) for c in choices], "refusal": None}


def log_dict(tokenizer: Tokenizer, choice: Choice) -> dict[str, Any]:
    """A token and its probability, as the OpenAI API writes it."""

    def one(token: int, value: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

    top = [one(token, value) for token, value in choice.top]
    return {**one(choice.token, choice.logprob), "top_logprobs": top}


def tool_dict(tool: msgspec.Struct) -> dict[str, Any]:
    """A tool as templates take it, without what was not given."""
    plain: dict[str, Any] = msgspec.to_builtins(tool)
    function = {key: value for key, value in plain["function"].items() if value is not None}
    function.pop("strict", None)
    return {"type": "function", "function": function}


def _call_dict(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def text_of(content: str | Sequence[Part] | None) -> str:
    """The text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them."""
    result = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": text_of(message.content)}
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        result.append(plain)
    return result


def _arguments(text: str) -> Any:
    """Templates write arguments as JSON: they want the values, not a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
