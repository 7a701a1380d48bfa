"""The server as its clients see it: over HTTP on loopback, with the openai client and without."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pliant
from pliant.server.tools import CallReader, Style, call_grammar, style_of, told
from serving import Reply, Server, running_server, wait_until
from tiny import TEMPLATE, roomy, write_tiny_pack

MESSAGES: Any = [{"role": "user", "content": "hi"}]
HERMES = TEMPLATE.replace(
    "{% for",
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\nuse <tool_call>{% endif %}{% for",
    1,
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("server") / "tiny.pack"
    return write_tiny_pack(path, least=2, template=HERMES)


@pytest.fixture(scope="module")
def model(pack: Path) -> Iterator[pliant.Model]:
    with pliant.load(pack, memory=f"{roomy(300)}MiB", sessions=8, answers=16) as loaded:
        yield loaded


@pytest.fixture
def own_model(pack: Path) -> Iterator[pliant.Model]:
    """A model that no other server uses."""
    with pliant.load(pack, sessions=8, answers=16) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: pliant.Model) -> Iterator[Server]:
    with running_server(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def plain(model: pliant.Model, prompt: Any, **options: Any) -> str:
    """What the model answers without a server."""
    return "".join(model.generate(prompt, **options))


# --- answers, with the openai client


def test_a_chat_is_what_the_model_says(client: openai.OpenAI, model: pliant.Model) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=30
    )
    expected = plain(model, model.chat_prompt(MESSAGES), max_tokens=30)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(model.chat_prompt(MESSAGES))
    assert reply.usage.completion_tokens == 30
    made = reply.model_extra["pliant"]  # type: ignore[index]
    assert made["bits_per_weight"] == pytest.approx(model.depth.bits_per_weight)
    assert set(made) >= {"bits_per_weight_lowest", "expected_kl", "expected_kl_highest", "seed"}


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI, model: pliant.Model) -> None:
    options: Any = {"temperature": 1.0, "seed": 7, "max_tokens": 40}
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=2, stream=True,
        stream_options={"include_usage": True}, **options,
    )  # fmt: skip
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
        usage = chunk.usage or usage
    prompt = model.chat_prompt(MESSAGES)
    assert texts == [
        plain(model, prompt, temperature=1.0, seed=seed, max_tokens=40) for seed in (7, 8)
    ]
    assert reasons == ["length", "length"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 80)
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, **options)
    assert [choice.message.content for choice in whole.choices] == texts


def test_headers_say_with_what_an_answer_was_made(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2}
    for asked in (body, {**body, "stream": True}):
        reply = server.post("/v1/chat/completions", asked)
        bits = float(reply.headers["pliant-bits-per-weight"])
        assert bits == pytest.approx(server.model.depth.bits_per_weight, abs=1e-3)
        assert reply.headers["x-request-id"].startswith("req_")


def test_stop_texts_end_answers(server: Server, model: pliant.Model) -> None:
    prompt = model.chat_prompt(MESSAGES)
    whole = plain(model, prompt, max_tokens=60)
    stop = whole[20:22]
    reply = server.post(
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 60, "temperature": 0, "stop": [stop]},
    ).json
    assert reply["choices"][0]["message"]["content"] == whole[: whole.find(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_logprobs_have_the_chosen_and_the_likeliest(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=4
    )
    logs = reply.choices[0].logprobs
    assert logs is not None
    assert logs.content is not None
    assert len(logs.content) == 5
    for token in logs.content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.bytes is not None


def test_texts_are_continued(client: openai.OpenAI, model: pliant.Model) -> None:
    reply = client.completions.create(
        model="tiny", prompt=["one", "two"], n=2, max_tokens=9, seed=3, temperature=1, logprobs=2
    )
    expected = [
        plain(model, prompt, max_tokens=9, seed=seed, temperature=1)
        for prompt in ("one", "two")
        for seed in (3, 4)
    ]
    assert [choice.text for choice in reply.choices] == expected
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 36)
    logs = reply.choices[0].logprobs
    assert logs is not None
    assert logs.tokens is not None
    assert logs.top_logprobs is not None
    assert len(logs.tokens) == len(logs.top_logprobs) == 9
    by_ids = client.completions.create(model="tiny", prompt=[1, 2, 3], temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in by_ids if chunk.choices)
    assert text == plain(model, [1, 2, 3], max_tokens=16)


def test_sampling_options_are_those_of_the_model(server: Server, model: pliant.Model) -> None:
    options = {
        "temperature": 1.5, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 5,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1,
    }  # fmt: skip
    body = {"prompt": "abc", "max_tokens": 30, "logit_bias": {"65": 2.5}, **options}
    reply = server.post("/v1/completions", body).json
    expected = plain(model, "abc", max_tokens=30, logit_bias={65: 2.5}, **options)
    assert reply["choices"][0]["text"] == expected


def test_the_responses_api(client: openai.OpenAI, model: pliant.Model) -> None:
    prompt = model.chat_prompt(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    )
    expected = plain(model, prompt, max_tokens=20)
    options: Any = {"instructions": "be brief", "temperature": 0, "max_output_tokens": 20}
    reply = client.responses.create(model="tiny", input="hi", **options)
    assert reply.output_text == expected
    assert reply.status == "incomplete"
    assert reply.usage is not None
    assert reply.usage.input_tokens == len(prompt)
    events = list(client.responses.create(model="tiny", input="hi", stream=True, **options))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
    listed: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]
    tool: Any = {"type": "function", **WEATHER["function"], "strict": True}
    reply = client.responses.create(
        model="tiny", input=listed, tools=[tool], tool_choice="required", max_output_tokens=100
    )
    (call,) = reply.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert set(json.loads(call.arguments)) == {"city"}
    kinds = {
        event.type
        for event in client.responses.create(
            model="tiny", input="hi", tools=[tool], tool_choice="required", stream=True
        )
    }
    assert "response.function_call_arguments.done" in kinds
    assert "response.completed" in kinds


@pytest.mark.parametrize("seed", range(8))
def test_a_json_schema_is_obeyed(client: openai.OpenAI, seed: int) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=seed, temperature=1.5, max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
    )  # fmt: skip
    assert reply.choices[0].finish_reason == "stop"
    value = json.loads(reply.choices[0].message.content or "")
    assert list(value) == ["name", "age", "tags"]
    assert isinstance(value["name"], str)
    assert 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"a", "b"}
    assert len(value["tags"]) <= 3


def test_other_forms_of_answers(server: Server) -> None:
    def text(form: Any) -> str:
        body = {"prompt": "x", "max_tokens": 60, "seed": 1, "response_format": form}
        return str(server.post("/v1/completions", body).json["choices"][0]["text"])

    assert text({"type": "regex", "regex": "[0-9]{4}-[0-9]{2}"})[4] == "-"
    grammar = 'start: word ("," word)* "."\nword: "yes" | "no"\n'
    assert set(text({"type": "grammar", "grammar": grammar})) <= set("yesno,.")
    assert text({"type": "json_object"}).startswith("{")
    assert text({"type": "text"})


@pytest.mark.parametrize(
    "form",
    [
        {"type": "grammar", "grammar": 'start: s\ns: s s | "a" | "b" | ""\n'},
        {"type": "grammar", "grammar": 'start: a\na: a "x" | a a a | "y"\n'},
        {"type": "grammar", "grammar": "start: a\na: a\n"},
        {"type": "grammar", "grammar": "start: nothing\n"},
        {"type": "regex", "regex": "(.*a){20}.*"},
        {"type": "regex", "regex": "(?:(?:a?){50}){50}a{50}"},
        {"type": "regex", "regex": ".*(a|b|c).{200}"},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 5000}}},
        {"type": "json_schema", "json_schema": {"schema": True}},
        {"type": "json_schema", "json_schema": {"schema": {"frobnicate": 1}}},
        {
            "type": "json_schema",
            "json_schema": {
                "schema": {
                    "type": "object",
                    "properties": {f"p{i}": {"type": "string"} for i in range(2000)},
                }
            },
        },
    ],
    ids=[
        "ambiguous",
        "recursive",
        "endless",
        "missing",
        "lazy",
        "powers",
        "window",
        "self",
        "long",
        "anything",
        "unknown",
        "wide",
    ],
)
def test_forms_that_are_too_much_end_or_are_refused(server: Server, form: Any) -> None:
    body = {"prompt": "x", "max_tokens": 200, "seed": 1, "response_format": form}
    reply = server.post("/v1/completions", body)
    assert reply.status in (200, 400)
    if reply.status == 200:
        assert reply.json["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        assert "form" in reply.error["message"] or "cannot be used" in reply.error["message"]
    plain_one = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert plain_one.status == 200


def test_a_function_is_called_when_it_must_be(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER], "max_tokens": 100}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        reply = client.chat.completions.create(tool_choice=choice, **options)
        assert reply.choices[0].finish_reason == "tool_calls"
        assert reply.choices[0].message.tool_calls is not None
        (call,) = reply.choices[0].message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
    stream = client.chat.completions.create(tool_choice="required", stream=True, **options)
    deltas = [choice for chunk in stream for choice in chunk.choices]
    calls = [delta.delta.tool_calls for delta in deltas if delta.delta.tool_calls]
    assert len(calls) == 1
    assert deltas[-1].finish_reason == "tool_calls"
    history = [
        *MESSAGES,
        reply.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    again = client.chat.completions.create(**{**options, "messages": history, "max_tokens": 3})
    assert again.choices[0].message.content


# --- tools, by themselves


def test_the_style_of_calls_is_that_of_the_template() -> None:
    assert style_of(None) == Style("<tool_call>", "</tool_call>", native=False)
    assert style_of(HERMES) == Style("<tool_call>", "</tool_call>")
    assert style_of("{{ tools }} [TOOL_CALLS]").many
    assert style_of('{{ tools }} {"name": x, "parameters": y}').begin == ""


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(
    ("style", "text", "said", "called"),
    [
        (
            Style("<tool_call>", "</tool_call>"),
            'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
            "Wait.\n",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (Style("<tool_call>", "</tool_call>"), "a < b <tool", "a < b <tool", []),
        (
            Style("<tool_call>", "</tool_call>"),
            'no <tool_call>{"name": "unknown", "arguments": {}}',
            'no <tool_call>{"name": "unknown", "arguments": {}}',
            [],
        ),
        (
            Style("[TOOL_CALLS]", "", many=True),
            '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        (
            Style("", "", arguments="parameters"),
            ' {"name": "f", "parameters": {"x": "é"}}',
            "",
            [("f", '{"x": "é"}')],
        ),
        (Style("", "", arguments="parameters"), "just text {", "just text {", []),
        (Style("", "", arguments="parameters"), "{not json", "{not json", []),
    ],
)
def test_calls_are_found_in_the_text(
    style: Style, text: str, said: str, called: list[tuple[str, str]], cut: int
) -> None:
    reader = CallReader(style, ["f", "g"])
    out = "".join(reader.push(text[at : at + cut]) for at in range(0, len(text), cut))
    rest, calls = reader.finish()
    assert out + rest == said
    assert [(call.name, call.arguments) for call in calls] == called
    assert len({call.id for call in calls}) == len(calls)


def test_only_the_first_call_counts_if_asked() -> None:
    reader = CallReader(Style("<t>", "</t>"), ["f"], single=True)
    reader.push('<t>{"name": "f"}</t><t>{"name": "f"}</t>')
    assert len(reader.finish()[1]) == 1


def test_a_template_without_tools_is_told_of_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]
    said = told(messages, [WEATHER])
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user"]
    assert json.dumps(WEATHER) in said[0]["content"]
    assert '{"name": "f", "arguments": {"a": 1}}' in said[2]["content"]
    assert "<tool_response>\ndone\n</tool_response>" in said[3]["content"]
    assert told(messages, [])[0]["role"] == "user"
    assert "%json" in call_grammar(Style("<t>", "</t>"), [{"name": "f"}], special=True)


# --- what is refused


@pytest.mark.parametrize(
    ("path", "change", "status", "param"),
    [
        ("chat", {"frobnicate": 1}, 400, "frobnicate"),
        ("chat", {"reasoning_effort": "low"}, 400, "reasoning_effort"),
        ("chat", {"store": True}, 400, "store"),
        ("chat", {"messages": []}, 400, "messages"),
        ("chat", {"messages": None}, 400, "messages"),
        ("chat", {"messages": [{"role": "boss", "content": "x"}]}, 400, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": "x", "y": 1}]}, 400, "messages[0].y"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            None,
        ),
        ("chat", {"temperature": -1}, 400, "temperature"),
        ("chat", {"temperature": "hot"}, 400, "temperature"),
        ("chat", {"temperature": 1e400}, 400, None),
        ("chat", {"top_p": 0}, 400, "top_p"),
        ("chat", {"n": 0}, 400, "n"),
        ("chat", {"n": 10**30}, 400, "n"),
        ("chat", {"max_tokens": 0}, 400, "max_tokens"),
        ("chat", {"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens"),
        ("chat", {"max_tokens": 100_000}, 400, None),
        ("chat", {"stop": ""}, 400, "stop"),
        ("chat", {"stop": ["x"] * 17}, 400, "stop"),
        ("chat", {"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("chat", {"logit_bias": {"100000": 1}}, 400, "logit_bias"),
        ("chat", {"top_logprobs": 2}, 400, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ("chat", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("chat", {"model": "gpt-9"}, 404, "model"),
        ("chat", {"priority": 1000}, 400, "priority"),
        ("chat", {"tool_choice": "required"}, 400, "tool_choice"),
        (
            "chat",
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            400,
            "tool_choice",
        ),
        ("chat", {"response_format": {"type": "xml"}}, 400, "response_format.type"),
        ("chat", {"response_format": {"type": "regex", "regex": "("}}, 400, "response_format"),
        (
            "chat",
            {"response_format": {"type": "regex", "regex": "(a{1000}){1000}{1000}"}},
            400,
            None,
        ),
        (
            "chat",
            {"response_format": {"type": "grammar", "grammar": "x" * 70_000}},
            400,
            "response_format",
        ),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            400,
            "response_format",
        ),
        ("chat", {"response_format": {"type": "json_object"}, "ignore_eos": True}, 400, None),
        ("completions", {"prompt": None}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [1, "x"]}, 400, "prompt"),
        ("completions", {"prompt": [5000]}, 400, "prompt"),
        ("completions", {"prompt": ["x"] * 200}, 400, "prompt"),
        ("completions", {"echo": True}, 400, "echo"),
        ("completions", {"suffix": "x"}, 400, "suffix"),
        ("completions", {"best_of": 2}, 400, "best_of"),
        ("responses", {"previous_response_id": "x"}, 400, "previous_response_id"),
        ("responses", {"input": [{"type": "message"}]}, 400, "input"),
        ("responses", {"input": [{"type": "function_call"}]}, 400, "input"),
        ("responses", {"input": []}, 400, "input"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_requests_are_refused_by_name(
    server: Server, path: str, change: dict[str, Any], status: int, param: str | None
) -> None:
    paths = {
        "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
        "completions": ("/v1/completions", {"prompt": "x"}),
        "responses": ("/v1/responses", {"input": "x"}),
    }
    url, body = paths[path]
    text = json.dumps({**body, **change}).replace("Infinity", "1e400")
    reply = server.post(url, text.encode())
    assert reply.status == status, reply.body
    if param is not None:
        assert reply.error["param"] == param
    assert "Traceback" not in reply.error["message"]


def test_a_prompt_that_cannot_fit_is_refused_with_the_sum(server: Server) -> None:
    reply = server.post("/v1/completions", {"prompt": "x" * 505, "max_tokens": 100})
    assert reply.status == 400
    assert reply.error["code"] == "context_length_exceeded"
    assert "holds 512 tokens, and needed are 605: 505 of the prompt" in reply.error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe{}", 400),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b'{"messages": ' + b"[" * 100_000, 400),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b"x" * (2**20 + 1), 413),
        (b'{"prompt": [' + b"[]," * 70_000 + b"[]]}", 413),
    ],
    ids=[
        "empty",
        "open",
        "list",
        "bytes",
        "text",
        "deep",
        "closed",
        "surrogate",
        "large",
        "many",
    ],
)
def test_bodies_that_are_no_requests(server: Server, body: bytes, status: int) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        reply = server.post(path, body)
        assert reply.status == status, reply.body
        assert reply.error["type"] == "invalid_request_error"


def test_paths_methods_and_types(server: Server) -> None:
    assert server.get("/v1/nothing").status == 404
    assert "no GET /v1/nothing" in server.get("/v1/nothing").error["message"]
    assert server.get("/v1/chat/completions").status == 405
    assert server.get("/v1/models/none").status == 404
    assert server.get("/v1/models/tiny").json["id"] == "tiny"
    assert server.post("/tokenize", b"{}", {"Content-Type": "text/plain"}).status == 415
    assert server.get("/health", {"Host": "evil.example"}).status == 403
    assert server.get("/health", {"Host": "localhost:99"}).status == 200
    assert "access-control-allow-origin" not in server.get("/health").headers


def test_embeddings_are_means_of_hidden_states(server: Server, model: pliant.Model) -> None:
    texts = ["hello", "x" * 300]
    reply = server.post("/v1/embeddings", {"input": texts, "model": "tiny"})
    assert reply.status == 200
    executor = model._executor
    for text, found in zip(texts, reply.json["data"], strict=True):
        ids = np.array(model.tokenize(text), np.int32)
        with model._turn():
            sequence = executor.open_sequence()
            states = executor.states([sequence], [len(ids)], ids)
            executor.close_sequence(sequence)
        mean = states.mean(axis=0)
        np.testing.assert_allclose(found["embedding"], mean / np.linalg.norm(mean), atol=1e-5)
    assert reply.json["usage"] == {"prompt_tokens": 305, "total_tokens": 305}
    assert reply.json["pliant"]["bits_per_weight_lowest"] == model.depth.bits_per_weight
    assert float(reply.headers["pliant-bits-per-weight"]) > 0
    coded = server.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"}).json
    for one, other in zip(coded["data"], reply.json["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
        np.testing.assert_array_equal(vector, np.array(other["embedding"], np.float32))
    for wrong in ({"input": 5}, {"input": []}, {"input": "x", "dimensions": 8}, {}):
        assert server.post("/v1/embeddings", wrong).status == 400
    long = server.post("/v1/embeddings", {"input": "x" * 600})
    assert (long.status, long.error["code"]) == (400, "context_length_exceeded")


def test_tokens_and_back(server: Server, model: pliant.Model) -> None:
    reply = server.post("/tokenize", {"prompt": "héllo"}).json
    assert reply["tokens"] == model.tokenize("héllo")
    assert reply["count"] == len(reply["tokens"])
    back = server.post("/detokenize", {"tokens": reply["tokens"]}).json
    assert back == {"prompt": "héllo"}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json
    assert chat["tokens"] == model.chat_prompt(MESSAGES)
    assert server.post("/detokenize", {"tokens": [-1]}).status == 400
    assert server.post("/tokenize", {}).status == 400


def test_api_keys_are_needed_where_there_are_some(own_model: pliant.Model) -> None:
    with running_server(own_model, keys=["secret-one", "secret-two"]) as server:
        for path in ("/health", "/ready", "/"):
            assert server.get(path).status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-one"}):
            reply = server.get("/v1/models", headers)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert server.get("/metrics", headers).status == 401
        for key in ("secret-one", "secret-two"):
            reply = server.get("/v1/models", {"Authorization": f"Bearer {key}", "Host": "my.host"})
            assert reply.status == 200


def test_bodies_together_are_bounded(own_model: pliant.Model) -> None:
    with running_server(own_model, body_limit=1000) as server:
        open_ones = []
        for _ in range(5):
            connection = server.connect()
            connection.putrequest("POST", "/tokenize")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(b"{" + b" " * 900)
            open_ones.append(connection)
        reply = open_ones[-1].getresponse()
        assert reply.status == 429
        assert reply.headers["retry-after"] == "1"
        assert server.post("/tokenize", {"prompt": "x" * 600}).status == 429
        for connection in open_ones:
            connection.close()
        wait_until(lambda: server.post("/tokenize", {"prompt": "x" * 600}).status == 200)


# --- many at once


def test_many_clients_get_what_they_would_alone(own_model: pliant.Model) -> None:
    rng = random.Random(3)
    asked = []
    for number in range(64):
        start = "the same beginning of many prompts, long enough for pages " * rng.randrange(3)
        asked.append(
            {
                "prompt": start + "x" * rng.randrange(1, 60) + str(number),
                "max_tokens": rng.randrange(1, 80),
                "temperature": rng.choice([0, 1]),
                "seed": number,
                "stream": True,
            }
        )
    expected = [
        plain(
            own_model,
            str(one["prompt"]),
            max_tokens=one["max_tokens"],
            temperature=one["temperature"],
            seed=one["seed"],
        )
        for one in asked
    ]
    with running_server(own_model, most_running=12) as server:

        def ask(number: int) -> str | None:
            if number % 4 == 3:  # leaves in the middle, or at once
                connection = server.connect()
                connection.request(
                    "POST", "/v1/completions", json.dumps(asked[number]),
                    {"Content-Type": "application/json"},
                )  # fmt: skip
                if number % 8 == 3:
                    connection.getresponse().read(200)
                connection.close()
                return None
            reply = server.post("/v1/completions", asked[number])
            assert reply.status == 200
            return "".join(choice["text"] for event in reply.events for choice in event["choices"])

        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(ask, range(len(asked))))
        for text, due in zip(found, expected, strict=True):
            assert text is None or text == due
        wait_until(lambda: server.scheduler.state().running + server.scheduler.state().waiting == 0)
        state = server.scheduler.state()
        assert state.pages == state.kept
        assert not server.kitchen.bridge._flows


def test_a_full_queue_says_when_to_come_back(own_model: pliant.Model) -> None:
    with running_server(own_model, most_running=1, most_waiting=1) as server:
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: server.post("/v1/completions", body), range(8)))
        statuses = {reply.status for reply in replies}
        assert statuses == {200, 429}
        for reply in replies:
            if reply.status == 429:
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.error["code"] == "queue_full"
        many = server.post("/v1/completions", {"prompt": "x", "n": 3})
        assert many.status == 429


def test_a_client_that_leaves_stops_its_answer(server: Server) -> None:
    for stream in (True, False):
        before = server.scheduler.counters.finished.get("cancelled", 0)
        connection = server.connect()
        body = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": stream, "n": 4}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        wait_until(lambda: server.scheduler.state().running > 0)
        connection.close()
        wait_until(lambda: server.scheduler.state().running == 0)
        ended = server.scheduler.counters.finished
        # The tiny model may have been faster than the news of the leave.
        assert ended.get("cancelled", 0) > before or ended.get("length", 0) >= 4


def test_a_deadline_is_kept(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "deadline": 1e-9}
    reply = server.post("/v1/completions", body)
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    events = server.post("/v1/completions", {**body, "stream": True}).events
    assert events[-1]["error"]["code"] == "deadline_exceeded"


# --- operation


def test_the_budget_is_seen_and_moved(server: Server, model: pliant.Model) -> None:
    before = server.get("/v1/budget").json
    assert before["memory"] == model.budget
    assert (
        sum(item["held"] for item in before["ledger"].values()) + before["free"] == before["total"]
    )
    moved = server.send("PUT", "/v1/budget", {"memory": before["least"] + 5_000_000})
    assert moved.status == 200
    assert moved.json["memory"] == model.budget == before["least"] + 5_000_000
    refused = server.send("PUT", "/v1/budget", {"memory": "1MiB"})
    assert (refused.status, refused.error["code"]) == (409, "budget_too_small")
    assert "sum" in refused.error["message"]
    for wrong in ({"memory": "much"}, {"memory": -5}, {"memory": True}, {}, {"memory": 1, "x": 2}):
        assert server.send("PUT", "/v1/budget", wrong).status == 400
    assert model.budget == before["least"] + 5_000_000
    size = roomy(300)
    moved = server.send("PUT", "/v1/budget", {"memory": f"{size}MiB"})
    assert moved.json["memory"] == size * 2**20


def test_health_state_and_metrics(server: Server) -> None:
    server.post("/v1/completions", {"prompt": "x" * 40, "max_tokens": 3})
    assert server.get("/health").json == {"status": "ok"}
    assert server.get("/ready").json == {"status": "ready"}
    state = server.get("/v1/state").json
    assert state["counters"]["answer_tokens"] > 0
    assert "layers.0.q" in state["matrices"]
    text = server.get("/metrics").body.decode()
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values["pliant_answer_tokens_total"] >= 3
    assert values['pliant_prompt_tokens_total{source="computed"}'] > 0
    assert values["pliant_first_token_seconds_count"] > 0
    assert values['pliant_ledger_bytes{owner="weights",state="touched"}'] > 0
    assert values["pliant_waiting"] == values["pliant_parked_bytes"] == 0
    assert values["pliant_resumed_tokens_total"] >= 0


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = page.body.decode()
    for name, kind in (("page.css", "text/css"), ("page.js", "javascript")):
        assert name in text
        reply = server.get(f"/{name}")
        assert kind in reply.headers["content-type"]
        text += reply.body.decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_slow_clients_stop_nobody(server: Server) -> None:
    stuck = []
    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        stuck.append(connection)
    reader = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    body = json.dumps(
        {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8}
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())  # reads nothing
    assert server.post("/v1/completions", {"prompt": "y", "max_tokens": 5}).status == 200
    for connection in [*stuck, reader]:
        connection.close()
    wait_until(lambda: server.scheduler.state().running == 0)


# --- anything at all

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "required", "json_schema", "function", "user", "", "tiny"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "function", "name", "schema", "regex"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
NAMES = [
    "model", "messages", "prompt", "input", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "n", "stop", "seed", "stream", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice",
    "response_format", "text", "stream_options", "presence_penalty", "priority", "deadline", "user",
    "memory", "tokens",
]  # fmt: skip
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("PUT", "/v1/budget"),
]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(ROUTES),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    st.booleans(),
)
def test_whatever_is_asked_gets_an_answer(
    server: Server, route: tuple[str, str], change: dict[str, Any], sound: bool
) -> None:
    base: dict[str, Any] = {}
    if sound:
        base = {
            "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
            "/v1/completions": {"prompt": "x", "max_tokens": 3},
            "/v1/responses": {"input": "x", "max_output_tokens": 3},
        }.get(route[1], {})
    data = json.dumps({**base, **change}).encode("utf-8", "surrogatepass")
    reply: Reply = server.send(*route, data)
    assert reply.status in (200, 400, 404, 409, 429, 504)
    if reply.status != 200:
        assert reply.error
    assert server.scheduler.failure is None


def test_the_server_is_well_after_all_that(server: Server, model: pliant.Model) -> None:
    assert server.get("/health").status == 200
    assert server.post("/v1/completions", {"prompt": "ab", "temperature": 0}).json["choices"][0][
        "text"
    ] == plain(model, "ab", max_tokens=16)
    assert threading.active_count() < 50
