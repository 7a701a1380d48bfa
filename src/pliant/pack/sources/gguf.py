"""A GGUF file, or one that is split into several.

What llama.cpp's converter changed is changed back: names and the order of dimensions, the rows
of q and k of architecture "llama" (its rope pairs neighbouring rows, transformers' the two
halves of a head), and Gemma's norms, which are stored as 1 + w.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pliant.errors import ModelError, SourceError
from pliant.pack.tokenizer_files import end_tokens, write_gguf_tokenizer

from .base import Source
from .config import generation_config, normal_config
from .gguf_header import GgufFile, GgufTensor

__all__ = ["GgufSource"]

_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_INNER_GEMMA = {
    **_INNER,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"
_GEMMA_27B_LAYERS = 62
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_CHUNK = 1 << 22  # values dequantised at once


class GgufSource(Source):
    """The model in `path`; of a split file any part may be given."""

    def __init__(
        self, path: Path, *, origin: str, name: str | None = None, license_id: str | None = None
    ) -> None:
        files = _open_all(path, origin)
        self._metadata = files[0].metadata
        stored: dict[str, tuple[GgufFile, GgufTensor]] = {}
        for file in files:
            for tensor in file.tensors.values():
                if tensor.name in stored:
                    raise SourceError(
                        f"{origin}: tensor {tensor.name} is in two of the split files."
                    )
                stored[tensor.name] = (file, tensor)
        architecture = self._metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _MODEL_TYPES:
            hint = "; this is only its part for images" if architecture == "clip" else ""
            raise ModelError(
                f"{origin}: GGUF architecture '{str(architecture)[:80]}' is not supported{hint}. "
                f"Supported: {', '.join(_MODEL_TYPES)} (Mistral and SmolLM files say llama)."
            )
        self._architecture = architecture
        self._tensors = _state_names(stored, architecture, origin)
        _check_types(self._tensors, origin)
        factors = None
        if _ROPE_FACTORS in stored:
            factors = _dequantise(*stored[_ROPE_FACTORS]).numpy().reshape(-1)
        raw = _raw_config(self._metadata, architecture, self._tensors, factors, origin)
        config = normal_config(raw, origin)
        general_name = self._metadata.get("general.name")
        if name is None:
            name = general_name if isinstance(general_name, str) and general_name else path.stem
        own_license = self._metadata.get("general.license")
        ends = [i for i in end_tokens(self._metadata) if i < config["vocab_size"]]
        super().__init__(
            name=name,
            origin=origin,
            license_id=own_license if isinstance(own_license, str) and own_license else license_id,
            config=config,
            generation_config=generation_config({}, config, more_eos=ends),
            shapes={n: tensor.shape for n, (_, tensor) in self._tensors.items()},
        )

    @property
    def metadata(self) -> Mapping[str, Any]:
        """All keys of the file, arrays included."""
        return self._metadata

    def _read(self, name: str) -> torch.Tensor:
        value = _dequantise(*self._tensors[name])
        if self._architecture == "llama" and re.search(r"\.(q|k)_proj\.", name):
            heads = self.config[
                "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            ]
            pairs = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
            value = pairs.transpose(1, 2).reshape(value.shape)
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            value = value - 1.0
        return value

    def _write_tokenizer(self, directory: Path) -> None:
        write_gguf_tokenizer(self._metadata, directory, self.origin)


def _open_all(path: Path, origin: str) -> list[GgufFile]:
    """The file, or all files of a split model in order; the first holds the metadata."""
    match = _SPLIT.fullmatch(path.name)
    if not match:
        file = GgufFile(path, origin)
        count = file.metadata.get("split.count", 0)
        if isinstance(count, int) and count > 1:
            raise SourceError(
                f"{origin}: this is one of {count} parts of a model, but its name does not end in "
                "-00001-of-0000N.gguf, so the others cannot be found. Give it its name back."
            )
        return [file]
    count = int(match[3])
    paths = [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise SourceError(
            f"{origin}: {len(missing)} of {count} parts are missing, first {missing[0]}. Fetch "
            "them into the same directory."
        )
    files = [GgufFile(p, origin) for p in paths]
    for number, file in enumerate(files):
        said = (file.metadata.get("split.no"), file.metadata.get("split.count"))
        if said != (number, count):
            raise SourceError(
                f"{origin}: {file.path.name} says it is part {said[0]} of {said[1]} (from 0), not "
                f"part {number} of {count}: the files do not belong together."
            )
    total = files[0].metadata.get("split.tensors.count")
    have = sum(len(file.tensors) for file in files)
    if isinstance(total, int) and total != have:
        raise SourceError(f"{origin}: {total} tensors are announced, the parts hold {have}.")
    return files


def _state_names(
    stored: Mapping[str, tuple[GgufFile, GgufTensor]], architecture: str, origin: str
) -> dict[str, tuple[GgufFile, GgufTensor]]:
    inner = _INNER_GEMMA if architecture == "gemma3" else _INNER
    result = {}
    for name, value in stored.items():
        if name == _ROPE_FACTORS or name.endswith(".attn_rot_embd.weight"):
            continue
        match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
        if name in _OUTER:
            state = _OUTER[name]
        elif match and match[2] in inner:
            state = f"model.layers.{int(match[1])}.{inner[match[2]]}.{match[3]}"
        else:
            experts = "_exps" in name or "ffn_gate_inp" in name
            feature = "a mixture of experts" if experts else f"tensor {name[:80]}"
            if "attn_sinks" in name:
                feature = "attention sinks"
            raise ModelError(
                f"{origin}: {feature} is not supported for architecture {architecture}."
            )
        result[state] = value
    return result


def _check_types(tensors: Mapping[str, tuple[GgufFile, GgufTensor]], origin: str) -> None:
    """Try each type on one block, so that an unknown one is found before the work begins."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    names = {t.type: (t.type_name, name) for name, (_, t) in tensors.items()}
    for code, (type_name, name) in names.items():
        kind = GGMLQuantizationType(code)
        try:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise ModelError(
                f"{origin}: tensor {name} has type {type_name}, which cannot be dequantised here. "
                "Pack a file of another type, best BF16, F16 or Q8_0."
            ) from None


