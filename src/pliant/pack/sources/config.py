"""What a model is: its `config.json` in one normal form, and the tensors that must go with it.

The transformers config classes fill in what a file leaves out, so that a pack never depends on
somebody's defaults. Everything is bounded before a class sees it: a hostile number of layers
must not build a list of that length.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pliant.errors import ModelError, SourceError

__all__ = [
    "ARCHITECTURES",
    "ROPE_TYPES",
    "attention_windows",
    "check_shapes",
    "expected_shapes",
    "generation_config",
    "normal_config",
    "token_ids",
    "unwrap_text_config",
]

#: model_type -> class of transformers; these are the models that pliant can run.
ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_ALIASES = {"smollm": "llama"}
_SUPPORTED = "llama (also SmolLM and SmolLM2), mistral, qwen2, qwen3, gemma3"

#: Position encodings whose frequencies do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# name -> (least, most). No real model comes near the upper ends; they bound work, not taste.
_INTEGERS: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 22),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 1 << 14),
    "num_key_value_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 14),
    "vocab_size": (1, 1 << 24),
    "max_position_embeddings": (1, 1 << 31),
    "sliding_window": (1, 1 << 31),
    "sliding_window_pattern": (1, 4096),
    "_sliding_window_pattern": (1, 4096),
    "max_window_layers": (0, 4096),
}
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# The fields that are given to a config class of transformers. Others stay out: some (num_labels)
# make it build lists as long as they say.
_FIELDS = (
    *_INTEGERS,
    "rms_norm_eps",
    "hidden_act",
    "hidden_activation",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "layer_types",
    "use_sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)
_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def unwrap_text_config(raw: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The part of `raw` that describes the text decoder, and whether there was a wrapper.

    Models that also see or hear keep the decoder's settings under `text_config`.
    """
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(raw), False
    text = dict(inner)
    outer = str(raw.get("model_type", ""))
    text.setdefault("model_type", "gemma3_text" if outer == "gemma3" else outer)
    # An inner null does not hide what the outer level says.
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        if text.get(key) is None and raw.get(key) is not None:
            text[key] = raw[key]
    for key in ("quantization_config",):
        if raw.get(key) is not None:
            text[key] = raw[key]
    return text, True


