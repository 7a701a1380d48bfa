"""Answers of a given form: JSON schemas, regular expressions and grammars, by llguidance.

What a request may make it do is bounded: the size of a grammar, the work for a token, the states
that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import numpy.typing as npt

from pliant.engine.seam import Tokenizer
from pliant.errors import EngineError, UsageError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["ANY_OBJECT", "Compiler", "Guide"]

MAX_SOURCE = 2**16
"""Characters of a grammar."""

ANY_OBJECT = '{"type": "object"}'
"""The schema of `json_object`."""

_ROW_ITEMS = {"schema": 2000, "grammar": 400}

# White space between the parts of JSON says nothing, and a small model may never stop making it.
_COMPACT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        count = tokenizer.vocab_size
        self.eos_token_id = eos
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(count)]
        self.special_token_ids = [i for i in range(count) if tokenizer.is_special(i)]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> Sequence[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._encode(text, add_special=False, parse_special=False)


class Guide:
    """Follows one answer; a Constraint of the scheduler. UsageError if the grammar takes more work
    for a token than it may."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit for each token, low bits first."""
        mask = self._matcher.compute_bitmask()
        self._check()
        return np.frombuffer(mask, np.uint8)

    def take(self, token: int) -> None:
        """A token was chosen."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Guide:
        """Another from the same beginning, which shares what was worked out."""
        return Guide(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the form that was asked for failed: {_first(self._matcher)}")


class Compiler:
    """Makes guides for one model. The tables take some 8 MiB for 49,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        if not eos:
            raise EngineError("this model has no token that ends an answer, so it keeps no form")
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, eos[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(eos), slices=[])
        self._special = {
            tokenizer.token_bytes(i).decode("utf-8", "replace")
            for i in range(tokenizer.vocab_size)
            if tokenizer.is_special(i)
        }
        # The work for a token grows with the square of the items in a row where a grammar can be
        # read in many ways; those of JSON schemas can not.
        self._limits = {kind: _limits(items) for kind, items in _ROW_ITEMS.items()}

    def schema(self, schema: str) -> Guide:
        """JSON that a schema allows. UsageError if it is no schema or has what is not supported."""
        self._bound(schema)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)
        except ValueError as error:
            raise UsageError(f"the JSON schema cannot be used: {error}") from error
        return self._guide(grammar, "JSON schema", "schema")

    def regex(self, regex: str) -> Guide:
        """Text that a regular expression matches as a whole."""
        self._bound(regex)
        grammar = llguidance.LLMatcher.grammar_from_regex(regex)
        return self._guide(grammar, "regular expression", "grammar")

    def lark(self, grammar: str) -> Guide:
        """Text of a grammar in the Lark form of llguidance."""
        self._bound(grammar)
        return self._guide(llguidance.LLMatcher.grammar_from_lark(grammar), "grammar", "grammar")

    def is_special(self, text: str) -> bool:
        """Whether a text is a special token, which grammars write without quotes."""
        return text in self._special

    def _guide(self, grammar: str, what: str, kind: str) -> Guide:
        matcher = llguidance.LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=self._limits[kind]
        )
        if matcher.is_error():
            raise UsageError(f"the {what} cannot be used: {_first(matcher)}")
        guide = Guide(matcher)
        guide.allowed()  # the first is the most work: not in the scheduler's thread
        return guide

    @staticmethod
    def _bound(source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise UsageError(
                f"a schema or grammar may have {MAX_SOURCE} characters, and this has {len(source)}"
            )


def _first(matcher: llguidance.LLMatcher) -> str:
    lines = matcher.get_error().strip().splitlines()
    return lines[0][:300] if lines else "for no known reason"


def _limits(items: int) -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        max_items_in_row=items,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=4_000,
        max_grammar_size=50_000,
    )
