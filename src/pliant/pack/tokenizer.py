"""Builds `tokenizer.bin` (docs/tokenizer.md) from the `tokenizer.json` of a model.

All that takes time when a tokenizer starts is done here once: hash tables of tokens, characters
and merges, and the trie of added tokens. What the file cannot say exactly is refused with a
ModelError that names the component, so a tokenizer that was built is exact.
"""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pliant.errors import ModelError, SourceError

__all__ = ["build_tokenizer"]

Json = dict[str, Any]
U64 = npt.NDArray[np.uint64]

MAGIC = b"pliantTK"
VERSION = 1
ALIGNMENT = 64
NONE = 0xFFFFFFFF
MAX_TOKENS = (1 << 21) - 1
MAX_MERGES = (1 << 22) - 1
MAX_PROBE = 1 << 12
LOW_LINE = "\u2581"

# The split patterns that the core has scanners for, and their numbers.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": 1,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES: 2,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES: 3,
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _SPACES: 4,
}
GPT2 = 1


def build_tokenizer(tokenizer_json: Path, out: Path) -> None:
    """Write `tokenizer.bin` to `out` from a Hugging Face `tokenizer.json`.

    Ids, decoding and added tokens are then those of the `tokenizers` library. Truncation and
    padding settings in the file are not part of a tokenizer's meaning and are left out.

    Raises SourceError if the file cannot be read, ModelError if a component is not supported.
    """
    try:
        source = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{tokenizer_json}: not a readable tokenizer.json: {error}") from error
    if not isinstance(source, dict) or not isinstance(source.get("model"), dict):
        raise SourceError(f"{tokenizer_json}: no 'model' in it, so it is not a tokenizer.json")
    try:
        data = _build(source)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(
            f"{tokenizer_json}: a field is missing or malformed: {error!r}"
        ) from error
    out.write_bytes(data)


def _unsupported(what: str, value: object) -> ModelError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) < 200 else text[:200] + "..."
    return ModelError(
        f"the tokenizer's {what} is not supported: {text}; "
        "docs/tokenizer.md lists what is, and a model of a listed family can be packed"
    )


@dataclass
class _Settings:
    """The header fields that say how the steps are done; see docs/tokenizer.md."""

    decoder: int = 0
    strip: int = 0
    nfc: bool = False
    prepend: bool = False
    replace_spaces: bool = False
    metaspace: int = 0
    metaspace_split: bool = False
    byte_level: bool = False
    digits: int = 0
    pattern: int = 0
    prefix_space: bool = False
    second_pattern: int = 0
    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)


