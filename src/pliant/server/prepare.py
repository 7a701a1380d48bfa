"""From what a request says to what the scheduler takes; common to all kinds of answers."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pliant.engine.answers import Answer, Request
from pliant.engine.sampling import Sampling, new_seed
from pliant.errors import EngineError, UsageError
from pliant.server import schema
from pliant.server.bridge import Bridge, Flow
from pliant.server.grammar import ANY_OBJECT, Compiler, Guide
from pliant.server.problems import Problem
from pliant.server.tools import CallReader, Style, call_grammar, style_of, told

__all__ = [
    "Form",
    "Kitchen",
    "ToolUse",
    "finish_reason",
    "quality",
    "usage_of",
    "wants_usage",
]

T = TypeVar("T")

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must look like: a kind (`schema`, `regex`, `lark`) and its source."""

    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions of a request, and whether one must be called."""

    style: Style
    tools: list[dict[str, Any]]
    force: list[dict[str, Any]] | None
    single: bool

    def reader(self) -> CallReader:
        """For one answer."""
        names = [tool["function"]["name"] for tool in self.tools]
        return CallReader(self.style, names, single=self.single)


class Kitchen:
    """What requests share: the model, its names, its forms, and who asks."""

    def __init__(self, bridge: Bridge, name: str, compiler: Compiler | None) -> None:
        self.bridge = bridge
        self.model = bridge.model
        self.name = name
        self.compiler = compiler
        self.style = style_of(self.model.template_source)

    def quality_now(self) -> dict[str, float | None]:
        """With what the next step is made."""
        depth = self.model.depth
        return {"bits_per_weight": depth.bits_per_weight, "expected_kl": depth.expected_kl}

    def check_name(self, name: str | None) -> None:
        """Refuse the name of another model."""
        if name not in (None, self.name):
            raise Problem(
                404, f"there is no model {name!r} here; there is {self.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def submit(
        self,
        asked: schema.Sampled,
        prompts: Sequence[Sequence[int]],
        *,
        who: str,
        n: int = 1,
        max_tokens: int | None = None,
        stop: schema.Stops = None,
        top_logprobs: int | None = None,
        form: Form | None = None,
    ) -> Flow:
        """Queue `n` answers to each prompt. A Problem or a PliantError if that cannot be."""
        self.check_name(asked.model)
        seed = new_seed() if asked.seed is None else asked.seed % 2**64
        bias = self._bias(asked.logit_bias)
        end = self.bridge.model.pack.manifest.tokens
        eos = frozenset() if asked.ignore_eos else frozenset(end.eos)
        if form is not None and asked.ignore_eos:
            raise Problem(400, "ignore_eos and a form of the answer exclude one another",
                          param="ignore_eos")  # fmt: skip
        stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        deadline = asked.deadline
        now = self.bridge.scheduler.clock()
        guides: list[Guide | None] = [None] * (len(prompts) * n)
        if form is not None:
            guides = await self.bridge.work(self._guides, form, len(guides))
        requests = []
        for at, prompt in enumerate(prompts):
            ids = array("i", prompt or ([] if end.bos is None else [end.bos]))
            if not ids:
                raise Problem(400, "the prompt is empty, and this model has no token to begin with",
                              param="prompt")  # fmt: skip
            for choice in range(n):
                sampling = Sampling(
                    temperature=_given(asked.temperature, 1.0),
                    top_k=max(_given(asked.top_k, 0), 0),
                    top_p=_given(asked.top_p, 1.0),
                    min_p=_given(asked.min_p, 0.0),
                    seed=(seed + choice) % 2**64,
                    repetition_penalty=_given(asked.repetition_penalty, 1.0),
                    presence_penalty=_given(asked.presence_penalty, 0.0),
                    frequency_penalty=_given(asked.frequency_penalty, 0.0),
                    logit_bias=bias,
                )
                requests.append(
                    Request(
                        prompt=ids,
                        sampling=sampling,
                        max_tokens=max_tokens,
                        stop=stops,
                        eos=eos,
                        top_logprobs=top_logprobs,
                        constraint=guides[at * n + choice],
                        key=who,
                        priority=asked.priority or 0,
                        deadline=None if deadline is None else now + deadline,
                    )
                )
        for request in requests:
            try:
                self.bridge.scheduler.check(request)
            except EngineError as error:
                raise Problem(400, str(error), code="context_length_exceeded") from error
        return self.bridge.submit(requests)

    async def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: ToolUse | None = None
    ) -> list[int]:
        """The prompt that a chat makes."""
        style = self.style
        values: dict[str, Any] = {}
        if not style.native:
            messages = told(messages, tools.tools if tools else [])
        elif tools:
            values["tools"] = tools.tools
        return await self.bridge.work(lambda: self.model.chat_prompt(messages, **values))

    def tool_use(
        self,
        tools: Sequence[dict[str, Any]] | None,
        choice: str | None,
        named: str | None,
        parallel: bool | None,
    ) -> ToolUse | None:
        """What the tools of a request mean; None if none may be called."""
        if not tools:
            if choice == "required" or named is not None:
                raise Problem(400, "tool_choice asks for a call, and there are no tools",
                              param="tool_choice")  # fmt: skip
            return None
        if choice == "none":
            return None
        force = None
        functions = [tool["function"] for tool in tools]
        if named is not None:
            force = [function for function in functions if function["name"] == named]
            if not force:
                raise Problem(400, f"tool_choice names {named!r}, and it is not among the tools",
                              param="tool_choice")  # fmt: skip
        elif choice == "required":
            force = functions
        return ToolUse(self.style, list(tools), force, single=parallel is False)

    def form_of(self, asked: schema.Format | None, tools: ToolUse | None) -> Form | None:
        """The form that an answer must have, from `response_format` or a call that is asked for."""
        form = None
        if isinstance(asked, schema.ObjectFormat):
            form = Form("schema", ANY_OBJECT)
        elif isinstance(asked, schema.SchemaFormat):
            form = self.schema_form(asked.json_schema.schema)
        elif isinstance(asked, schema.GrammarFormat):
            form = Form("lark", asked.grammar)
        elif isinstance(asked, schema.RegexFormat):
            form = Form("regex", asked.regex)
        if tools is not None and form is not None:
            raise Problem(400, "response_format and tools exclude one another",
                          param="response_format")  # fmt: skip
        if tools is not None and tools.force is not None:
            special = self.compiler is not None and self.compiler.is_special(tools.style.begin)
            form = Form("lark", call_grammar(tools.style, tools.force, special))
        if form is not None and self.compiler is None:
            raise Problem(
                400, "this server was started without grammars (--no-grammars), so answers of a "
                "given form cannot be made", param="response_format", code="unsupported_parameter",
            )  # fmt: skip
        return form

    @staticmethod
    def schema_form(raw: Any) -> Form:
        """The form of a JSON schema as it came in; without one, any object."""
        text = bytes(raw).decode()
        return Form("schema", ANY_OBJECT if text in ("", "null") else text)

    def _guides(self, form: Form, count: int) -> list[Guide | None]:
        assert self.compiler is not None
        make = {
            "schema": self.compiler.schema,
            "regex": self.compiler.regex,
            "lark": self.compiler.lark,
        }[form.kind]
        try:
            first = make(form.source)
        except UsageError as error:
            raise Problem(400, str(error), param="response_format") from error
        return [first, *(first.copy() for _ in range(count - 1))]

    def _bias(self, given: dict[str, float] | None) -> dict[int, float]:
        vocab, bias = self.model.pack.manifest.model.vocab, {}
        for key, value in (given or {}).items():
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
            if not 0 <= token < vocab:
                raise Problem(
                    400, f"logit_bias: {key!r} is not one of the {vocab} tokens",
                    param="logit_bias",
                )  # fmt: skip
            bias[token] = value
        return bias


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def finish_reason(reason: str | None) -> str | None:
    """A finish reason as the OpenAI API names it."""
    return None if reason is None else _REASONS.get(reason, reason)


def quality(answers: Sequence[Answer]) -> dict[str, Any]:
    """The field `pliant` of an answer: with what it was made. Means over the choices, and the worst
    step of all of them."""
    values = [answer.track.values() for answer in answers]

    def known(name: str) -> list[float]:
        return [value for one in values if (value := one[name]) is not None]

    def mean(name: str) -> float | None:
        found = known(name)
        return sum(found) / len(found) if found else None

    return {
        "bits_per_weight": mean("bits_per_weight"),
        "bits_per_weight_lowest": min(known("bits_per_weight_lowest"), default=None),
        "expected_kl": mean("expected_kl"),
        "expected_kl_highest": max(known("expected_kl_highest"), default=None),
        "kv_bits_lowest": min(known("kv_bits_lowest"), default=None),
        "seed": answers[0].request.sampling.seed if answers else None,
    }


def wants_usage(asked: schema.ChatRequest | schema.CompletionRequest) -> bool:
    """Whether a stream shall end with its tokens; a Problem if that is asked of no stream."""
    if asked.stream_options is None:
        return False
    if not asked.stream:
        raise Problem(400, "stream_options needs stream: true", param="stream_options")
    return asked.stream_options.include_usage


def usage_of(answers: Sequence[Answer], prompts: int) -> dict[str, Any]:
    """Tokens of an answer, as the OpenAI API counts them: every prompt once."""
    per_prompt = max(len(answers) // max(prompts, 1), 1)
    firsts = answers[::per_prompt]
    prompt = sum(len(answer.request.prompt) for answer in firsts)
    made = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached for answer in firsts)},
    }
