"""An executor and a tokenizer for tests of the engine: the same surface as the core, and scripted.

The logits say which token comes next: that of the script if there is one, otherwise the last token
plus one. Everything that is done is counted, and limits are enforced as in the core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from pliant.engine.model import Model
from pliant.engine.rates import Rates
from pliant.errors import ChecksumError, EngineError
from pliant.memory.plan import PackSizes, Wish

__all__ = ["AlwaysRead", "FakeExecutor", "FakeTokenizer", "executor_of", "fake_model"]

VOCAB = 300
RUNG = 1000
KV_PAGE = 640
PAGE_TOKENS = 32
EOS = 299


class FakeExecutor:
    """`script(tokens, rungs)` gives the next token for a sequence, or None: the last plus one."""

    kv_page_tokens = PAGE_TOKENS
    kv_page_bytes = KV_PAGE
    kv_rung_bytes = ()
    kv_global_bytes = (KV_PAGE,)
    kv_local_age = 0
    kv_stored_bytes = ((KV_PAGE,), (KV_PAGE,))
    threads = 1
    isa = "fake"

    def __init__(self, rungs: int = 100) -> None:
        self.rungs = rungs
        self.resident_rungs = 0
        self.read = 0
        self.most_read = 0
        self.kv_pages_total = 0
        self.sequences: dict[int, list[int]] = {}
        self.script: Callable[[list[int], int], int | None] = lambda tokens, rungs: None
        self.steps: list[tuple[int, int]] = []  # tokens and rungs of each step
        self.broken_rung: int | None = None
        self.read_seconds = 0.0
        self.step_seconds = 0.0
        self.newest = 0
        self.hurried = False
        self.given_up = 0
        self.after_giving_up: float | None = None  # seconds of a step from then on
        self._busy = threading.Lock()
        self._reading = threading.Lock()
        self._end = threading.Lock()

    @property
    def arena_bytes(self) -> int:
        return self.read * RUNG

    @property
    def kv_pages_used(self) -> int:
        return sum(-(-len(tokens) // PAGE_TOKENS) for tokens in self.sequences.values())

    @property
    def read_rungs_count(self) -> int:
        return self.read

    def overtake(self, ticket: int) -> None:
        self.newest = max(self.newest, ticket)

    def read_rungs(
        self,
        locations: Sequence[tuple[int, int, int, int]],
        *,
        first: int,
        goal: int,
        ticket: int,
        threads: int,
        direct: bool,
        share: float,
    ) -> bool:
        assert self._reading.acquire(blocking=False), "two reads at a time"
        try:
            assert first + len(locations) <= self.rungs
            end = time.monotonic() + self.read_seconds
            while time.monotonic() < end and self.newest <= ticket:
                time.sleep(0.0005)
            for number in range(first, first + len(locations)):
                if number == self.broken_rung:
                    raise ChecksumError(f"rung {number} is broken")
            with self._end:
                if self.newest > ticket or first != self.read:
                    return False
                self.read += len(locations)
                self.most_read = max(self.most_read, self.read)
                return True
        finally:
            self._reading.release()

    def discard(self, rungs: int) -> None:
        with self._end:
            self.read = min(self.read, max(rungs, self.resident_rungs))

    def publish(self, rungs: int) -> None:
        with self._alone(), self._end:
            assert 0 <= rungs <= self.read
            self.resident_rungs = self.read = rungs

    @property
    def busy(self) -> bool:
        return self._busy.locked()

    def depths(self) -> npt.NDArray[np.uint8]:
        return np.array([self.resident_rungs % 9], np.uint8)

    def reserve_kv(self, pages: int) -> None:
        assert not self.sequences
        self.kv_pages_total = pages

    def open_sequence(self) -> int:
        number = max(self.sequences, default=-1) + 1
        self.sequences[number] = []
        return number

    def close_sequence(self, seq: int) -> None:
        del self.sequences[seq]

    def length(self, seq: int) -> int:
        return len(self.sequences[seq])

    def truncate(self, seq: int, length: int) -> int:
        assert length <= len(self.sequences[seq])
        del self.sequences[seq][length:]
        return length

    def page_rungs(self, pages: list[int]) -> list[int]:
        return [0] * len(pages)

    def page_whole(self, pages: list[int]) -> list[bool]:
        return [True] * len(pages)

    def set_kv_ages(self, seen: list[int], kept: list[int], whole: int | None = None) -> None:
        assert not any(seen + kept)
        assert whole is None

    def pages(self, seq: int) -> list[int]:
        return [seq * 10_000 + page for page in range(-(-len(self.sequences[seq]) // PAGE_TOKENS))]

    def adopt_pages(self, seq: int, pages: list[int]) -> None:
        assert not pages

    def hold_pages(self, pages: list[int]) -> None:
        assert not pages

    def drop_pages(self, pages: list[int]) -> None:
        assert not pages

    def trim_kv(self) -> int:
        return 0

    def limit_kv(self, size: int) -> None:
        self.kv_limit = size

    def kv_ages(self, seqs: list[int], tokens: list[int]) -> tuple[list[int], int]:
        full = [count // PAGE_TOKENS for count in tokens]
        ages = [sum(count > age for count in full) for age in range(max(full, default=0))]
        return ages, sum(count % PAGE_TOKENS > 0 for count in tokens)

    def kv_usable(self, pages: list[int]) -> int:
        return len(pages)

    def kv_bytes(self, pages: list[int]) -> int:
        return len(pages) * KV_PAGE

    @property
    def kv_used_bytes(self) -> int:
        return self.kv_pages_used * KV_PAGE

    def take_page(self, page: int, into: npt.NDArray[np.uint8]) -> None:
        seq, page = divmod(page, 10_000)
        tokens = self.sequences[seq][page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
        into[:] = np.resize(np.array([*tokens, *[0] * (160 - len(tokens))], "<i4").view("u1"), 640)

    def put_page(
        self,
        seq: int,
        tokens: int,
        from_: npt.NDArray[np.uint8],
        rungs: int = 0,
        whole: bool = True,
    ) -> None:
        assert rungs == 0
        assert whole
        assert len(self.sequences[seq]) % PAGE_TOKENS == 0
        self.sequences[seq] += from_.view("<i4")[:tokens].tolist()

    def step(
        self,
        seqs: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        want: list[int],
        *,
        whole: bool = True,
    ) -> npt.NDArray[np.float32] | None:
        with self._alone():
            begin = time.monotonic()
            while (left := begin + self.step_seconds - time.monotonic()) > 0:
                if self.hurried and not whole:
                    self.given_up += 1
                    if self.after_giving_up is not None:
                        self.step_seconds = self.after_giving_up
                    return None
                time.sleep(min(left, 0.001))
            assert tokens.dtype == np.int32
            assert len(tokens) == sum(counts)
            rows, at = [], 0
            for seq, count, wanted in zip(seqs, counts, want, strict=True):
                known = self.sequences[seq]
                for index in range(count):
                    known.append(int(tokens[at]))
                    at += 1
                    if wanted == 2 or (wanted == 1 and index == count - 1):
                        rows.append(self._logits(known))
            if self.kv_pages_used > self.kv_pages_total:
                raise EngineError("no page")
            self.steps.append((len(tokens), self.resident_rungs))
            return np.array(rows, np.float32).reshape(-1, VOCAB)

    def states(
        self,
        seqs: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        *,
        whole: bool = True,
    ) -> npt.NDArray[np.float32] | None:
        rows = self.step(seqs, counts, tokens, [2] * len(seqs), whole=whole)
        return None if rows is None else rows[:, :2]

    def hurry(self, on: bool) -> None:
        self.hurried = on

    def memory(self) -> dict[str, int]:
        return {"weights": self.arena_bytes, "kv": self.kv_pages_used * KV_PAGE, "base": 0}

    def _logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        following = self.script(tokens, self.resident_rungs)
        row = np.arange(VOCAB, 0, -1).astype(np.float32) / VOCAB
        row[(tokens[-1] + 1) % VOCAB if following is None else following] = 9.0
        return row

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The core is used by one thread at a time: anything else is a mistake of the engine."""
        assert self._busy.acquire(blocking=False), "two threads in the executor"
        try:
            yield
        finally:
            self._busy.release()


