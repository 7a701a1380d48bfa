"""Models and tokenizers from GGUF files, with transformers as the oracle."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pliant.errors import ModelError, SourceError
from pliant.pack.sources import open_source
from pliant.pack.tokenizer_files import copy_tokenizer_files, end_tokens, gguf_tokenizer
from tiny_sources import (
    TEXT,
    VOCAB,
    bpe_metadata,
    check_same_model,
    logits,
    tiny_model,
    train_tokenizer,
    use_all,
    write_gguf,
)

GGUF_FAMILIES = {
    "llama": {},
    "llama-bias": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    # query_pre_attn_scalar is not in the file; all but the 27B model use head_dim.
    "gemma3": {"query_pre_attn_scalar": 16},
}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_gives_the_same_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **GGUF_FAMILIES[family])
    path = write_gguf(model, tmp_path / "tiny.gguf", family)
    source = open_source(str(path))
    assert (source.name, source.license) == ("Tiny model", "mit")
    state = model.state_dict()
    for name in source.tensor_names():
        # 1 + w loses the last bits of w.
        tolerance = 3e-7 if family == "gemma3" and "norm" in name else 0
        torch.testing.assert_close(source.tensor(name), state[name], rtol=0, atol=tolerance)
    torch.testing.assert_close(logits(source.load_torch()), logits(model), rtol=0, atol=2e-5)
    ours, theirs = source.config, model.config
    for key in ("rope_parameters", "layer_types", "sliding_window", "rms_norm_eps", "vocab_size"):
        assert ours.get(key) == getattr(theirs, key, None), key
    assert source.generation_config == {
        "eos_token_id": [2, 0],
        "bos_token_id": 1,
        "pad_token_id": 0,
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_gguf_agrees_with_the_reader_of_transformers(family: str, tmp_path: Path) -> None:
    # That reader takes query_pre_attn_scalar for 256 always.
    more = {"head_dim": 256, "query_pre_attn_scalar": 256} if family == "gemma3" else {}
    model = tiny_model(family, **{**GGUF_FAMILIES[family], **more})
    path = write_gguf(model, tmp_path / "q8.gguf", family, gguf.GGMLQuantizationType.Q8_0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="q8.gguf", dtype=torch.float32
    ).eval()
    # Nor does it know of the cap on the logits.
    theirs.config.final_logit_softcapping = getattr(model.config, "final_logit_softcapping", None)
    check_same_model(open_source(str(path)), theirs)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q4_0", "Q5_1", "Q8_0", "TQ2_0"])
def test_gguf_types_are_dequantised(kind: str, tmp_path: Path) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=256, head_dim=64)
    source = open_source(str(write_gguf(model, tmp_path / "x.gguf", "qwen3", quantised)))
    name = "model.layers.1.mlp.down_proj.weight"
    stored = gguf.quants.quantize(model.state_dict()[name].numpy(), quantised)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, quantised))
    assert torch.equal(source.tensor(name), expected)


def test_split_gguf_is_read_from_any_part(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_gguf(model, tmp_path / "m.gguf", "llama", split_max_tensors=6)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    for spec in (parts[0], parts[-1], tmp_path):
        check_same_model(open_source(str(spec)), model)
    parts[1].rename(tmp_path / "kept")
    with pytest.raises(SourceError, match=f"1 of {len(parts)} parts are missing, first m-00002"):
        open_source(str(parts[0]))
    parts[2].rename(parts[1])
    (tmp_path / "kept").rename(parts[2])
    with pytest.raises(SourceError, match="do not belong together"):
        open_source(str(parts[0]))


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("general.architecture", "mamba", ModelError, "'mamba' is not supported.*llama"),
        ("general.architecture", "clip", ModelError, "images"),
        ("llama.expert_count", 8, ModelError, "mixture of experts"),
        ("llama.rope.dimension_count", 8, ModelError, "rope on 8 of 16"),
        ("llama.block_count", 3, SourceError, "says 3 layers, the files hold 2"),
        ("llama.embedding_length", 64, SourceError, "has shape"),
        ("llama.rope.scaling.type", "longrope", ModelError, "longrope"),
        ("llama.attention.value_length", 8, ModelError, "different length"),
        ("llama.attention.head_count", "four", SourceError, "not a whole number"),
        ("tokenizer.ggml.eos_token_id", 5000, SourceError, "eos_token_id is 5000"),
        ("tokenizer.ggml.pre", "of-next-year", ModelError, "'of-next-year', which is not known"),
        ("tokenizer.ggml.model", "bert", ModelError, "'bert' is not supported"),
    ],
)
def test_gguf_that_cannot_be_run(
    key: str, value: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "a.gguf", "llama")
    changed = tmp_path / "b.gguf"
    reader = gguf.GGUFReader(path)
    arch = value if key == "general.architecture" else "llama"
    writer = gguf.GGUFWriter(changed, arch)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    del fields["general.architecture"]
    if key != "general.architecture":
        fields[key] = value
    for name, content in fields.items():
        old = reader.fields.get(name)
        kinds = [*old.types, None] if old is not None and name != key else [None, None]
        if kinds[0] is None:
            kinds[0] = gguf.GGUFValueType.get_type(content)
            kinds[0] = gguf.GGUFValueType.UINT32 if isinstance(content, int) else kinds[0]
        writer.add_key_value(name, content, kinds[0], sub_type=kinds[1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(error, match=message):
        open_source(str(changed)).write_tokenizer_files(tmp_path / "out")


def header_bytes(tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def key_value(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(tiny_model("llama"), path, "llama")


HUGE = 1 << 60


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" + bytes(40),
        header_bytes(tensors=HUGE),
        header_bytes(keys=HUGE),
        header_bytes(keys=1, rest=struct.pack("<Q", HUGE)),
        header_bytes(keys=1, rest=key_value(8, struct.pack("<Q", HUGE))),
        header_bytes(keys=1, rest=key_value(9, struct.pack("<IQ", 8, HUGE))),
        header_bytes(keys=1, rest=key_value(9, struct.pack("<IQ", 0, HUGE))),
        header_bytes(keys=1, rest=key_value(9, struct.pack("<IQ", 9, 1) + bytes(64))),
        header_bytes(keys=1, rest=key_value(77, bytes(64))),
        header_bytes(keys=2, rest=key_value(0, b"\1") * 2 + bytes(64)),
        header_bytes(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64)),
        header_bytes(1, 0, struct.pack("<Q1sIQQIQ", 1, b"t", 2, HUGE, HUGE, 0, 0)[:41] + bytes(99)),
        header_bytes(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<I", 1 << 31) + bytes(99)),
        header_bytes(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 64, 0, HUGE)),
        header_bytes(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 64, 999, 0)),
        b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64),
        b"GGUF" + struct.pack("<IQQ", 1, 1, 1) + bytes(64),
    ],
)
def test_hostile_gguf_header_costs_nothing(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            open_source(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_gguf_is_refused_or_read(
    small_gguf: Path, data: st.DataObject, tmp_path: Path
) -> None:
    # The header, where damage is interesting, is about the first eighth of the file.
    damaged = bytearray(small_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 12_000))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        damaged[at : at + len(piece)] = piece
    cut = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(bytes(damaged[:cut]))
    with contextlib.suppress(SourceError, ModelError):
        use_all(path, tmp_path / "out")


def test_gguf_tokenizer_is_the_original(tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "t.gguf", "llama")
    open_source(str(path)).write_tokenizer_files(tmp_path / "out")
    original = train_tokenizer()
    written = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT, "x\n 12", " 1  23", "<|im_start|>user\nhi<|im_end|>", "a\tb", "né ½ ²"):
        ids = original.encode(text).ids
        assert written.encode(text).ids == ids
        assert loaded(text)["input_ids"] == ids
        assert written.decode(ids, skip_special_tokens=False) == text
    assert loaded.chat_template == "{{ messages }}"
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("gpt-2", "a 12'S", ["a", "Ġ12", "'", "S"]),
        ("llama-bpe", "a12345'S", ["a", "123", "45", "'S"]),
        ("qwen2", "a12 b", ["a", "1", "2", "Ġb"]),
        ("tekken", "aB1 cD", ["a", "B", "1", "Ġc", "D"]),
        ("default", "a,b1234", ["a", ",", "b", "123", "4"]),
    ],
)
def test_text_is_cut_by_the_named_rule(pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = gguf_tokenizer(bpe_metadata(pre), "here")
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize(
    ("pre", "flags", "first", "last"),
    [
        ("smollm", {}, None, None),
        ("llama-bpe", {}, 1, None),
        ("llama-bpe", {"add_bos_token": False}, None, None),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, 1, 2),
    ],
)
def test_beginning_and_end_are_added_as_the_file_says(
    pre: str, flags: dict[str, bool], first: int | None, last: int | None
) -> None:
    tokenizer = gguf_tokenizer(bpe_metadata(pre, **flags), "here")
    plain = tokenizer.encode("fox", add_special_tokens=False).ids
    ends = ([first] if first else []), ([last] if last else [])
    assert tokenizer.encode("fox").ids == [*ends[0], *plain, *ends[1]]


@pytest.mark.parametrize("token", ["<|im_start|>", "a:b", "$A", "$x:1"])
def test_any_token_can_begin_a_text(token: str) -> None:
    metadata = bpe_metadata(add_bos_token=True)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[1] = token
    tokenizer = gguf_tokenizer(metadata | {"tokenizer.ggml.tokens": tokens}, "here")
    assert tokenizer.encode("fox").ids[0] == 1
    assert tokenizer.encode("fox").tokens[0] == token


def spm_metadata(*, space: bool) -> dict[str, Any]:
    """A SentencePiece vocabulary: controls, bytes, some pieces from best to worst, letters."""
    pieces = ["▁t", "he", "▁the", "in", "er", "▁in", "▁▁", "ther", "▁there", "ab", "abab", "▁▁▁▁"]
    letters = ["▁", *"abdehinrtx"]
    tokens = ["<unk>", "<s>", "</s>", "<turn>", "\n"]
    types = [2, 3, 3, 3, 4]
    tokens += [f"<0x{i:02X}>" for i in range(256)]
    types += [6] * 256
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces) + len(letters))]
    tokens += pieces + letters
    types += [1] * (len(pieces) + len(letters))
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": space,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in values.items()} | {"general.architecture": "llama"}


def spm_encode(text: str, metadata: Mapping[str, Any], *, space: bool) -> list[int]:
    """SentencePiece BPE by its definition: join the best pair of neighbours until none is left."""
    table = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    parts = list(("▁" if space else "") + text.replace(" ", "▁"))
    while True:
        pairs = [
            (scores[table[a + b]], -i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in table and table[a + b] > 260
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids: list[int] = []
    for part in parts:
        ids += [table[part]] if part in table else [5 + byte for byte in part.encode()]
    return ids


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=" abdehinrtxé日", min_size=1, max_size=40), space=st.booleans())
def test_sentencepiece_joins_the_best_pair_first(text: str, space: bool) -> None:
    metadata = spm_metadata(space=space)
    tokenizer = gguf_tokenizer(metadata, "here")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == spm_encode(text, metadata, space=space)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text).ids == [1, *ids]


def test_gemma_tokens_keep_runs_of_spaces_and_lines_whole() -> None:
    metadata = spm_metadata(space=False) | {"general.architecture": "gemma3"}
    tokens = [
        t.replace("▁", " ") if not t.strip("▁") and len(t) > 1 else t
        for t in metadata["tokenizer.ggml.tokens"]
    ]
    tokenizer = gguf_tokenizer(metadata | {"tokenizer.ggml.tokens": tokens}, "here")
    encoded = tokenizer.encode("a    \nhe<turn>x", add_special_tokens=False)
    assert encoded.tokens == ["a", "▁▁▁▁", "\n", "he", "<turn>", "x"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "a    \nhe<turn>x"


def test_end_tokens_include_the_end_of_a_turn() -> None:
    metadata = bpe_metadata(eot_token_id=1)
    assert end_tokens(metadata) == [2, 1, 0]
    plain = metadata | {"tokenizer.ggml.token_type": [1] * VOCAB}
    assert end_tokens(plain) == [2, 1]


@pytest.mark.parametrize("place", ["jinja", "config", "list", "json"])
def test_chat_template_is_found_in_each_place(place: str, tmp_path: Path) -> None:
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"auto_map": {"AutoTokenizer": "code.Evil"}}
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text("T")
        config["chat_template"] = "old"
    elif place == "json":
        (tmp_path / "chat_template.json").write_text('{"chat_template": "T"}')
    else:
        listed = [{"name": "tool", "template": "X"}, {"name": "default", "template": "T"}]
        config["chat_template"] = listed if place == "list" else "T"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    copy_tokenizer_files(tmp_path, tmp_path / "out", "here")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "T"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {}


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("already", [True, False])
def test_published_tokenizer_follows_its_settings(
    flag: bool | None, already: bool, tmp_path: Path
) -> None:
    tokenizer = gguf_tokenizer(bpe_metadata(add_bos_token=already), "here")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": {"content": "<|im_start|>"}}
    if flag is not None:
        config["add_bos_token"] = flag
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    copy_tokenizer_files(tmp_path, tmp_path / "out", "here")
    ids = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("fox").ids
    assert (ids[0] == 1) is (already if flag is None else flag)
    assert ids.count(1) <= 1
