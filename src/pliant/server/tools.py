"""Functions that a model may call: how they are shown to it, and how its calls are read.

Every family of models writes calls in its own way. The chat template tells which: it says how
calls of before were written. A template that knows nothing of tools gets them in a message of the
system, in the most common form (that of Hermes).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "CallReader", "Style", "call_grammar", "new_id", "style_of", "told"]


@dataclass(frozen=True, slots=True)
class Style:
    """How a model writes calls: `begin` JSON `end`, with the arguments under the name `arguments`.

    `native`: whether the template takes `tools` itself. An empty `begin`: the whole answer is JSON.
    """

    begin: str
    end: str
    arguments: str = "arguments"
    many: bool = False  # one list of calls
    native: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function. `arguments` is JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str


def style_of(template: str | None) -> Style:
    """The style that a chat template stands for."""
    text = template or ""
    if "tools" not in text:
        return Style("<tool_call>", "</tool_call>", native=False)
    if "[TOOL_CALLS]" in text:
        return Style("[TOOL_CALLS]", "", many=True)
    if "<tool_call>" not in text and '"parameters"' in text:
        return Style("", "", arguments="parameters")
    return Style("<tool_call>", "</tool_call>")


def new_id(prefix: str) -> str:
    """An identifier that was not used before."""
    return f"{prefix}{os.urandom(12).hex()}"


def told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages for a template that knows nothing of tools: everything in their texts."""
    result: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "assistant" and message.get("tool_calls"):
            calls = [
                "<tool_call>\n"
                + json.dumps(
                    {"name": c["function"]["name"], "arguments": c["function"]["arguments"]},
                    ensure_ascii=False,
                )
                + "\n</tool_call>"
                for c in message["tool_calls"]
            ]
            content = "\n".join([content, *calls] if content else calls)
        elif role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        result.append({"role": role, "content": content})
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = (
            "You may call functions. Their signatures are between <tools> and </tools>:\n<tools>\n"
            f"{listed}\n</tools>\nTo call one, write a JSON object with its name and arguments:\n"
            '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>'
        )
        if result and result[0]["role"] == "system":
            result[0]["content"] += "\n\n" + text
        else:
            result.insert(0, {"role": "system", "content": text})
    return result


def call_grammar(style: Style, functions: Sequence[Mapping[str, Any]], special: bool) -> str:
    """A grammar, in Lark form, of exactly one call of one of these functions.

    `special`: whether `style.begin` is a special token.
    """
    kinds = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                style.arguments: function.get("parameters") or {"type": "object"},
            },
            "required": ["name", style.arguments],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema: dict[str, Any] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if style.many:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = {**schema, "x-guidance": compact}

    def literal(text: str) -> str:
        if special and text.startswith("<") and text.endswith(">"):
            return text
        return json.dumps(text)

    parts = [literal(text) for text in (style.begin,) if text]
    parts.append("call")
    parts += [literal(text) for text in (style.end,) if text]
    return f"start: {' '.join(parts)}\ncall: %json {json.dumps(schema)}\n"


class CallReader:
    """Separates calls from the text of an answer as it comes."""

    __slots__ = ("_held", "_inside", "_names", "_single", "_style")

    def __init__(self, style: Style, names: Sequence[str], *, single: bool = False) -> None:
        """`names` of the functions that there are; `single`: only the first call counts."""
        self._style = style
        self._names = frozenset(names)
        self._single = single
        self._held = ""
        self._inside = False

    def push(self, text: str) -> str:
        """What of the text is certainly no call."""
        self._held += text
        if self._inside:
            return ""
        begin = self._style.begin
        if not begin:
            start = self._held.lstrip()
            if not start or start[0] in "{[":
                self._inside = bool(start)
                return ""
            out, self._held = self._held, ""
            return out
        at = self._held.find(begin)
        if at >= 0:
            self._inside = True
        else:
            at = len(self._held)
            for size in range(min(len(begin) - 1, at), 0, -1):
                if self._held.endswith(begin[:size]):
                    at -= size
                    break
        out, self._held = self._held[:at], self._held[at:]
        return out

    def finish(self) -> tuple[str, list[Call]]:
        """The calls, or what was held back if it holds none."""
        held, self._held = self._held, ""
        calls = self._read(held) if self._inside else []
        if not calls:
            return held, []
        return "", calls[:1] if self._single else calls

    def _read(self, text: str) -> list[Call]:
        begin = self._style.begin
        pieces = text.split(begin)[1:] if begin else [text]
        calls = []
        for piece in pieces:
            value = _first_json(piece)
            for item in value if isinstance(value, list) else [value]:
                call = self._call(item)
                if call is None:
                    return []  # not of the form: then all of it is text
                calls.append(call)
        return calls

    def _call(self, value: object) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            return Call(new_id("call_"), str(value["name"]), arguments)
        return Call(new_id("call_"), str(value["name"]), json.dumps(arguments, ensure_ascii=False))


def _first_json(text: str) -> object:
    try:
        value: object = json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return None
    return value
