"""Reading packs: one test for each way of being wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packs import (
    random_manifest,
    write_random_pack,
)
from pliant.errors import (
    BudgetError,
    ChecksumError,
    FormatError,
    PackError,
    VersionError,
)
from pliant.store import Layout, Manifest, Pack, UnitTable
from pliant.store.files import RegularFile
from pliant.store.layout import occurrences
from pliant.store.safetensors import DTYPES, encode_header, read_header

Tensors = list[tuple[str, str, npt.NDArray[Any]]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with every kind of tensor, three shards and some files beside it."""
    return write_random_pack(
        tmp_path_factory.mktemp("store") / "pack",
        tied=False,
        post_norms=True,
        qk_norms=True,
        biases=True,
        coding={"head": "bf16", "layers.0.q": "f32"},
        shard_bytes=12_000,
        extra_files={"config.json": b"{}", "chat_template.jinja": b"{{ messages }}"},
    )


@pytest.fixture
def pack(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "pack"))


def load(pack: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((pack / "pliant.json").read_bytes())
    return value


def save(pack: Path, manifest: dict[str, Any]) -> None:
    (pack / "pliant.json").write_text(json.dumps(manifest))


def tensors_of(pack: Path) -> Tensors:
    with RegularFile(pack / "base.safetensors") as file:
        header = read_header(file)
        data = file.read(file.size - header.data_start)
    return [
        (name, t.dtype, np.frombuffer(data[t.start : t.stop], DTYPES[t.dtype]).reshape(t.shape))
        for name, t in header.tensors.items()
    ]


def save_base(pack: Path, content: bytes) -> None:
    """Replace base.safetensors, with the right size and digest in the manifest."""
    (pack / "base.safetensors").write_bytes(content)
    manifest = load(pack)
    digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["base.safetensors"] = digest
    save(pack, manifest)


def save_tensors(pack: Path, tensors: Tensors) -> None:
    header = encode_header((name, dtype, array.shape) for name, dtype, array in tensors)
    save_base(pack, header + b"".join(array.tobytes() for _, _, array in tensors))


def refuses(pack: Path, message: str, error: type[PackError] = FormatError) -> None:
    with pytest.raises(error, match=message) as caught:
        Pack.open(pack)
    assert type(caught.value) is error


# --- the manifest -----------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], object]


def put(*path: Any) -> Edit:
    """An edit: the last of `path` is the value, the rest leads to its place."""
    *keys, last, value = path

    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys:
            place = place[key]
        place[last] = value

    return edit


def drop(*path: Any) -> Edit:
    *keys, last = path

    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys:
            place = place[key]
        del place[last]

    return edit


HUGE = 2**53
WRONG_MANIFESTS: dict[str, tuple[Edit, str]] = {
    "unknown key": (put("more", 1), "pliant.json: unknown key 'more'"),
    "unknown key below": (put("model", "rope", 1), "pliant.json: model: unknown key 'rope'"),
    "unknown key of a matrix": (
        put("matrices", 0, "bits", 4),
        r"matrices\[0\]: unknown key 'bits'",
    ),
    "unknown key of a shard": (put("shards", 0, "x", 1), r"shards\[0\]: unknown key"),
    "unknown key of a file": (
        put("files", "base.safetensors", "x", 1),
        r"files\['base.safetensors'\]: unknown key 'x'",
    ),
    "missing key": (drop("tokens"), "no key 'tokens'"),
    "missing key below": (drop("source", "license"), "source: no key 'license'"),
    "another format": (put("format", "gguf"), "not a pack"),
    "version 0": (put("version", 0), "version is 0"),
    "version as text": (put("version", "1"), "version is '1', and must be an integer"),
    "version as bool": (put("version", True), "version is True, and must be an integer"),
    "writer too long": (put("writer", "x" * 257), "writer has 257 characters, and may have 256"),
    "writer unprintable": (put("writer", "\x1b[2J"), "writer is .*cannot be printed"),
    "writer a lone surrogate": (put("writer", "\ud800"), "writer is .*cannot be printed"),
    "writer no text": (put("writer", None), "writer is None, and must be text"),
    "source no object": (put("source", []), "source is a list of 0, and must be an object"),
    "a fraction for an integer": (put("model", "hidden", 64.0), "model.hidden is 64.0, .*integer"),
    "a bool for an integer": (put("model", "layers", True), "model.layers is True, .*integer"),
    "a negative size": (put("model", "hidden", -64), "model.hidden is -64, and must lie in 1"),
    "a size of zero": (put("model", "heads", 0), "model.heads is 0, and must lie in 1"),
    "a size too large": (put("model", "ffn", 2**20 + 1), "model.ffn is 1048577, and must lie in"),
    "an absurd integer": (put("model", "ffn", 10**400), "model.ffn is 1000.*must lie in"),
    "too many layers": (put("model", "layers", 1025), "model.layers is 1025, .* 1 ... 1024"),
    "vocabulary too large": (put("model", "vocab", 2**22 + 1), "model.vocab is 4194305"),
    "context too large": (put("model", "context", 2**26 + 1), "model.context is 67108865"),
    "heads no multiple": (put("model", "kv_heads", 3), "4 heads are no multiple of 3 kv_heads"),
    "odd head size": (put("model", "head_dim", 15), "head_dim is 15, and must be even"),
    "eps of zero": (put("model", "norm_eps", 0), "norm_eps is 0, and must be above 0"),
    "eps negative": (put("model", "norm_eps", -1e-6), "norm_eps is -1e-06, and must be above 0"),
    "activation unknown": (
        put("model", "activation", "relu"),
        "activation is 'relu', .*one of silu",
    ),
    "activation no text": (put("model", "activation", 3), "activation is 3, .*one of silu"),
    "a flag as a number": (put("model", "tied", 1), "tied is 1, and must be true or false"),
    "a cap of zero": (put("model", "logit_softcap", 0.0), "logit_softcap is 0.0, .*above 0"),
    "a cap as text": (put("model", "attn_softcap", "50"), "attn_softcap is '50', .*a number"),
    "an absurd scale": (put("model", "attn_scale", 10**400), "attn_scale is 1000.*at most"),
    "rope too short": (put("model", "ropes", 0, "inv_freq", [1.0]), "has 1 values.* is 8"),
    "rope without numbers": (put("model", "ropes", 0, "inv_freq", 0, None), "None.*a number"),
    "no ropes": (put("model", "ropes", []), r"layer_rope\[0\] is 0, and must lie in 0 ... -1"),
    "rope index": (put("model", "layer_rope", [0, 1]), r"layer_rope\[1\] is 1, and must lie in 0"),
    "rope of each layer": (
        put("model", "layer_rope", [0]),
        "has 1 entries, and the model 2 layers",
    ),
    "window of each layer": (
        put("model", "layer_window", [0] * 3),
        "has 3 entries, and the model 2",
    ),
    "window negative": (put("model", "layer_window", [0, -1]), r"layer_window\[1\] is -1"),
    "begin token": (put("tokens", "bos", 160), "tokens.bos is 160, and must lie in 0 ... 159"),
    "end token": (put("tokens", "eos", [1, -1]), r"tokens.eos\[1\] is -1"),
    "end token no list": (put("tokens", "eos", 1), "tokens.eos is 1, and must be a list"),
    "matrix missing": (drop("matrices", 3), "matrices: the matrix layers.0.k is missing"),
    "matrix twice": (lambda m: m["matrices"].append(m["matrices"][0]), "'embed' is not .*or there"),
    "matrix unknown": (put("matrices", 0, "name", "embd"), "a matrix 'embd' is not expected"),
    "a head though tied": (put("model", "tied", True), "a matrix 'head' is not expected"),
    "matrix shape": (
        put("matrices", 0, "rows", 96),
        "embed is 96 x 64, and in this model 160 x 64",
    ),
    "matrix no object": (put("matrices", 0, 7), r"matrices\[0\] is 7, and must be an object"),
    "matrices no list": (put("matrices", {}), "matrices is an object of 0, and must be a list"),
    "coding unknown": (
        put("matrices", 1, "coding", "q4_0"),
        "coding is 'q4_0', .*plies, f32, bf16",
    ),
    "coding missing": (drop("matrices", 1, "coding"), r"matrices\[1\]: no key 'coding'"),
    "input for a plain one": (
        put("matrices", 1, "input", "a"),
        r"matrices\[1\]: unknown key 'input'",
    ),
    "no input": (drop("matrices", 0, "input"), r"matrices\[0\]: no key 'input'"),
    "input name": (put("matrices", 0, "input", "../a"), "'../a' cannot be the name of an order"),
    "input of two widths": (
        put("matrices", 8, "input", "embed"),
        "layers.0.down has 96 columns, and another matrix with the input embed has 64",
    ),
    "two inputs for one vector": (
        put("matrices", 7, "input", "layers.0.attn"),
        "layers.0.up has the input layers.0.attn, and layers.0.gate, which reads the same vector, "
        "has layers.0.ffn",
    ),
    "blocks short": (
        put("matrices", 0, "blocks", [64, 64]),
        "add up to 128, and embed has 160 rows",
    ),
    "blocks uneven": (put("matrices", 0, "blocks", [80, 80]), "all but the last must be multiples"),
    "blocks empty": (
        put("matrices", 0, "blocks", [160, 0]),
        r"blocks\[1\] is 0, and must lie in 1",
    ),
    "blocks negative": (
        put("matrices", 0, "blocks", [192, -32]),
        r"blocks\[0\] is 192, and must lie",
    ),
    "rungs of two lengths": (lambda m: m["rungs"]["crc32"].pop(), "they must have one length"),
    "rung uneven": (put("rungs", "bytes", 1, 5000), r"bytes\[1\] is 5000, and must be a multiple"),
    "rung empty": (put("rungs", "bytes", 1, 0), r"rungs.bytes\[1\] is 0, and must lie in 4096"),
    "rung too large": (put("rungs", "bytes", 1, HUGE), rf"rungs.bytes\[1\] is {HUGE}"),
    "rung without plies": (put("rungs", "plies", 1, 0), r"rungs.plies\[1\] is 0"),
    "rung of too many plies": (put("rungs", "plies", 1, HUGE - 1), r"rungs.plies\[1\] is"),
    "checksum too large": (put("rungs", "crc32", 0, 2**32), r"rungs.crc32\[0\] is 4294967296"),
    "checksum as text": (put("rungs", "crc32", 0, "00"), r"rungs.crc32\[0\] is '00', .*integer"),
    "rungs no list": (put("rungs", "crc32", "00"), "rungs.crc32 is '00', .*list of integers"),
    "shard name": (put("shards", 0, "file", "../../etc/passwd"), "must be plies-00001.safetensors"),
    "shard order": (lambda m: m["shards"].reverse(), "must be plies-00001.safetensors"),
    "shard missing": (lambda m: m["shards"].pop(), "have .* rungs, and the pack"),
    "shard of no rungs": (put("shards", 0, "rungs", 0), r"shards\[0\].rungs is 0"),
    "shard of too many rungs": (put("shards", 0, "rungs", 9999), "shards have more rungs than the"),
    "shard size": (put("shards", 0, "bytes", 4096), r"shards\[0\].bytes is 4096, and must be"),
    "shard size huge": (put("shards", 0, "bytes", HUGE - 1), r"shards\[0\].bytes is 9007.*must be"),
    "quality falls": (
        put("quality", [{"bytes": 9, "kl": 1.0}, {"bytes": 8, "kl": 0.5}]),
        r"quality\[1\]: bytes must rise",
    ),
    "quality rises": (
        put("quality", [{"bytes": 8, "kl": 0.5}, {"bytes": 9, "kl": 1.0}]),
        r"quality\[1\]: bytes must rise and kl fall",
    ),
    "quality negative": (
        put("quality", [{"bytes": 1, "kl": -1}]),
        "kl is -1, and must be at least 0",
    ),
    "calibration digest": (put("calibration", "sha256", "0" * 63), "must be 64 hexadecimal digits"),
    "files no object": (put("files", []), "files is a list of 0, and must be an object"),
    "a file elsewhere": (
        put("files", "../../.ssh/id", {"bytes": 1, "sha256": "0" * 64}),
        "'../../.ssh/id' is not the name of a file of a pack",
    ),
    "a file of another name": (
        put("files", "model.pkl", {"bytes": 1, "sha256": "0" * 64}),
        "'model.pkl' is not the name of a file of a pack",
    ),
    "a file too large": (
        put("files", "tokenizer.bin", "bytes", 2**28 + 1),
        r"files\['tokenizer.bin'\].bytes is 268435457, and must lie in 0",
    ),
    "no tokenizer": (drop("files", "tokenizer.bin"), "files: tokenizer.bin is missing"),
    "no base": (drop("files", "base.safetensors"), "files: base.safetensors is missing"),
    "size of base": (
        put("files", "base.safetensors", "bytes", 5),
        "base.safetensors has .* is longer than the 5 in the manifest",
    ),
    "size of a file": (
        put("files", "config.json", "bytes", 999),
        "config.json has 2 bytes and is shorter than the 999",
    ),
}


@pytest.mark.parametrize("case", WRONG_MANIFESTS)
def test_manifest_that_is_wrong(pack: Path, case: str) -> None:
    edit, message = WRONG_MANIFESTS[case]
    manifest = load(pack)
    edit(manifest)
    save(pack, manifest)
    refuses(pack, message)


def test_later_version_names_both_numbers(pack: Path) -> None:
    manifest = load(pack)
    manifest["version"] = 3
    manifest["something"] = "new"
    save(pack, manifest)
    refuses(
        pack, "has version 3 of the format, and this program reads versions up to 2", VersionError
    )


@pytest.mark.parametrize(
    ("found", "written", "message"),
    [
        ('"norm_eps": 1e-05', '"norm_eps": NaN', "the number NaN is not allowed"),
        ('"norm_eps": 1e-05', '"norm_eps": Infinity', "the number Infinity is not allowed"),
        ('"norm_eps": 1e-05', '"norm_eps": -Infinity', "the number -Infinity is not allowed"),
        ('"norm_eps": 1e-05', '"norm_eps": 1e400', "norm_eps is inf, and must be finite"),
        ('"hidden": 64', '"hidden": 1e2', "hidden is 100.0, and must be an integer"),
        ('"hidden": 64', '"hidden": ' + "9" * 5000, "not JSON: Exceeds the limit"),
        ('"hidden": 64', '"hidden": 64, "hidden": 64', "the key 'hidden' is there twice"),
        ('"version": 2', '"version": 2, "version": 1', "the key 'version' is there twice"),
        ('"quality": []', '"quality": ' + "[" * 20 + "]" * 20, "nested deeper than 16 levels"),
        ('"quality": []', '"quality": ' + "[" * 10**5 + "]" * 10**5, "nested deeper|proportion"),
        ('"quality": []', '"quality": ' + "[" * 10**4 + "]" * 10**4, "nested deeper than 16"),
        ('"quality": []', '"quality": [', "not JSON"),
        ('"quality": []', "", "not JSON"),
    ],
    ids=str,
)
def test_json_that_is_wrong(pack: Path, found: str, written: str, message: str) -> None:
    save(pack, load(pack))
    text = (pack / "pliant.json").read_text()
    assert found in text
    (pack / "pliant.json").write_text(text.replace(found, written, 1))
    refuses(pack, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{}", "not a pack"),
        (b"[]", "not a pack"),
        (b"null", "not a pack"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8: byte 0"),
        (b'\xef\xbb\xbf{"format":"pliant-pack"}', "not JSON"),
    ],
)
def test_manifest_that_is_none(pack: Path, content: bytes, message: str) -> None:
    (pack / "pliant.json").write_bytes(content)
    refuses(pack, message)


def test_manifest_too_long(pack: Path) -> None:
    os.truncate(pack / "pliant.json", 64 * 2**20 + 1)
    refuses(pack, "pliant.json has 67108865 bytes, and a manifest may have 67108864")


@pytest.mark.parametrize(
    "filler", [b"[],", b"{},", b'"ab",', b"0.1,", b'{"a":0},', b"\xf0\x9f\xaa\xa2"]
)
def test_parsing_takes_no_more_than_the_pack_justifies(pack: Path, filler: bytes) -> None:
    count = 3 * 2**20 // len(filler)
    quote = b'"' if filler[0] > 127 else b""
    closing = b'"' if quote else b"0"
    content = b'{"format":[' + quote + filler * count + closing + b"]}"
    (pack / "pliant.json").write_bytes(content)
    size = sum(file.stat().st_size for file in pack.iterdir())
    tracemalloc.start()
    refuses(pack, "out of proportion|not a pack")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size + 16 * 2**20


def test_names_of_rungs_and_shards_run_out(pack: Path) -> None:
    manifest = load(pack)
    manifest["shards"] = [0] * 100_000
    data = json.dumps(manifest).encode()
    with pytest.raises(FormatError, match="shards: 100000, and a pack may have 99999"):
        Manifest.from_json(data)
    count = 1_000_001
    rungs = {"plies": [1] * count, "bytes": [4096] * count, "crc32": [0] * count}
    data = json.dumps(manifest | {"rungs": rungs}).encode()
    with pytest.raises(FormatError, match="1000001 rungs, and a pack may have 1000000"):
        Manifest.from_json(data, beside=2**30)


# --- base.safetensors -------------------------------------------------------------------------


def change(name: str, edit: Callable[[npt.NDArray[Any]], object]) -> Callable[[Tensors], Tensors]:
    """Change the values of one tensor."""

    def apply(tensors: Tensors) -> Tensors:
        assert name in [t[0] for t in tensors]
        result = []
        for tensor, dtype, array in tensors:
            copy = array.copy()
            if tensor == name:
                edit(copy)
            result.append((tensor, dtype, copy))
        return result

    return apply


def item(index: Any, value: Any) -> Callable[[npt.NDArray[Any]], object]:
    return lambda array: array.__setitem__(index, value)


def swap_type(name: str, dtype: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [
        (n, dtype, a.astype(DTYPES[dtype])) if n == name else (n, t, a) for n, t, a in tensors
    ]


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [tensor for tensor in tensors if tensor[0] != name]


def reshaped(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [
        (n, t, a.reshape(1, *a.shape)) if n == name else (n, t, a) for n, t, a in tensors
    ]


EXTRA: tuple[str, str, npt.NDArray[Any]] = ("layers.2.attn_norm", "F32", np.ones(64, np.float32))
WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (without("final_norm"), "the tensor final_norm is missing"),
    "no order": (without("order.embed"), "the tensor order.embed is missing"),
    "no tree": (without("tree"), "the tensor tree is missing"),
    "no ladder": (without("ladder"), "the tensor ladder is missing"),
    "no weight": (without("head.weight"), "the tensor head.weight is missing"),
    "not expected": (lambda t: [*t, EXTRA], "a tensor 'layers.2.attn_norm' is not expected"),
    "norms of some layers": (
        without("layers.1.attn_post_norm"),
        "attn_post_norm is there in 1 of 2 layers",
    ),
    "dtype": (swap_type("final_norm", "F16"), r"final_norm is F16 \[64\], and must be F32 \[64\]"),
    "dtype of a weight": (
        swap_type("head.weight", "U16"),
        r"head.weight is U16 \[160, 64\], and must be BF16 \[160, 64\]",
    ),
    "shape": (reshaped("final_norm"), r"final_norm is F32 \[1, 64\], and must be F32 \[64\]"),
    "short ladder": (
        lambda t: [(n, d, a[:-1] if n == "ladder" else a) for n, d, a in t],
        r"ladder is U32 \[\d+\], and must be U32",
    ),
    "NaN": (change("final_norm", item(3, np.nan)), "final_norm: NaN or infinity"),
    "infinity": (change("layers.0.q.bias", item(3, -np.inf)), "layers.0.q.bias: NaN or infinity"),
    "infinite weight": (
        change("layers.0.q.weight", item((3, 5), np.inf)),
        "layers.0.q.weight: NaN or infinity",
    ),
    "bfloat16 infinity": (change("head.weight", item((9, 1), 0x7F80)), "head.weight: NaN or inf"),
    "bfloat16 -infinity": (change("head.weight", item((9, 1), 0xFF80)), "head.weight: NaN or inf"),
    "bfloat16 NaN": (change("head.weight", item((9, 1), 0xFFC1)), "head.weight: NaN or infinity"),
    "infinite scale": (change("embed.row_scale", item(0, np.inf)), "row_scale: NaN or infinity"),
    "scale is NaN": (change("embed.row_scale", item(0, -np.nan)), "row_scale: NaN or infinity"),
    "negative scale": (
        change("embed.row_scale", item(0, -0.5)),
        "embed.row_scale: a scale of -0.5 is negative",
    ),
    "negative group scale": (
        change("embed.group_scale", item((0, 0), -2)),
        "embed.group_scale: a scale of -2 is negative",
    ),
    "step of zero": (change("scale_steps", item(5, 0)), "scale_steps: a step of 0"),
    "huge step": (change("scale_steps", item(5, 2e19)), "and none may be above 1.84467e.19"),
    "tree falls": (change("tree", item(slice(6, 8), [1, 0])), "tree: the levels of depth 3 do not"),
    "tree leans": (change("tree", item(13, 9.0)), "tree: the levels of depth 3 are not symmetric"),
    "tree rests": (change("tree", item(slice(0, 2), 0)), "tree: the levels of depth 1 do not rise"),
    "tree is NaN": (change("tree", item(0, np.nan)), "tree: NaN or infinity"),
    "order twice": (
        change("order.embed", item(slice(None), 0)),
        "order.embed is no permutation: 1",
    ),
    "order too far": (change("order.embed", item(0, 64)), "order.embed names 64, and there are 64"),
    "row order": (
        change("embed.row_order", item(0, 2**32 - 1)),
        "embed.row_order names 4294967295",
    ),
    "row order in a layer": (
        lambda t: [*t, ("layers.0.k.row_order", "U32", np.arange(32, dtype=np.uint32))],
        "a tensor 'layers.0.k.row_order' is not expected",
    ),
    "unit unknown": (change("ladder", item(0, 999)), "ladder names unit 999, and there are"),
    "unit too often": (change("ladder", item(slice(None), 0)), "ladder names unit 0 more than 8"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_base_that_is_wrong(pack: Path, case: str) -> None:
    edit, message = WRONG_TENSORS[case]
    save_tensors(pack, edit(tensors_of(pack)))
    refuses(pack, message)


def test_base_tensors_may_lie_in_any_order(pack: Path) -> None:
    before = Pack.open(pack)
    save_tensors(pack, sorted(tensors_of(pack), reverse=True))
    after = Pack.open(pack)
    assert before.base.keys() == after.base.keys()
    for name, array in before.base.items():
        np.testing.assert_array_equal(array, after.base[name])
        assert after.base[name].flags.aligned


def header_of(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(start: int, stop: int, dtype: str = "U8", shape: list[Any] | None = None) -> Any:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1234567", "has 7 bytes, too few"),
        ((2**26 + 1).to_bytes(8, "little") + b"{}", "a header of 67108865 bytes, and at most"),
        (b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "a header of 3 bytes in a file of 10"),
        (bytes(8), "does not begin with an object"),
        ((2).to_bytes(8, "little") + b"[]", "does not begin with an object"),
        ((3).to_bytes(8, "little") + b"{}}", "not JSON"),
        (header_of(a=tensor(0, 4), b=tensor(5, 8)) + bytes(8), "a hole before 'b', at 5"),
        (header_of(a=tensor(0, 4), b=tensor(3, 8)) + bytes(8), "an overlap before 'b', at 3"),
        (header_of(a=tensor(1, 4)) + bytes(4), "a hole before 'a', at 1 instead of 0"),
        (header_of(a=tensor(0, 4)) + bytes(5), r"has \d+ bytes, and by its header"),
        (header_of(a=tensor(0, 4)) + bytes(3), r"has \d+ bytes, and by its header"),
        (header_of(a=tensor(4, 0, shape=[0])), "must be a start and an end"),
        (header_of(a=tensor(0, 8, "F64", [1])) + bytes(8), "dtype is 'F64', and must be one of"),
        (header_of(a=tensor(0, 4, "F32", [2])) + bytes(4), "has 8 bytes, and its offsets say 4"),
        (header_of(a=tensor(0, 4, "U8", [2**52, 2**52])) + bytes(4), "and its offsets say 4"),
        (header_of(a=tensor(0, 4, "U8", [-2, -2])) + bytes(4), r"shape\[0\] is -2"),
        (header_of(a=tensor(0, 1, "U8", [True])) + bytes(1), r"shape\[0\] is True"),
        (header_of(a=tensor(0, 1, "U8", [1] * 9)) + bytes(1), "9 dimensions"),
        (header_of(a={"dtype": "U8", "shape": []}), "no key 'data_offsets'"),
        (header_of(a=tensor(0, 1) | {"more": 1}) + bytes(1), "unknown key 'more'"),
        (header_of(__metadata__={"format": "pt"}), "'__metadata__'"),
        ((22).to_bytes(8, "little") + b'{"a":{},"b":{},"a":{}}', "the key 'a' is there twice"),
    ],
)
def test_safetensors_header_that_is_wrong(pack: Path, content: bytes, message: str) -> None:
    save_base(pack, content)
    refuses(pack, message)


@pytest.mark.parametrize("name", ["base.safetensors", "tokenizer.bin", "plies-00002.safetensors"])
@pytest.mark.parametrize("by", [-1, 1])
def test_file_shorter_or_longer(pack: Path, name: str, by: int) -> None:
    os.truncate(pack / name, (pack / name).stat().st_size + by)
    refuses(pack, f"{name} has .* bytes and is {'shorter' if by < 0 else 'longer'} than the")


@pytest.mark.parametrize("name", ["base.safetensors", "tokenizer.bin", "plies-00001.safetensors"])
def test_file_missing(pack: Path, name: str) -> None:
    (pack / name).unlink()
    refuses(pack, rf"{name} is missing")


def test_base_altered(pack: Path) -> None:
    content = bytearray((pack / "base.safetensors").read_bytes())
    content[-1] ^= 1
    (pack / "base.safetensors").write_bytes(content)
    refuses(pack, "base.safetensors has the SHA-256", ChecksumError)


def test_base_larger_than_the_limit(pack: Path) -> None:
    needed = Pack.open(pack).base_bytes
    assert Pack.open(pack, limit=needed).base_bytes == needed
    with pytest.raises(BudgetError, match=f"take {needed} bytes of memory, and {needed - 1} are"):
        Pack.open(pack, limit=needed - 1)


def test_too_little_memory_for_the_base(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("pliant.store.pack.np.empty", empty)
    with pytest.raises(BudgetError, match="bytes of memory, and there is not as much"):
        Pack.open(pack)


def test_sparse_base_larger_than_memory(pack: Path) -> None:
    """A few bytes on disk that declare 2 TiB of weights are refused before memory is taken."""
    manifest = load(pack)
    manifest["model"] |= {"vocab": 2**22, "hidden": 2**17}
    save(pack, manifest)
    shapes = {n: (r, c) for n, r, c in model_of(manifest).matrix_shapes()}
    for matrix in manifest["matrices"]:
        matrix["rows"], matrix["columns"] = shapes[matrix["name"]]
        matrix["coding"] = "f32"
        matrix.pop("input", None), matrix.pop("blocks", None)
    manifest |= {"rungs": {"plies": [], "bytes": [], "crc32": []}, "shards": [], "kv": None}
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("final_norm", "F32", (2**17,))]
    for layer in range(2):
        tensors += [(f"layers.{layer}.{part}_norm", "F32", (2**17,)) for part in ("attn", "ffn")]
    tensors += [(f"{name}.weight", "F32", shape) for name, shape in shapes.items()]
    header = encode_header(tensors)
    size = len(header) + sum(4 * int(np.prod(shape)) for _, _, shape in tensors)
    (pack / "base.safetensors").write_bytes(header)
    try:
        os.truncate(pack / "base.safetensors", size)
    except OSError:
        pytest.skip("the file system has no files of 4 TiB")
    manifest["files"]["base.safetensors"]["bytes"] = size
    save(pack, manifest)
    with pytest.raises(BudgetError, match=r"its tensors take \d+ bytes of memory"):
        Pack.open(pack)


def model_of(manifest: dict[str, Any]) -> Any:
    from pliant.store.model import read_model

    return read_model(manifest["model"], "model")


# --- shards and rungs -------------------------------------------------------------------------


def test_first_shards_are_a_smaller_model(pack: Path) -> None:
    whole = Pack.open(pack, verify=True)
    shards = whole.manifest.shards
    assert len(shards) >= 3
    assert whole.rungs_available == len(whole.manifest.rungs)
    for index in reversed(range(1, len(shards))):
        (pack / shards[index].file).unlink()
        part = Pack.open(pack, verify=True)
        assert part.rungs_available == sum(shard.rungs for shard in shards[:index])
        assert part.bytes_to_rungs(2**40) == part.rungs_available
        assert part.read_rung(part.rungs_available - 1)
        with pytest.raises(PackError, match=r"in a shard that is not here; .* download the rest"):
            part.read_rung(part.rungs_available)


def test_shard_missing_in_the_middle(pack: Path) -> None:
    (pack / "plies-00002.safetensors").unlink()
    refuses(pack, "plies-00002.safetensors is missing, and plies-00003.safetensors is there")


def test_no_shards(pack: Path) -> None:
    for shard in Pack.open(pack).manifest.shards:
        (pack / shard.file).unlink()
    refuses(pack, r"plies-00001.safetensors is missing: copy or download it again")


def test_shards_swapped(pack: Path) -> None:
    manifest = load(pack)
    one, two = pack / "plies-00001.safetensors", pack / "plies-00002.safetensors"
    sizes = manifest["shards"]
    one.rename(pack / "x"), two.rename(one), (pack / "x").rename(two)
    message = "this is another file, or one of another pack"
    refuses(pack, message if sizes[0]["bytes"] == sizes[1]["bytes"] else "bytes and is")


def edit_shard_header(
    pack: Path, edit: Callable[[dict[str, Any]], object], pad: int = 4096
) -> None:
    path = pack / "plies-00001.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % pad)
    content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    path.write_bytes(content)
    manifest = load(pack)
    manifest["shards"][0]["bytes"] = len(content)
    save(pack, manifest)


def test_shard_header_may_be_spelled_otherwise(pack: Path) -> None:
    edit_shard_header(pack, lambda header: None)
    Pack.open(pack, verify=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header.update({"rung.000009": header.pop("rung.000000")}),
        lambda header: header["rung.000000"].update(shape=[64, 128]),
        lambda header: header["rung.000000"].update(shape=[2048], dtype="F32"),
        lambda header: header.update(
            extra=tensor(*2 * [list(header.values())[-1]["data_offsets"][1]])
        ),
    ],
    ids=["name", "shape", "dtype", "one more"],
)
def test_shard_header_not_that_of_the_manifest(
    pack: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    edit_shard_header(pack, edit)
    refuses(pack, "does not have the rungs 0 ... ")


def test_shard_header_too_long(pack: Path) -> None:
    edit_shard_header(pack, lambda header: header.update({" " * 40_000: tensor(0, 0)}))
    refuses(pack, "a header of .* bytes, and at most .* are allowed here")


def test_rung_not_aligned(pack: Path) -> None:
    edit_shard_header(pack, lambda header: None, pad=64)
    refuses(pack, r"shards\[0\].bytes is .* padded to a multiple of 4096")


def test_rungs_and_plies_disagree(pack: Path) -> None:
    manifest = load(pack)
    manifest["rungs"]["plies"][0] += 3
    manifest["rungs"]["plies"][1] -= 3
    save(pack, manifest)
    refuses(pack, r"rung [01] has \d+ bytes, and its \d+ plies add up to \d+ with padding")


def test_rungs_without_plies(tmp_path: Path) -> None:
    plain = write_random_pack(tmp_path / "plain", coding="f32")
    manifest = load(plain)
    manifest["rungs"] = {"plies": [1], "bytes": [4096], "crc32": [0]}
    save(plain, manifest)
    refuses(plain, "there are rungs, but no matrix is coded in plies")


def test_rung_altered(pack: Path) -> None:
    whole = Pack.open(pack)
    place = whole.rung_location(1)
    content = bytearray(place.path.read_bytes())
    content[place.offset + 100] ^= 4
    place.path.write_bytes(content)
    again = Pack.open(pack)  # the payload is not read
    again.read_rung(0)
    with pytest.raises(ChecksumError, match=r"rung 1 has the checksum .* was written: copy or"):
        again.read_rung(1)
    with pytest.raises(ChecksumError, match="rung 1 has the checksum"):
        again.verify()
    with pytest.raises(ChecksumError, match="rung 1 has the checksum"):
        Pack.open(pack, verify=True)


def test_padding_must_be_zero(pack: Path) -> None:
    whole = Pack.open(pack)
    padding = whole.layout.padded - np.diff(whole.layout.payload)
    index = int(np.flatnonzero(padding)[0])
    place = whole.rung_location(index)
    content = bytearray(place.path.read_bytes())
    content[place.offset + place.bytes - 1] = 1
    place.path.write_bytes(content)
    manifest = load(pack)
    data = content[place.offset : place.offset + place.bytes]
    manifest["rungs"]["crc32"][index] = zlib.crc32(data)
    save(pack, manifest)
    again = Pack.open(pack)
    with pytest.raises(FormatError, match=f"bytes after rung {index} must be zero"):
        again.read_rung(index)
    with pytest.raises(FormatError, match=f"bytes after rung {index} must be zero"):
        again.verify()


def test_shard_shortened_after_opening(pack: Path) -> None:
    whole = Pack.open(pack)
    os.truncate(pack / "plies-00001.safetensors", 5000)
    with pytest.raises(FormatError, match="has 5000 bytes and is shorter"):
        whole.read_rung(0)
    (pack / "plies-00001.safetensors").unlink()
    with pytest.raises(FormatError, match=r"plies-00001.safetensors is missing"):
        whole.read_rung(0)


def test_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with RegularFile(path) as file:
        os.truncate(path, 60)
        with pytest.raises(FormatError, match="ended at byte 60 of 100 while it was read"):
            file.read(100)


def test_file_that_cannot_be_read() -> None:
    with RegularFile(Path("/proc/self/mem")) as file:  # a regular file, with nothing at byte 0
        with pytest.raises(PackError, match="/proc/self/mem cannot be read: Input/output error"):
            file.read(10)
        with pytest.raises(BudgetError, match="4611686018427387904 bytes do not fit into memory"):
            file.read(2**62)


def test_no_such_rung(pack: Path) -> None:
    whole = Pack.open(pack)
    for index in (-1, len(whole.manifest.rungs)):
        with pytest.raises(PackError, match=f"has no rung {index}: it has"):
            whole.rung_location(index)


# --- files beside it --------------------------------------------------------------------------


def test_listed_files(pack: Path) -> None:
    whole = Pack.open(pack)
    assert whole.read_file("config.json") == b"{}"
    assert whole.read_file("tokenizer.bin") == b"placeholder"
    with pytest.raises(PackError, match=r"lists no file 'tokenizer.json'"):
        whole.read_file("tokenizer.json")
    (pack / "config.json").write_bytes(b"[]")
    with pytest.raises(ChecksumError, match=r"config.json has the SHA-256"):
        whole.read_file("config.json")
    with pytest.raises(ChecksumError, match=r"config.json has the SHA-256"):
        whole.verify()
    (pack / "config.json").unlink()
    Pack.open(pack, verify=True)  # not needed to run
    with pytest.raises(FormatError, match=r"config.json is missing"):
        whole.read_file("config.json")


def test_files_that_are_not_listed_are_left_alone(pack: Path) -> None:
    os.mkfifo(pack / "tokenizer.json")
    (pack / "plies-00099.safetensors").write_bytes(b"?")
    Pack.open(pack, verify=True)


@pytest.mark.parametrize(
    "name", ["pliant.json", "base.safetensors", "tokenizer.bin", "plies-00002.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "loop"])
def test_only_regular_files_are_read(pack: Path, name: str, kind: str) -> None:
    (pack / name).unlink()
    if kind == "pipe":
        os.mkfifo(pack / name)
    elif kind == "directory":
        (pack / name).mkdir()
    elif kind == "device":
        (pack / name).symlink_to("/dev/zero")
    else:
        (pack / name).symlink_to(pack / name)
    if kind == "loop":
        refuses(pack, f"{name} cannot be opened: Too many levels of symbolic links", PackError)
    else:
        refuses(pack, f"{name} is not a regular file")


def test_symbolic_links_are_followed(pack: Path, tmp_path: Path) -> None:
    """Caches of model hubs keep files elsewhere and link to them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in pack.iterdir():
        (snapshot / file.name).symlink_to(file)
    Pack.open(snapshot, verify=True)


def test_no_pack_there(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "there is no pack at .*nowhere", PackError)
    refuses(tmp_path, "is not a pack: it has no pliant.json", PackError)
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "cannot be opened: Not a directory", PackError)
    refuses(Path("/\0"), "cannot be opened", PackError)


# --- what opening costs -----------------------------------------------------------------------


def test_opening_imports_no_framework(pack: Path) -> None:
    code = (
        "import sys; from pliant.store import Pack; Pack.open(sys.argv[1], verify=True);"
        "print(sorted({'torch', 'safetensors', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(pack)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_opening_holds_the_base_once(tmp_path: Path) -> None:
    path = write_random_pack(tmp_path / "plain", coding="f32", hidden=256, vocab=4000)
    Pack.open(path)
    tracemalloc.start()
    pack = Pack.open(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pack.base_bytes > 4 * 2**20
    assert held < pack.base_bytes + 2**17
    assert peak < pack.base_bytes + 2**19


def test_manifest_of_many_layers_is_small() -> None:
    value = random_manifest(layers=100, hidden=64)
    digest = {"bytes": 0, "sha256": "0" * 64}
    value |= {
        "rungs": {"plies": [], "bytes": [], "crc32": []},
        "shards": [],
        "files": {"base.safetensors": digest, "tokenizer.bin": digest},
    }
    data = json.dumps(value).encode()
    tracemalloc.start()
    manifest = Manifest.from_json(data)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(manifest.matrices) == 701
    assert held < 300_000


# --- units and rungs --------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=48), st.data())
def test_layout_against_plain_loops(entries: list[int], data: st.DataObject) -> None:
    manifest = random_manifest(layers=1, vocab=100, hidden=70, tied=True, coding={
        f"layers.0.{part}": "f32" for part in ("q", "k", "v", "o", "gate", "up", "down")
    }, embed_block_rows=32)  # fmt: skip
    digest = {"bytes": 0, "sha256": "0" * 64}
    manifest |= {
        "rungs": {"plies": [], "bytes": [], "crc32": []},
        "shards": [],
        "files": {"base.safetensors": digest, "tokenizer.bin": digest},
    }
    units = UnitTable(Manifest.from_json(json.dumps(manifest).encode()).matrices)
    assert len(units) == 4 * 2
    ladder = np.array([e for i, e in enumerate(entries) if entries[:i].count(e) < 8], np.uint32)
    counts, left = [], len(ladder)
    while left:
        counts.append(data.draw(st.integers(1, left)))
        left -= counts[-1]
    layout = Layout(units, ladder, np.array(counts, np.int64))
    seen: dict[int, int] = {}
    position, payload = 0, [0]
    for rung, count in enumerate(counts):
        offset = 0
        rung_units, bits, offsets = layout.plies_of(rung)
        for at, unit in enumerate(ladder[position : position + count].tolist()):
            seen[unit] = seen.get(unit, 0) + 1
            rows = -(-units.locate(unit).rows // 32) * 32
            assert (rung_units[at], bits[at], offsets[at]) == (unit, seen[unit], offset)
            size = rows * 8 + (-(-(rows // 2) // 64) * 64 if seen[unit] == 1 else 0)
            one = units.first_ply_bytes if seen[unit] == 1 else units.next_ply_bytes
            assert one[unit] == size
            offset += size
        position += count
        payload.append(payload[-1] + offset)
        assert layout.padded[rung] == -(-offset // 4096) * 4096
        assert layout.depths(rung + 1).tolist() == [seen.get(u, 0) for u in range(len(units))]
    assert layout.payload.tolist() == payload
    scales = 2 * 100 + 4 * 8
    assert units.scale_bytes == scales
    for rung, size in enumerate(payload):
        assert layout.resident_bytes(rung) == scales + size
        assert layout.rungs_for(scales + size) == rung
        assert layout.rungs_for(scales + size - 1) == max(rung - 1, 0)
    assert layout.rungs_for(0) == layout.rungs_for(-1) == 0


@pytest.mark.parametrize("units", [3, 40_000])
def test_occurrences_over_many_chunks(units: int) -> None:
    rng = np.random.default_rng(units)
    ladder = rng.permutation(np.repeat(np.arange(units, dtype=np.uint32), 8))
    bits = occurrences(ladder, units)
    order = np.argsort(ladder, kind="stable")
    np.testing.assert_array_equal(bits[order], np.tile(np.arange(1, 9), units))
    wrong = ladder.copy()
    wrong[-1] = wrong[0]
    with pytest.raises(FormatError, match=f"names unit {wrong[0]} more than 8 times"):
        occurrences(wrong, units)
    with pytest.raises(FormatError, match=r"plies, and .* units have at most"):
        occurrences(np.zeros(8 * units + 1, np.uint32), units)


def test_units_are_located(pack: Path) -> None:
    whole = Pack.open(pack)
    number = 0
    for matrix in whole.manifest.matrices:
        if matrix.coding != "plies":
            assert matrix.units == 0
            with pytest.raises(KeyError):
                whole.units.number(matrix.name, 0, 0)
            continue
        for block, rows in enumerate(matrix.blocks):
            for group in range(matrix.groups):
                first = sum(matrix.blocks[:block])
                assert whole.units.locate(number) == (matrix, block, group, first, rows)
                assert whole.units.number(matrix.name, block, group) == number
                number += 1
    assert len(whole.units) == number
    for wrong in (-1, number):
        with pytest.raises(IndexError):
            whole.units.locate(wrong)
    with pytest.raises(IndexError):
        whole.units.number("embed", 3, 0)
