"""The tokenizer's files of a pack: from a directory, or from the metadata of a GGUF file.

A GGUF file holds a vocabulary and the name of a rule (`tokenizer.ggml.pre`) by which text is cut
before merging. The rules written here are those of the published `tokenizer.json` files. For
'smollm' this differs from what transformers makes of a GGUF file: there each digit stands alone.

An unknown rule is refused: a model that gets its text cut in another way answers worse, and
nothing would show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import TemplateProcessing

from pliant.errors import ModelError, SourceError
from pliant.pack.json_files import read_json, write_json

__all__ = ["copy_tokenizer_files", "end_tokens", "gguf_tokenizer", "write_gguf_tokenizer"]

# Token types of GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)


@dataclass(frozen=True)
class _Rule:
    """How byte-level text is cut: digits alone first, then each expression in turn.

    `whole`: a piece that is a token is taken as it is, without merging.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_LLAMA3_RULE = _Rule((_LLAMA3,), whole=True, bos=True)
_RULES: dict[str, _Rule] = {
    # Old files name no rule; this is what llama.cpp does with them.
    "default": _Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _Rule()),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone"), _Rule(digits=True)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3_RULE),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Rule((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _Rule((_QWEN2,), nfc=True)),
    "stablelm2": _Rule((_QWEN2,)),
    "tekken": _Rule((_TEKKEN,), whole=True, bos=True),
}

# Tokens with which models of these families end a turn, beside their end-of-text token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>")

_COPIED = ("special_tokens_map.json", "added_tokens.json")
_MAX_FILE = 256 << 20


@dataclass
class _Vocabulary:
    """The tokenizer's part of GGUF metadata, checked."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]] | None
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool = False
    add_space: bool = True
    template: str | None = None


def write_gguf_tokenizer(metadata: Mapping[str, Any], directory: Path, origin: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of a GGUF file.

    Raises SourceError for a broken vocabulary, ModelError for a rule that is not known.
    """
    vocabulary = _vocabulary(metadata, origin)
    tokenizer, adds_bos = _build(vocabulary, str(metadata.get("general.architecture")), origin)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": vocabulary.add_eos and "eos_token" in vocabulary.special,
        "clean_up_tokenization_spaces": False,
    }
    for name, index in vocabulary.special.items():
        config[name] = vocabulary.tokens[index]
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    write_json(directory / "tokenizer_config.json", config)
    if vocabulary.template:
        (directory / "chat_template.jinja").write_text(vocabulary.template, encoding="utf-8")


