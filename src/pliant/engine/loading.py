"""From a directory to a running model: put everything in place, measure it, plan the rest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pliant import __version__
from pliant.engine.auto import first_budget
from pliant.engine.build import (
    build_executor,
    default_threads,
    open_tokenizer,
    pack_sizes,
    read_ahead,
)
from pliant.engine.chat import ChatTemplate, find_template
from pliant.engine.model import Model
from pliant.engine.page_folder import PageFolder
from pliant.errors import BudgetError, UsageError
from pliant.memory.budget import Meter, margin, system_limit
from pliant.memory.plan import PackSizes, Wish, make_plan
from pliant.memory.pressure import Sources
from pliant.sizes import MIB, format_size, parse_size
from pliant.store import Pack

if TYPE_CHECKING:
    from pliant.engine.seam import Executor, Tokenizer

__all__ = ["Parts", "kv_wish", "load", "open_parts"]

PARK_LIMIT = 4 * 2**30
READ_AHEAD = 256 * MIB  # what disks give while all but the rungs is made ready
LOGIT_ROWS = 2  # besides a row for each answer: one to put them in order, one of the step before
ROUNDING = MIB  # fixed parts are rounded up to it, so that plans do not differ from run to run

Also = tuple[str, "Callable[[Pack, Tokenizer], int]"]
"""An owner in the ledger, and what makes that which it owns."""


class Parts:
    """Everything of a model but its weights and KV, in memory, and measured."""

    __slots__ = ("executor", "fixed", "pack", "sizes", "template", "tokenizer", "tokenizer_bytes")

    def __init__(
        self,
        pack: Pack,
        executor: Executor,
        tokenizer: Tokenizer,
        sizes: PackSizes,
        fixed: tuple[tuple[str, int], ...],
        template: ChatTemplate | None,
    ) -> None:
        self.pack = pack
        self.template = template
        self.executor = executor
        self.tokenizer = tokenizer
        self.sizes = sizes
        self.fixed = fixed
        self.tokenizer_bytes = pack.manifest.files["tokenizer.bin"].bytes


def open_parts(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    isa: str = "auto",
    chunk: int | None = None,
    chat: bool = True,
    answers: int = 1,
    also: Also | None = None,
    limit: int | None = None,
    coded_kv: bool = False,
    ahead: int = 0,
) -> Parts:
    """Open a pack and build executor and tokenizer. `limit`: most bytes for base tensors;
    `coded_kv`: full pages of the KV cache are coded; `ahead`: bytes of rungs that the disk reads
    meanwhile."""
    if isinstance(answers, bool) or not isinstance(answers, int) or not 1 <= answers <= 4096:
        raise UsageError(f"answers must be from 1 to 4096, and not {answers!r}")
    if chunk is not None and (
        isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= 4096
    ):
        raise UsageError(f"chunk must be from 1 to 4096 tokens, and not {chunk!r}")
    count = default_threads(threads)
    import pliant._core  # noqa: F401 - before the first mark: its code counts as interpreter

    meter = Meter()
    pack = Pack.open(path, limit=limit)
    if ahead:
        read_ahead(pack, ahead)
    meter.mark("base")
    if coded_kv and pack.manifest.kv is None:
        raise UsageError(
            f"{pack.path} does not say how to code a KV cache: pack the model again with this "
            "version of pliant, or use 16 bits"
        )
    if chunk is None:  # where its pages take more than they will later, a long one is dear
        chunk = 128 if coded_kv or any(pack.manifest.model.layer_window) else 256
    tokenizer = open_tokenizer(pack)
    grown = meter.mark("tokenizer")
    mapped = pack.manifest.files["tokenizer.bin"].bytes
    unread = max(0, mapped - getattr(tokenizer, "resident_bytes", mapped))
    executor = build_executor(pack, threads=count, isa=isa, chunk=chunk, coded_kv=coded_kv)
    meter.mark("base")
    found = find_template(pack.path) if chat else None
    template = None if found is None else ChatTemplate(*found)
    meter.mark("chat template")
    reserve = 0
    if also is not None:
        reserve = also[1](pack, tokenizer)
        meter.mark(also[0])
    parts, memory = dict(meter.parts), executor.memory()
    activations = memory.get("activations", 0)
    # What was promised to the executor and not yet touched will be, with the first step.
    untouched = max(0, memory.get("base", 0) + activations - parts["base"])
    vocab = pack.manifest.model.vocab
    fixed = {
        "interpreter": parts["interpreter"],
        "tokenizer": grown + unread,
        "base": parts["base"] - activations + untouched,
        "activations": activations,
        "logits": (LOGIT_ROWS + answers) * vocab * 4,
        "chat template": parts["chat template"],
        "margin": margin() + reserve,
    }
    if also is not None:
        fixed[also[0]] = parts[also[0]]
    fixed["margin"] += -sum(fixed.values()) % ROUNDING
    named = tuple((name, max(size, 0)) for name, size in fixed.items() if size)
    return Parts(pack, executor, tokenizer, pack_sizes(pack, executor, chunk), named, template)


def kv_wish(kv_bits: float | Literal["auto"], kv_floor: float | None) -> tuple[bool, float | None]:
    """Whether full pages of the KV cache are coded, and with at most how many bits (None: as many
    as serve best); UsageError for what has no meaning. The arguments are those of `load`."""
    if kv_bits != "auto" and (
        isinstance(kv_bits, bool) or not isinstance(kv_bits, int | float) or not 1 <= kv_bits <= 16
    ):
        raise UsageError(f"kv_bits must be from 1 to 16, or 'auto', and not {kv_bits!r}")
    if kv_floor is not None and kv_bits != "auto":
        raise UsageError("kv_floor belongs to kv_bits='auto'")
    return kv_bits != 16, None if kv_bits == "auto" or kv_bits == 16 else kv_bits


def load(
    path: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    keep_free: int | str | None = None,
    weights: int | str | None = None,
    context: int | None = None,
    sessions: int = 1,
    min_bits: float | None = None,
    max_kl: float | None = None,
    threads: int | None = None,
    isa: str = "auto",
    kv_bits: float | Literal["auto"] = 16,
    kv_floor: float | None = None,
    chunk: int | None = None,
    chat: bool = True,
    answers: int = 1,
    also: Also | None = None,
    log: Callable[[str], None] | None = None,
    park: str | os.PathLike[str] | None = None,
    park_limit: int | str | None = None,
    early: bool = False,
) -> Model:
    """Load a pack within a budget.

    memory:    bytes of the whole process (its resident set), such as "300MiB". None: no limit.
               "auto": as many as other programs leave, at any moment (Model.govern)
    keep_free: with "auto", bytes that other programs shall find free
    weights:   bytes of resident plies and scales; the largest prefix of rungs that fits is loaded
    context:   tokens that each session may hold. None: as many as the budget leaves
    sessions:  how many conversations of that length are held at once
    min_bits, max_kl: the floor of quality, in bits per weight and nats of expected KL divergence
    threads:   None: the CPUs that this process may use
    isa:       kernels: "auto", or one of pliant._core.cpu_isa()
    kv_bits:   bits of a value in the KV cache, scales included, the mean of a full context. 16:
               exact. Fewer: full pages are coded in plies, newer ones deeper than older ones, with
               no more bits. "auto": with as many as serve best, weights and KV together, as the
               budget moves
    kv_floor:  with "auto", never fewer bits than these
    chunk:     tokens of a prompt that are computed at once; fewer take less memory. None: 256, or
               128 where KV pages become smaller after their chunk (coded, or with windows)
    chat:      prepare the chat template, if the pack has one (some 7 MiB for jinja2)
    answers:   how many answers may be computed in one step; each needs a row of logits
    also:      an owner in the ledger, and a function that makes what it owns from the pack and the
               tokenizer, and returns how many bytes more to leave free
    log:       called with a line for each move of the budget with memory="auto", and if what
               `early` left cannot be read
    park:      a folder, made if it is not there, in which pages of the KV cache stay that had to
               go, and those that are kept when the model is closed: what prompts begin with is read
               instead of computed again where that is faster, also after a restart
    park_limit: bytes that the files in it may take; those that were used longest ago go first.
               None: 4 GiB
    early:     return as soon as the floor of quality that min_bits or max_kl state is in memory;
               the rest of the plan is read beside the first steps (`Model.change`). Answers say
               what they were made with. Without a floor nothing changes

    Raises PackError for a pack that cannot be used, BudgetError with the sum if it does not fit,
    UsageError for arguments without meaning.
    """
    coded, most_bits = kv_wish(kv_bits, kv_floor)
    auto = memory == "auto"
    if keep_free is not None and not auto:
        raise UsageError("keep_free belongs to memory='auto'")
    if auto and weights is not None:
        raise UsageError("memory='auto' moves the weights; without it they can be set")
    if park_limit is not None and park is None:
        raise UsageError("park_limit belongs to park")
    most_parked = PARK_LIMIT if park_limit is None else parse_size(park_limit, "park_limit")
    free = None if keep_free is None else parse_size(keep_free, "keep_free")
    wish = Wish(
        memory=None if memory is None or auto else parse_size(memory, "memory"),
        weights=None if weights is None else parse_size(weights, "weights"),
        context=context,
        sessions=sessions,
        min_bits=min_bits,
        max_kl=max_kl,
        kv_bits=most_bits,
        kv_floor=kv_floor,
    )
    parts = open_parts(
        path,
        threads=threads,
        isa=isa,
        chunk=chunk,
        chat=chat,
        answers=answers,
        also=also,
        limit=wish.memory,
        coded_kv=coded,
        ahead=min(READ_AHEAD, wish.memory or READ_AHEAD, wish.weights or READ_AHEAD),
    )
    folder = None
    if park is not None:
        digest = hashlib.blake2b(f"{__version__}\0".encode() + parts.pack.digest, digest_size=16)
        stored = parts.executor.kv_stored_bytes
        folder = PageFolder(Path(park), most_parked, digest.digest(), stored)
    if auto:
        first = first_budget(parts.sizes, parts.fixed, wish, free, Sources())
        wish = replace(wish, memory=first)
    elif wish.memory is None:
        plan, limit = make_plan(parts.sizes, parts.fixed, wish), system_limit()
        if plan.total - plan.kv > limit:
            raise BudgetError(
                f"all of this model takes {format_size(plan.total - plan.kv)}, and this machine "
                f"gives a process at most {format_size(limit)}: set a memory budget"
            )
    model = Model(
        parts.pack,
        parts.executor,
        parts.tokenizer,
        sizes=parts.sizes,
        fixed=parts.fixed,
        wish=wish,
        tokenizer_bytes=parts.tokenizer_bytes,
        template=parts.template,
        folder=folder,
        early=early,
        log=log,
    )
    if auto:
        model.govern(keep_free=free, log=log)
    return model
