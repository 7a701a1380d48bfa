"""What a pack says about a model: the `model` and `tokens` objects of the manifest and the names.

Works on the normal form of `config.json` that every source gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pliant.errors import ModelError

__all__ = ["MatrixName", "describe_model", "describe_tokens", "matrix_names", "vector_names"]

_FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_LAYER_MATRICES = (
    ("q", "self_attn.q_proj", "attn"),
    ("k", "self_attn.k_proj", "attn"),
    ("v", "self_attn.v_proj", "attn"),
    ("o", "self_attn.o_proj", "o"),
    ("gate", "mlp.gate_proj", "ffn"),
    ("up", "mlp.up_proj", "ffn"),
    ("down", "mlp.down_proj", "down"),
)


@dataclass(frozen=True)
class MatrixName:
    """A matrix of a pack: its name, the tensor in the source, the channel order that it shares."""

    name: str
    tensor: str
    input: str


def matrix_names(config: Mapping[str, Any]) -> list[MatrixName]:
    """All matrices of a model in the order of the manifest."""
    names = [MatrixName("embed", "model.embed_tokens.weight", "embed")]
    if not config["tie_word_embeddings"]:
        names.append(MatrixName("head", "lm_head.weight", "head"))
    for i in range(config["num_hidden_layers"]):
        for short, path, order in _LAYER_MATRICES:
            tensor = f"model.layers.{i}.{path}.weight"
            names.append(MatrixName(f"layers.{i}.{short}", tensor, f"layers.{i}.{order}"))
    return names


def vector_names(config: Mapping[str, Any], present: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Vectors of a pack: name -> (tensor of the source, whether 1 is to be added).

    `present` are the tensors that the source has. Norms of Gemma multiply by 1 + w.
    """
    gemma = config["model_type"] == "gemma3_text"
    has = set(present)
    found = {"final_norm": ("model.norm.weight", gemma)}
    for i in range(config["num_hidden_layers"]):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        found[to + "attn_norm"] = (at + "input_layernorm.weight", gemma)
        if gemma:
            found[to + "attn_post_norm"] = (at + "post_attention_layernorm.weight", True)
            found[to + "ffn_norm"] = (at + "pre_feedforward_layernorm.weight", True)
            found[to + "ffn_post_norm"] = (at + "post_feedforward_layernorm.weight", True)
        else:
            found[to + "ffn_norm"] = (at + "post_attention_layernorm.weight", False)
        for letter in ("q", "k"):
            tensor = f"{at}self_attn.{letter}_norm.weight"
            if tensor in has:
                found[f"{to}{letter}_norm"] = (tensor, gemma)
        for short, path, _ in _LAYER_MATRICES:
            tensor = f"{at}{path}.bias"
            if tensor in has:
                found[f"{to}{short}.bias"] = (tensor, False)
    return found


def describe_model(config: Mapping[str, Any], windows: Sequence[int | None]) -> dict[str, Any]:
    """The `model` object of the manifest (docs/format.md, 2.1) for a normal `config.json`.

    `windows` has for each layer the tokens that it sees, None for all. Rotary frequencies are
    computed by the code of transformers, so that its scalings are meant by the same words.
    Raises ModelError, by name, for what the format cannot say.
    """
    kind = config["model_type"]
    if kind not in _FAMILIES:
        raise ModelError(
            f"architecture '{kind}' is not supported; supported are {', '.join(_FAMILIES)}"
        )
    activation = config["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"activation '{activation}' is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    gemma = kind == "gemma3_text"
    scalar = config.get("query_pre_attn_scalar") if gemma else None
    ropes, layer_rope = _ropes(config)
    return {
        "family": _FAMILIES[kind],
        "hidden": hidden,
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": head_dim,
        "ffn": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "norm_eps": float(config["rms_norm_eps"]),
        "activation": _ACTIVATIONS[activation],
        "tied": bool(config["tie_word_embeddings"]),
        "embed_scale": float(hidden) ** 0.5 if gemma else 1.0,
        "attn_scale": float(scalar if scalar is not None else head_dim) ** -0.5,
        "attn_softcap": config.get("attn_logit_softcapping"),
        "logit_softcap": config.get("final_logit_softcapping"),
        "ropes": ropes,
        "layer_rope": layer_rope,
        "layer_window": [window or 0 for window in windows],
    }


def _ropes(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """Rotary tables (frequencies of half a head, factor of both); which layer has which."""
    from transformers import AutoConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {k: v for k, v in config.items() if k != "architectures"}
    full: Any = AutoConfig.for_model(**settings)
    layers = config["num_hidden_layers"]
    if config["model_type"] == "gemma3_text":
        rotary = Gemma3RotaryEmbedding(full)
        kinds = list(dict.fromkeys(full.layer_types))
        tables = [
            _table(getattr(rotary, f"{k}_inv_freq"), getattr(rotary, f"{k}_attention_scaling"))
            for k in kinds
        ]
        return tables, [kinds.index(k) for k in full.layer_types]
    # The other families share the rotary embedding of Llama.
    plain = LlamaRotaryEmbedding(full)
    return [_table(plain.inv_freq, plain.attention_scaling)], [0] * layers


def _table(inv_freq: Any, scale: float) -> dict[str, Any]:
    return {"inv_freq": [float(f) for f in inv_freq.tolist()], "scale": float(scale)}


def describe_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], *, add_bos: bool
) -> dict[str, Any]:
    """The `tokens` object of the manifest; `generation` is a normal `generation_config.json`."""
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    eos = generation.get("eos_token_id") or []
    return {
        "bos": bos,
        "eos": [int(e) for e in (eos if isinstance(eos, list) else [eos])],
        "add_bos": add_bos and bos is not None,
    }
