"""`pliant pack`: a model of any source to its calibration, plies, ladder and pack."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.codec import ladder as ladders
from pliant.codec.feedback import factor
from pliant.errors import SourceError, UsageError
from pliant.pack.calibrate import (
    Importance,
    Windows,
    calibrate,
    gather_kv,
    read_documents,
    token_windows,
)
from pliant.pack.coded import CodedModel
from pliant.pack.describe import (
    MatrixName,
    describe_model,
    describe_tokens,
    matrix_names,
    vector_names,
)
from pliant.pack.echoes import echo_windows
from pliant.pack.kv import KvMoments, make_kv
from pliant.pack.kv import moment_bytes as kv_moment_bytes
from pliant.pack.moments import gather_moments, moment_bytes
from pliant.pack.quality import measure_quality
from pliant.pack.sources import Source, open_source
from pliant.pack.tokenizer import build_tokenizer
from pliant.pack.writer import write_pack

__all__ = ["DEFAULT_TOKENS", "PackProgress", "PackResult", "Plain", "pack", "peak_memory"]

Plain = Literal["f32", "bf16"]

DEFAULT_TOKENS = 8192
_WINDOW = 512
_HELD_OUT = 4  # windows of the calibration text that only the quality curve sees
_HEAD_BLOCKS = 16
_MOMENT_WINDOWS = 8
_MOMENT_SHARE = 0.75  # of the bytes of the model: beyond, plies are chosen without feedback
_BUILT_IN = Path(__file__).parent / "data" / "calibration.txt"
_EXTRA = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class PackProgress(Protocol):
    """What `pack` tells while it works."""

    def peak_memory(self, size: int) -> None:
        """Called once, before anything large is read: the most bytes that packing will hold."""

    def update(self, what: str, done: float | None) -> None:
        """Called often: what is being done, and which part of it is done (None: not known)."""


class _Silent:
    def peak_memory(self, size: int) -> None:
        pass

    def update(self, what: str, done: float | None) -> None:
        pass


@dataclass(frozen=True)
class PackResult:
    """What came out: sizes in bytes, the quality curve as pairs of bytes and KL divergence."""

    path: Path
    bytes: int
    plies: int
    scales: int
    quality: list[tuple[int, float]]
    seconds: float


def peak_memory(config: Mapping[str, Any], *, plain: bool) -> int:
    """The most bytes that the process holds while it packs a model with this normal config.

    The model in float32 once, what Python and PyTorch take, and the larger of: the activations
    of one calibration window with their gradients, or a copy of the head and the work of
    encoding and decoding one matrix.
    """
    hidden: int
    ffn: int
    vocab: int
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layers: int
    head_dim: int
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    q: int = config["num_attention_heads"] * head_dim
    kv: int = config["num_key_value_heads"] * head_dim
    layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * ffn
    matrices = vocab * hidden * (1 if config["tie_word_embeddings"] else 2) + layers * layer
    interpreter = 600 << 20
    model = 4 * matrices
    largest = 4 * max(vocab * hidden, hidden * ffn)
    if plain:
        return interpreter + model + 3 * largest
    # Kept for the backward pass of a token in a layer: about 12 vectors of the residual stream,
    # 6 of the queries and keys, 5 of the feed-forward block.
    window = 4 * _WINDOW * layers * (12 * hidden + 6 * (q + kv) + 5 * ffn)
    head = 6 * (64 << 20) + 16 * vocab * 8
    # Measuring the curve keeps a copy of the head and decodes row blocks of it.
    work = 4 * 4 * vocab * hidden + largest
    if _uses_moments(config, model):
        work += moment_bytes([hidden, q, hidden, ffn], layers)
    kv_moments = kv_moment_bytes(layers, config["num_key_value_heads"], config["head_dim"])
    return interpreter + model + max(window + head + kv_moments, work)


def _uses_moments(config: Mapping[str, Any], model: int) -> bool:
    """Whether the moments of the inputs are small beside the model of `model` bytes."""
    hidden: int = config["hidden_size"]
    q: int = config["num_attention_heads"] * config["head_dim"]
    widths = [hidden, q, hidden, config["intermediate_size"]]
    return moment_bytes(widths, config["num_hidden_layers"]) <= _MOMENT_SHARE * model


def pack(
    source: Source | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    calibration: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    progress: PackProgress | None = None,
    plain: Plain | None = None,
    overwrite: bool = False,
) -> PackResult:
    """Pack a model.

    source:      a source, or what `open_source` takes
    out:         directory of the pack; it appears when it is complete
    calibration: text to learn from; by default the one that comes with pliant
    tokens:      how many tokens of it to use at most
    seed:        decides on the order of documents and on sampled tokens
    plain:       store the matrices as they are in this type instead of in plies

    Raises SourceError and ModelError for what is wrong with the model, UsageError for the
    arguments, PackError where the result cannot be written.
    """
    began = time.monotonic()
    report: PackProgress = progress if progress is not None else _Silent()
    if tokens < 1:
        raise UsageError(f"{tokens} tokens of calibration text: at least 1 is needed")
    if plain not in (None, "f32", "bf16"):
        raise UsageError(f"plain is f32 or bf16, not {plain!r}")
    target = Path(os.path.realpath(out))
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a directory: make it first")
    if not isinstance(source, Source):
        source = open_source(os.fspath(source), progress=report.update)
    config = source.config
    model = describe_model(config, source.attention_windows())
    report.peak_memory(peak_memory(config, plain=plain is not None))

    with tempfile.TemporaryDirectory(prefix=f".{target.name}.work-", dir=target.parent) as work:
        files = Path(work) / "files"
        report.update("tokenizer", None)
        source.write_tokenizer_files(files)
        build_tokenizer(files / "tokenizer.json", files / "tokenizer.bin")
        extra: dict[str, bytes | Path] = {"tokenizer.bin": files / "tokenizer.bin"}
        extra |= {name: files / name for name in _EXTRA if (files / name).is_file()}
        tokenizer = _tokenizer(files)
        bos = source.generation_config.get("bos_token_id")
        add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        manifest: dict[str, Any] = {
            "writer": f"pliant {_version()}",
            "source": {"name": source.name, "origin": source.origin, "license": source.license},
            "model": model,
            "tokens": describe_tokens(config, source.generation_config, add_bos=add_bos),
        }
        names = matrix_names(config)
        base = {
            name: _vector(source, tensor, plus_one)
            for name, (tensor, plus_one) in vector_names(config, source.tensor_names()).items()
        }
        if plain is not None:
            manifest["calibration"] = {"text": "none", "tokens": 0, "sha256": _digest(b"")}
            return _write_plain(source, target, manifest, base, names, plain, extra, report, began)

        text, label = _calibration_text(calibration)
        learned, held = _windows(text, tokenizer, tokens, bos if add_bos else None, seed)
        manifest["calibration"] = {
            "text": label,
            "tokens": sum(map(len, learned)),
            "sha256": _digest(text.encode()),
        }
        report.update("model", None)
        network: Any = source.load_torch()
        kv = KvMoments()
        importance = calibrate(
            network,
            learned,
            seed=seed,
            kv=kv,
            progress=lambda done, of: report.update("calibration", done / of),
        )
        gather_kv(
            network,
            _echoes(text, tokenizer, tokens, bos if add_bos else None, seed),
            kv,
            seed=seed,
            progress=lambda done, of: report.update("calibration of KV", done / of),
        )
        kv_coding = make_kv(kv)
        del kv
        moments: dict[str, torch.Tensor] = {}
        if _uses_moments(config, source.bytes_fp32):
            moments = gather_moments(
                network,
                learned[:_MOMENT_WINDOWS],
                progress=lambda done, of: report.update("moments", done / of),
            )
        with (Path(work) / "plies").open("w+b") as scratch:
            coded = _encode(network, names, importance, moments, scratch, report)
            ladder, sizes = _ladder(coded)
            quality = _quality(network, coded, ladder, sizes, held, report)
            manifest["matrices"] = [
                {
                    "name": m.name,
                    "rows": m.rows,
                    "columns": m.columns,
                    "coding": "plies",
                    "input": m.input,
                    "blocks": list(m.blocks),
                }
                for m in coded.matrices
            ]
            manifest["quality"] = [{"bytes": size, "kl": kl} for size, kl in quality]
            manifest["kv"] = kv_coding.manifest
            base |= coded.base_tensors() | kv_coding.tensors
            write_pack(
                target,
                manifest=manifest,
                base=base,
                ladder=ladder,
                ply_bytes=coded.ply,
                extra_files=extra,
                overwrite=overwrite,
                progress=lambda done, of: report.update("writing", done / max(of, 1)),
            )
    return PackResult(
        path=target,
        bytes=_directory_bytes(target),
        plies=int(sizes.sum()),
        scales=coded.scale_bytes(),
        quality=quality,
        seconds=time.monotonic() - began,
    )


def _windows(
    text: str, tokenizer: Any, tokens: int, bos: int | None, seed: int
) -> tuple[Windows, Windows]:
    """Windows to learn from, and windows that only the quality curve sees.

    Of a text in documents every sixth is held out, but none in a language other than English:
    there small models diverge three times as much, and the curve is to tell what most texts see.
    """

    def cut(part: str, count: int) -> Windows:
        return token_windows(part, tokenizer, tokens=count, length=_WINDOW, bos=bos, seed=seed)

    documents = read_documents(text)
    usual = [d for d in documents if d[0] != "language"]
    if len(usual) >= _HELD_OUT * 12:
        apart = usual[::6]
        rest = [d for d in documents if d not in apart]
        return cut(_join(rest), tokens), cut(_join(apart), _HELD_OUT * _WINDOW)
    windows = cut(text, tokens + _HELD_OUT * _WINDOW)
    # A text of one window has nothing to hold out.
    held = windows[-_HELD_OUT:] if len(windows) > _HELD_OUT else windows[-1:]
    return windows[: -len(held)] or windows, held


def _echoes(text: str, tokenizer: Any, tokens: int, bos: int | None, seed: int) -> Windows:
    """As many tokens as there are of the text."""
    prose = [body for kind, body in read_documents(text) if kind in ("prose", "text")]
    count = max(1, tokens // _WINDOW)
    return echo_windows(tokenizer, prose, count=count, length=_WINDOW, bos=bos, seed=seed)


def _join(documents: Sequence[tuple[str, str]]) -> str:
    return "".join(f"%%% {kind}\n{body}\n" for kind, body in documents)


def _encode(
    network: Any,
    names: list[MatrixName],
    importance: Mapping[str, Importance],
    moments: dict[str, torch.Tensor],
    scratch: Any,
    report: PackProgress,
) -> CodedModel:
    """All matrices in plies. Tied matrices are important for both their uses.

    `moments` are used up: each goes when the last matrix with this input is done.
    """
    tied = "head" not in [n.name for n in names]
    coded = CodedModel(scratch)
    weights = dict(network.named_parameters(remove_duplicate=False))
    shared: dict[str, list[MatrixName]] = {}
    for name in names:
        shared.setdefault(name.input, []).append(name)

    def uses(name: str) -> list[Importance]:
        return (
            [importance["embed"], importance["head"]]
            if tied and name == "embed"
            else [importance[name]]
        )

    upper: torch.Tensor | None = None  # of the inputs `upper_of`
    upper_of = ""
    for done, name in enumerate(names):
        if name.input not in coded.orders:
            group = [(weights[n.tensor].detach(), uses(n.name)) for n in shared[name.input]]
            coded.set_order(name.input, group)
        # A tied matrix is read as the head; an embedding alone has no inputs.
        read_as = "head" if tied and name.name == "embed" else name.input
        if read_as in moments:
            order = torch.from_numpy(coded.orders[name.input])
            upper, upper_of = factor(moments.pop(read_as), order), name.input
        coded.add(
            name.name,
            name.input,
            weights[name.tensor].detach(),
            uses(name.name),
            blocks=_HEAD_BLOCKS if name.name in ("embed", "head") else 1,
            upper=upper if upper_of == name.input else None,
        )
        report.update("encoding", (done + 1) / len(names))
    return coded


def _ladder(coded: CodedModel) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    sizes = coded.sizes()
    gains = coded.costs()[:, None] * ladders.benefits()[None, :]
    return ladders.greedy_order(gains, sizes), sizes


def _quality(
    network: Any,
    coded: CodedModel,
    ladder: NDArray[np.uint32],
    sizes: NDArray[np.int64],
    windows: Windows,
    report: PackProgress,
) -> list[tuple[int, float]]:
    return measure_quality(
        network,
        coded,
        ladder,
        sizes,
        windows,
        progress=lambda done, of: report.update("quality", done / of),
    )


def _write_plain(
    source: Source,
    target: Path,
    manifest: dict[str, Any],
    base: dict[str, NDArray[Any]],
    names: list[MatrixName],
    plain: Plain,
    extra: Mapping[str, bytes | Path],
    report: PackProgress,
    began: float,
) -> PackResult:
    manifest["matrices"] = []
    for done, name in enumerate(names):
        weight = source.tensor(name.tensor)
        rows, columns = weight.shape
        manifest["matrices"].append(
            {"name": name.name, "rows": rows, "columns": columns, "coding": plain}
        )
        if plain == "bf16":
            base[f"{name.name}.weight"] = weight.bfloat16().view(torch.uint16).numpy()
        else:
            base[f"{name.name}.weight"] = weight.numpy()
        report.update("reading", (done + 1) / len(names))
    report.update("writing", None)
    write_pack(
        target,
        manifest=manifest,
        base=base,
        ladder=np.zeros(0, np.uint32),
        ply_bytes=lambda unit, bit: b"",
        extra_files=extra,
    )
    return PackResult(target, _directory_bytes(target), 0, 0, [], time.monotonic() - began)


def _vector(source: Source, tensor: str, plus_one: bool) -> NDArray[np.float32]:
    values = source.tensor(tensor)
    result: NDArray[np.float32] = (values + 1 if plus_one else values).numpy()
    return result


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _calibration_text(path: Path | None) -> tuple[str, str]:
    """The text and what the manifest calls it."""
    file = path if path is not None else _BUILT_IN
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"calibration text {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"calibration text {file} is not UTF-8: {error.reason}") from None
    if not text.strip():
        raise SourceError(f"calibration text {file} is empty")
    return text, "pliant" if path is None else file.name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version() -> str:
    try:
        return metadata.version("pliant")
    except metadata.PackageNotFoundError:
        return "unknown"


def _directory_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.iterdir())
