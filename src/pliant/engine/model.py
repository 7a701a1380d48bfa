"""A model in memory: the class that everything above uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pliant.engine.build import RungFiles
from pliant.engine.generation import Generation
from pliant.engine.kinds import Depth, GenerationResult, Report
from pliant.engine.sampling import Sampling, new_seed
from pliant.engine.seam import Executor, Floats, Tokenizer
from pliant.engine.session import Session
from pliant.engine.turns import Turns
from pliant.engine.weights import Weights
from pliant.errors import BudgetError, EngineError, UsageError
from pliant.memory.budget import measure, system_limit
from pliant.memory.ledger import Audit, Ledger
from pliant.memory.plan import PackSizes, Plan, Wish, make_plan, smallest
from pliant.sizes import format_size, parse_size

if TYPE_CHECKING:
    from pliant.engine.chat import ChatTemplate, Message
    from pliant.store import Pack

__all__ = ["Model"]

_RESERVED = ("logits", "margin", "weights", "kv")  # not in memory at first

Fixed = tuple[tuple[str, int], ...]


class Model:
    """A model that runs within a budget. Made by `pliant.load`; close it, or use it in a `with`.

    Answers may be made from several threads at once; their steps take turns. The budget may be
    changed from any thread at any moment.
    """

    def __init__(
        self,
        pack: Pack,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        sizes: PackSizes,
        fixed: Fixed,
        wish: Wish,
        tokenizer_bytes: int = 0,
        template: ChatTemplate | None = None,
    ) -> None:
        """For `pliant.load`.

        `fixed`: the parts that are there whatever the plan, and their bytes; `tokenizer_bytes`: how
        much of them is the mapped file of the tokenizer, which is read into memory as it is used.
        """
        self.pack = pack
        self.tokenizer = tokenizer
        self.last: GenerationResult | None = None
        """The answer that ended last."""
        self.plan: Plan = make_plan(sizes, fixed, wish)
        """What is held for what, once the change in progress, if any, is done."""
        self.ledger = Ledger(wish.memory or max(system_limit(), self.plan.total))
        """Who holds how many bytes."""
        self._executor = executor
        self._sizes = sizes
        self._fixed = fixed
        self._wish = wish
        self._turns = Turns()
        self._planning = threading.Lock()
        self._files = RungFiles(pack)
        self._weights = Weights(executor, self._files, sizes, self._turns)
        self._lengths: dict[int, int] = {}
        self._context = self.plan.context
        self._pages = self.plan.kv_pages
        self._template = template
        self._tokenizer_bytes = tokenizer_bytes
        self._closed = False
        executor.reserve_kv(sizes.pages(sizes.context) * wish.sessions)
        for owner, size in self.plan.lines():
            self.ledger.hold(owner, size, touched=0 if owner in _RESERVED else None)
        try:
            self._weights.go(self.plan.rungs, self._weights.ticket())
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; answers that go on end with an EngineError."""
        with self._turns:
            if not self._closed:
                self._closed = True
                self._files.close()
                del self._weights, self._executor  # the last references, so the memory goes

    # --- text and tokens

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, the tokens in front that the model wants, and special
        tokens spelled out in the text are taken as such."""
        return list(self.tokenizer.encode(text, add_special=special, parse_special=special))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self.tokenizer.decode(list(ids))

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    @property
    def template_source(self) -> str | None:
        """The chat template as it came with the model; None without one."""
        return None if self._template is None else self._template.source

    def chat_prompt(self, messages: Sequence[Message], **values: Any) -> list[int]:
        """The ids of a conversation, up to where the answer begins.

        Messages are mappings with `role` and `content`; `values` are further variables of the
        template. UsageError if the pack has no template or it refuses the messages.
        """
        if self._template is None:
            raise UsageError(
                f"{self.pack.path} has no chat template, or it was loaded without: the model can "
                "continue text; use generate, or `pliant run --raw`"
            )
        text = self._template.render(messages, **values)
        return list(self.tokenizer.encode(text, add_special=False, parse_special=True))

    # --- answers

    def session(self) -> Session:
        """A conversation whose tokens stay in the cache between answers."""
        return Session(self)

    def step_all(self, sessions: Sequence[Session], tokens: Sequence[int]) -> Floats:
        """Append one token to each of several sessions in a single step.

        Returns float32 [sessions, vocabulary]. The logits of a session are the same, bit by bit, as
        if it were alone. EngineError, and no change, if one of them has no room.
        """
        ids = self._checked(tokens)
        if len(sessions) != len(ids) or len({id(session) for session in sessions}) != len(ids):
            raise UsageError("step_all takes one token for each of several different sessions")
        if not ids:
            raise UsageError("no session was given")
        sequences = [session.sequence for session in sessions]
        rows, _ = self._step(sequences, [1] * len(ids), np.array(ids, np.int32), [1] * len(ids))
        for session, token in zip(sessions, ids, strict=True):
            session.tokens.append(token)
        return rows

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        ignore_eos: bool = False,
        session: Session | None = None,
    ) -> Generation:
        """Continue a text, or ids. Returns an iterator over pieces of text, with `.result`.

        `max_tokens` None: until the model ends or the context is full. `stop`: texts before which
        the answer ends. `seed` None: a new one, which the result tells. `ignore_eos`: go on where
        the model would end. `session`: use and keep its cache. The rest is explained in
        `pliant.engine.sampling.Sampling`. Raises UsageError for arguments without meaning, and
        EngineError if the prompt does not fit into the context.
        """
        ids = self.tokenize(prompt) if isinstance(prompt, str) else self._checked(prompt)
        if not ids:
            bos = self.pack.manifest.tokens.bos
            if bos is None:
                raise UsageError("the prompt is empty, and this model has no token to begin with")
            ids = [bos]
        if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
            raise UsageError(f"max_tokens must be at least 1, and not {max_tokens!r}")
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=new_seed() if seed is None else seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=dict(logit_bias or {}),
        )
        vocab = self.pack.manifest.model.vocab
        for token in sampling.logit_bias:
            if token >= vocab:
                raise UsageError(f"logit_bias: token {token} is not one of {vocab}")
        self._fits_context(len(ids))
        return Generation(
            self,
            ids,
            sampling,
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            eos=frozenset() if ignore_eos else frozenset(self.pack.manifest.tokens.eos),
            session=session,
        )

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation; `options` are those of `generate`."""
        return self.generate(self.chat_prompt(messages), **options)

    def logits(self, ids: Sequence[int]) -> Floats:
        """The logits after each token: float32 [tokens, vocabulary].

        BudgetError if the result itself, 4 bytes a value, has no room in the budget.
        """
        ids = self._checked(ids)
        rows, vocab = len(ids), self.pack.manifest.model.vocab
        self._fits_result(rows, vocab)
        result = np.empty((rows, vocab), np.float32)
        done = 0
        for block in self.logit_blocks(ids):
            result[done : done + len(block)] = block
            done += len(block)
        return result

    def logit_blocks(self, ids: Sequence[int], *, rows: int = 64) -> Iterator[Floats]:
        """As `logits`, but in blocks of at most `rows` rows, so that only one is in memory."""
        ids = self._checked(ids)
        if not ids:
            raise UsageError("no token was given")
        if rows < 1:
            raise UsageError(f"rows must be at least 1, and not {rows}")
        self._fits_context(len(ids))
        with self.session() as session:
            yield from session.feed_all(ids, rows)

    # --- the budget

    @property
    def context(self) -> int:
        """Tokens that a session may hold now."""
        return self._context

    @property
    def kv_pages(self) -> int:
        """Pages that all sessions together may hold now."""
        return self._pages

    @property
    def kv_page_tokens(self) -> int:
        """Tokens of a page."""
        return self._sizes.kv_page_tokens

    @property
    def kv_page_bytes(self) -> int:
        """Bytes of a page, for all layers."""
        return self._sizes.kv_page_bytes

    @property
    def depth(self) -> Depth:
        """What steps use now."""
        self._check_open()
        return self._weights.depth

    @property
    def budget(self) -> int | None:
        """Bytes that the whole process may use; None if no budget was set.

        Set it to a number of bytes or a text such as `200MiB`, from any thread, while answers go
        on: when the assignment is done, the new budget holds. BudgetError, and no change, if the
        model and what its sessions hold do not fit.
        """
        return self._wish.memory

    @budget.setter
    def budget(self, size: int | str | None) -> None:
        self.resize(memory=size)

    def resize(self, *, memory: int | str | None = None, weights: int | str | None = None) -> Plan:
        """Set both limits anew (None: no limit), and move there; returns the plan that holds.

        `memory`: bytes of the whole process. `weights`: bytes of plies and scales. If another call
        comes in while this one reads rungs, that one takes over and this one returns.
        """
        wish = self._limits(memory, weights)
        with self._planning:
            before = self.plan, self._wish, self.ledger.total
            with self._turns:  # nothing grows while we plan
                self._check_open()
                wish = replace(wish, least_context=self._least_context())
                plan = make_plan(self._sizes, self._fixed, wish)
                self._context = min(self._context, plan.context)
                self._pages = min(self._pages, plan.kv_pages)
            total = wish.memory or max(system_limit(), plan.total)
            held = {name: size for name, (size, _) in self.ledger.owners().items()}
            most = max(plan.arena, held["weights"])
            self.ledger.move(
                {"weights": most, "kv": min(plan.kv, held["kv"])},
                max(total, self.ledger.total, self.ledger.held + most - held["weights"]),
            )
            self.plan, self._wish = plan, wish
            ticket = self._weights.ticket()
        try:
            done = self._weights.go(plan.rungs, ticket)
        except BaseException:
            with self._planning:
                if self.plan is plan:
                    self._settle(*before)
            raise
        if done:
            with self._planning:
                if self.plan is plan:
                    self._settle(plan, wish, total)
        return plan

    def plan_for(
        self, *, memory: int | str | None = None, weights: int | str | None = None
    ) -> Plan:
        """The plan that `resize` with these limits would go to; nothing changes."""
        return make_plan(self._sizes, self._fixed, self._limits(memory, weights))

    @property
    def budget_range(self) -> tuple[int, int]:
        """Bytes of the least budget with which the model runs, and of all that it could use."""
        wish = replace(self._wish, memory=None, weights=None, least_context=0)
        least = smallest(self._sizes, self._fixed, wish)
        return least.total, make_plan(self._sizes, self._fixed, wish).total

    def report(self) -> Report:
        """What the process holds, and with what quality it answers."""
        self._refresh()
        with self._turns:
            self._check_open()
            depths, depth = self._executor.depths(), self._weights.depth
        now = measure()
        return Report(
            pack=str(self.pack.path),
            budget=self._wish.memory,
            resident=now.now,
            peak=now.peak,
            total=self.ledger.total,
            free=self.ledger.free,
            ledger=self.ledger.owners(),
            rungs=depth.rungs,
            rungs_available=self.pack.rungs_available,
            rungs_of_pack=len(self.pack.manifest.rungs),
            weights=depth.weights,
            bits_per_weight=depth.bits_per_weight,
            expected_kl=depth.expected_kl,
            context=self._context,
            sessions=self.plan.sessions,
            threads=self._executor.threads,
            isa=self._executor.isa,
            matrices=self._matrix_depths(depths),
        )

    def audit(self) -> Audit:
        """Compare the ledger with the resident set that the kernel reports."""
        self._refresh()
        return self.ledger.audit()

    # --- for sessions

    def _open_sequence(self, pages: Sequence[int] = ()) -> int:
        """A new sequence that begins with whole pages that are in use already."""
        with self._turns:
            self._check_open()
            sequence = self._executor.open_sequence()
            if pages:
                self._executor.adopt_pages(sequence, list(pages))
            self._lengths[sequence] = len(pages) * self._sizes.kv_page_tokens
            return sequence

    def _close_sequence(self, sequence: int) -> None:
        with self._turns:
            if not self._closed:
                self._executor.close_sequence(sequence)
                del self._lengths[sequence]

    def _hold_pages(self, sequence: int, first: int, last: int) -> list[int]:
        """Keep pages first .. last - 1 of a sequence beyond its end; returns their numbers."""
        with self._turns:
            self._check_open()
            pages = self._executor.pages(sequence)[first:last]
            self._executor.hold_pages(pages)
            return pages

    def _drop_pages(self, pages: Sequence[int]) -> None:
        """Give pages back that were kept."""
        with self._turns:
            if not self._closed:
                self._executor.drop_pages(list(pages))

    @property
    def _free_pages(self) -> int:
        """KV pages that steps may still take; below 0 if a budget has just shrunk."""
        return self._pages - self._executor.kv_pages_used

    def _truncate(self, sequence: int, length: int) -> None:
        with self._turns:
            self._check_open()
            self._executor.truncate(sequence, length)
            self._lengths[sequence] = length

    def _step(
        self,
        sequences: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        want: list[int],
    ) -> tuple[Floats, Depth]:
        """One step, and the depth it was made with. EngineError, and no change, without room."""
        with self._turns:
            self._check_open()
            pages = self._executor.kv_pages_used
            for sequence, count in zip(sequences, counts, strict=True):
                length = self._lengths[sequence]
                if length + count > self._context:
                    raise EngineError(
                        f"the context is full: it holds {self._context} tokens, and "
                        f"{length + count} were to be in it; a larger budget or context holds more"
                    )
                pages += self._sizes.pages(length + count) - self._sizes.pages(length)
            if pages > self._pages:
                raise EngineError(
                    f"the KV cache is full: it holds {self._pages} pages of "
                    f"{self._sizes.kv_page_tokens} tokens for all sessions; close some, or load "
                    "with more sessions or a larger budget"
                )
            rows = self._executor.step(sequences, counts, tokens, want)
            for sequence, count in zip(sequences, counts, strict=True):
                self._lengths[sequence] += count
            return rows, self._weights.depth

    # --- inside

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this model was closed; load it again")

    def _checked(self, ids: Sequence[int]) -> list[int]:
        vocab = self.pack.manifest.model.vocab
        checked = []
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int | np.integer):
                raise UsageError(f"a token id is an integer, and not {item!r}")
            if not 0 <= item < vocab:
                raise UsageError(f"token {item} is not one of the {vocab} of this model")
            checked.append(int(item))
        return checked

    def _fits_context(self, tokens: int) -> None:
        if tokens > self._context:
            made = self._sizes.context
            way = "a larger budget or context holds more"
            if self._context == made:
                way = "this model was made for no more"
            raise EngineError(
                f"{tokens} tokens do not fit into the context of {self._context}: {way}"
            )

    def _fits_result(self, rows: int, vocab: int) -> None:
        if self._wish.memory is None:
            return
        self._refresh()
        owners = self.ledger.owners()
        held, touched = owners["kv"]
        own_kv = self._sizes.kv(rows, 1)
        room = self.ledger.free + owners["logits"][0] + max(0, held - touched - own_kv)
        if rows * vocab * 4 > room:
            raise BudgetError(
                f"{rows} x {vocab} logits take {format_size(rows * vocab * 4)}, and the budget of "
                f"{format_size(self._wish.memory)} leaves {format_size(room)}: use logit_blocks, "
                "or a larger budget"
            )

    def _limits(self, memory: int | str | None, weights: int | str | None) -> Wish:
        return replace(
            self._wish,
            memory=None if memory is None else parse_size(memory, "memory"),
            weights=None if weights is None else parse_size(weights, "weights"),
        )

    def _least_context(self) -> int:
        """Tokens of a session that a plan must leave room for; called with the turn taken."""
        pages = -(-self._executor.kv_pages_used // self._wish.sessions)
        longest = max(self._lengths.values(), default=0)
        return min(max(longest, pages * self._sizes.kv_page_tokens), self._sizes.context)

    def _settle(self, plan: Plan, wish: Wish, total: int) -> None:
        """The end of a change: limits and ledger follow `plan`; called while planning is locked."""
        with self._turns:
            self._check_open()
            self._executor.trim_kv()
            self._context, self._pages = plan.context, plan.kv_pages
        self.plan, self._wish = plan, wish
        self.ledger.move({"weights": plan.arena, "kv": plan.kv}, total)

    def _refresh(self) -> None:
        """Tell the ledger what is in memory now."""
        with self._turns:
            self._check_open()
            parts = self._executor.memory()
        for owner in ("weights", "kv"):
            self.ledger.touch(owner, parts.get(owner, 0))
        owners = self.ledger.owners()
        if "tokenizer" in owners:
            mapped = getattr(self.tokenizer, "resident_bytes", self._tokenizer_bytes)
            held = owners["tokenizer"][0]
            self.ledger.touch("tokenizer", held - max(0, self._tokenizer_bytes - mapped))

    def _matrix_depths(self, depths: npt.NDArray[np.uint8]) -> dict[str, float]:
        """The mean plies of each coded matrix, over its weights."""
        units, result = self.pack.units, {}
        for matrix, start in zip(units.matrices, units.first.tolist(), strict=False):
            part = slice(start, start + matrix.units)
            rows = units.rows[part]
            result[matrix.name] = float((depths[part] * rows).sum() / max(int(rows.sum()), 1))
        return result
