"""A random pack that can be talked to: a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packs import write_random_pack
from pliant.memory.budget import measure
from pliant.pack.tokenizer import build_tokenizer
from pliant.sizes import MIB

__all__ = ["TEMPLATE", "VOCAB", "write_tiny_pack"]

VOCAB = 260
SPECIAL = {256: "<s>", 257: "</s>", 258: "<|im_start|>", 259: "<|im_end|>"}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_letters() -> list[str]:
    """The letter for each byte in byte-level BPE: printable bytes stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, more = [], 256
    for byte in range(256):
        if byte in plain:
            letters.append(chr(byte))
        else:
            letters.append(chr(more))
            more += 1
    return letters


def _tokenizer_json() -> dict[str, Any]:
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, "special": True, **flags}
            for token, text in SPECIAL.items()
        ],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab | {text: token for token, text in SPECIAL.items()},
            "merges": [],
        },
    }


def write_tiny_pack(path: Path, *, template: str | None = TEMPLATE, **options: Any) -> Path:
    """A pack as `packs.write_random_pack` makes it, with a tokenizer of 260 tokens."""
    folder = path.parent / f"{path.name}.files"
    folder.mkdir()
    source, binary = folder / "tokenizer.json", folder / "tokenizer.bin"
    source.write_text(json.dumps(_tokenizer_json()), encoding="utf-8")
    build_tokenizer(source, binary)
    files: dict[str, bytes | Path] = {
        "tokenizer.bin": binary.read_bytes(),
        "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}}',
    }
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    options.setdefault("tokens", {"bos": 256, "eos": [257, 259], "add_bos": False})
    options.setdefault("vocab", VOCAB)
    return write_random_pack(path, extra_files=files, **options)


def roomy(more: int) -> int:
    """A budget in MiB: `more` than this process has now. Other tests may have left much in it."""
    return measure().now // MIB + more
