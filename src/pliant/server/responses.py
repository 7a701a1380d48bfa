"""/v1/responses: text in and out. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pliant.server import schema
from pliant.server.bridge import Flow
from pliant.server.chat import template_messages, text_of
from pliant.server.guard import body_of, note, who_asks
from pliant.server.prepare import Form, Kitchen, ToolUse, quality
from pliant.server.problems import Problem
from pliant.server.replies import Events, collect, event, made_reply, piece_problem, while_here
from pliant.server.schema import ResponsesRequest, parse
from pliant.server.tools import Call, new_id

__all__ = ["responses"]


async def responses(request: Request) -> Response:
    """Answer an input."""
    kitchen: Kitchen = request.app.state.kitchen
    asked = parse(body_of(request), ResponsesRequest)
    kitchen.check_name(asked.model)
    choice = asked.tool_choice
    use = kitchen.tool_use(
        [_tool_dict(tool) for tool in asked.tools or ()],
        choice if isinstance(choice, str) else None,
        choice.name if isinstance(choice, schema.NamedResponsesTool) else None,
        asked.parallel_tool_calls,
    )
    wanted = asked.text.format if asked.text is not None else None
    form: Form | None
    if isinstance(wanted, schema.ResponsesSchemaFormat):
        described = schema.JsonSchema(name=wanted.name, schema=wanted.schema)
        form = kitchen.form_of(schema.SchemaFormat(json_schema=described), use)
    else:
        form = kitchen.form_of(wanted, use)
    prompt = await kitchen.chat_ids(_messages(asked), use)
    flow = await kitchen.submit(
        asked, [prompt], who=who_asks(request), max_tokens=asked.max_output_tokens, form=form
    )
    note(request, answers=flow.answers, user=asked.user)
    reply = _Reply(kitchen, flow, use, asked)
    if asked.stream:
        return Events(reply.events(), flow, kitchen.quality_now(), last=b"")
    return await while_here(request, reply.whole())


def _tool_dict(tool: schema.ResponsesTool) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(tool)
    function = {
        key: value
        for key, value in plain.items()
        if value is not None and key not in ("type", "strict")
    }
    return {"type": "function", "function": function}


def _messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    result: list[schema.Message] = []
    if asked.instructions is not None:
        result.append(schema.Message(role="system", content=asked.instructions))
    if isinstance(asked.input, str):
        result.append(schema.Message(role="user", content=asked.input))
        return template_messages(result)
    for at, item in enumerate(asked.input):
        if item.type == "message":
            if item.role is None or item.content is None:
                raise Problem(400, f"input[{at}]: a message has a role and content", param="input")
            result.append(schema.Message(role=item.role, content=text_of(item.content)))
        elif item.type == "function_call":
            if item.call_id is None or item.name is None or item.arguments is None:
                raise Problem(400, f"input[{at}]: a call has call_id, name and arguments",
                              param="input")  # fmt: skip
            called = schema.CalledFunction(name=item.name, arguments=item.arguments)
            call = schema.ToolCall(id=item.call_id, function=called)
            result.append(schema.Message(role="assistant", tool_calls=[call]))
        else:
            if item.call_id is None or item.output is None:
                raise Problem(400, f"input[{at}]: the output of a call has call_id and output",
                              param="input")  # fmt: skip
            result.append(
                schema.Message(role="tool", tool_call_id=item.call_id, content=item.output)
            )
    return template_messages(result)


class _Reply:
    def __init__(
        self, kitchen: Kitchen, flow: Flow, use: ToolUse | None, asked: ResponsesRequest
    ) -> None:
        self._flow = flow
        self._use = use
        self._message = new_id("msg_")
        self._number = 0
        sampling = flow.answers[0].request.sampling
        choice = asked.tool_choice
        self._base: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": kitchen.name,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tool_choice": msgspec.to_builtins(choice) if choice is not None else "auto",
            "tools": [msgspec.to_builtins(tool) for tool in asked.tools or ()],
            "store": False,
            "truncation": "disabled",
            "text": {"format": {"type": "text"}},
            "user": asked.user,
        }

    async def whole(self) -> Response:
        """The answer in one piece."""
        one = (await collect(self._flow))[0]
        text, calls = self._parted("".join(one.text))
        return made_reply(self._done(text, calls, one.reason))

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        start = {**self._base, "status": "in_progress", "output": [], "usage": None}
        yield self._event("response.created", response=start)
        yield self._event("response.in_progress", response=start)
        reader = None if self._use is None else self._use.reader()
        parts: list[str] = []
        place = {"item_id": self._message, "output_index": 0, "content_index": 0}
        calls: list[Call] = []
        reason = None
        async for _, piece in self._flow.pieces():
            problem = piece_problem(piece)
            if problem is not None:
                error = {"code": problem.code or "server_error", "message": problem.message}
                failed = {**start, "status": "failed", "error": error}
                yield self._event("response.failed", response=failed)
                return
            text = piece.text if reader is None else reader.push(piece.text)
            if piece.last and reader is not None:
                rest, calls = reader.finish()
                text += rest
            if text:
                if not parts:
                    yield self._event(
                        "response.output_item.added", output_index=0, item=self._item("", False)
                    )
                    yield self._event("response.content_part.added", **place, part=_part(""))
                parts.append(text)
                yield self._event("response.output_text.delta", **place, delta=text, logprobs=[])
            reason = piece.finish_reason
        whole = "".join(parts)
        if parts or not calls:
            item = self._item(whole, True)
            if not parts:
                yield self._event("response.output_item.added", output_index=0, item=item)
                yield self._event("response.content_part.added", **place, part=_part(""))
            yield self._event("response.output_text.done", **place, text=whole, logprobs=[])
            yield self._event("response.content_part.done", **place, part=_part(whole))
            yield self._event("response.output_item.done", output_index=0, item=item)
        body = self._done(whole, calls, reason)
        for at, item in enumerate(body["output"]):
            if item["type"] == "function_call":
                begun = {**item, "arguments": "", "status": "in_progress"}
                yield self._event("response.output_item.added", output_index=at, item=begun)
                at_call = {"item_id": item["id"], "output_index": at}
                yield self._event(
                    "response.function_call_arguments.delta", **at_call, delta=item["arguments"]
                )
                yield self._event(
                    "response.function_call_arguments.done", **at_call,
                    arguments=item["arguments"], name=item["name"],
                )  # fmt: skip
                yield self._event("response.output_item.done", output_index=at, item=item)
        yield self._event(f"response.{body['status']}", response=body)

    def _parted(self, text: str) -> tuple[str, list[Call]]:
        if self._use is None:
            return text, []
        reader = self._use.reader()
        out = reader.push(text)
        rest, calls = reader.finish()
        return out + rest, calls

    def _item(self, text: str, done: bool) -> dict[str, Any]:
        return {
            "id": self._message,
            "type": "message",
            "role": "assistant",
            "status": "completed" if done else "in_progress",
            "content": [_part(text)] if done else [],
        }

    def _done(self, text: str, calls: Sequence[Call], reason: str | None) -> dict[str, Any]:
        answer = self._flow.answers[0]
        output: list[dict[str, Any]] = [self._item(text, True)] if text or not calls else []
        output += [
            {
                "id": new_id("fc_"),
                "type": "function_call",
                "status": "completed",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
            }
            for call in calls
        ]
        cut = reason in ("length", "context")
        prompt, made = len(answer.request.prompt), len(answer.tokens)
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": answer.cached},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + made,
            },
            "pliant": quality(self._flow.answers),
        }

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **values}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
