"""The native core: kernels, executor, sampler, tokenizer.

Everything releases the GIL while it computes. Errors are those of pliant.errors, and OSError for
reads that fail.
"""

from collections.abc import Iterable
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

def cpu_isa() -> list[str]:
    """Instruction sets that have kernels here, best first: of avx512, avx2, plain."""

def usable_cpus() -> int:
    """Processors that this process may use: its affinity and the quota of its cgroup."""

def resident_bytes() -> tuple[int, int]:
    """Resident set of this process and its peak (VmRSS, VmHWM) in bytes."""

def is_cached(fd: int, offset: int, size: int) -> bool:
    """Whether most of this range of an open file is in the kernel's cache; true where the kernel
    cannot tell."""

def read_bandwidth(mebibytes: int, threads: int, repeats: int) -> float:
    """Bytes per second of plain reading of anonymous memory, the best of some repeats."""

def sample(
    logits: npt.NDArray[np.float32],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    position: int = 0,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    history: npt.NDArray[np.int32] | None = None,
    prompt: int = 0,
    bias: list[tuple[int, float]] = ...,
    isa: str = "auto",
) -> int:
    """Draw a token id from float32 [vocabulary]; see src/core/sampler.h."""

class Executor:
    """One model in memory, and the sequences that it continues; see src/core/executor.h."""

    def __init__(
        self, model: dict[str, Any], *, threads: int, isa: str = "auto", chunk: int = 128
    ) -> None:
        """`model` as in a manifest; at most `chunk` tokens are computed at once."""
    def set_vector(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """A norm or a bias, by its name in docs/format.md; copied."""
    def set_plain(
        self, name: str, weight: npt.NDArray[np.float32] | npt.NDArray[np.uint16]
    ) -> None:
        """A matrix [rows, columns] in float32, or in bfloat16 given as its bits; copied."""
    def set_tree(
        self, levels: npt.NDArray[np.float32], scale_steps: npt.NDArray[np.float32]
    ) -> None:
        """The 510 levels and 16 scale steps of a pack."""
    def add_coded(
        self,
        name: str,
        rows: int,
        columns: int,
        blocks: list[int],
        order: npt.NDArray[np.uint16],
        row_order: npt.NDArray[np.uint32] | None,
        row_scale: npt.NDArray[np.uint16],
        group_scale: npt.NDArray[np.float32],
    ) -> None:
        """A matrix in plies; in the order of the manifest. `row_scale` are the bits of float16."""
    def set_ladder(
        self, units: npt.NDArray[np.uint32], rung_plies: list[int], rung_bytes: list[int]
    ) -> None:
        """The unit of each ply, and what each rung has of them; after all matrices."""
    def finish(self) -> None:
        """Check that nothing is missing; FormatError says what is."""
    @property
    def rungs(self) -> int:
        """All rungs of the ladder."""
    @property
    def read_rungs_count(self) -> int:
        """Rungs in memory."""
    @property
    def resident_rungs(self) -> int:
        """Rungs in use."""
    @property
    def arena_bytes(self) -> int:
        """Memory of the rungs that were read."""
    def overtake(self, ticket: int) -> None:
        """Say that a newer change was asked for: reads with a smaller ticket end soon."""
    def read_rungs(
        self,
        locations: list[tuple[int, int, int, int]],
        *,
        first: int | None = None,
        goal: int = 0,
        ticket: int = ...,
        threads: int | None = None,
        direct: bool = False,
        share: float = 1.0,
    ) -> bool:
        """Append rungs: file descriptor, offset, bytes, CRC-32 of each. On an error none stays.

        May run beside steps, which do not see them before `publish`, and beside `publish`. False if
        the ticket was overtaken, and then the first that are complete may stay, or if `first` is
        not `read_rungs_count`. `goal`: rungs that there will be after this and further reads.
        `threads`: each has one read in flight. `direct`: what is not in the kernel's cache is read
        past it. `share`: of a processor, which all threads together may use.
        """
    def discard(self, rungs: int) -> None:
        """Give back what was read beyond so many rungs and is not in use. May run beside steps."""
    def publish(self, rungs: int) -> None:
        """Use exactly the first rungs from the next step on; memory of the others goes back."""
    def depths(self) -> npt.NDArray[np.uint8]:
        """Depth of each unit in use, uint8 [units]."""
    @property
    def kv_page_tokens(self) -> int: ...
    @property
    def kv_page_bytes(self) -> int:
        """Bytes of an exact page, for all layers."""
    @property
    def kv_global_bytes(self) -> list[int]:
        """Bytes of a page without its local layers (those with a window): exact, and with 1, 2, ...
        rungs. As of a whole page where layers are all of one kind."""
    @property
    def kv_local_age(self) -> int:
        """The largest age at which local layers see a page; 0 if there are none."""
    @property
    def kv_pages_total(self) -> int: ...
    @property
    def kv_pages_used(self) -> int: ...
    @property
    def kv_used_bytes(self) -> int:
        """Bytes of all pages in use, exact or coded."""
    @property
    def kv_rung_bytes(self) -> list[int]:
        """Bytes of a coded page with 0, 1, ... rungs; empty without a ladder."""
    def set_kv_ages(self, seen: list[int], kept: list[int], whole: int | None = None) -> None:
        """How many rungs of a coded page are seen from now on, and kept when memory is short, by
        its age; index 0 is for the first page of a sequence and for pages as they are coded, the
        last for all that are older. Neither rises; without a ladder all are 0. `whole`: up to which
        age pages keep their local layers, at least `kv_local_age`; None: always. What is more than
        kept is given up."""
    def limit_kv(self, size: int) -> None:
        """Bytes that pages may take in all, as far as giving up what no sequence needs is enough;
        0: any. Holds before each chunk of a step."""
    def kv_ages(self, seqs: list[int], tokens: list[int]) -> tuple[list[int], int]:
        """How many full pages of each age these sequences would have with so many tokens each, a
        page that they share counted once; and how many that are partly filled."""
    def kv_usable(self, pages: list[int]) -> int:
        """How many of these pages, from the first on, a sequence can go on after: they have all
        the rungs and local layers that it would see."""
    def kv_bytes(self, pages: list[int]) -> int:
        """Bytes of pages that are in use, exact or coded."""
    def set_kv_ladder(
        self, units: npt.NDArray[np.uint32], plies: list[int], thresholds: npt.NDArray[np.float32]
    ) -> None:
        """Code full pages in plies: the unit of each ply in ladder order, how many plies each rung
        has, and the thresholds of the tree, float32 [255]. Before `finish`."""
    def set_kv_turn(
        self,
        layer: int,
        head: int,
        value: bool,
        mean: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32],
        order: npt.NDArray[np.uint16],
    ) -> None:
        """How the keys or values of a KV head are turned before they are coded: [head_dim]."""
    def code_newest(self, on: bool) -> None:
        """Let tokens of prompts see all pages coded that a chunk fills: the worst case."""
    def page_rungs(self, pages: list[int]) -> list[int]:
        """The rungs of pages; 0: exact."""
    def page_whole(self, pages: list[int]) -> list[bool]:
        """Whether pages have their local layers; always, where layers are all of one kind."""
    def shallow(self, page: int, rungs: int, whole: bool = True) -> int:
        """Leave a coded page at most `rungs` rungs, and a page that is not to be `whole` no local
        layers; returns the bytes that the kernel got back."""
    def reserve_kv(self, pages: int) -> None:
        """Size of the pool; no sequence may hold pages. Memory is taken when it is used."""
    def open_sequence(self) -> int: ...
    def close_sequence(self, seq: int) -> None: ...
    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
    def truncate(self, seq: int, length: int) -> int:
        """Forget the tokens from `length` on; inside a page that is coded or not whole, all of that
        page, and all but what is usable. Returns how many are left."""
    def pages(self, seq: int) -> list[int]:
        """The pages of a sequence in order; the last may be partly filled."""
    def adopt_pages(self, seq: int, pages: list[int]) -> None:
        """Let an empty sequence begin with whole pages that are in use already."""
    def hold_pages(self, pages: list[int]) -> None:
        """Count one user more for pages that are in use; they stay until `drop_pages`."""
    def drop_pages(self, pages: list[int]) -> None:
        """Count one user less; a page without users is free."""
    def trim_kv(self) -> int:
        """Give the memory of unused pages back; returns its bytes."""
    @property
    def kv_stored_bytes(self) -> list[list[int]]:
        """Bytes of a page as it is taken: exact, and with 1, 2, ... rungs. First of one without its
        local layers, then of a whole one."""
    def take_page(self, page: int, into: npt.NDArray[np.uint8]) -> None:
        """Copy a page that is in use: as it is if it is exact, otherwise rung after rung, so that
        its first bytes are the page with fewer rungs (docs/parking.md)."""
    def put_page(
        self,
        seq: int,
        tokens: int,
        from_: npt.NDArray[np.uint8],
        rungs: int = 0,
        whole: bool = True,
    ) -> None:
        """Append a page that was taken, with the first `tokens` of its tokens."""
    def deepen_page(
        self, page: int, from_: npt.NDArray[np.uint8], rungs: int, whole: bool = True
    ) -> None:
        """Add rungs to a coded page with one user, up to `rungs` and the level: what follows in
        the page that was taken, which was `whole` if this one is."""
    @overload
    def step(
        self,
        seqs: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        want: list[int],
        *,
        whole: Literal[True] = True,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def step(
        self,
        seqs: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        want: list[int],
        *,
        whole: bool,
    ) -> npt.NDArray[np.float32] | None:
        """Append counts[i] tokens to sequence seqs[i]; float32 [wanted, vocabulary].

        want[i] is 0 for no logits, 1 for those of the last token, 2 for all. A step that cannot
        be made raises EngineError or UsageError and changes nothing, such as one that would see
        what a page has given up. None, and no change, if it need not be `whole` and somebody is in
        a `hurry`.
        """
    @overload
    def states(
        self,
        seqs: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        *,
        whole: Literal[True] = True,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def states(
        self,
        seqs: list[int],
        counts: list[int],
        tokens: npt.NDArray[np.int32],
        *,
        whole: bool,
    ) -> npt.NDArray[np.float32] | None:
        """As `step`; the last hidden states, after the last norm: float32 [tokens, hidden]."""
    def hurry(self, on: bool) -> None:
        """Whether steps that need not be whole end soon, without effect; from any thread."""
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def memory(self) -> dict[str, int]:
        """Bytes by owner: weights, kv, activations, base."""

class TokenStream:
    """Decodes token after token; gives out whole characters only."""

    def push(self, id: int) -> str:  # noqa: A002
        """The characters that this token completes; maybe none."""
    def flush(self) -> str:
        """What is still held back, as U+FFFD; the stream then begins anew."""

class Tokenizer:
    """Text to token ids and back, from a tokenizer.bin (docs/tokenizer.md), which is mapped."""

    def __init__(self, path: str) -> None: ...
    def encode(
        self, text: str, add_special: bool = False, parse_special: bool = True
    ) -> list[int]: ...
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...  # noqa: A002
    def id_of(self, token: str) -> int | None: ...
    def is_special(self, id: int) -> bool: ...  # noqa: A002
    def stream(self, skip_special: bool = False) -> TokenStream: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
