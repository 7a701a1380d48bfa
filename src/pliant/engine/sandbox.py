"""Where chat templates run: the sandbox of jinja2, with bounds on what an expression may build.

Imports jinja2, and is therefore imported only when a template is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
from jinja2.exceptions import SecurityError

__all__ = ["MAX_TEXT", "Refusal", "make_environment"]

MAX_TEXT = 2**24
"""The longest text, in characters, and the longest list that a template may build."""

_MAX_INDENT = 64
_SEQUENCES = (str, list, tuple, bytes)
# They make long texts of short ones, and no template of a model needs them.
_NO_METHODS = {
    "center",
    "expandtabs",
    "format",
    "format_map",
    "ljust",
    "rjust",
    "translate",
    "zfill",
}
_NO_FILTERS = ("center", "format", "pprint", "wordwrap", "xmlattr")


class Refusal(Exception):
    """Raised by `raise_exception` in a template."""


def _bound(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it would build something of {size} characters or items")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not allowed")
        if operator == "+" and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
            _bound(len(left) + len(right))
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, _SEQUENCES) and isinstance(other, int):
                    _bound(len(one) * other)
                elif isinstance(one, int):
                    _bound(abs(one) >> 64)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _NO_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        owner, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
        if isinstance(owner, str) and name in ("format", "format_map"):
            raise SecurityError("formatting is not allowed")
        return None

    # Named as in the method that is overridden: keyword arguments belong to the template.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            if name == "replace":
                return _replace(owner, *args, **kwargs)
            if name == "join" and len(args) == 1:
                return _join(args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        _Concatenations().visit(tree)
        return tree


class _Concatenations(jinja2.visitor.NodeTransformer):
    """Makes `a ~ b` a filter that looks at the length first."""

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        items = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(items, "join", [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the model's answers for training, has no effect here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def make_environment() -> jinja2.Environment:
    """The sandbox, with the settings and functions that templates of Hugging Face rely on."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    for name in _NO_FILTERS:
        environment.filters.pop(name, None)
    indent: Callable[..., str] = environment.filters["indent"]

    def bounded_indent(text: str, width: int | str = 4, *rest: bool, **named: bool) -> str:
        if (width if isinstance(width, int) else len(width)) > _MAX_INDENT:
            raise SecurityError(f"an indentation of more than {_MAX_INDENT}")
        return indent(text, width, *rest, **named)

    environment.filters |= {
        "indent": bounded_indent,
        "join": _join,
        "replace": _replace,
        "tojson": _tojson,
    }
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _replace(text: object, old: str, new: str, count: int | None = None) -> str:
    given = str(text)
    found = given.count(old) if count is None or count < 0 else min(given.count(old), count)
    _bound(len(given) + found * max(len(new) - len(old), 0))
    return given.replace(old, new, -1 if count is None else count)


def _join(items: Iterable[object], between: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise SecurityError("join with an attribute is not allowed; use map(attribute=...)")
    texts, size = [], 0
    for item in items:
        texts.append(str(item))
        size += len(texts[-1]) + len(between)
        _bound(size)
    return between.join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise SecurityError(f"an indentation of more than {_MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(message)


def _strftime_now(form: str) -> str:
    _bound(len(form) * 2**16)  # a directive of two letters makes some dozen
    return datetime.now().strftime(form)