def _steps(part: Json | None, key: str) -> list[Json]:
    """The components of a possibly nested Sequence, in order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


def _read_normalizer(part: Json | None, s: _Settings) -> None:
    for step in _steps(part, "normalizers"):
        replaces = step["type"] == "Replace"
        if step["type"] == "NFC" and not (s.nfc or s.prepend or s.replace_spaces):
            s.nfc = True
        elif step["type"] == "Prepend" and step["prepend"] == LOW_LINE and not s.prepend:
            s.prepend = True
        elif replaces and step["pattern"] == {"String": " "} and step["content"] == LOW_LINE:
            s.replace_spaces = True
        else:
            raise _unsupported("normalizer", step)


def _pattern_number(split: Json) -> int:
    # Every known pattern matches everywhere, so keeping the matches and isolating them are one.
    behaviour = (split["behavior"], bool(split.get("invert", False)))
    number = PATTERNS.get(split["pattern"].get("Regex", ""))
    if number is None or behaviour not in (("Isolated", False), ("Removed", True)):
        raise _unsupported("split pattern", split)
    return number


def _read_pre_tokenizer(part: Json | None, s: _Settings) -> None:
    steps = _steps(part, "pretokenizers")
    if s.replace_spaces:
        # No space is left to split at (Gemma).
        steps = [x for x in steps if x["type"] != "Split" or x["pattern"] != {"String": " "}]
    if not steps:
        return
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    if kinds == ["Metaspace"] and not (s.prepend or s.replace_spaces):
        scheme = last.get("prepend_scheme", "always")
        if last["replacement"] != LOW_LINE or not (last.get("add_prefix_space", True)):
            raise _unsupported("pre-tokenizer", last)
        s.metaspace = {"never": 1, "first": 2, "always": 3}[scheme]
        s.metaspace_split = bool(last.get("split", True))
    elif kinds[-1] == "ByteLevel" and len(steps) <= 2 and not (s.prepend or s.replace_spaces):
        s.byte_level = True
        s.prefix_space = bool(last["add_prefix_space"])
        s.second_pattern = GPT2 if last.get("use_regex", True) else 0
        if kinds[0] == "Digits":
            s.digits = 2 if steps[0]["individual_digits"] else 1
        elif kinds[0] == "Split":
            s.pattern = _pattern_number(steps[0])
        elif len(steps) > 1:
            raise _unsupported("pre-tokenizer", steps[0])
    else:
        raise _unsupported("pre-tokenizer", part)


def _read_decoder(part: Json | None, s: _Settings) -> None:
    steps = _steps(part, "decoders")
    kinds = [step["type"] for step in steps]
    low_line = {"type": "Replace", "pattern": {"String": LOW_LINE}, "content": " "}
    if kinds == ["ByteLevel"] and s.byte_level:
        s.decoder = 1
    elif (
        kinds[:3] == ["Replace", "ByteFallback", "Fuse"]
        and steps[0] == low_line
        and kinds[3:] in ([], ["Strip"])
        and not s.byte_level
    ):
        s.decoder = 2
        if kinds[3:]:
            strip = steps[3]
            if strip["content"] != " " or strip["stop"] != 0:
                raise _unsupported("decoder", strip)
            s.strip = int(strip["start"])
    elif kinds == ["Metaspace"] and steps[0]["replacement"] == LOW_LINE and not s.byte_level:
        s.decoder = 3
        s.strip = int(steps[0].get("prepend_scheme", "always") != "never")
    else:
        raise _unsupported("decoder, together with this pre-tokenizer,", part)


def _read_post_processor(part: Json | None, s: _Settings) -> None:
    steps = [x for x in _steps(part, "processors") if x["type"] != "ByteLevel"]
    if not steps:
        return
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        raise _unsupported("post-processor", part)
    template = steps[0]
    target = s.prefix
    for item in template["single"]:
        if "SpecialToken" in item:
            target += template["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif item["Sequence"]["id"] == "A" and target is s.prefix:
            target = s.suffix
        else:
            raise _unsupported("post-processor", template)
    if target is s.prefix:
        raise _unsupported("post-processor", template)


def _byte_letters() -> dict[str, int]:
    """The byte-level spelling: every byte is a visible letter."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(b): b for b in own}
    others = [b for b in range(256) if b not in own]
    letters.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return letters


_LETTERS = _byte_letters()


def _spelled_bytes(token: str) -> bytes | None:
    """The bytes of a token in byte-level spelling; None if it has other letters."""
    try:
        return bytes([_LETTERS[c] for c in token])
    except KeyError:
        return None


def _is_byte_name(token: str) -> bool:
    if len(token) != 6 or token[:3] != "<0x" or token[5] != ">":
        return False
    if token[3] == "+" and token[4] in "0123456789abcdefABCDEF":
        # The reference reads this as a byte too, by an accident of its number parser.
        raise _unsupported("token", token)
    return all(c in "0123456789abcdefABCDEF" for c in token[3:5])


@dataclass(frozen=True)
class _Added:
    content: str
    id: int
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


def _read_added(parts: Sequence[Json], vocab: Mapping[str, int]) -> list[_Added]:
    taken = set(vocab.values())
    highest = -1
    added: dict[str, _Added] = {}
    for part in parts:
        content = part["content"]
        if not content or content in added:
            raise _unsupported("added token, empty or given twice,", part)
        # The reference gives ids itself: the next free one to a token that is not in the model.
        expected = vocab.get(content)
        if expected is None:
            expected = highest + 1 if highest >= len(vocab) else len(vocab)
            if expected in taken:
                raise _unsupported("added token, whose id another token has,", part)
            taken.add(expected)
        if part["id"] != expected:
            raise _unsupported(f"added token, whose id should be {expected},", part)
        highest = max(highest, expected)
        flags = {k: bool(part[k]) for k in ("special", "lstrip", "rstrip", "single_word")}
        added[content] = _Added(content, expected, normalized=bool(part["normalized"]), **flags)
    return list(added.values())