class FakeTokenizer:
    """Tokens are bytes; from 256 on they are spelled `<256>` and so on."""

    vocab_size = VOCAB

    def encode(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        ids = list(text.encode())
        return [256, *ids] if add_special else ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else f"<{token}>".encode()

    def id_of(self, token: str) -> int | None:
        return None

    def is_special(self, token: int) -> bool:
        return token >= 256

    def stream(self) -> FakeStream:
        return FakeStream(self)


class FakeStream:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = b""

    def push(self, token: int) -> str:
        self._bytes += self._tokenizer.token_bytes(token)
        try:
            text = self._bytes.decode()
        except UnicodeDecodeError:
            return ""
        self._bytes = b""
        return text

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode("utf-8", "replace"), b""
        return text


class AlwaysRead(Rates):
    """Reads whatever is on disk, so that no test depends on times."""

    def choose(self, size: int, tokens: int, pages: int = 1) -> bool:
        self.reads += pages
        return True


def fake_model(
    rungs: int = 100,
    *,
    context: int = 2048,
    executor: FakeExecutor | None = None,
    early: bool = False,
    log: Callable[[str], None] | None = None,
    **wish: Any,
) -> Model:
    """A model of 100 rungs of 1,000 bytes; a token of KV takes 20 bytes, fixed parts 10,000.

    `wish` are the limits: memory, weights, context, sessions and so on.
    """
    executor = executor or FakeExecutor(rungs)
    units = SimpleNamespace(matrices=(), first=np.zeros(1, np.int64), rows=np.zeros(0, np.int32))
    pack = SimpleNamespace(
        path=Path("fake.pack"),
        rungs_available=rungs,
        units=units,
        manifest=SimpleNamespace(
            rungs=range(rungs),
            tokens=SimpleNamespace(bos=256, eos=(EOS,), add_bos=True),
            model=SimpleNamespace(vocab=VOCAB, context=context),
        ),
        rung_location=lambda rung: SimpleNamespace(
            path=Path(__file__), offset=0, bytes=RUNG, crc32=0
        ),
    )
    sizes = PackSizes(
        weights=[RUNG * k for k in range(rungs + 1)],
        arena=[RUNG * k for k in range(rungs + 1)],
        coded=8000,
        quality=[(0, 8.0), (RUNG * rungs, 0.01)],
        context=context,
        kv_page_tokens=PAGE_TOKENS,
        kv_page_bytes=KV_PAGE,
    )
    fixed = (("interpreter", 7600), ("logits", 2 * VOCAB * 4))
    tokenizer: Any = FakeTokenizer()
    seam: Any = executor
    return Model(
        pack,  # type: ignore[arg-type]
        seam,
        tokenizer,
        sizes=sizes,
        fixed=fixed,
        wish=Wish(**wish),
        early=early,
        log=log,
    )


def executor_of(model: Model) -> FakeExecutor:
    """The executor inside a fake model."""
    found = model._executor
    assert isinstance(found, FakeExecutor)
    return found
