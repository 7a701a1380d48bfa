"""The tokenizer against the `tokenizers` library, on small tokenizers of every supported family.

They are trained here, with the components that the tokenizer.json files of the families have.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import threading
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence, TemplateProcessing
from tokenizers.trainers import BpeTrainer

from pliant._core import Tokenizer
from pliant.errors import FormatError, ModelError, SourceError, UsageError
from pliant.pack.tokenizer import PATTERNS, build_tokenizer

GPT2, LLAMA3, QWEN2, QWEN35 = PATTERNS
SAMPLES = [
    "The quick brown fox's 12345 jumps, didn't it? WE'LL SEE; they’ve “gone”…  \n\n\t done.",
    "Äpfel, naïve, e\u0301tude, A\u030angstro\u0308m, \u1e9b\u0323 q\u0307\u0323, \ufb01ne, ſ'ſ",
    "Быстрая лиса; γρήγορη αλεπού; שלום עולם; مرحبا بالعالم ١٢٣; नमस्ते दुनिया १२; สวัสดีชาวโลก",
    "日本語のテキスト、中文文本。한국어 텍스트 \u1112\u1161\u11ab ㎏ ½ Ⅻ ²³ ٣",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \U0001f1e9\U0001f1ea 𝔘𝔫𝔦 𒀀 \U0010ffff \u2581\u2581x \u00a0\u3000\u2028\x85\r\n",
    "def f(x):\n    return {'a': 0x1F, \"b\": [1_000, 2.5e-3]}  # ok\n\n\n\n<0x41> <unk> <|x|>",
]
MARKS = "\u0301\u0323\u0308\u0327\u0345\u093c\u094d\u05b0\u1161\u11a8\u3099\u0f71\u0f72\U00011930"


def corpus() -> Iterator[str]:
    text = inspect.getsource(argparse)
    yield from (text[i : i + 500] for i in range(0, len(text), 500))
    for _ in range(4):
        yield from SAMPLES


def byte_level(
    *steps: Any, prefix: bool = False, regex: bool = True, nfc: bool = False, size: int = 1200
) -> Reference:
    tokenizer = Reference(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|begin|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def sentence_piece(
    split_words: bool, change: Callable[[dict[str, Any]], None], byte_tokens: int = 256
) -> Reference:
    tokenizer = Reference(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if split_words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = BpeTrainer(
        vocab_size=1200,
        special_tokens=["<unk>", "<s>", "</s>"],
        limit_alphabet=300,
        show_progress=False,
        max_token_length=12,
    )
    texts = corpus() if split_words else [t[:100] for t in corpus()]
    tokenizer.train_from_iterator(texts, trainer)
    source = json.loads(tokenizer.to_str())
    vocab = source["model"]["vocab"]
    for byte in range(byte_tokens):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    source["model"]["byte_fallback"] = byte_tokens > 0
    source["pre_tokenizer"] = None
    source["decoder"] = decoder_of(strip=1)
    source["post_processor"] = json.loads(
        TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    change(source)
    return Reference.from_str(json.dumps(source))


def decoder_of(strip: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": strip, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def smollm2() -> Reference:
    return byte_level(pre_tokenizers.Digits(individual_digits=True))


def gpt2() -> Reference:
    tokenizer = byte_level(prefix=True)
    tokenizer.add_tokens([AddedToken(" of", normalized=True), AddedToken("self", lstrip=True)])
    tokenizer.add_tokens([AddedToken("return", rstrip=True), AddedToken("in", single_word=True)])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("  \n", lstrip=True), AddedToken("é!"), AddedToken("<|")])
    return tokenizer


def digit_runs() -> Reference:
    return byte_level(pre_tokenizers.Digits(individual_digits=False), prefix=True, regex=False)


def llama3() -> Reference:
    tokenizer = byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), regex=False)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.post_processor = Sequence(
        [
            ByteLevelProcessor(trim_offsets=True),
            TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1200)]
            ),
        ]
    )
    source = json.loads(tokenizer.to_str())
    source["model"]["ignore_merges"] = True
    # Tokens that no merge makes: only ignore_merges finds them.
    source["model"]["merges"] = source["model"]["merges"][::2] + source["model"]["merges"][-9:]
    return Reference.from_str(json.dumps(source))


def qwen2() -> Reference:
    tokenizer = byte_level(pre_tokenizers.Split(Regex(QWEN2), "isolated"), regex=False, nfc=True)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("naïve q̣̇")])
    return tokenizer


def qwen35() -> Reference:
    split = pre_tokenizers.Split(Regex(QWEN35), "removed", invert=True)
    return byte_level(split, regex=False, nfc=True)


def llama2() -> Reference:
    def change(source: dict[str, Any]) -> None:
        prepend = {"type": "Prepend", "prepend": "▁"}
        source["normalizer"] = {"type": "Sequence", "normalizers": [prepend, REPLACE]}

    return sentence_piece(True, change)


def mistral() -> Reference:
    def change(source: dict[str, Any]) -> None:
        source["normalizer"] = None
        source["pre_tokenizer"] = metaspace("first", split=False)

    return sentence_piece(True, change)


def gemma() -> Reference:
    def change(source: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
        source["pre_tokenizer"] = split | {"invert": False}
        source["decoder"] = decoder_of(strip=0)

    tokenizer = sentence_piece(True, change)
    plain = [
        AddedToken(t, normalized=False) for t in ("\n", "\n\n", "\n\n\n", "\t\t", "▁▁", "<h1>")
    ]
    tokenizer.add_tokens(plain)
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    return tokenizer


def joined() -> Reference:
    """Merges go across spaces, so words are long; bytes are missing, so characters are unknown."""

    def change(source: dict[str, Any]) -> None:
        vocab = source["model"]["vocab"]
        vocab["<0xF0 >"] = vocab.pop("<0xF0>")

    return sentence_piece(False, change)


def byte_merges() -> Reference:
    """Tokens of byte fallback that merge, which no known model has and the format allows."""

    def change(source: dict[str, Any]) -> None:
        model = source["model"]
        for pair in (("<0xF0>", "<0x9F>"), ("▁", "<0xF0>"), ("<0x80>", "▁")):
            model["vocab"]["".join(pair)] = len(model["vocab"])
            model["merges"].append(list(pair))

    return sentence_piece(True, change)


def unknown_kept() -> Reference:
    """No byte fallback; every unknown character is one token; spaces by Metaspace throughout."""

    def change(source: dict[str, Any]) -> None:
        source["model"]["fuse_unk"] = False
        source["normalizer"] = None
        source["pre_tokenizer"] = metaspace("always", split=True)
        source["decoder"] = metaspace("always", split=True)

    return sentence_piece(True, change, byte_tokens=0)


FAMILIES = {
    make.__name__: make
    for make in (
        *(smollm2, gpt2, digit_runs, llama3, qwen2, qwen35),
        *(llama2, mistral, gemma, joined, byte_merges, unknown_kept),
    )
}
DIRECTORY = Path(mkdtemp(prefix="pliant-tokenizer-"))


def build(reference: Reference, name: str) -> Path:
    source, packed = DIRECTORY / f"{name}.json", DIRECTORY / f"{name}.bin"
    reference.save(str(source))
    build_tokenizer(source, packed)
    return packed


@cache
def family(name: str) -> tuple[Tokenizer, Reference]:
    reference = FAMILIES[name]()
    return Tokenizer(str(build(reference, name))), reference


def expected_ids(reference: Reference, text: str, special: bool, parse: bool) -> list[int]:
    reference.encode_special_tokens = not parse
    return reference.encode(text, add_special_tokens=special).ids


def check(name: str, text: str) -> None:
    ours, reference = family(name)
    for special, parse in product((False, True), (False, True)):
        expected = expected_ids(reference, text, special, parse)
        assert ours.encode(text, special, parse) == expected, (name, text, special, parse)
        for skip in (False, True):
            whole = reference.decode(expected, skip_special_tokens=skip)
            assert ours.decode(expected, skip) == whole


names = pytest.mark.parametrize("name", FAMILIES)
quick = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*SAMPLES, *"".join(SAMPLES), *MARKS, *" \n\r\t'aA1!▁<", "  ", "'ll ", "'ſ"]),
    st.sampled_from(["<|end|>", "<s>", "<mask>", "<|im_start|>", "<think>", "<h1>", " of", "self"]),
    st.sampled_from(["<start_of_turn>", "naïve q̣̇", "nai\u0308ve q\u0307\u0323", "in", "return"]),
)
texts = st.lists(pieces, max_size=12).map("".join)


@names
def test_samples_are_equal(name: str) -> None:
    check(name, "")
    check(name, " ")
    for text in corpus():
        check(name, text)


@names
@quick
@given(text=texts)
def test_random_text_is_equal(name: str, text: str) -> None:
    check(name, text)


@names
@quick
@given(data=st.data())
def test_random_ids_decode_equally(name: str, data: st.DataObject) -> None:
    ours, reference = family(name)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 2), max_size=12))
    for skip in (False, True):
        assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@names
def test_every_token_is_equal(name: str) -> None:
    ours, reference = family(name)
    assert ours.vocab_size == reference.get_vocab_size()
    special = {t.content for t in reference.get_added_tokens_decoder().values() if t.special}
    for token, i in reference.get_vocab().items():
        assert ours.decode([i]) == reference.decode([i], skip_special_tokens=False)
        assert ours.id_of(token) == i
        assert ours.is_special(i) == (token in special)
    assert ours.id_of("no such token") is None
    assert not ours.is_special(ours.vocab_size)


@names
def test_token_bytes_make_up_the_text(name: str) -> None:
    ours, _ = family(name)
    for text in SAMPLES:
        ids = ours.encode(text)
        whole = b"".join(map(ours.token_bytes, ids)).decode()
        assert whole.removeprefix(" ") == ours.decode(ids).removeprefix(" ")
    with pytest.raises(UsageError, match="does not exist"):
        ours.token_bytes(ours.vocab_size)


def streamed(name: str, ids: list[int]) -> str:
    """What a stream should give: decode, but complete characters of byte runs come at once."""
    _, reference = family(name)
    out, run = "", b""
    strip = name in ("llama2", "mistral", "joined", "byte_merges")
    for i in [*ids, None]:
        token = "" if i is None else reference.id_to_token(i) or ""
        if len(token) == 6 and token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        good = len(run)
        while True:
            try:
                out += run[:good].decode()
                break
            except UnicodeDecodeError:
                good -= 1
        out += "\ufffd" * (len(run) - good) + token.replace("▁", " ")
        run = b""
    return out.removeprefix(" ") if strip else out


@names
@quick
@given(data=st.data())
def test_stream_gives_whole_characters(name: str, data: st.DataObject) -> None:
    ours, _ = family(name)
    text = data.draw(texts)
    ids = ours.encode(text)
    stream = ours.stream()
    shown = [stream.push(i) for i in ids]
    if name == "byte_merges":  # its tokens hold parts of characters, so that decode breaks them
        assert "".join(shown) + stream.flush() == streamed(name, ids)
    else:
        assert "".join(shown) + stream.flush() == ours.decode(ids)
        assert "\ufffd" in text or "\ufffd" not in "".join(shown)

    # The bytes of broken characters, too, and the same stream again.
    stray = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=10))
    if name in ("llama2", "mistral", "gemma", "joined", "byte_merges"):
        low = ours.id_of("<0x00>")
        assert low is not None
        stray += [low + b for b in data.draw(st.binary(max_size=6)) if b != 0xF0] + stray
        expected = streamed(name, stray)
    else:
        expected = ours.decode(stray)
    assert "".join(map(stream.push, stray)) + stream.flush() == expected
    stream = ours.stream(skip_special=True)
    if name not in ("llama2", "mistral", "gemma", "joined", "byte_merges"):
        assert "".join(map(stream.push, stray)) + stream.flush() == ours.decode(stray, True)


def test_stream_holds_back_what_is_incomplete() -> None:
    for name in ("smollm2", "gemma"):
        ours, _ = family(name)
        ids = ours.encode("\u1201")  # no training text has it: one token for each byte
        stream = ours.stream()
        assert [stream.push(i) for i in ids] == ["", "", "\u1201"]
        assert stream.push(ids[0]) == ""
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""


# Where the patterns cut: two bytes merge if they are in one piece, so ids show every boundary.
def boundaries(pre_tokenizer: Any) -> Reference:
    letters = dict(zip(range(256), _letters(), strict=True))
    plain = [ord(c) for c in "a1! \n'sS"]
    left, right = plain + list(range(0x80, 0xC0)), plain + list(range(0xC2, 0xF5))
    merges = [(letters[a], letters[b]) for a in left for b in right]
    tokens = [*letters.values(), *(a + b for a, b in merges)]
    vocab = {t: i for i, t in enumerate(tokens)}
    reference = Reference(models.BPE(vocab=vocab, merges=merges))
    reference.pre_tokenizer = pre_tokenizer
    reference.decoder = decoders.ByteLevel()
    return reference


def _letters() -> list[str]:
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in own else chr(next(others)) for b in range(256)]


def pattern_split(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, last])


def characters() -> list[str]:
    """All of the first planes' start, and where the general category changes."""
    found = list(range(0x3100))
    last = ""
    for c in range(0x3100, 0x110000):
        if 0xD800 <= c <= 0xDFFF:
            continue
        category = unicodedata.category(chr(c))
        if category != last:
            found += [c - 1, c] if c != 0xE000 else [c]
        last = category
    return [chr(c) for c in found if not 0xD800 <= c <= 0xDFFF]


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        *(pattern_split(p) for p in PATTERNS),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
    ],
    ids=["gpt2", "llama3", "qwen2", "qwen35", "digits"],
)
def test_characters_are_classified_equally(pre_tokenizer: Any) -> None:
    reference = boundaries(pre_tokenizer)
    ours = Tokenizer(str(build(reference, "boundaries")))
    for c in characters():
        text = f"a{c}a1{c}1!{c} {c}\n{c}{c}'{c}s"
        assert ours.encode(text) == reference.encode(text).ids, (hex(ord(c)), c)


@quick
@given(st.text(alphabet="a1! \n\r'sStTrReEvVmMlLdDſ\u0301\u0903½²\u3000", max_size=30))
def test_patterns_cut_equally(text: str) -> None:
    for ours, reference in pattern_tokenizers():
        assert ours.encode(text) == reference.encode(text).ids


@cache
def pattern_tokenizers() -> list[tuple[Tokenizer, Reference]]:
    found = []
    for i, pattern in enumerate(PATTERNS):
        reference = boundaries(pattern_split(pattern))
        found.append((Tokenizer(str(build(reference, f"pattern{i}"))), reference))
    return found


def test_normal_form_is_equal() -> None:
    ours, reference = family("qwen2")
    rng = random.Random(3)
    some = [c for c in characters() if unicodedata.category(c)[0] in "MLC"]
    jamo = [
        chr(c) for c in (*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A7, 0x11C3))
    ]
    for _ in range(300):
        text = "".join(
            rng.choice(rng.choice((some, jamo, MARKS, "aeiouAEIOUqſ \uac00\uac01")))
            for _ in range(60)
        )
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    for c in characters():
        for text in (f"{c}\u0301\u0323", f"a{c}\u0301", f"\u0323{c}"):
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_single_word_and_stripping_of_added_tokens() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("@@", single_word=True), AddedToken("##", lstrip=True)])
    tokenizer.add_tokens([AddedToken("%%", rstrip=True), AddedToken(" \n", rstrip=True)])
    ours = Tokenizer(str(build(tokenizer, "added")))
    for c in characters():
        text = f"{c}@@{c} @@{c}@@ {c}##{c} {c}%%{c} \n##"
        assert ours.encode(text) == tokenizer.encode(text).ids, hex(ord(c))


@pytest.mark.parametrize("name", ["smollm2", "gemma", "joined"])
def test_long_words_are_equal_and_take_no_square_time(name: str) -> None:
    ours, reference = family(name)
    rng = random.Random(4)
    for alphabet in ("a", "ab", "ers", "=-"):
        text = "".join(rng.choices(alphabet, k=3000))
        assert ours.encode(text) == expected_ids(reference, text, False, True)
    # With time in the square of the length this would take hours.
    text = "".join(rng.choices("aeinrst", k=1 << 20))
    assert ours.decode(ours.encode(text)).removeprefix(" ") == text


def test_surrogates_and_wrong_arguments_are_refused() -> None:
    ours, _ = family("smollm2")
    with pytest.raises(UsageError, match="surrogate"):
        ours.encode("a\ud800b")
    with pytest.raises(UsageError, match="surrogate"):
        ours.id_of("\udfff")
    for bad in (-1, 1 << 32, 1 << 80):
        with pytest.raises(UsageError, match="not a token id"):
            ours.decode([bad])
    with pytest.raises(TypeError):
        ours.decode([1.5])
    with pytest.raises(TypeError):
        ours.encode(b"bytes")


def test_threads_share_one_tokenizer() -> None:
    ours, _ = family("llama2")
    text = "".join(corpus())
    expected = ours.encode(text)
    results: list[bool] = []

    def encode() -> None:
        results.append(ours.encode(text) == expected)

    work = [threading.Thread(target=encode) for _ in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert results == [True, True, True]


def test_resident_bytes_count_the_mapping() -> None:
    path = build(family("gemma")[1], "resident")
    ours = Tokenizer(str(path))
    ours.encode("".join(SAMPLES))
    assert 0 < ours.resident_bytes < path.stat().st_size + 8192


def use(path: Path) -> None:
    """Touches every part of a file that may be broken."""
    ours = Tokenizer(str(path))
    for text in SAMPLES:
        ids = ours.encode(text, True, True)
        ours.encode(text, False, False)
        ours.decode(ids)
        stream = ours.stream()
        for i in ids:
            stream.push(i)
        stream.flush()
    for i in range(0, ours.vocab_size, 7):
        ours.token_bytes(i)
    ours.id_of("self")


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2", "gemma", "joined", "unknown_kept"])
def test_broken_files_are_refused_or_used_safely(name: str, tmp_path: Path) -> None:
    family(name)
    good = (DIRECTORY / f"{name}.bin").read_bytes()
    broken = tmp_path / "broken.bin"
    refused = 0
    for length in [0, 1, 7, 8, 100, 335, 336, 384, len(good) // 2, len(good) - 1]:
        broken.write_bytes(good[:length])
        with pytest.raises(FormatError):
            Tokenizer(str(broken))
    broken.write_bytes(good + b"\0")
    with pytest.raises(FormatError, match="should have"):
        Tokenizer(str(broken))
    rng = random.Random(5)
    for turn in range(250):
        data = bytearray(good)
        for _ in range(rng.choice((1, 4, 64))):
            at = rng.randrange(336 if turn % 2 else len(data))
            if rng.random() < 0.5:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            else:
                data[at & ~3 : (at & ~3) + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\1\0\0\0"))
        broken.write_bytes(data)
        try:
            use(broken)
        except FormatError:
            refused += 1
    assert refused > 50


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be opened"):
        Tokenizer(str(tmp_path / "missing.bin"))
    with pytest.raises(FormatError, match="regular file"):
        Tokenizer(str(tmp_path))
    other = tmp_path / "other.bin"
    other.write_bytes(b"x" * 4096)
    with pytest.raises(FormatError, match=r"not a tokenizer\.bin"):
        Tokenizer(str(other))
    good = bytearray(build(family("smollm2")[1], "version").read_bytes())
    good[8] = 2
    other.write_bytes(good)
    with pytest.raises(FormatError, match="version 2"):
        Tokenizer(str(other))


def put(source: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for key in way:
        source = source[key]
    source[last] = value


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("normalizer", {"type": "NFKC"}, "normalizer.*NFKC"),
        ("normalizer", {"type": "Lowercase"}, "normalizer.*Lowercase"),
        ("pre_tokenizer", {"type": "BertPreTokenizer"}, "pre-tokenizer.*BertPreTokenizer"),
        (
            "pre_tokenizer.pretokenizers",
            [
                {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
            r"split pattern.*\[a-z\]",
        ),
        ("decoder", {"type": "WordPiece"}, "decoder.*WordPiece"),
        ("decoder", None, "decoder"),
        ("post_processor", {"type": "BertProcessing"}, "post-processor.*BertProcessing"),
        ("model.type", "Unigram", "model.*Unigram"),
        ("model.dropout", 0.1, "model setting.*dropout"),
        ("model.end_of_word_suffix", "</w>", "model setting.*suffix"),
        ("model.merges", [["Ġ", "nothing"]], "merge"),
        ("model.vocab", {"a": 1, "b": 1}, "not different numbers"),
    ],
)
def test_unsupported_components_are_named(
    path: str, value: Any, named: str, tmp_path: Path
) -> None:
    source = json.loads(family("smollm2")[1].to_str())
    put(source, path, value)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(source))
    with pytest.raises(ModelError, match=named):
        build_tokenizer(file, tmp_path / "tokenizer.bin")
    assert not (tmp_path / "tokenizer.bin").exists()


def test_added_tokens_must_have_the_ids_that_the_reference_gives(tmp_path: Path) -> None:
    source = json.loads(family("gpt2")[1].to_str())
    source["added_tokens"][-1]["id"] += 1
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(source))
    with pytest.raises(ModelError, match="added token, whose id should be"):
        build_tokenizer(file, tmp_path / "tokenizer.bin")


def test_what_is_no_tokenizer_json_is_a_source_error(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    out = tmp_path / "tokenizer.bin"
    with pytest.raises(SourceError, match="not a readable"):
        build_tokenizer(file, out)
    for text in ("{", "[]", "{}", '{"model": {"type": "BPE", "merges": []}}'):
        file.write_text(text)
        with pytest.raises(SourceError):
            build_tokenizer(file, out)