def _dequantise(file: GgufFile, tensor: GgufTensor) -> torch.Tensor:
    """The values of a tensor in float32, in pieces, so that little more than it is held."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows, columns = int(np.prod(tensor.shape[:-1], dtype=np.int64)), tensor.shape[-1]
    result = torch.empty((rows, columns), dtype=torch.float32)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data = file.read(tensor, start, stop)
        # Scales that are not numbers are found by the caller, who looks at all values.
        with np.errstate(all="ignore"):
            values = dequantize(data, GGMLQuantizationType(tensor.type))
        result[start:stop] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return result.reshape(tensor.shape)


def _raw_config(
    metadata: Mapping[str, Any],
    architecture: str,
    tensors: Mapping[str, tuple[GgufFile, GgufTensor]],
    factors: np.ndarray[Any, Any] | None,
    origin: str,
) -> dict[str, Any]:
    """A `config.json` from the metadata; what the file leaves out is as llama.cpp takes it."""
    get = _Getter(metadata, architecture, origin)
    _refuse_features(get, architecture)
    if "model.embed_tokens.weight" not in tensors:
        raise SourceError(
            f"{origin}: the file holds no token_embd.weight; it is not a whole model."
        )
    embedding = tensors["model.embed_tokens.weight"][1].shape
    heads = get.uniform("attention.head_count")
    hidden = get.integer("embedding_length")
    if heads is None or hidden is None or heads < 1:
        raise SourceError(f"{origin}: the file does not say embedding_length or head_count.")
    head_dim = get.integer("attention.key_length") or hidden // heads
    if (get.integer("attention.value_length") or head_dim) != head_dim:
        raise ModelError(f"{origin}: keys and values of different length are not supported.")
    rotated = get.integer("rope.dimension_count") or head_dim
    if rotated != head_dim:
        raise ModelError(f"{origin}: rope on {rotated} of {head_dim} values is not supported.")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > embedding[0]:
        raise SourceError(
            f"{origin}: the vocabulary has {len(tokens)} tokens, the embedding {embedding[0]} rows."
        )
    raw: dict[str, Any] = {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": get.uniform("feed_forward_length"),
        "num_hidden_layers": get.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.uniform("attention.head_count_kv") or heads,
        "max_position_embeddings": get.integer("context_length") or 2048,
        "rms_norm_eps": get.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if architecture != "qwen2":
        raw["head_dim"] = head_dim
        raw["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    elif head_dim * heads != hidden:
        raise ModelError(f"{origin}: qwen2 with heads of {head_dim} values is not supported.")
    if architecture == "llama":
        raw["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    for key in ("bos", "eos", "padding"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        raw[f"{'pad' if key == 'padding' else key}_token_id"] = value
    if architecture == "gemma3":
        _gemma_settings(raw, get, hidden // heads, head_dim)
    else:
        theta = get.decimal("rope.freq_base") or 10_000.0
        raw["rope_parameters"] = {"rope_theta": theta, **_rope_scaling(get, origin)}
        if factors is not None:
            raw["rope_parameters"].update(_llama3_rope(factors, theta, head_dim, origin))
    if architecture == "llama" and get.integer("attention.sliding_window"):
        raw["model_type"] = "mistral"
        raw["sliding_window"] = get.integer("attention.sliding_window")
    return raw


def _gemma_settings(raw: dict[str, Any], get: _Getter, per_head: int, head_dim: int) -> None:
    window = get.integer("attention.sliding_window") or 1024
    layers = raw["num_hidden_layers"] or 0
    pattern = get.raw("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        slides = [bool(v) for v in pattern]
        if len(slides) != layers:
            raise SourceError(
                f"{get.origin}: sliding_window_pattern has {len(slides)} entries for "
                f"{layers} layers."
            )
    else:
        period = pattern if isinstance(pattern, int) and 0 < pattern <= 4096 else 6
        slides = [(i + 1) % period != 0 for i in range(min(layers, 4096))]
    raw["sliding_window"] = window
    raw["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    # Only the 27B model scales its queries by the width per head and not by head_dim.
    raw["query_pre_attn_scalar"] = per_head if layers == _GEMMA_27B_LAYERS else head_dim
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        raw[key] = get.decimal(key) or None
    raw["rope_parameters"] = {
        "full_attention": {
            "rope_theta": get.decimal("rope.freq_base") or 1_000_000.0,
            **_rope_scaling(get, get.origin),
        },
        "sliding_attention": {
            "rope_theta": get.decimal("rope.freq_base_swa") or 10_000.0,
            "rope_type": "default",
        },
    }


def _rope_scaling(get: _Getter, origin: str) -> dict[str, Any]:
    kind = get.raw("rope.scaling.type")
    factor = get.decimal("rope.scaling.factor") or get.decimal("rope.scale_linear")
    if kind is None and factor not in (None, 0.0, 1.0):
        kind = "linear"
    if kind in (None, "none"):
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{origin}: rope scaling '{str(kind)[:40]}' is not supported.")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    result: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": get.integer("rope.scaling.original_context_length"),
    }
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        value = get.decimal(f"rope.scaling.{key}")
        if value:
            result[name] = value
    for key in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
        value = get.decimal(f"rope.scaling.{key}")
        if value not in (None, 0.0, 1.0):
            raise ModelError(f"{origin}: rope setting {key} = {value} is not supported.")
    return result


def _llama3_rope(
    factors: np.ndarray[Any, Any], theta: float, head_dim: int, origin: str
) -> dict[str, Any]:
    """The settings of Llama 3's rope from the divisors of the frequencies that a file holds.

    A frequency is kept where its wave is short, divided by `factor` where it is long, and
    something between in the middle; only the two limits matter, not the three numbers that a
    config states them by, so published values are tried, and accepted if they give these divisors.
    """
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
        raise SourceError(f"{origin}: {_ROPE_FACTORS} is not a list of {head_dim // 2} numbers.")
    if np.allclose(factors, 1.0):
        return {}
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wave = 2 * np.pi / frequency
    factor = float(np.float32(factors.max()))
    for original in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
        smooth = np.clip((original / wave - 1.0) / 3.0, 0.0, 1.0)
        guess = 1.0 / ((1.0 - smooth) / factor + smooth)
        if np.allclose(guess, factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise ModelError(
        f"{origin}: the rope frequencies in {_ROPE_FACTORS} are not those of Llama 3; long rope is "
        "not supported."
    )


def _refuse_features(get: _Getter, architecture: str) -> None:
    if get.integer("expert_count"):
        raise ModelError(f"{get.origin}: a mixture of experts is not supported.")
    if get.raw("attention.causal") is False:
        raise ModelError(f"{get.origin}: attention in both directions is not supported.")
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if get.decimal(key) not in (None, 0.0, 1.0):
            raise ModelError(f"{get.origin}: {architecture}.{key} is not supported.")
    if get.decimal("attention.temperature_scale") not in (None, 0.0):
        raise ModelError(f"{get.origin}: a temperature of attention is not supported.")


class _Getter:
    """Typed look-ups of `<architecture>.<key>` in the metadata."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, origin: str) -> None:
        self._metadata = metadata
        self._architecture = architecture
        self.origin = origin

    def raw(self, key: str) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}")

    def integer(self, key: str) -> int | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "a whole number")
        return value

    def decimal(self, key: str) -> float | None:
        """The number that the 32-bit value in the file stands for, so 1e-05 and not 9.99e-06."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, value, "a number")
        return float(str(np.float32(value)))

    def uniform(self, key: str) -> int | None:
        """A number, or a list with one number for all layers; ModelError where layers differ."""
        value = self.raw(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            different = set(value.tolist())
            if len(different) != 1:
                raise ModelError(f"{self.origin}: {key} differs from layer to layer.")
            return int(different.pop())
        return self.integer(key)

    def _wrong(self, key: str, value: Any, wanted: str) -> SourceError:
        return SourceError(
            f"{self.origin}: {self._architecture}.{key} is {str(value)[:40]!r}, not {wanted}."
        )