def normal_config(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`raw` (a `config.json` of one text decoder) with every value that the forward pass needs.

    The result is itself a valid `config.json`. Rope settings are given twice: as
    `rope_parameters` (transformers 5; for gemma3_text one entry per layer type) and as the older
    `rope_theta`, `rope_scaling`, `rope_local_base_freq`. `num_key_value_heads`, `head_dim`,
    `tie_word_embeddings`, `hidden_act` and `sliding_window` (null: none) are always there,
    `layer_types` for qwen2, qwen3 and gemma3_text.

    Raises ModelError for what pliant cannot run, SourceError for values that make no sense.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError(f"{origin}: config.json names no model_type; is this a language model?")
    model_type = _ALIASES.get(model_type, model_type)
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"{origin}: architecture '{model_type}' is not supported. Supported: {_SUPPORTED}."
        )
    _refuse_features(raw, origin)
    _check_integers(raw, origin)
    full = _fill_defaults({**raw, "model_type": model_type}, origin)
    config = _select(full, model_type)
    _check_config(config, origin)
    return config


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model, in order of use; a tied head is not listed."""
    kind = config["model_type"]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q = config["num_attention_heads"] * head_dim
    kv = config["num_key_value_heads"] * head_dim
    attention_bias = bool(config.get("attention_bias"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        projections = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        for letter, shape in projections.items():
            shapes[f"{at}self_attn.{letter}_proj.weight"] = shape
            # Qwen2 has biases on q, k and v and none on o.
            if attention_bias or (kind == "qwen2" and letter != "o"):
                shapes[f"{at}self_attn.{letter}_proj.bias"] = shape[:1]
        if kind in ("qwen3", "gemma3_text"):
            shapes[at + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[at + "self_attn.k_norm.weight"] = (head_dim,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        if kind == "gemma3_text":
            shapes[at + "pre_feedforward_layernorm.weight"] = (hidden,)
        for part, shape in (
            ("gate", (ffn, hidden)),
            ("up", (ffn, hidden)),
            ("down", (hidden, ffn)),
        ):
            shapes[f"{at}mlp.{part}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{at}mlp.{part}_proj.bias"] = shape[:1]
        if kind == "gemma3_text":
            shapes[at + "post_feedforward_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def check_shapes(
    config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], origin: str
) -> dict[str, tuple[int, ...]]:
    """Compare what a source holds with what its config asks for; returns the expected shapes.

    Raises SourceError for missing tensors and contradictory shapes, ModelError for tensors of a
    feature that the architecture does not have.
    """
    layers = {m[1] for name in found if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != config["num_hidden_layers"]:
        raise SourceError(
            f"{origin}: the config says {config['num_hidden_layers']} layers, the files hold "
            f"{len(layers)}. Fetch the model again, or correct num_hidden_layers."
        )
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise SourceError(
            f"{origin}: {len(missing)} of {len(expected)} tensors are missing ({_few(missing)}). "
            "Fetch the model again; an adapter without its base model cannot be packed."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise SourceError(
                f"{origin}: tensor {name} has shape {list(found[name])}, its config asks for "
                f"{list(shape)}. Config and weights belong to different models."
            )
    extra = [name for name in found if name not in expected and name != "lm_head.weight"]
    if extra:
        raise ModelError(
            f"{origin}: {len(extra)} tensors have no place in a '{config['model_type']}' model "
            f"({_few(extra)}): a variant of the architecture that pliant does not run."
        )
    return expected


def attention_windows(config: Mapping[str, Any]) -> list[int | None]:
    """For each layer the number of tokens that it sees, itself included; None: all of them."""
    window = config.get("sliding_window")
    types = config.get("layer_types")
    count = config["num_hidden_layers"]
    if window is None:
        return [None] * count
    if types is None:
        return [window] * count
    return [window if kind == "sliding_attention" else None for kind in types]


def token_ids(value: Any, vocab_size: int) -> list[int]:
    """The valid token ids in a config value: an id, a list of ids, or nothing."""
    values = value if isinstance(value, list) else [value]
    ids = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return list(dict.fromkeys(v for v in ids if 0 <= v < vocab_size))


def generation_config(
    raw: Mapping[str, Any], config: Mapping[str, Any], *, more_eos: Iterable[int] = ()
) -> dict[str, Any]:
    """A `generation_config.json`: ids from `raw` or else from `config`, sampling settings kept.

    `eos_token_id` is always a list here: all tokens at which an answer ends.
    """
    vocab = config["vocab_size"]
    result: dict[str, Any] = {
        key: value
        for key in ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if isinstance(value := raw.get(key), int | float)
    }
    eos = token_ids(raw.get("eos_token_id"), vocab) or token_ids(config.get("eos_token_id"), vocab)
    result["eos_token_id"] = list(dict.fromkeys([*eos, *more_eos]))
    for key in ("bos_token_id", "pad_token_id"):
        ids = token_ids(raw.get(key), vocab) or token_ids(config.get(key), vocab)
        if ids:
            result[key] = ids[0]
    return result


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _refuse_features(raw: Mapping[str, Any], origin: str) -> None:
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, Mapping) else "?"
        raise ModelError(
            f"{origin}: the weights are already quantised ({method}). Pack the original in "
            "float32, bfloat16 or float16, or a GGUF file."
        )
    for key in _EXPERT_KEYS:
        if raw.get(key):
            raise ModelError(f"{origin}: a mixture of experts ({key}) is not supported.")
    if raw.get("use_bidirectional_attention"):
        raise ModelError(f"{origin}: attention in both directions is not supported.")
    if raw.get("attention_sinks") or raw.get("use_attention_sinks"):
        raise ModelError(f"{origin}: attention sinks are not supported.")


def _check_integers(raw: Mapping[str, Any], origin: str) -> None:
    for key in _REQUIRED:
        if raw.get(key) is None and raw.get("model_type") != "gemma3_text":
            raise SourceError(f"{origin}: config.json has no {key}.")
    for key, (least, most) in _INTEGERS.items():
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            shown = repr(value)[:40]
            raise SourceError(
                f"{origin}: {key} is {shown} in the config; a whole number from {least} to {most} "
                "is needed."
            )
    if isinstance(raw.get("head_dim"), int) and raw["head_dim"] % 2:
        raise SourceError(f"{origin}: head_dim {raw['head_dim']} is odd; rope needs pairs.")
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) > 4096):
        raise SourceError(f"{origin}: layer_types must be a list with one entry for each layer.")


def _fill_defaults(raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """`raw` completed by the config class of transformers (rope settings in the new form)."""
    from transformers import AutoConfig

    # The classes complete the dictionaries that they are given.
    known = copy.deepcopy({k: raw[k] for k in _FIELDS if k in raw})
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = token_ids(known.get(key), 1 << 24)
        if key in known:
            known[key] = None if not ids else ids if len(ids) > 1 else ids[0]
    try:
        config = AutoConfig.for_model(raw["model_type"], **known)
        full: dict[str, Any] = config.to_dict()
    except Exception as error:  # noqa: BLE001 - the strict classes raise many kinds; all mean the same here
        text = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{origin}: config.json is not a valid {raw['model_type']}: {text}"
        ) from None
    return full


def _select(full: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The fields that matter, in a fixed order, so that equal models give equal files."""
    heads = full["num_attention_heads"]
    rope = full["rope_parameters"]
    if model_type == "gemma3_text":
        # A layer type that no layer uses may be absent; both are written all the same.
        rope = {k: dict(rope[k]) for k in ("full_attention", "sliding_attention") if rope.get(k)}
        flat = rope["full_attention"]
    else:
        rope = dict(rope)
        flat = rope
    scaling = {k: v for k, v in flat.items() if k != "rope_theta"}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": full["vocab_size"],
        "hidden_size": full["hidden_size"],
        "intermediate_size": full["intermediate_size"],
        "num_hidden_layers": full["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": full.get("num_key_value_heads") or heads,
        "head_dim": full.get("head_dim") or full["hidden_size"] // heads,
        "max_position_embeddings": full["max_position_embeddings"],
        "rms_norm_eps": full["rms_norm_eps"],
        "hidden_act": full.get("hidden_activation") or full.get("hidden_act"),
        "attention_bias": bool(full.get("attention_bias", False)),
        "mlp_bias": bool(full.get("mlp_bias", False)),
        "tie_word_embeddings": bool(full.get("tie_word_embeddings", False)),
        "rope_parameters": rope,
        "rope_theta": flat["rope_theta"],
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        "sliding_window": full.get("sliding_window"),
        "bos_token_id": full.get("bos_token_id"),
        "eos_token_id": full.get("eos_token_id"),
        "pad_token_id": full.get("pad_token_id"),
        "initializer_range": full.get("initializer_range", 0.02),
        "use_cache": True,
    }
    if model_type in ("qwen2", "qwen3"):
        config["use_sliding_window"] = config["sliding_window"] is not None
        config["max_window_layers"] = full["max_window_layers"]
    if model_type == "gemma3_text":
        config["hidden_activation"] = config["hidden_act"]
        config["rope_local_base_freq"] = rope.get("sliding_attention", flat)["rope_theta"]
        for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            config[key] = full.get(key)
    if model_type in ("qwen2", "qwen3", "gemma3_text"):
        config["layer_types"] = list(full["layer_types"])
    return config


