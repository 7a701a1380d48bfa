"""What requests may say. A field that is not here is refused by name, and so is a wrong type.

The names are those of the OpenAI API; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
`priority` and `deadline` are ours, with the meanings that other servers give them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw

from pliant.server.problems import Problem

__all__ = [
    "BudgetRequest",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "FunctionTool",
    "Message",
    "NamedTool",
    "Part",
    "ResponsesRequest",
    "ResponsesTool",
    "TokenizeRequest",
    "ToolCall",
    "parse",
]

T = TypeVar("T")

MOST_VALUES = 2**17
"""Values in a body, about: what they take in memory is many times what they take in the body."""

_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_PLACE = re.compile(r" - at `\$\.?([^`]*)`")


def parse(body: bytes, kind: type[T]) -> T:
    """A request from its JSON; or a Problem that names the field."""
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if values > MOST_VALUES:
        raise Problem(413, f"the body may have {MOST_VALUES} values, and it has some {values}")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        unknown = _UNKNOWN.search(text)
        if unknown:
            where = ".".join(part for part in (unknown[2], unknown[1]) if part)
            raise Problem(
                400, f"{where} is not supported by this server", param=where,
                code="unsupported_parameter",
            ) from error  # fmt: skip
        place = _PLACE.search(text)
        at = place[1] if place else None
        said = _PLACE.sub("", text)
        raise Problem(400, f"{at}: {said}" if at else said, param=at or None) from error
    except msgspec.DecodeError as error:
        raise Problem(400, f"the body is not JSON: {error}", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise Problem(400, "the body is nested too deeply", code="invalid_json") from error


class _Base(msgspec.Struct, forbid_unknown_fields=True):
    pass


Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Meta(max_length=256)]
FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Stop | Annotated[list[Stop], Meta(max_length=16)] | None


class Sampled(_Base):
    """What all kinds of answers have in common."""

    model: Name | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Unit | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: Name | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    deadline: Annotated[float, Meta(gt=0, le=86400)] | None = None
    """Seconds after which an answer that is not done is an error."""


class StreamOptions(_Base):
    include_usage: bool = False


class Part(_Base):
    """A part of the content of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class CalledFunction(_Base):
    name: Name
    arguments: str


class ToolCall(_Base):
    id: Name
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class Message(_Base):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: Name | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(_Base):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Base):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Base):
    name: Name


class NamedTool(_Base):
    """The function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Base):
    name: Name | None = None
    description: str | None = None
    schema: Raw = Raw()
    strict: bool | None = None


class TextFormat(_Base, tag="text", tag_field="type"):
    pass


class ObjectFormat(_Base, tag="json_object", tag_field="type"):
    pass


class SchemaFormat(_Base, tag="json_schema", tag_field="type"):
    json_schema: JsonSchema


class GrammarFormat(_Base, tag="grammar", tag_field="type"):
    """A grammar in the Lark form of llguidance."""

    grammar: str


class RegexFormat(_Base, tag="regex", tag_field="type"):
    regex: str


Format = TextFormat | ObjectFormat | SchemaFormat | GrammarFormat | RegexFormat


class ChatRequest(Sampled, kw_only=True):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Choices | None = None
    stop: Stops = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None


Ids = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]


class CompletionRequest(Sampled, kw_only=True):
    """/v1/completions"""

    prompt: Any  # a text, ids, or a list of either: see completions.prompts_of
    max_tokens: Count | None = None
    n: Choices | None = None
    stop: Stops = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    echo: Literal[False] | None = None
    best_of: None = None
    suffix: None = None


class ResponsesSchemaFormat(_Base, tag="json_schema", tag_field="type"):
    name: Name | None = None
    schema: Raw = Raw()
    description: str | None = None
    strict: bool | None = None


class TextOptions(_Base):
    format: (
        TextFormat | ObjectFormat | ResponsesSchemaFormat | GrammarFormat | RegexFormat | None
    ) = None


class ResponsesTool(_Base):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponsesTool(_Base):
    type: Literal["function"]
    name: Name


class Item(_Base):
    """What was said before: a message, a call of a function, or what it gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    id: Name | None = None
    status: Name | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: str | None = None


class ResponsesRequest(Sampled, kw_only=True):
    """/v1/responses"""

    input: str | Annotated[list[Item], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponsesTool | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None


class TokenizeRequest(_Base):
    """/tokenize: a text, or the messages of a chat."""

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    model: Name | None = None


class DetokenizeRequest(_Base):
    """/detokenize"""

    tokens: list[int]
    model: Name | None = None


class EmbeddingsRequest(_Base):
    """/v1/embeddings"""

    input: Any  # a text, ids, or a list of either: see completions.prompts_of
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None


class BudgetRequest(_Base):
    """PUT /v1/budget: bytes, a text such as 300MiB, null for no limit, or auto."""

    memory: int | str | None
    keep_free: int | str | None = None
