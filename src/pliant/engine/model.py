"""A model in memory: the class that everything above uses."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pliant.engine.auto import steer
from pliant.engine.build import RungFiles
from pliant.engine.cache import Cache, ParkedLost
from pliant.engine.generation import Generation
from pliant.engine.holdings import Change, Fixed, Holdings
from pliant.engine.kinds import Depth, DepthTrack, GenerationResult, Report
from pliant.engine.line import Line
from pliant.engine.page_folder import PageFolder
from pliant.engine.park import FETCH
from pliant.engine.prefixes import page_keys
from pliant.engine.reporting import make_report
from pliant.engine.sampling import Sampling, new_seed
from pliant.engine.seam import Executor, Floats, Tokenizer
from pliant.engine.session import Session
from pliant.engine.turns import StepGivenUp, Turns
from pliant.errors import BudgetError, EngineError, UsageError
from pliant.memory.governor import Governor
from pliant.memory.ledger import Audit, Ledger
from pliant.memory.plan import PackSizes, Plan, Wish
from pliant.memory.pressure import Sources
from pliant.sizes import format_size, parse_size
from pliant.store.closing import Closing

if TYPE_CHECKING:
    from pliant.engine.chat import ChatTemplate, Message
    from pliant.store import Pack

__all__ = ["Model"]

_LOST, _LOSS = 8, 0.25
"""Steps in a row, and their seconds, that changes of the budget may cost; then one is whole."""

_BLOCK_ROWS = 64  # of logits that are made together


def _block_rows(room: int) -> int:
    """Of two blocks, one to put rows in order, and the one of a step before."""
    return min(max((room - 2) // 2, 1), _BLOCK_ROWS)


def _nobody(on: bool) -> None:
    """There is nobody left who could hurry."""


class Model(Closing):
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
        folder: PageFolder | None = None,
        early: bool = False,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """For `pliant.load`.

        `fixed`: the parts that are there whatever the plan, and their bytes; `tokenizer_bytes`: how
        much of them is the mapped file of the tokenizer, which is read into memory as it is used;
        `early`, `log`: as for `Holdings.load`.
        """
        self.pack = pack
        self.tokenizer = tokenizer
        self.last: GenerationResult | None = None
        """The answer that ended last."""
        self._executor = executor
        self._sizes = sizes
        self._turns = Turns(executor.hurry)
        self._lost, self._loss = 0, 0.0  # steps that were given up since one was not; seconds
        self._line = Line()
        self._holdings = Holdings(
            executor,
            RungFiles(pack),
            self._turns,
            sizes=sizes,
            fixed=fixed,
            wish=wish,
            moved=self._line.wake,
            folder=folder,
        )
        self._governor: Governor | None = None
        self._steering = threading.Lock()
        self._template = template
        self._tokenizer_bytes = tokenizer_bytes
        self._closed = False
        try:
            self._holdings.load(self._check_open, early=early, log=log)
        except BaseException:
            self._holdings.close()
            raise

    def close(self) -> None:
        """Give everything back; answers that go on end with an EngineError."""
        with self._turns:
            if self._closed:
                return
            self._closed = True
        with self._steering:
            self._stop_governor()
        self._holdings.close()
        with self._turns:
            self._turns.hurry = _nobody
            del self._holdings, self._executor  # the last references, so the memory goes
        self._line.wake()

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
        ones, array = [1] * len(ids), np.array(ids, np.int32)
        while True:
            try:
                rows, _ = self._step(sequences, ones, array, ones)
                break
            except ParkedLost as lost:
                sessions[sequences.index(lost.sequence)].compute_again()
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
        self._fits_context(len(ids))
        rows, vocab = len(ids), self.pack.manifest.model.vocab
        room = self._logit_rows(rows)
        if rows > room:
            raise self._no_logits(rows, room, "use logit_blocks, or a larger budget")
        # Not from malloc, which may keep it when it is dropped: nobody would hold it then.
        result = np.frombuffer(mmap.mmap(-1, rows * vocab * 4), np.float32).reshape(rows, vocab)
        done = 0
        for block in self._blocks(ids, _block_rows(room - rows)):
            result[done : done + len(block)] = block
            done += len(block)
        return result

    def logit_blocks(self, ids: Sequence[int], *, rows: int | None = None) -> Iterator[Floats]:
        """As `logits`, but in blocks of at most `rows` rows. None: 64, or as many as the budget has
        room for.

        There are two in memory, one while the next is computed; BudgetError if they have no room.
        """
        ids = self._checked(ids)
        if rows is not None and rows < 1:
            raise UsageError(f"rows must be at least 1, and not {rows}")
        self._fits_context(len(ids))
        room = self._logit_rows(len(ids))
        if rows is None:
            rows = _block_rows(room)
        elif (need := 2 * min(rows, len(ids))) > room:
            raise self._no_logits(need, room, "use fewer rows, or a larger budget")
        yield from self._blocks(ids, rows)

    def embed(
        self,
        ids: Sequence[int],
        *,
        track: DepthTrack | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Floats:
        """The mean of the last hidden states, after the last norm, over all tokens: float32
        [hidden].

        Waits for room as an answer does. `track`: gets the depths of the steps. `cancelled`: asked
        before each step; an EngineError follows if it says so.
        """
        ids = self._checked(ids)
        self._fits_context(len(ids))
        total = np.zeros(self.pack.manifest.model.hidden, np.float64)
        with self.session() as session:
            there = self._admit(session.sequence, len(ids), cancelled)
            states = session.states_all(ids, track) if there else iter(())
            for block in states:
                total += block.sum(axis=0, dtype=np.float64)
                if cancelled():
                    break
            if len(session) < len(ids):
                raise EngineError("it was cancelled")
        mean: Floats = (total / len(ids)).astype(np.float32)
        return mean

    # --- the budget

    @property
    def context(self) -> int:
        """Tokens that a session may hold now."""
        return self._cache.context

    @property
    def depth(self) -> Depth:
        """What steps use now."""
        self._check_open()
        return self._holdings.depth

    @property
    def plan(self) -> Plan:
        """What is held for what, once the change in progress, if any, is done."""
        self._check_open()
        return self._holdings.plan

    @property
    def ledger(self) -> Ledger:
        """Who holds how many bytes."""
        self._check_open()
        return self._holdings.ledger

    @property
    def budget(self) -> int | None:
        """Bytes that the whole process may use; None if no budget was set.

        Set it to a number of bytes or a text such as `200MiB`, from any thread, while answers go
        on: when the assignment is done, the new budget holds. BudgetError, and no change, if the
        model and what its sessions hold do not fit. `auto` is `govern()`.
        """
        self._check_open()
        return self._holdings.wish.memory

    @budget.setter
    def budget(self, size: int | str | None) -> None:
        if size == "auto":
            self.govern()
        else:
            self.resize(memory=size)

    def govern(
        self,
        *,
        keep_free: int | str | None = None,
        log: Callable[[str], None] | None = None,
        sources: Sources | None = None,
    ) -> Governor:
        """Let the budget follow the memory that other programs need, until another one is set.

        `keep_free`: bytes that they shall find free at any moment (None: a sixteenth of what this
        process could have). `log` is called with a line for each move, from another thread.
        `sources`: where the signs of pressure are read. The same as `budget = "auto"`.
        """
        self._check_open()
        size = None if keep_free is None else parse_size(keep_free, "keep_free")
        with self._steering:
            self._stop_governor()
            self._governor = steer(
                self._holdings,
                self._check_open,
                keep_free=size,
                log=log,
                sources=sources,
            )
            return self._governor

    @property
    def change(self) -> Change | None:
        """The newest change of the budget, done or not; with `load(early=True)` the first is the
        growth from the floor of quality to the plan. None: there was none."""
        self._check_open()
        return self._holdings.change

    @property
    def governor(self) -> Governor | None:
        """What moves the budget by itself; None if nothing does."""
        return self._governor

    def resize(self, *, memory: int | str | None = None, weights: int | str | None = None) -> Plan:
        """Set both limits anew (None: no limit), and move there; returns the plan that holds.

        `memory`: bytes of the whole process. `weights`: bytes of plies and scales. If another call
        comes in while this one reads rungs, that one takes over and this one returns.
        """
        change = self._move(memory, weights)
        change.run()
        return change.plan

    def move(self, *, memory: int | str | None = None, weights: int | str | None = None) -> Change:
        """As `resize`, but rungs that must be read are read in a thread of its own.

        When this returns, what had to shrink has shrunk and the new limits hold; `Change.wait`
        waits until the model has grown into them.
        """
        return self._move(memory, weights).start()

    def plan_for(
        self, *, memory: int | str | None = None, weights: int | str | None = None
    ) -> Plan:
        """The plan that `resize` with these limits would go to if no session were open."""
        self._check_open()
        return self._holdings.plan_for(self._limits(memory, weights))

    def least_plan(self) -> Plan:
        """The smallest plan now: the floor of quality, and what answers in flight were promised."""
        self._check_open()
        return self._holdings.least()

    def report(self, *, hurry: bool = False) -> Report:
        """What the process holds, and with what quality it answers.

        That is known between two steps. `hurry`: a step in progress is made again afterwards,
        instead of being waited for.
        """
        with self._turns.next(hurry=hurry):
            self._check_open()
            self._refresh()
            return make_report(self.pack, self._executor, self._holdings)

    def audit(self) -> Audit:
        """Compare the ledger with the resident set that the kernel reports."""
        with self._turns:
            self._check_open()
            self._refresh()
            return self._holdings.ledger.audit()

    # --- for sessions

    @contextmanager
    def _turn(self) -> Iterator[Cache]:
        """The turn, and the cache, which is used with it only; EngineError once it is closed."""
        with self._turns:
            yield self._cache

    def _close_sequence(self, sequence: int) -> None:
        with self._turns:
            if not self._closed:
                self._cache.close(sequence)
        self._line.wake()

    def _reserve(self, sequence: int, tokens: int) -> bool:
        with self._turn() as cache:
            return cache.reserve(sequence, min(tokens, cache.context))

    def _release(self, sequence: int) -> None:
        with self._turns:
            if not self._closed:
                self._cache.release(sequence)
        self._line.wake()

    def _admit(self, sequence: int, tokens: int, cancelled: Callable[[], bool]) -> bool:
        """Wait until room is promised; False if cancelled before, EngineError if nobody moves."""
        try:
            return self._line.wait(lambda: self._reserve(sequence, tokens), cancelled)
        except TimeoutError:
            raise EngineError(
                f"there is no room in the KV cache for {tokens} tokens: "
                f"{self._cache.in_flight} answers have it, and none of them goes on; end one, or "
                "load with more sessions or a larger budget"
            ) from None

    @property
    def _parks(self) -> bool:
        """Whether beginnings stay for later: then sessions share them too."""
        return self._cache.park.folder is not None

    def _begin(self, sequence: int, ids: Sequence[int]) -> int:
        """Let an empty sequence begin with the pages of `ids` that are kept, in memory or parked;
        returns how many tokens that are."""
        with self._turn() as cache:
            state = self._holdings.depth.state
            keys = page_keys(array("i", ids), cache.page_tokens, state)
            cache.begin(sequence, keys)
        while True:
            with self._turn() as cache:
                if self._holdings.depth.state != state or not cache.fetch(sequence, keys, FETCH):
                    return cache.length(sequence)

    def _share(self, sequence: int, keys: Sequence[bytes]) -> None:
        with self._turn() as cache:
            cache.share(sequence, keys)

    def _step(
        self,
        sequences: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        want: Sequence[int] | None,
    ) -> tuple[Floats, list[Depth]]:
        """One step with a turn of its own; the rest as `_step_in_turn`."""
        while True:
            with suppress(StepGivenUp), self._turns:
                return self._step_in_turn(sequences, counts, tokens, want)

    def _step_in_turn(
        self,
        sequences: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        want: Sequence[int] | None,
    ) -> tuple[Floats, list[Depth]]:
        """One step, and the depth that it had for each sequence. EngineError, and no change,
        without room; StepGivenUp, and no change, if the budget is to move: then leave the turn, and
        try again.

        `want` None: hidden states of all tokens instead of logits.
        """
        cache, begin = self._cache, time.perf_counter()
        whole = self._lost >= _LOST or self._loss >= _LOSS
        cache.prepare(sequences, counts)
        ready = time.perf_counter()
        if want is None:
            rows = self._executor.states(sequences, counts, tokens, whole=whole)
        else:
            rows = self._executor.step(sequences, counts, tokens, list(want), whole=whole)
        if rows is None:
            self._lost += 1
            self._loss += time.perf_counter() - begin
            raise StepGivenUp
        self._lost, self._loss = 0, 0.0
        if max(counts) >= cache.page_tokens:
            cache.park.rates.prefill.add(sum(counts), time.perf_counter() - ready)
        cache.stepped(sequences, counts)
        self._line.progress += 1
        return rows, [self._holdings.depth_of(sequence) for sequence in sequences]

    # --- inside

    @property
    def _cache(self) -> Cache:
        self._check_open()
        return self._holdings.cache

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
        if tokens == 0:
            raise UsageError("no token was given")
        context = self._cache.context
        if tokens > context:
            way = "a larger budget or context holds more"
            if context == self._sizes.context:
                way = "this model was made for no more"
            raise EngineError(f"{tokens} tokens do not fit into the context of {context}: {way}")

    def _blocks(self, ids: Sequence[int], rows: int) -> Iterator[Floats]:
        with self.session() as session:
            yield from session.feed_all(ids, rows)

    def _logit_rows(self, tokens: int) -> int:
        """Rows of logits that the budget has room for beside the KV of so many tokens."""
        if self.budget is None:
            return sys.maxsize
        with self._turns:
            self._refresh()
        owners = self.ledger.owners()
        held, touched = owners["kv"]
        level = self._cache.level
        own_kv = self._sizes.kv_session(level, tokens) + self._sizes.kv_in_chunk(level, tokens)
        room = self.ledger.free + owners["logits"][0] + max(0, held - touched - own_kv)
        return room // (4 * self.pack.manifest.model.vocab)

    def _no_logits(self, rows: int, room: int, way: str) -> BudgetError:
        vocab = self.pack.manifest.model.vocab
        return BudgetError(
            f"{rows} x {vocab} logits take {format_size(rows * vocab * 4)}, and the budget of "
            f"{format_size(self.budget or 0)} leaves {format_size(room * vocab * 4)}: {way}"
        )

    def _limits(self, memory: int | str | None, weights: int | str | None) -> Wish:
        return self._holdings.limits(
            None if memory is None else parse_size(memory, "memory"),
            None if weights is None else parse_size(weights, "weights"),
        )

    def _move(self, memory: int | str | None, weights: int | str | None) -> Change:
        self._check_open()
        wish = self._limits(memory, weights)
        with self._steering:
            self._stop_governor()
        return self._holdings.move(wish, self._check_open)

    def _stop_governor(self) -> None:
        if self._governor is not None:
            self._governor.close()
            self._governor = None

    def _refresh(self) -> None:
        """Tell the ledger what is in memory now; called with the turn taken."""
        self._check_open()
        mapped = getattr(self.tokenizer, "resident_bytes", self._tokenizer_bytes)
        self._holdings.refresh(max(0, self._tokenizer_bytes - mapped))
