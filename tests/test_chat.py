"""Chat templates: rendered as Hugging Face does, and harmless whatever they contain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pliant.engine.chat import ChatTemplate, find_template
from pliant.errors import FormatError, PliantError, UsageError
from tiny import TEMPLATE

HELLO = [{"role": "user", "content": "Hello"}]


DOUBLING = (
    "{% set ns = namespace(t='x') %}"
    "{% for a in range(60) %}{% set ns.t = ns.t OP ns.t %}{% endfor %}"
)


def test_a_template_renders_messages_up_to_the_answer() -> None:
    template = ChatTemplate(TEMPLATE)
    text = "<|im_start|>user\nHello<|im_end|>\n"
    assert template.render(HELLO) == text + "<|im_start|>assistant\n"
    assert template.render(HELLO, answer=False) == text


def test_blocks_leave_no_blank_lines_and_loops_can_break() -> None:
    source = """{% for m in messages %}
    {% if loop.index > 1 %}{% break %}{% endif %}
{{ bos_token }}{{ m.content | trim }}
{% endfor %}
{% generation %}x{% endgeneration %}"""
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([*HELLO, *HELLO]) == "<s>Hello\nx"


def test_functions_of_hugging_face_are_there() -> None:
    tools = [{"name": "f", "text": "é <b>"}]
    assert ChatTemplate("{{ tools | tojson }}").render(HELLO, tools=tools) == json.dumps(
        tools, ensure_ascii=False
    )
    indented = ChatTemplate("{{ tools | tojson(indent=2) }}").render(HELLO, tools=tools)
    assert json.loads(indented) == tools
    assert "\n  " in indented
    year = ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO)
    assert re.fullmatch(r"20\d\d", year)
    assert ChatTemplate("{{ 'a\nb' | indent(2) }}").render(HELLO) == "a\n  b"
    assert ChatTemplate("{{ '-' * 3 }}{{ 7 % 4 }}").render(HELLO) == "---3"
    assert ChatTemplate("{{ 'a' ~ 1 ~ (1 + 2) }}").render(HELLO) == "a13"
    assert ChatTemplate("{{ [1, 2] | join(', ') }}{{ '-'.join(['a', 'b']) }}").render(HELLO) == (
        "1, 2a-b"
    )
    assert ChatTemplate("{{ 'abab'.replace('a', 'c', 1) }}").render(HELLO) == "cbab"
    assert ChatTemplate("{{ 'abab' | replace('a', '') }}").render(HELLO) == "bb"


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="roles must alternate"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10**9 }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [0] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x\ny' | indent(1000000000) }}",
        "{{ 'x' | tojson(indent=1000000000) }}",
        "{% for a in range(1000000000) %}x{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        DOUBLING.replace("OP", "~"),
        DOUBLING.replace("OP", "+"),
        "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
        "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
        "{{ ('y' * 1000000).join(['x'] * 1000000) }}",
        "{{ (['x'] * 1000000) | join('y' * 1000000) }}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 / 0 }}",
        "{% include 'file' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_ends_in_one_error(source: str) -> None:
    with pytest.raises(PliantError):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% nonsense %}", "x" * 2**21])
def test_a_broken_template_is_a_format_error(source: str) -> None:
    with pytest.raises(FormatError):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "messages", [[], ["hi"], [{"content": "x"}], [{"role": "user"}], [{"role": 1}]], ids=str
)
def test_messages_of_the_wrong_form_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(UsageError):
        ChatTemplate(TEMPLATE).render(messages)


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "chat_template": "from the config",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert find_template(tmp_path) == ("from the config", tokens)
    config["chat_template"] = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "the default"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(tmp_path) == ("the default", tokens)
    (tmp_path / "chat_template.jinja").write_text("from its file")
    assert find_template(tmp_path) == ("from its file", tokens)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(FormatError):
        find_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(FormatError):
        find_template(tmp_path)
