"""The decoder as a manifest describes it: docs/format.md section 2.1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pliant.errors import FormatError
from pliant.store.strict import Fields

__all__ = ["ACTIVATIONS", "ModelSpec", "Rope", "read_model"]

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_MAX_SIZE = 2**20


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary table: `inv_freq` has head_dim / 2 values, sine and cosine are times `scale`."""

    inv_freq: tuple[float, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The decoder, section 2.1. Sizes are counts of values, `context` and windows of tokens."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    activation: str
    tied: bool
    embed_scale: float
    attn_scale: float
    attn_softcap: float | None
    logit_softcap: float | None
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]
    layer_window: tuple[int, ...]

    def matrix_shapes(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows and columns of each matrix that a model of these sizes has."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "embed", self.vocab, self.hidden
        if not self.tied:
            yield "head", self.vocab, self.hidden
        for layer in range(self.layers):
            at = f"layers.{layer}."
            yield at + "q", queries, self.hidden
            yield at + "k", keys, self.hidden
            yield at + "v", keys, self.hidden
            yield at + "o", self.hidden, queries
            yield at + "gate", self.ffn, self.hidden
            yield at + "up", self.ffn, self.hidden
            yield at + "down", self.hidden, self.ffn


def read_model(value: object, where: str) -> ModelSpec:
    """Read and check `model` of a manifest; `where` is its place in messages."""
    fields = Fields(value, where, ModelSpec.__dataclass_fields__)
    sizes = {
        key: fields.integer(key, 1, high)
        for key, high in (
            ("hidden", _MAX_SIZE),
            ("layers", 1024),
            ("heads", _MAX_SIZE),
            ("kv_heads", _MAX_SIZE),
            ("head_dim", _MAX_SIZE),
            ("ffn", _MAX_SIZE),
            ("vocab", 2**22),
            ("context", 2**26),
        )
    }
    if sizes["heads"] % sizes["kv_heads"]:
        raise FormatError(
            f"{where}: {sizes['heads']} heads are no multiple of {sizes['kv_heads']} kv_heads"
        )
    if sizes["head_dim"] % 2:
        raise FormatError(f"{where}.head_dim is {sizes['head_dim']}, and must be even")

    def rope(item: object, at: str) -> Rope:
        one = Fields(item, at, ("inv_freq", "scale"))
        frequencies = one.numbers("inv_freq")
        if len(frequencies) != sizes["head_dim"] // 2:
            raise FormatError(
                f"{at}.inv_freq has {len(frequencies)} values, and head_dim / 2 is "
                f"{sizes['head_dim'] // 2}"
            )
        return Rope(frequencies, one.number("scale"))

    ropes = fields.items("ropes", rope)
    layer_rope = fields.integers("layer_rope", 0, len(ropes) - 1)
    layer_window = fields.integers("layer_window")
    for key, found in (("layer_rope", layer_rope), ("layer_window", layer_window)):
        if len(found) != sizes["layers"]:
            raise FormatError(
                f"{where}.{key} has {len(found)} entries, and the model {sizes['layers']} layers"
            )
    return ModelSpec(
        family=fields.text("family", 64),
        **sizes,
        norm_eps=fields.number("norm_eps", positive=True),
        activation=fields.choice("activation", ACTIVATIONS),
        tied=fields.flag("tied"),
        embed_scale=fields.number("embed_scale"),
        attn_scale=fields.number("attn_scale"),
        attn_softcap=fields.optional_number("attn_softcap", positive=True),
        logit_softcap=fields.optional_number("logit_softcap", positive=True),
        ropes=ropes,
        layer_rope=tuple(layer_rope.tolist()),
        layer_window=tuple(layer_window.tolist()),
    )
