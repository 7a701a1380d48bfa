"""What every source of a model gives to `pliant pack`."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pliant.errors import SourceError
from pliant.pack.json_files import write_json

from .config import ARCHITECTURES, attention_windows, check_shapes

__all__ = ["Progress", "Source", "cache_root"]

#: Called with what is being done and the part done, 0 to 1 (None: not known).
Progress = Callable[[str, float | None], None]


class Source(ABC):
    """A model that can be packed: its config, its tensors one at a time, its tokenizer.

    Attributes:
        name: short name of the model, fit for a file name.
        origin: what the user gave, for messages.
        license: licence as the source states it, or None.
        config: a normal `config.json` (see `config.normal_config`).
        generation_config: a `generation_config.json`; `eos_token_id` is a list.
    """

    def __init__(
        self,
        *,
        name: str,
        origin: str,
        license_id: str | None,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.name = name
        self.origin = origin
        self.license = license_id
        self.config = config
        self.generation_config = generation_config
        self._shapes = check_shapes(config, shapes, origin)

    @property
    def bytes_fp32(self) -> int:
        """Bytes of all tensors in float32; a tied head counts once."""
        return 4 * sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def largest_tensor_bytes(self) -> int:
        """Bytes in float32 of the largest tensor: what reading one at a time needs on top."""
        return 4 * max(math.prod(shape) for shape in self._shapes.values())

    def tensor_names(self) -> list[str]:
        """Names as in the state dict of the transformers model; a tied `lm_head` is left out."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; nothing is read."""
        return self._shapes[name]

    def attention_windows(self) -> list[int | None]:
        """For each layer the number of tokens that it sees; None: all."""
        return attention_windows(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, float32, contiguous, owned by the caller.

        Raises SourceError where its bytes cannot be read or hold a value that is not a number.
        """
        shape = self._shapes[name]
        value = self._read(name)
        if tuple(value.shape) != shape or value.dtype != torch.float32:
            raise SourceError(f"{self.origin}: tensor {name} was read as {list(value.shape)}.")
        # The sum is finite if all values are, save for overflow; only then look at each.
        if not math.isfinite(float(value.sum())):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise SourceError(
                    f"{self.origin}: tensor {name} holds {bad} values of {value.numel()} that are "
                    "NaN or infinite. The file is damaged; fetch it again."
                )
        return value.contiguous()

    def write_tokenizer_files(self, directory: Path) -> None:
        """Write config.json, generation_config.json, tokenizer.json, tokenizer_config.json and,
        if the model has one, chat_template.jinja into `directory` (made if needed)."""
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", self.config)
        write_json(directory / "generation_config.json", self.generation_config)
        self._write_tokenizer(directory)

    def load_torch(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The transformers model with these weights, in eval mode.

        Memory: one copy of the model in `dtype` and one tensor in float32 more.
        """
        import transformers

        settings = copy.deepcopy({k: v for k, v in self.config.items() if k != "architectures"})
        config = transformers.AutoConfig.for_model(**settings)
        # Soft caps on attention scores exist in the eager form only.
        capped = self.config.get("attn_logit_softcapping") is not None
        config._attn_implementation = "eager" if capped else "sdpa"
        config.dtype = dtype
        cls = getattr(transformers, ARCHITECTURES[self.config["model_type"]])
        with _EmptyOnMeta():
            model: torch.nn.Module = cls(config)
        for name in self._shapes:
            module_name, _, parameter = name.rpartition(".")
            module = model.get_submodule(module_name)
            setattr(module, parameter, torch.nn.Parameter(self.tensor(name).to(dtype)))
        if self.config["tie_word_embeddings"]:
            model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
        left = [n for n, p in model.named_parameters() if p.is_meta]
        left += [n for n, b in model.named_buffers() if b.is_meta]
        if left:
            raise SourceError(f"{self.origin}: no weights for {left[0]} and {len(left) - 1} more.")
        # Ids only: how to sample is the caller's choice.
        ids = {k: v for k, v in self.generation_config.items() if k.endswith("_id")}
        make_generation: Any = transformers.GenerationConfig
        model.generation_config = make_generation(**ids)
        return model.eval()

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """The float32 tensor `name`; shape and values are checked by the caller."""

    @abstractmethod
    def _write_tokenizer(self, directory: Path) -> None:
        """Write the files of the tokenizer."""


class _EmptyOnMeta(TorchFunctionMode):
    """Memory that is only reserved (`torch.empty`, so the weights) goes to the meta device;
    what is computed (rope frequencies, the scale of an embedding) stays real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where fetched packages are kept: `cache_dir`, or pliant's folder in the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pliant"
