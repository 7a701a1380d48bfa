"""Tiny random models, and the files in which a model comes: for the tests of the sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pliant.pack.sources import Source, open_source

TEXT = (
    "The quick brown fox jumps over the lazy dog 0123456789 times, didn't it?\n"
    "    if x == 12: return [y, z]  # naïve café, ÅÄÖ, 日本語\n\n"
) * 3
VOCAB = 320
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 8, "head_dim": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "gemma3": {
        "head_dim": 16,
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 30.0,
    },
}
MODEL_TYPES = {"llama-bias": "llama", "gemma3": "gemma3_text"}


def tiny_model(family: str, **more: Any) -> Any:
    """A random model; norms and biases are random too, so that no error in them can hide."""
    torch.manual_seed(len(family))
    config = transformers.AutoConfig.for_model(
        MODEL_TYPES.get(family, family), **{**BASE, **FAMILIES[family], **more}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 33)[None] * 7 % VOCAB
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def check_same_model(source: Source, model: Any) -> None:
    """The source gives the tensors of `model`, and a model that computes the same."""
    state = model.state_dict()
    tied = source.config["tie_word_embeddings"]
    assert set(source.tensor_names()) == set(state) - ({"lm_head.weight"} if tied else set())
    for name in source.tensor_names():
        assert torch.equal(source.tensor(name), state[name].float()), name
    assert source.bytes_fp32 == 4 * sum(p.numel() for p in model.parameters())
    loaded = source.load_torch()
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that cuts text as SmolLM's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def save_hf(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    train_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    return directory


def use_all(path: Path, directory: Path) -> None:
    """Open a source and read all that it gives."""
    source = open_source(str(path))
    for name in source.tensor_names():
        assert torch.isfinite(source.tensor(name)).all()
    source.write_tokenizer_files(directory)


INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
INNER_GEMMA = INNER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, family: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in outer:
        return f"{outer[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{(INNER_GEMMA if family == 'gemma3' else INNER)[rest]}.{kind}"


def gguf_value(name: str, value: np.ndarray, family: str, config: Any) -> np.ndarray:
    """What llama.cpp's converter stores for a tensor."""
    if family.startswith("llama") and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_" in name else config.num_key_value_heads
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    if family == "gemma3" and name.endswith("norm.weight"):
        value = value + np.float32(1)
    return np.ascontiguousarray(value)


def write_gguf(
    model: Any,
    path: Path,
    family: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    config = model.config
    arch = family.split("-")[0]
    writer = gguf.GGUFWriter(path, arch, **options)
    writer.add_name("Tiny model")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    add_tokenizer(writer, metadata)
    if config.rope_parameters.get("rope_type") == "llama3":
        rotary = model.model.rotary_emb
        plain, _ = type(rotary).compute_default_rope_parameters(config)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq).numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = gguf_value(name, tensor.float().numpy(), family, config)
        if value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(value, kind)
            writer.add_tensor(gguf_name(name, family), data, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name, family), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, metadata: Mapping[str, Any] | None) -> None:
    fields = dict(metadata if metadata is not None else bpe_metadata())
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def bpe_metadata(pre: str = "smollm", **more: Any) -> dict[str, Any]:
    state = json.loads(train_tokenizer().to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    types = [3 if t.startswith("<|") else 1 for t in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in values.items()} | {
        "tokenizer.chat_template": "{{ messages }}"
    }
