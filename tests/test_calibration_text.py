"""The calibration text that ships with pliant is what its README says."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[1] / "src" / "pliant" / "pack" / "data"
KINDS = {"prose", "code", "dialogue", "language", "markdown"}
PREFIX = 64 * 1024

# What may stand in the text besides ASCII: (first, last) of each range.
RANGES = [
    ("\u00a1", "\u024f"),  # Latin with accents, and the signs of Latin-1
    ("\u03a9", "\u03a9"),  # ohm
    ("\u0400", "\u04ff"),  # Cyrillic
    ("\u0600", "\u06ff"),  # Arabic
    ("\u0900", "\u097f"),  # Devanagari
    ("\u2013", "\u2026"),  # dashes, quotation marks, ellipsis
    ("\u20ac", "\u20ac"),  # euro
    ("\u2190", "\u22ff"),  # arrows and mathematical signs
    ("\u2500", "\u257f"),  # box drawing
    ("\u3001", "\u30ff"),  # Japanese and Chinese punctuation, kana
    ("\u4e00", "\u9fff"),  # Han
    ("\uac00", "\ud7a3"),  # Hangul
    ("\uff01", "\uff1f"),  # full-width punctuation
]
SINGLE = set("\n\t★✅✓➡⏰💻📅🕒🙏\ufe0f")
SCRIPTS = ("CYRILLIC", "CJK", "HIRAGANA", "ARABIC", "DEVANAGARI", "HANGUL")
# A few words that only the one language has, for those which share the Latin script.
WORDS = {
    "German": {"nicht", "sich", "die"},
    "French": {"est", "puis", "même"},
    "Spanish": {"pero", "después", "había"},
    "Italian": {"perché", "che", "non"},
    "Portuguese": {"foi", "uma", "depois"},
    "Dutch": {"niet", "wordt", "een"},
    "Polish": {"nie", "się", "jest"},
    "Turkish": {"bir", "kahve", "belki"},
    "Swedish": {"och", "är", "som"},
}

Document = tuple[str, str]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_calibration", DATA / "make_calibration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text() -> str:
    return (DATA / "calibration.txt").read_bytes().decode("utf-8")


@pytest.fixture(scope="module")
def documents(text: str) -> list[Document]:
    """Read independently of the program: split at the lines that begin with the mark."""
    parts = re.split(r"^%%% (\S+)\n", text, flags=re.M)
    assert parts[0] == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


def shares(documents: Iterable[Document]) -> dict[str, float]:
    size = Counter[str]()
    for kind, body in documents:
        size[kind] += len(body.encode())
    return {kind: n / size.total() for kind, n in size.items()}


def repetition(text: str, n: int = 8) -> float:
    """The share of n-grams of words that have stood before."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def test_program_reproduces_the_file(maker: ModuleType, tmp_path: Path) -> None:
    for name in ("calibration.txt", "make_calibration.py"):
        shutil.copy(DATA / name, tmp_path / name)
    program = [sys.executable, str(tmp_path / "make_calibration.py")]
    assert subprocess.run([*program, "--check"], capture_output=True, check=False).returncode == 0

    # Damage a generated document: the check must see it, and a run must repair it.
    copy = tmp_path / "calibration.txt"
    docs = maker.split(copy.read_text(encoding="utf-8"))
    docs[maker.EVERY - 1] = ("code", "something else")
    copy.write_text("".join(f"%%% {k}\n{b}\n" for k, b in docs), encoding="utf-8", newline="\n")
    assert subprocess.run([*program, "--check"], capture_output=True, check=False).returncode == 1
    subprocess.run(program, check=True)
    assert copy.read_bytes() == (DATA / "calibration.txt").read_bytes()


def test_too_few_written_documents_are_an_error(maker: ModuleType) -> None:
    with pytest.raises(ValueError, match="hand-written"):
        maker.join([("prose", "Alone.")])
    with pytest.raises(ValueError, match="must begin with"):
        maker.split("no mark\n")