def gguf_tokenizer(metadata: Mapping[str, Any], origin: str) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes."""
    architecture = str(metadata.get("general.architecture"))
    return _build(_vocabulary(metadata, origin), architecture, origin)[0]


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of all tokens that end an answer: end of text, of turn, of message."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    found = [
        value
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        if isinstance(value := metadata.get(f"tokenizer.ggml.{key}"), int) and 0 <= value < count
    ]
    if isinstance(tokens, list):
        types = metadata.get("tokenizer.ggml.token_type", ())
        control = {i for i, kind in enumerate(types) if kind in (_CONTROL, _USER)}
        names = set(_TURN_ENDS)
        found += [i for i, t in enumerate(tokens) if t in names and i in control]
    return list(dict.fromkeys(found))


def copy_tokenizer_files(source: Path, directory: Path, origin: str) -> None:
    """Bring the tokenizer of a Hugging Face directory into `directory`.

    tokenizer.json is taken as published; where there is none, transformers makes one from the
    older files. If tokenizer_config.json says that a beginning (or no beginning) is to be put
    before a text, tokenizer.json is made to do so, since it is all that a runner reads.
    """
    settings: dict[str, Any] = {}
    if (source / "tokenizer_config.json").is_file():
        settings = read_json(source / "tokenizer_config.json", origin, _MAX_FILE)
    # Code that a repository brings is never run, and no file of a pack asks for it.
    settings.pop("auto_map", None)
    template = _chat_template(source, settings, origin)
    settings.pop("chat_template", None)
    if (source / "tokenizer.json").is_file():
        tokenizer = _load_tokenizer(source / "tokenizer.json", origin)
    else:
        tokenizer = _converted(source, origin)
    _follow_settings(tokenizer, settings)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    write_json(directory / "tokenizer_config.json", settings)
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in _COPIED:
        if (source / name).is_file():
            write_json(directory / name, read_json(source / name, origin, _MAX_FILE))


def _vocabulary(metadata: Mapping[str, Any], origin: str) -> _Vocabulary:
    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return default
        if not isinstance(value, kind):
            raise SourceError(f"{origin}: tokenizer.ggml.{name} is of the wrong type.")
        return value

    tokens = get("tokens", list)
    if not tokens:
        raise SourceError(
            f"{origin}: the file holds no vocabulary (tokenizer.ggml.tokens). Convert the model "
            "again with its tokenizer."
        )
    types = _column(metadata, "token_type", len(tokens), _NORMAL, origin)
    scores = _column(metadata, "scores", len(tokens), 0.0, origin)
    merges = get("merges", list)
    pairs = None
    if merges is not None:
        # The first space is part of no token, so it is the one between them.
        cut = [tuple(m.split(" ", 1)) for m in merges if isinstance(m, str)]
        pairs = [(c[0], c[1]) for c in cut if len(c) == 2]
        if len(pairs) != len(merges):
            raise SourceError(f"{origin}: tokenizer.ggml.merges holds entries that are no pairs.")
    special: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = get(f"{key}_token_id", int)
        if index is not None and not 0 <= index < len(tokens):
            raise SourceError(
                f"{origin}: tokenizer.ggml.{key}_token_id is {index}, the vocabulary has "
                f"{len(tokens)} tokens."
            )
        if index is not None:
            special[f"{name}_token"] = index
    template = metadata.get("tokenizer.chat_template")
    return _Vocabulary(
        model=get("model", str, ""),
        pre=get("pre", str, "default"),
        tokens=tokens,
        types=[int(t) for t in types],
        scores=[float(s) for s in scores],
        merges=pairs,
        special=special,
        add_bos=get("add_bos_token", bool),
        add_eos=get("add_eos_token", bool, False),
        add_space=get("add_space_prefix", bool, True),
        template=template if isinstance(template, str) else None,
    )


def _column(
    metadata: Mapping[str, Any], name: str, count: int, default: float, origin: str
) -> Sequence[float]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return [default] * count
    if isinstance(value, str | bytes | int | float | bool) or len(value) != count:
        raise SourceError(f"{origin}: tokenizer.ggml.{name} has not one entry for each token.")
    return list(value)


def _build(vocabulary: _Vocabulary, architecture: str, origin: str) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it puts a beginning-of-text token before every text."""
    if vocabulary.model == "gpt2":
        tokenizer, add_bos = _byte_level(vocabulary, origin)
    elif vocabulary.model == "llama":
        tokenizer, add_bos = _sentencepiece(vocabulary, architecture, origin), True
    else:
        raise ModelError(
            f"{origin}: tokenizer '{vocabulary.model}' is not supported. Supported: gpt2 "
            "(byte-level BPE) and llama (SentencePiece)."
        )
    _add_tokens(tokenizer, vocabulary, respelled=architecture.startswith("gemma"))
    if vocabulary.add_bos is not None:
        add_bos = vocabulary.add_bos
    add_bos = add_bos and "bos_token" in vocabulary.special
    ends = {}
    for name, wanted in (("bos_token", add_bos), ("eos_token", vocabulary.add_eos)):
        if wanted and name in vocabulary.special:
            index = vocabulary.special[name]
            ends[name] = (vocabulary.tokens[index], index)
    if ends:
        tokenizer.post_processor = _template(ends.get("bos_token"), ends.get("eos_token"))
    return tokenizer, add_bos


def _byte_level(vocabulary: _Vocabulary, origin: str) -> tuple[Tokenizer, bool]:
    rule = _RULES.get(vocabulary.pre)
    if rule is None:
        raise ModelError(
            f"{origin}: the tokenizer cuts text by the rule '{vocabulary.pre}', which is not known "
            f"here. Known: {', '.join(sorted(_RULES))}. Pack the model from its Hugging Face "
            "directory instead."
        )
    if vocabulary.merges is None:
        raise SourceError(f"{origin}: the file holds no merges (tokenizer.ggml.merges).")
    table = _table(vocabulary.tokens, origin)
    for pair in vocabulary.merges:
        if pair[0] not in table or pair[1] not in table or "".join(pair) not in table:
            raise SourceError(f"{origin}: the merge {pair!r} names a token that is not there.")
    model = BPE(vocab=table, merges=vocabulary.merges, ignore_merges=rule.whole)
    tokenizer = Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    steps += [pre_tokenizers.Split(Regex(s), behavior="isolated") for s in rule.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule.splits))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    return tokenizer, rule.bos


