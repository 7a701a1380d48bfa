"""Models from Hugging Face directories, their configs, and what a name means."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pliant.errors import ModelError, SourceError
from pliant.pack.sources import open_source
from pliant.pack.sources.config import normal_config
from tiny_sources import (
    BASE,
    FAMILIES,
    LLAMA3,
    check_same_model,
    save_hf,
    tiny_model,
    use_all,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_hf_directory_gives_the_same_model(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    path = save_hf(model, tmp_path / "tiny", max_shard_size=shard)
    assert (path / "model.safetensors.index.json").exists() == (shard == "30KB")
    source = open_source(str(path))
    assert (source.name, source.license) == ("tiny", "apache-2.0")
    check_same_model(source, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_reads_back_as_the_same_config(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = open_source(str(save_hf(model, tmp_path / "in")))
    source.write_tokenizer_files(tmp_path / "out")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    for key in ("rope_parameters", "layer_types", "sliding_window", "eos_token_id", "head_dim"):
        default = 8 if key == "head_dim" else None
        assert getattr(again, key, default) == getattr(model.config, key, default), key
    # What was normal stays as it is.
    assert normal_config(source.config, "again") == source.config
    assert (
        normal_config(json.loads((tmp_path / "out/config.json").read_text()), "x") == source.config
    )


def test_older_rope_settings_mean_the_same(tmp_path: Path) -> None:
    path = save_hf(tiny_model("gemma3"), tmp_path / "in")
    new = open_source(str(path)).config
    old = json.loads((path / "config.json").read_text())
    del old["rope_parameters"]
    old |= {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    assert normal_config(old, "old") == new
    scaled = normal_config({**old, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "old")
    assert scaled["rope_parameters"]["full_attention"]["factor"] == 8.0
    assert scaled["rope_parameters"]["sliding_attention"] == {
        "rope_type": "default",
        "rope_theta": 10_000.0,
    }
    llama = {**BASE, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**LLAMA3}}
    del llama["rope_scaling"]["rope_theta"]
    assert normal_config(llama, "old")["rope_parameters"] == {**LLAMA3, "rope_theta": 5e5}


def test_attention_windows_follow_the_layers(tmp_path: Path) -> None:
    for family, windows in {
        "llama": [None, None],
        "mistral": [8, 8],
        "qwen2": [None, 8],
        "gemma3": [8, 8, 8, 8, 8, None],
    }.items():
        source = open_source(str(save_hf(tiny_model(family), tmp_path / family)))
        assert source.attention_windows() == windows


def test_text_part_of_a_model_with_images(tmp_path: Path) -> None:
    text = tiny_model("gemma3")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    path = save_hf(whole, tmp_path / "wrapped")
    names = set(load_file(path / "model.safetensors"))
    for part in ("language_model.", "vision"):
        assert any(part in name for name in names)
    check_same_model(open_source(str(path)), text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama").to(dtype)
    source = open_source(str(save_hf(model, tmp_path / "half")))
    for name in source.tensor_names():
        assert torch.equal(source.tensor(name), model.state_dict()[name].float())
    loaded = source.load_torch(dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("same", [True, False])
def test_stored_head_of_a_tied_model(same: bool, tmp_path: Path) -> None:
    path = save_hf(tiny_model("llama"), tmp_path / "tied")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if same else 1.0)
    save_file(tensors, path / "model.safetensors")
    source = open_source(str(path))
    assert source.config["tie_word_embeddings"] is same
    assert ("lm_head.weight" in source.tensor_names()) is not same
    check_same_model(source, transformers.AutoModelForCausalLM.from_pretrained(path))


def break_file(path: Path, how: str) -> None:
    """Damage a model directory in one of the ways that happen."""
    weights, config = path / "model.safetensors", path / "config.json"
    if how in ("nan", "shape", "missing", "extra", "fp8"):
        tensors = load_file(weights)
        name = "model.layers.1.mlp.up_proj.weight"
        if how == "nan":
            tensors[name][5, 3] = float("nan")
        elif how == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        elif how == "missing":
            del tensors[name]
        elif how == "fp8":
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        else:
            tensors["model.layers.1.self_attn.sinks"] = torch.zeros(4)
        save_file(tensors, weights)
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + weights.read_bytes()[8:])
    elif how == "overlap":
        data = weights.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        norms = [n for n in header if n.endswith("layernorm.weight")]
        header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
        text = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    elif how == "pickle":
        weights.unlink()
        (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif how == "no tokenizer":
        (path / "tokenizer.json").unlink()
    elif how == "config":
        config.write_text("{")
    else:
        weights.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "1 values of 2048 that are NaN"),
        ("shape", r"has shape \[63, 32\], its config asks for \[64, 32\]"),
        ("missing", "1 of 20 tensors are missing"),
        ("extra", "variant of the architecture"),
        ("fp8", "quantised"),
        ("cut", "cut off"),
        ("header", "header claims 1152921504606846976"),
        ("overlap", "belong to another"),
        ("pickle", "save_pretrained"),
        ("no tokenizer", "no tokenizer"),
        ("config", "not valid JSON"),
        ("gone", "no .*safetensors"),
    ],
)
def test_broken_directory_says_what_is_wrong(how: str, message: str, tmp_path: Path) -> None:
    path = save_hf(tiny_model("llama"), tmp_path / "broken")
    break_file(path, how)
    with pytest.raises((SourceError, ModelError), match=message):
        use_all(path, tmp_path / "out")


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": {"type": "BPE"}}', '{"version": 7}', "\0"])
def test_tokenizer_that_is_none(text: str, tmp_path: Path) -> None:
    path = save_hf(tiny_model("llama"), tmp_path / "x")
    (path / "tokenizer.json").write_text(text)
    with pytest.raises(SourceError, match=r"tokenizer\.json cannot be used"):
        use_all(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model-00001-of-00003.safetensors", "plain names"),
        ("/etc/passwd", "plain names"),
        ("model-00009-of-00003.safetensors", "is missing"),
        (7, "plain names"),
    ],
)
def test_index_cannot_name_other_files(name: object, message: str, tmp_path: Path) -> None:
    path = save_hf(tiny_model("llama"), tmp_path / "x", max_shard_size="30KB")
    index = path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(value))
    with pytest.raises(SourceError, match=message):
        open_source(str(path))


def test_shards_without_an_index_must_be_complete(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = save_hf(model, tmp_path / "x", max_shard_size="30KB")
    (path / "model.safetensors.index.json").unlink()
    check_same_model(open_source(str(path)), model)
    sorted(path.glob("model-*"))[1].unlink()
    with pytest.raises(SourceError, match="shard 2 of"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "mamba"}, ModelError, "'mamba' is not supported. Supported: llama"),
        ({"model_type": None}, SourceError, "model_type"),
        ({"num_local_experts": 8}, ModelError, "mixture of experts"),
        ({"hidden_act": "relu"}, ModelError, "relu"),
        ({"attention_sinks": True}, ModelError, "sinks"),
        ({"quantization_config": {"quant_method": "gptq"}}, ModelError, "gptq"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ModelError, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, SourceError, "factor"),
        ({"partial_rotary_factor": 0.5}, ModelError, "part of the head"),
        ({"num_hidden_layers": 1 << 60}, SourceError, "num_hidden_layers is 1152921504606846976"),
        ({"hidden_size": -1}, SourceError, "hidden_size"),
        ({"vocab_size": "many"}, SourceError, "vocab_size"),
        ({"num_key_value_heads": 3}, SourceError, "evenly"),
        ({"head_dim": 7}, SourceError, "odd"),
        ({"rms_norm_eps": float("nan")}, SourceError, "rms_norm_eps"),
        ({"rope_theta": 0.0}, SourceError, "rope_theta"),
        ({"hidden_size": None}, SourceError, "no hidden_size"),
    ],
)
def test_config_that_cannot_be_run(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        normal_config({"model_type": "llama", **BASE, **change}, "here")


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(
        [*BASE, "head_dim", "layer_types", "rope_scaling", "num_labels", "model_type"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=5,
    ),
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]),
)
def test_any_value_in_a_config_is_taken_or_refused(key: str, value: Any, kind: str) -> None:
    try:
        config = normal_config({"model_type": kind, **BASE, key: value}, "here")
    except (SourceError, ModelError):
        return
    assert config["num_hidden_layers"] <= 4096
    assert normal_config(config, "again") == config


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nothing", "no such file or directory.*Give a directory"),
        ("models/none.gguf", "no such file or directory"),
        ("just-a-word", "no such file or directory"),
        ("a/b/c/d", "no such file or directory"),
        ("", "no such file|no model"),
        ("nul\0byte", "no such file"),
        ("pypi:", "write pypi:NAME"),
        ("pypi:../x", "write pypi:NAME"),
        ("pypi:--index-url=x", "write pypi:NAME"),
        ("pypi:a==1; import os", "write pypi:NAME"),
        ("hf:../../x", "no such file"),
    ],
)
def test_name_that_means_nothing(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message):
        open_source(spec)


def test_files_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no model"):
        open_source(str(tmp_path))
    for name, message in {
        "pytorch_model.bin": "pickle",
        "model.safetensors": "give the directory",
        "notes.txt": "not a GGUF file",
        "x-1.0-py3-none-any.whl": "damaged or no archive",
    }.items():
        (tmp_path / name).write_bytes(b"something")
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path / name), cache_dir=tmp_path / "cache")
    with pytest.raises(SourceError, match="belongs to a hub"):
        open_source(str(tmp_path), revision="main")
    with pytest.raises(SourceError, match="no revisions"):
        open_source("pypi:x", revision="main")