def test_size_and_form(text: str, documents: list[Document], maker: ModuleType) -> None:
    assert 250_000 <= len(text.encode()) <= 400_000
    assert len(documents) >= 200
    assert {kind for kind, _ in documents} == KINDS
    assert text.endswith("\n")
    assert "\r" not in text
    assert unicodedata.normalize("NFC", text) == text
    assert text.count("%%%") == len(documents)
    for kind, body in documents:
        assert 200 <= len(body) <= 12_000, (kind, body[:60])
        assert body == body.strip("\n") + "\n", (kind, body[:60])
    by_hand = sum(len(body.encode()) for _, body in maker.written(maker.split(text)))
    assert by_hand >= 0.75 * len(text.encode())


def test_shares_of_the_kinds(text: str, documents: list[Document]) -> None:
    want = {"prose": 0.28, "dialogue": 0.28, "code": 0.24, "language": 0.11, "markdown": 0.08}
    for kind, share in shares(documents).items():
        assert abs(share - want[kind]) < 0.02, (kind, share)
    # Any stretch of 64 KiB has all the kinds; the first one too.
    raw = text.encode()
    for start in range(0, len(raw) - PREFIX, PREFIX // 2):
        piece = raw[start : start + PREFIX].decode(errors="ignore")
        parts = re.split(r"^%%% (\S+)\n", piece, flags=re.M)[1:]
        got = shares(zip(parts[::2], parts[1::2], strict=True))
        for kind, share in want.items():
            assert got[kind] > share / 3, (start, kind, got[kind])


def test_nothing_is_said_twice(text: str, documents: list[Document], maker: ModuleType) -> None:
    paragraphs = Counter(
        paragraph.strip()
        for _, body in documents
        for paragraph in re.split(r"\n[ \t]*\n", body)
        if paragraph.strip()
    )
    assert [p[:80] for p, n in paragraphs.items() if n > 1] == []
    assert repetition(text) < 0.01
    by_hand = "\n".join(body for _, body in maker.written(maker.split(text)))
    assert repetition(by_hand) < 0.003
    # No opening sentence of a document is used over and over.
    openings = Counter(" ".join(body.split()[:4]) for kind, body in documents if kind != "code")
    assert openings.most_common(1)[0][1] <= 3


def test_dialogues_are_conversations(documents: list[Document]) -> None:
    turns = []
    for kind, body in documents:
        if kind != "dialogue":
            continue
        speakers = re.findall(r"^(User|Assistant): \S", body, flags=re.M)
        assert speakers == ["User", "Assistant"] * (len(speakers) // 2), body[:80]
        turns.append(len(speakers))
    assert min(turns) >= 2
    assert sum(turns) / len(turns) >= 4
    assert max(turns) >= 12


def test_only_characters_that_are_meant(text: str) -> None:
    def meant(char: str) -> bool:
        ascii_ok = " " <= char <= "~"
        return ascii_ok or char in SINGLE or any(a <= char <= b for a, b in RANGES)

    odd = {f"U+{ord(c):04X}" for c in set(text) if not meant(c)}
    assert odd == set()
    # No sign of text that was decoded wrongly.
    assert not re.search(r"Ã.|â€|\ufffd", text)


def test_languages(documents: list[Document]) -> None:
    other = [body for kind, body in documents if kind == "language"]
    names = Counter(
        unicodedata.name(c, "?").split()[0] for body in other for c in body if ord(c) > 127
    )
    for script in SCRIPTS:
        assert names[script] >= 150, script
    for language, words in WORDS.items():
        assert any(words <= set(re.findall(r"\w+", body.lower())) for body in other), language


def test_code_and_data_are_valid(documents: list[Document]) -> None:
    parsed = Counter[str]()
    for kind, body in documents:
        blocks = re.findall(r"```(\w+)\n(.*?)^```$", body, flags=re.M | re.S)
        if kind == "code" and re.match(r'import \w+$|from \w+ import|"""', body, flags=re.M):
            blocks.append(("python", body))
        if kind == "code" and body.startswith("{\n"):
            blocks.append(("json", body))
        for language, block in blocks:
            if language == "python":
                compile(block, "calibration", "exec", dont_inherit=True)
                parsed["python"] += 1
            elif language == "json":
                json.loads(block)
                parsed["json"] += 1
    assert parsed["python"] >= 10
    assert parsed["json"] >= 8