def _check_config(config: dict[str, Any], origin: str) -> None:
    """Refuse what would only fail much later, by name and number."""
    kind = config["model_type"]
    wanted = "gelu_pytorch_tanh" if kind == "gemma3_text" else "silu"
    if config["hidden_act"] not in (wanted, *(("swish",) if wanted == "silu" else ())):
        raise ModelError(
            f"{origin}: activation '{config['hidden_act']}' is not supported; {kind} models are "
            f"run with {wanted}."
        )
    config["hidden_act"] = wanted
    _check_integers(config, origin)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads:
        raise SourceError(
            f"{origin}: {heads} attention heads cannot share {kv_heads} key/value heads evenly."
        )
    eps = config["rms_norm_eps"]
    if not _positive(eps) or eps > 1:
        raise SourceError(f"{origin}: rms_norm_eps is {eps!r}; a small positive number is needed.")
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        value = config.get(key)
        if value is not None and not _positive(value):
            raise SourceError(f"{origin}: {key} is {value!r}; a positive number is needed.")
    types = config.get("layer_types")
    if types is not None:
        if len(types) != config["num_hidden_layers"]:
            raise SourceError(
                f"{origin}: layer_types has {len(types)} entries for "
                f"{config['num_hidden_layers']} layers."
            )
        unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise ModelError(f"{origin}: layer type {unknown[0]!r} is not supported.")
        if "sliding_attention" in types and config["sliding_window"] is None:
            raise SourceError(f"{origin}: layers with a sliding window, but no sliding_window.")
    rope = config["rope_parameters"]
    for part in rope.values() if kind == "gemma3_text" else (rope,):
        _check_rope(part, origin)


def _check_rope(rope: Mapping[str, Any], origin: str) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"{origin}: rope scaling '{kind}' is not supported. Supported: {', '.join(ROPE_TYPES)}."
        )
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise ModelError(f"{origin}: rope on a part of the head ({partial}) is not supported.")
    needed = {
        "default": ("rope_theta",),
        "linear": ("rope_theta", "factor"),
        "llama3": (
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
    }[kind]
    for key in needed:
        if not _positive(rope.get(key)):
            raise SourceError(
                f"{origin}: rope setting {key} is {rope.get(key)!r}; rope '{kind}' needs a "
                "positive number."
            )


def _positive(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )
