"""Calibration: which weights matter, learned from one pass of the source model over some text.

For every window of tokens the model runs forward, next tokens are sampled from its own
distribution, and the gradient of their log-likelihood is taken: the mean of its square over
windows is the diagonal of the Fisher information F, and a small error d of the weights costs a
KL divergence of about 1/2 sum(F d^2) for each token. Only the sums of F over the rows and over
the columns of each matrix are kept; F is taken to be their product.
The head needs no sampling: there F(v, k) = E[p_v (1 - p_v) h_k^2] for the final vector h.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.pack.kv import KvMoments

__all__ = [
    "LINEARS",
    "Importance",
    "Windows",
    "calibrate",
    "full_precision",
    "gather_kv",
    "linear_modules",
    "logits_chunks",
    "read_documents",
    "token_windows",
]

LINEARS: dict[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Matrix of a layer in a pack -> module of a layer in transformers."""

Windows = list[list[int]]

_HEAD_CHUNK_BYTES = 64 << 20
_TEMPER = 0.6
_MARK = re.compile(r"^%%% *(\S+).*$", re.MULTILINE)
_TURN = re.compile(r"^(User|Assistant): ?", re.MULTILINE)


@dataclass
class Importance:
    """The Fisher information of a matrix, as its sums over columns and rows (a token's mean).

    `rows` float64 [rows] and `columns` float64 [columns] have one and the same sum.
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]

    @property
    def total(self) -> float:
        return float(self.rows.sum())


def read_documents(text: str) -> list[tuple[str, str]]:
    """Documents of a calibration text as pairs (kind, text).

    A line `%%% KIND` begins a document; without such lines the whole text is one of kind `text`.
    """
    marks = list(_MARK.finditer(text))
    documents: list[tuple[str, str]] = []
    first = text[: marks[0].start()] if marks else text
    if first.strip():
        documents.append(("text", first.strip("\n")))
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        body = text[mark.end() : following.start() if following else len(text)].strip("\n")
        if body.strip():
            documents.append((mark[1], body))
    return documents


def _messages(body: str) -> list[dict[str, str]]:
    """Turns of a dialogue document: `User:` and `Assistant:` lines, alternating from the user."""
    turns = list(_TURN.finditer(body))
    messages: list[dict[str, str]] = []
    for turn, following in zip(turns, [*turns[1:], None], strict=False):
        content = body[turn.end() : following.start() if following else len(body)].strip()
        role = turn[1].lower()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        elif messages or role == "user":
            messages.append({"role": role, "content": content})
    return messages


def token_windows(
    text: str, tokenizer: Any, *, tokens: int, length: int, bos: int | None, seed: int
) -> Windows:
    """Cut a calibration text into windows of `length` tokens, in all at most `tokens`.

    `tokenizer` is one of transformers; dialogues go through its chat template where it has one.
    Documents are taken in an order that `seed` decides. With `bos` every window begins with it.
    Text that is shorter than one window gives one short window.
    """
    documents = read_documents(text)
    random.Random(seed).shuffle(documents)
    stream: list[int] = []
    body_length = length - (bos is not None)
    wanted = max(1, tokens // length) * body_length
    for kind, body in documents:
        ids: list[int] | None = None
        if kind == "dialogue" and getattr(tokenizer, "chat_template", None):
            messages = _messages(body)
            if messages:
                rendered = tokenizer.apply_chat_template(messages, tokenize=False)
                ids = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
                if bos is not None and ids[:1] == [bos]:
                    ids = ids[1:]
        if ids is None:
            ids = list(tokenizer(body + "\n\n", add_special_tokens=False)["input_ids"])
        stream.extend(ids)
        if len(stream) >= wanted:
            break
    head = [] if bos is None else [bos]
    windows = [
        head + stream[at : at + body_length]
        for at in range(0, min(len(stream), wanted) - body_length + 1, body_length)
    ]
    return windows or [head + stream]


def linear_modules(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear layers of the decoder by their names in a pack (`layers.0.q`, ...)."""
    found: dict[str, torch.nn.Linear] = {}
    for i, layer in enumerate(model.model.layers):
        for name, path in LINEARS.items():
            found[f"layers.{i}.{name}"] = layer.get_submodule(path)
    return found


@contextmanager
def full_precision(exact: bool) -> Iterator[None]:
    """Products of float32 matrices inside: exact, or through bfloat16 where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def logits_chunks(
    hidden: torch.Tensor, head: torch.Tensor, softcap: float | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Logits of `hidden` [tokens, hidden] a few tokens at a time.

    Yields (slice of tokens, logits, logits before the soft cap); the head is [vocab, hidden].
    """
    step = max(1, _HEAD_CHUNK_BYTES // (4 * head.shape[0]))
    for start in range(0, hidden.shape[0], step):
        part = slice(start, min(start + step, hidden.shape[0]))
        raw = hidden[part] @ head.T
        yield part, (raw if softcap is None else softcap * torch.tanh(raw / softcap)), raw


class _Gatherer:
    """Sums of squared gradients by rows and columns; a gradient is dropped once it is counted."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows = torch.zeros(weight.shape[0], dtype=torch.float64)
        self.columns = torch.zeros(weight.shape[1], dtype=torch.float64)
        hook: Any = weight.register_post_accumulate_grad_hook  # torch has no types for it
        self.handle = hook(self._count)

    def _count(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        square = weight.grad.square_()
        self.rows += square.sum(dim=1)
        self.columns += square.sum(dim=0)
        weight.grad = None


def calibrate(
    model: Any,
    windows: Windows,
    *,
    seed: int = 0,
    kv: KvMoments | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Importance]:
    """Fisher information of every matrix of a transformers decoder.

    `kv` gathers what there is to know of keys and values on the way. Returns the information by
    names of the pack: `layers.i.*`, `embed` and `head`, the last two apart also where they are one
    matrix. `progress(done, all)` is called after every window. Memory beyond the model: the
    activations of one window, and about 5 chunks of 64 MiB for the head.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding: torch.Tensor = model.get_input_embeddings().weight.detach()
    head: torch.Tensor = model.get_output_embeddings().weight.detach()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gatherers: dict[str, _Gatherer] = {}
    for name, module in linear_modules(model).items():
        module.weight.requires_grad_(True)
        gatherers[name] = _Gatherer(module.weight)

    vocab, width = head.shape
    head_rows = torch.zeros(vocab, dtype=torch.float64)
    head_columns = torch.zeros(width, dtype=torch.float64)
    likely = torch.zeros(vocab, dtype=torch.float64)
    embed_rows = torch.zeros(vocab, dtype=torch.float64)
    embed_columns = torch.zeros(width, dtype=torch.float64)
    count = 0

    def look(final: torch.Tensor, p: torch.Tensor, slope: torch.Tensor | None) -> None:
        nonlocal head_rows, head_columns, likely
        likely += p.sum(dim=0)
        curve = p - p.square()
        if slope is not None:
            curve = curve * slope.square()
        square = final.square()
        head_rows += square.sum(dim=1) @ curve
        head_columns += curve.sum(dim=1) @ square

    try:
        with full_precision(False), kv.watch(model) if kv is not None else nullcontext():
            for done, window in enumerate(windows):
                gradient = _backward(model, window, generator, look)
                seen, where = torch.unique(torch.tensor(window), return_inverse=True)
                sums = torch.zeros(len(seen), width).index_add_(0, where, gradient)
                sums = sums.square_()
                embed_rows[seen] += sums.sum(dim=1)
                embed_columns += sums.sum(dim=0)
                count += len(window)
                if progress is not None:
                    progress(done + 1, len(windows))
    finally:
        for gatherer in gatherers.values():
            gatherer.handle.remove()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    result: dict[str, Importance] = {}
    for name, gatherer in gatherers.items():
        result[name] = Importance(gatherer.rows.numpy() / count, gatherer.columns.numpy() / count)
    result["head"] = Importance(_temper(head_rows.numpy() / count), head_columns.numpy() / count)
    # A token that the text does not have still occurs: half of the weight of the embedding goes
    # by how often the model expects each token.
    total = embed_rows.sum()
    embed_rows = 0.5 * embed_rows + 0.5 * total * likely / likely.sum()
    scale = _embedding_scale(model, embedding) ** 2 / count
    rows = _temper(embed_rows.numpy() * scale)
    result["embed"] = Importance(rows, embed_columns.numpy() * scale)
    return result


def gather_kv(
    model: Any,
    windows: Windows,
    kv: KvMoments,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """What further windows say of keys and values alone; memory and progress as in `calibrate`."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with full_precision(False), kv.watch(model):
        for done, window in enumerate(windows):
            _backward(model, window, generator)
            if progress is not None:
                progress(done + 1, len(windows))


def _backward(
    model: Any,
    window: list[int],
    generator: torch.Generator,
    look: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = None,
) -> torch.Tensor:
    """Gradients of the log-likelihood of sampled next tokens; float32 [tokens, hidden], of the
    vectors that enter the first layer.

    `look` sees the final vectors [some tokens, hidden], the probabilities [some tokens, vocab], and
    d(logit) / d(raw logit), None without a soft cap.
    """
    head: torch.Tensor = model.get_output_embeddings().weight.detach()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(window)[None])
    embedded.requires_grad_(True)
    hidden = model.model(inputs_embeds=embedded, use_cache=False)[0]
    final = hidden.detach()[0]
    gradient = torch.empty_like(final)
    for part, logits, _ in logits_chunks(final, head, softcap):
        p = torch.softmax(logits, dim=1)
        labels = _sample(p, generator)
        slope = None if softcap is None else 1 - (logits / softcap).square()
        if look is not None:
            look(final[part], p, slope)
        p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))
        if slope is not None:
            p = p * slope
        gradient[part] = p @ head
    hidden.backward(gradient[None])
    assert embedded.grad is not None
    found: torch.Tensor = embedded.grad[0]
    return found


def _temper(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row importances of a vocabulary, brought closer together; their sum stays.

    What a short text says of single tokens spreads over many orders of magnitude, and the tokens
    that it lacks would get no plies at all. To the power 0.6 SmolLM2 has a KL divergence of 0.34
    instead of 2.2 at 55 MB; powers from 0.35 to 0.6 do about as well.
    """
    tempered = rows**_TEMPER
    total = float(tempered.sum())
    return tempered * (float(rows.sum()) / total) if total > 0 else rows


def _sample(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index for each row of the probabilities `p` [tokens, vocab], int64 [tokens, 1]."""
    sums = p.cumsum(dim=1)
    draws = torch.rand(p.shape[0], 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, draws).clamp_(max=p.shape[1] - 1)


def _embedding_scale(model: Any, weight: torch.Tensor) -> float:
    """The factor between the embedding matrix and the vectors that enter the first layer."""
    return float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