def _normalized(content: str, s: _Settings) -> str:
    """An added token as it looks in normalized text."""
    if s.nfc and not content.isascii():
        old = unicodedata.ucd_3_2_0
        if any(old.category(c) == "Cn" for c in content):
            raise _unsupported("added token, normalized and with rare characters,", content)
        content = unicodedata.normalize("NFC", content)
    if s.prepend:
        content = LOW_LINE + content
    if s.replace_spaces:
        content = content.replace(" ", LOW_LINE)
    return content


class _Trie:
    """The tries of added tokens: nodes in breadth-first order, children behind their parents."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, int]] = []
        self.edges: list[int] = []

    def add(self, patterns: Mapping[bytes, int]) -> int:
        """Add a trie of patterns -> index of the added token; its root, or NONE if empty."""
        if not patterns:
            return NONE
        root = len(self.nodes)
        tree: list[dict[int, int]] = [{}]
        leaf: dict[int, int] = {}
        for pattern, index in patterns.items():
            at = 0
            for byte in pattern:
                if byte not in tree[at]:
                    tree[at][byte] = len(tree)
                    tree.append({})
                at = tree[at][byte]
            leaf[at] = index
        order = [0]
        number = {0: root}
        for at in order:
            for byte in sorted(tree[at]):
                number[tree[at][byte]] = root + len(order)
                order.append(tree[at][byte])
        if root + len(order) >= 1 << 24:
            raise ModelError(f"the added tokens need {root + len(order)} nodes; 2^24 are possible")
        for at in order:
            self.nodes.append((len(self.edges), len(tree[at]), leaf.get(at, NONE)))
            self.edges += [byte << 24 | number[tree[at][byte]] for byte in sorted(tree[at])]
        return root


def _mix(x: U64) -> U64:
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    return x ^ (x >> np.uint64(32))


def _hash_bytes(tokens: Sequence[bytes]) -> U64:
    lengths = np.array([len(t) for t in tokens], np.uint64)
    hashes = lengths.copy()
    for at in range(0, int(lengths.max(initial=0)), 8):
        rows = np.flatnonzero(lengths > at).tolist()
        words = b"".join(tokens[r][at : at + 8].ljust(8, b"\0") for r in rows)
        hashes[rows] = _mix(hashes[rows] ^ np.frombuffer(words, "<u8"))
    return hashes


@dataclass(frozen=True)
class _Table:
    """A hash table: every entry stands at most `probe` - 1 places behind its first slot."""

    slots: int
    probe: int
    entries: U64

    def bytes(self) -> bytes:
        return self.entries.astype("<u8").tobytes()


def _hash_table(hashes: U64, entries: U64) -> _Table:
    n = len(entries)
    slots = n + n // 3 + 1
    while True:
        home = ((hashes & np.uint64(NONE)) * np.uint64(slots) >> np.uint64(32)).astype(np.int64)
        order = np.argsort(home, kind="stable")
        # Sorted by first slot, each entry takes the next free one: linear probing without search.
        rank = np.arange(n)
        place = rank + np.maximum.accumulate(home[order] - rank)
        probe = int((place - home[order]).max(initial=0)) + 1
        if probe <= MAX_PROBE:
            break
        slots *= 2
    table = np.full(slots + probe, 0xFFFFFFFFFFFFFFFF, np.uint64)
    table[place] = entries[order]
    return _Table(slots, probe, table)


def _low_high(low: U64, high: Sequence[int] | npt.NDArray[Any]) -> U64:
    """u64 entries with `low` in bits 0..31 and `high` above."""
    return low | np.asarray(high, np.uint64) << np.uint64(32)


def _joint_class(char: str) -> int:
    code = ord(char)
    return code if code < 128 else 128 if char == LOW_LINE else 129 + code % 127


def _read_merges(model: Json, vocab: Mapping[str, int]) -> dict[tuple[str, str], tuple[int, int]]:
    """(left, right) -> (rank, id of the token they make)."""
    merges: dict[tuple[str, str], tuple[int, int]] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not all(p in vocab for p in pair) or "".join(pair) not in vocab:
            raise _unsupported("merge, whose tokens are not all in the vocabulary,", merge)
        merges[pair[0], pair[1]] = (rank, vocab["".join(pair)])
    if len(model["merges"]) > MAX_MERGES:
        raise ModelError(
            f"the tokenizer has {len(model['merges'])} merges; {MAX_MERGES} are possible"
        )
    return merges


def _read_vocab(model: Json) -> dict[str, int]:
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _unsupported("model", model.get("type"))
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unsupported("model setting", {name: model[name]})
    vocab: dict[str, int] = model["vocab"]
    ids = set(vocab.values())
    if len(ids) != len(vocab) or not all(isinstance(i, int) and 0 <= i < MAX_TOKENS for i in ids):
        raise ModelError(f"the {len(vocab)} token ids are not different numbers under {MAX_TOKENS}")
    return vocab


def _tokens(
    size: int, vocab: Mapping[str, int], added: Sequence[_Added], s: _Settings
) -> tuple[list[bytes], npt.NDArray[np.uint8], _Table]:
    """Bytes and flags of every id, and the table that finds them."""
    present, mapped, special, byte, in_model = 1, 2, 4, 8, 16
    texts = [b""] * size
    flags = np.zeros(size, np.uint8)
    for token, i in [*vocab.items(), *((a.content, a.id) for a in added)]:
        spelled = _spelled_bytes(token) if s.byte_level else None
        try:
            texts[i] = token.encode() if spelled is None else spelled
        except UnicodeEncodeError as error:
            raise _unsupported("token, which is not Unicode,", repr(token)) from error
        flags[i] = present | (mapped if spelled is not None else 0)
        flags[i] |= byte if s.decoder == 2 and _is_byte_name(token) else 0
        flags[i] |= in_model if token in vocab else 0
    for a in added:
        flags[a.id] |= special if a.special else 0
    owners = np.flatnonzero(flags)
    hashes = _hash_bytes([texts[i] for i in owners])
    return texts, flags, _hash_table(hashes, _low_high(hashes >> np.uint64(32), owners))


def _byte_ids(model: Json, vocab: Mapping[str, int], s: _Settings) -> list[int]:
    """The token of every byte: an atom if the model is byte-level, else for byte fallback."""
    fallback = bool(model.get("byte_fallback"))
    if s.byte_level:
        ids = [NONE] * 256
        for letter, byte in _LETTERS.items():
            ids[byte] = vocab.get(letter, NONE)
        if fallback and NONE in ids:
            raise _unsupported("setting, while bytes have no token,", "byte_fallback")
    else:
        ids = [vocab.get(f"<0x{b:02X}>", NONE) for b in range(256)]
    complete = NONE not in ids and (s.byte_level or fallback)
    unknown = model.get("unk_token")
    if unknown and unknown not in vocab and not complete:
        raise _unsupported("unknown token, which is not in the vocabulary,", unknown)
    return ids


def _joints(merges: Iterable[tuple[str, str]], s: _Settings) -> bytes:
    """One bit for every two classes of atoms: whether any merge has its seam between them."""
    bits = np.zeros(65536, np.uint8)
    for left, right in merges:
        if s.byte_level:
            # Merges of tokens that are not bytes cannot happen.
            before, behind = _spelled_bytes(left), _spelled_bytes(right)
            if before and behind:
                bits[before[-1] << 8 | behind[0]] = 1
        elif left and right:
            bits[_joint_class(left[-1]) << 8 | _joint_class(right[0])] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _added_trie(added: Sequence[_Added], s: _Settings) -> tuple[_Trie, list[int]]:
    """The tries of added tokens, and their two roots: for raw and for normalized text."""
    raw: dict[bytes, int] = {}
    normal: dict[bytes, int] = {}
    # Of two that look alike the reference prefers special ones, then the first.
    for index, a in sorted(enumerate(added), key=lambda pair: not pair[1].special):
        if a.normalized:
            normal.setdefault(_normalized(a.content, s).encode(), index)
        else:
            raw.setdefault(a.content.encode(), index)
    trie = _Trie()
    return trie, [trie.add(raw), trie.add(normal)]


def _build(source: Json) -> bytes:
    model = source["model"]
    vocab = _read_vocab(model)
    s = _Settings()
    _read_normalizer(source.get("normalizer"), s)
    _read_pre_tokenizer(source.get("pre_tokenizer"), s)
    _read_decoder(source.get("decoder"), s)
    _read_post_processor(source.get("post_processor"), s)
    added = _read_added(source.get("added_tokens") or [], vocab)
    size = max([*vocab.values(), *(a.id for a in added)], default=0) + 1
    if size > MAX_TOKENS:
        raise ModelError(f"the tokenizer has {size} token ids; {MAX_TOKENS} are possible")
    if any(not 0 <= i < size for i in s.prefix + s.suffix):
        raise _unsupported("post-processor, with ids that have no token,", s.prefix + s.suffix)

    texts, flags, tokens = _tokens(size, vocab, added, s)
    byte_ids = _byte_ids(model, vocab, s)
    unknown = vocab.get(model.get("unk_token") or "", NONE)
    chars = {ord(t): i for t, i in vocab.items() if len(t) == 1 and not s.byte_level}
    codes = np.array(list(chars), np.uint64)
    char_table = _hash_table(_mix(codes), _low_high(codes, list(chars.values())))

    merges = _read_merges(model, vocab)
    pairs = np.array([(vocab[a], vocab[b]) for a, b in merges], np.uint64).reshape(-1, 2)
    keys = pairs[:, 0] | pairs[:, 1] << np.uint64(21)
    ranks = np.array([rank for rank, _ in merges.values()], np.uint64)
    merge_table = _hash_table(_mix(keys), keys | ranks << np.uint64(42))
    merge_ids = np.full(len(model["merges"]), NONE, np.uint32)
    for rank, i in merges.values():
        merge_ids[rank] = i

    # Words are cut where nothing merges, which needs atoms of byte fallback that never do.
    fallback = bool(model.get("byte_fallback"))
    unmergeable = {unknown, *(byte_ids if fallback and not s.byte_level else [])} - {NONE}
    any_atom_merges = not unmergeable.isdisjoint(pairs.ravel().tolist())
    model_bits = bool(model.get("fuse_unk")) | fallback << 1
    model_bits |= bool(model.get("ignore_merges")) << 2 | any_atom_merges << 3

    trie, roots = _added_trie(added, s)
    rows = [(a.id, a.special | a.lstrip << 1 | a.rstrip << 2 | a.single_word << 3) for a in added]
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts])])
    if offsets[-1] > NONE:
        raise ModelError(f"the tokens have {offsets[-1]} bytes in all; 4 GiB are possible")

    fields = [
        *(size, len(merge_ids)),
        *(1 if s.byte_level else 2, s.decoder, s.strip),
        *(s.nfc | s.prepend << 1 | s.replace_spaces << 2, s.metaspace, s.metaspace_split),
        *(s.digits, s.pattern, s.prefix_space, s.second_pattern),
        *(model_bits, unknown, *roots),
        *(x for table in (tokens, merge_table, char_table) for x in (table.slots, table.probe)),
    ]
    sections = [
        offsets.astype("<u4").tobytes(),
        b"".join(texts),
        flags.tobytes(),
        tokens.bytes(),
        merge_table.bytes(),
        merge_ids.astype("<u4").tobytes(),
        char_table.bytes(),
        _words(byte_ids),
        _joints(merges, s),
        _words(x for node in trie.nodes for x in node),
        _words(trie.edges),
        _words(x for row in rows for x in row),
        _words(s.prefix),
        _words(s.suffix),
    ]
    return _assemble([int(x) for x in fields], sections)


def _words(values: Iterable[int]) -> bytes:
    return np.array(list(values), "<u4").tobytes()


def _align(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _assemble(fields: Sequence[int], sections: Sequence[bytes]) -> bytes:
    header_bytes = 24 + 4 * len(fields) + 16 * len(sections)
    extents = []
    at = _align(header_bytes)
    for section in sections:
        extents += [at, len(section)]
        at = _align(at + len(section))
    header = struct.pack("<8sIIQ", MAGIC, VERSION, header_bytes, at)
    header += struct.pack(f"<{len(fields)}I{len(extents)}Q", *fields, *extents)
    data = bytearray(at)
    data[: len(header)] = header
    for begin, section in zip(extents[::2], sections, strict=True):
        data[begin : begin + len(section)] = section
    return bytes(data)