def _sentencepiece(vocabulary: _Vocabulary, architecture: str, origin: str) -> Tokenizer:
    """BPE over characters with spaces written as U+2581 and bytes for what is not known."""
    gemma = architecture.startswith("gemma")
    tokens = [_respell(t) for t in vocabulary.tokens] if gemma else vocabulary.tokens
    table = _table(tokens, origin)
    merges = vocabulary.merges
    if merges is None:
        # Gemma's tokens stand in the order in which they were merged, runs of spaces included;
        # elsewhere the score tells, and what the user defined was not merged.
        merged = (_NORMAL, _USER) if gemma else (_NORMAL,)
        rank = range(0, -len(tokens), -1) if gemma else vocabulary.scores
        merges = _implied_merges(tokens, vocabulary.types, rank, table, merged)
    unknown = vocabulary.special.get("unk_token")
    has_bytes = sum(kind == _BYTE for kind in vocabulary.types) == 256
    if not has_bytes and unknown is None:
        raise SourceError(f"{origin}: the vocabulary has neither byte tokens nor an unknown token.")
    model = BPE(
        vocab=table,
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", _SPACE)
    if vocabulary.add_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _respell(token: str) -> str:
    """Runs of spaces are stored as they look; the model knows them with U+2581."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _table(tokens: Sequence[str], origin: str) -> dict[str, int]:
    table = {token: index for index, token in enumerate(tokens)}
    if len(table) != len(tokens):
        raise SourceError(
            f"{origin}: {len(tokens) - len(table)} tokens of the vocabulary are there twice."
        )
    return table


def _implied_merges(
    tokens: Sequence[str],
    types: Sequence[int],
    rank: Sequence[float],
    table: Mapping[str, int],
    merged: tuple[int, ...],
) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best first: SentencePiece joins the two neighbours
    whose union has the best score."""
    found: list[tuple[float, int, int, int]] = []
    usable = {token for token, kind in zip(tokens, types, strict=True) if kind in merged}
    for index, token in enumerate(tokens):
        if token not in usable or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                found.append((-rank[index], index, table[left], table[right]))
    found.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in found]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, respelled: bool) -> None:
    """Control tokens are special; what the user defined is kept whole but is plain text."""
    control, user = [], []
    named = set(vocabulary.special.values())
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if not token:
            continue
        if kind in (_CONTROL, _UNKNOWN) or (index in named and kind != _BYTE):
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER and not (respelled and _respell(token) != token):
            user.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user)


def _template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> TemplateProcessing:
    """Puts `bos` before each text and `eos` behind it."""

    def label(end: tuple[str, int] | None, other: str) -> str:
        # In a template a colon and a leading dollar have a meaning of their own.
        plain = end is not None and end[0] and ":" not in end[0] and end[0][0] != "$"
        return end[0] if plain and end is not None else other

    ends = [(label(bos, "BOS"), bos), (label(eos, "EOS"), eos)]

    def sequence(letter: str, kind: int) -> list[str]:
        before = [f"{ends[0][0]}:{kind}"] if bos else []
        after = [f"{ends[1][0]}:{kind}"] if eos else []
        return [*before, f"${letter}:{kind}", *after]

    tokens = {name: {"id": name, "ids": [e[1]], "tokens": [e[0]]} for name, e in ends if e}
    return TemplateProcessing(
        single=sequence("A", 0),
        pair=[*sequence("A", 0), *sequence("B", 1)],
        special_tokens=list(tokens.values()),
    )


def _follow_settings(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Make the post-processor do what add_bos_token and add_eos_token say, if they say it."""
    flags = [settings.get("add_bos_token"), settings.get("add_eos_token")]
    if not any(isinstance(flag, bool) for flag in flags):
        return
    ids = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ends: list[tuple[str, int] | None] = []
    for name, flag, place in (("bos_token", flags[0], 0), ("eos_token", flags[1], -1)):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        index = tokenizer.token_to_id(text) if isinstance(text, str) else None
        here = index is not None and len(ids) > len(plain) and ids[place] == index
        wanted = flag if isinstance(flag, bool) else here
        ends.append(
            (text, index) if wanted and isinstance(text, str) and index is not None else None
        )
    bos, eos = ends
    want = [*([bos[1]] if bos else []), *plain, *([eos[1]] if eos else [])]
    if ids == want:
        return
    tokenizer.post_processor = (
        _template(bos, eos) if bos or eos else ByteLevelProcessor(trim_offsets=False)
    )


def _load_tokenizer(path: Path, origin: str) -> Tokenizer:
    if path.stat().st_size > _MAX_FILE:
        raise SourceError(
            f"{origin}: {path.name} has {path.stat().st_size} bytes; that is no tokenizer."
        )
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of its Rust code is no Exception
        raise SourceError(f"{origin}: {path.name} cannot be used ({str(error)[:200]}).") from None


def _converted(source: Path, origin: str) -> Tokenizer:
    """A tokenizer from tokenizer.model, or vocab.json and merges.txt, through transformers."""
    older = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any((source / name).is_file() for name in older):
        raise SourceError(
            f"{origin}: there is no tokenizer (tokenizer.json or tokenizer.model) beside the model."
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(source), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # noqa: BLE001 - many kinds, from several libraries
        text = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{origin}: no tokenizer.json, and none can be made from the older files: {text}"
        ) from None


def _chat_template(source: Path, settings: Mapping[str, Any], origin: str) -> str | None:
    """The default chat template, from whichever of its three places holds it."""
    if (source / "chat_template.jinja").is_file():
        path = source / "chat_template.jinja"
        if path.stat().st_size > 1 << 20:
            raise SourceError(f"{origin}: chat_template.jinja is larger than 1 MiB.")
        return path.read_text(encoding="utf-8", errors="replace")
    value = settings.get("chat_template")
    if value is None and (source / "chat_template.json").is_file():
        value = read_json(source / "chat_template.json", origin, _MAX_FILE).get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None
