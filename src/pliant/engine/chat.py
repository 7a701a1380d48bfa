"""Chat templates: messages to the text that a model was trained on.

A template comes with a model from a stranger and is a program. It runs in the sandbox of jinja2,
with the functions that templates of Hugging Face use, and bounds on what it may build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pliant.errors import EngineError, FormatError, UsageError

__all__ = ["ChatTemplate", "Message", "find_template"]

Message = Mapping[str, Any]
"""`role` and `content`; further keys are handed to the template as they are."""

MAX_TEMPLATE = 2**20


class ChatTemplate:
    """A compiled template. Importing jinja2 takes some 7 MiB: make one only when it is needed."""

    __slots__ = ("_template", "_tokens", "source")

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """`tokens`: names and texts of special tokens, such as `bos_token`.

        Raises FormatError if it is no template.
        """
        import jinja2

        from pliant.engine.sandbox import make_environment

        self.source = source
        self._tokens = dict(tokens or {})
        if len(source) > MAX_TEMPLATE:
            raise FormatError(f"the chat template has {len(source)} characters, and may have 2^20")
        try:
            self._template = make_environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise FormatError(f"the chat template of the pack is broken: {error}") from error

    def render(self, messages: Sequence[Message], *, answer: bool = True, **values: Any) -> str:
        """The conversation as text; with `answer`, up to where the model's answer begins.

        `values` are further variables of the template, such as `tools`. Raises UsageError for
        messages of the wrong form or that the template refuses, EngineError if it fails.
        """
        import jinja2

        from pliant.engine.sandbox import MAX_TEXT, Refusal

        given = [_checked(message) for message in messages]
        if not given:
            raise UsageError("a chat needs at least one message")
        names = {"messages": given, "add_generation_prompt": answer, **self._tokens, **values}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**names):
                size += len(piece)
                if size > MAX_TEXT:
                    raise EngineError(f"the chat template built more than {MAX_TEXT} characters")
                pieces.append(piece)
        except EngineError:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise EngineError(f"the chat template did what is not allowed: {error}") from error
        except Refusal as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program and may fail like one, in any way.
            raise EngineError(f"the chat template failed: {error}") from error
        return "".join(pieces)


def find_template(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The source of the chat template of a pack, and its special tokens; None if it has none.

    Reads `chat_template.jinja`, or the entry `chat_template` of `tokenizer_config.json`. Raises
    FormatError if they cannot be read.
    """
    config = _read(folder / "tokenizer_config.json")
    settings: dict[str, Any] = {}
    if config is not None:
        try:
            loaded = json.loads(config)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{folder / 'tokenizer_config.json'} is not JSON: {error}") from error
        settings = loaded if isinstance(loaded, dict) else {}
    source: object = _read(folder / "chat_template.jinja")
    if source is None:
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in source if _is_map(item)}
            source = named.get("default")
    if not isinstance(source, str):
        return None
    tokens = {}
    for key, value in settings.items():
        if key.endswith("_token"):
            text = value.get("content") if _is_map(value) else value
            if isinstance(text, str):
                tokens[key] = text
    return source, tokens


def _is_map(value: object) -> bool:
    return isinstance(value, dict)


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            data = file.read(16 * MAX_TEMPLATE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > 16 * MAX_TEMPLATE:
        raise FormatError(f"{path} has more than 16 MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8: {error}") from error


def _checked(message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(f"a message is a mapping with `role` and `content`, and not {message!r}")
    if "content" not in message:
        raise UsageError(f"the message of role {message['role']!r} has no `content`")
    return dict(message)
