"""A directory in Hugging Face layout: config.json, *.safetensors, the tokenizer's files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pliant.errors import SourceError
from pliant.pack.json_files import read_json
from pliant.pack.tokenizer_files import copy_tokenizer_files

from .base import Source
from .config import generation_config, normal_config, unwrap_text_config
from .safetensors_file import SafetensorsFile

__all__ = ["HfSource", "is_hf_directory"]

_INDEX = "model.safetensors.index.json"
# Buffers that old files hold and that are computed anew.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias)$")
# Parts of a model that sees or hears, beside its text decoder.
_NOT_TEXT = re.compile(
    r"^(model\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|embed_vision)\."
)
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def is_hf_directory(path: Path) -> bool:
    """Whether `path` holds a config.json."""
    return (path / "config.json").is_file()


class HfSource(Source):
    """The model in a directory that `save_pretrained` wrote, or that a hub holds."""

    def __init__(
        self, path: Path, *, origin: str, name: str | None = None, license_id: str | None = None
    ) -> None:
        self.path = path
        raw, wrapped = unwrap_text_config(read_json(path / "config.json", origin))
        config = normal_config(raw, origin)
        self._files: dict[str, tuple[SafetensorsFile, str]] = {}
        for file in _weight_files(path, origin):
            for stored in file.tensors:
                if not _COMPUTED.search(stored) and not (wrapped and _NOT_TEXT.match(stored)):
                    self._files[_state_name(stored) if wrapped else stored] = (file, stored)
        shapes = {n: file.tensors[stored].shape for n, (file, stored) in self._files.items()}
        if config["tie_word_embeddings"] and "lm_head.weight" in shapes:
            # transformers does not tie two tensors that differ, whatever the config says.
            config["tie_word_embeddings"] = self._equal(
                "lm_head.weight", "model.embed_tokens.weight", shapes
            )
        generation: Mapping[str, Any] = {}
        if (path / "generation_config.json").is_file():
            generation = read_json(path / "generation_config.json", origin)
        super().__init__(
            name=name if name is not None else path.resolve().name,
            origin=origin,
            license_id=license_id if license_id is not None else _card_license(path),
            config=config,
            generation_config=generation_config(generation, config),
            shapes=shapes,
        )

    def _read(self, name: str) -> torch.Tensor:
        file, stored = self._files[name]
        return file.read(stored)

    def _write_tokenizer(self, directory: Path) -> None:
        copy_tokenizer_files(self.path, directory, self.origin)

    def _equal(self, first: str, second: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether two matrices hold the same numbers, compared in pieces of some MiB."""
        shape = shapes[first]
        if shape != shapes.get(second) or len(shape) != 2:
            return False
        step = max(1, (1 << 22) // max(1, shape[1]))
        (file_a, name_a), (file_b, name_b) = self._files[first], self._files[second]
        for start in range(0, shape[0], step):
            stop = min(shape[0], start + step)
            if not torch.equal(file_a.rows(name_a, start, stop), file_b.rows(name_b, start, stop)):
                return False
        return True


def _state_name(name: str) -> str:
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def _weight_files(path: Path, origin: str) -> list[SafetensorsFile]:
    """The safetensors files of the model, complete, or a SourceError that says what is wrong."""
    if (path / _INDEX).is_file():
        return _indexed_files(path, origin)
    if (path / "model.safetensors").is_file():
        return [SafetensorsFile(path / "model.safetensors", origin)]
    # "consolidated" files hold the same weights under other names.
    found = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("consolidated"))
    parts = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", p.name) for p in found]
    if found and all(parts):
        count = int(parts[0][3])  # type: ignore[index]
        have = {int(m[2]) for m in parts if m}
        missing = [n for n in range(1, min(count, 100_000) + 1) if n not in have]
        if missing:
            raise SourceError(
                f"{origin}: shard {missing[0]} of {count} is missing ({len(missing)} in all). "
                "Fetch the model again."
            )
        return _distinct([SafetensorsFile(p, origin) for p in found], origin)
    if len(found) == 1:
        if found[0].name.startswith("adapter"):
            raise SourceError(
                f"{origin}: this is an adapter, not a model. Merge it into its base model first "
                "(peft: merge_and_unload, then save_pretrained)."
            )
        return [SafetensorsFile(found[0], origin)]
    if found:
        names = ", ".join(p.name for p in found[:4])
        raise SourceError(f"{origin}: several models in one directory ({names}); keep one.")
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        raise SourceError(
            f"{origin}: {pickles[0]} is a pickle file, which can run code when it is read, so it "
            "is not opened. Convert it where you trust it: load the model with transformers and "
            "call save_pretrained(DIRECTORY), which writes safetensors."
        )
    raise SourceError(f"{origin}: there is no *.safetensors file beside config.json.")


def _indexed_files(path: Path, origin: str) -> list[SafetensorsFile]:
    weight_map = read_json(path / _INDEX, origin).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{origin}: {_INDEX} has no weight_map.")
    files: dict[str, SafetensorsFile] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise SourceError(
                f"{origin}: {_INDEX} names the file {str(name)[:80]!r}; only plain names of "
                "*.safetensors files in the same directory are read."
            )
        if name not in files:
            if not (path / name).is_file():
                raise SourceError(f"{origin}: shard {name} is missing. Fetch the model again.")
            files[name] = SafetensorsFile(path / name, origin)
        if tensor not in files[name].tensors:
            raise SourceError(
                f"{origin}: {name} lacks the tensor {tensor} that {_INDEX} puts there."
            )
    return _distinct(list(files.values()), origin)


def _distinct(files: list[SafetensorsFile], origin: str) -> list[SafetensorsFile]:
    seen: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor in seen:
                raise SourceError(
                    f"{origin}: tensor {tensor} is in {seen[tensor]} and in {file.path.name}."
                )
            seen[tensor] = file.path.name
    return files


def _card_license(path: Path) -> str | None:
    """The licence that the model card (README.md) states at its top."""
    card = path / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    if not head.startswith("---"):
        return None
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", head[3:].split("\n---", 1)[0], re.MULTILINE)
    return found[1] if found else None
