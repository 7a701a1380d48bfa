"""Writes unicode_data.inc: the character classes and the normalisation data of the tokenizer.

    python make_unicode.py > unicode_data.inc

The oracle is the `tokenizers` library: every code point is asked of its regular expressions,
pre-tokenizers, added tokens and normalisers, because equality with that library, and not with
one version of Unicode, is what the tokenizer promises. (Its classes follow a newer Unicode
than its normaliser does.)
"""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Callable, Iterable

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
LETTER, NUMBER, SPACE, MARK, DIGIT, WORD, NFC = 1, 2, 4, 8, 16, 32, 64

nfc = normalizers.NFC().normalize_str
nfd = normalizers.NFD().normalize_str


def matches(pattern: str) -> set[int]:
    """The code points that a class of the regular expression engine contains."""
    remove = normalizers.Replace(Regex(pattern), "")
    found: set[int] = set()
    for at in range(0, len(CODE_POINTS), 128):
        block = CODE_POINTS[at : at + 128]
        kept = set(remove.normalize_str("".join(map(chr, block))))
        found.update(c for c in block if chr(c) not in kept)
    return found


def digits() -> set[int]:
    """What the Digits pre-tokenizer cuts out."""
    split = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str
    return {c for c in CODE_POINTS if len(split(f"a{chr(c)}a")) == 3}


def word_characters() -> set[int]:
    """What an added token with `single_word` must not touch."""
    tokenizer = Tokenizer(models.BPE(vocab={"\0": 0}, merges=[]))
    tokenizer.add_tokens([AddedToken("\1\1", single_word=True, normalized=False)])
    return {c for c in CODE_POINTS if c > 1 and not tokenizer.encode(f"\1\1{chr(c)}").ids}


def combining_classes() -> dict[int, int]:
    """Canonical combining class of every code point that has one."""
    # A mark has the class of the representative with which it never changes places, if there is
    # any other with which it does.
    marks = [c for c in CODE_POINTS if unicodedata.category(chr(c)) in ("Mn", "Mc", "Me", "Cn")]

    def swaps(a: str, b: str) -> bool:
        return nfd("q" + a + b) != "q" + a + b

    def reorders(mark: str) -> bool:
        probes = ("\u0334", "\u094d", "\u0301")  # classes 1, 9, 230
        return any(swaps(mark, p) or swaps(p, mark) for p in probes)

    sample: dict[int, str] = {}
    for c in marks:
        k = unicodedata.combining(chr(c))
        if k and k not in sample and nfd(chr(c)) == chr(c) and reorders(chr(c)):
            sample[k] = chr(c)

    found: dict[int, int] = {}
    for c in marks:
        mark = chr(c)
        if nfd(mark) != mark or not reorders(mark):
            continue
        same = [k for k, s in sample.items() if not swaps(mark, s) and not swaps(s, mark)]
        assert len(same) == 1, (hex(c), same)
        found[c] = same[0]
    return found


def decompositions() -> dict[int, tuple[int, int, bool]]:
    """Code point -> first, second (0 if alone) of one canonical step, and whether it composes."""
    found: dict[int, tuple[int, int, bool]] = {}
    for c in CODE_POINTS:
        if nfd(chr(c)) == chr(c) or 0xAC00 <= c < 0xAC00 + 11172:
            continue
        parts = [int(p, 16) for p in unicodedata.decomposition(chr(c)).split()]
        first, second = [*parts, 0][:2]
        found[c] = (first, second, second != 0 and nfc(chr(first) + chr(second)) == chr(c))

    def full(c: int) -> str:
        if c not in found:
            return chr(c)
        return full(found[c][0]) + (chr(found[c][1]) if found[c][1] else "")

    for c in found:
        assert full(c) == nfd(chr(c)), hex(c)
    return found


def runs(value: Callable[[int], int]) -> list[int]:
    """start << 8 | value of every maximal run of code points with the same value."""
    out = []
    for v, run in itertools.groupby(range(0x110000), key=value):
        out.append(next(iter(run)) << 8 | v)
    return out


def write(line: str) -> None:
    sys.stdout.write(line + "\n")


def table(kind: str, name: str, values: Iterable[str]) -> None:
    write(f"\ninline constexpr {kind} {name}[] = {{")
    line = "   "
    for v in values:
        if len(line) + len(v) + 2 > 100:
            write(line)
            line = "   "
        line += f" {v},"
    write(line + "\n};")


def main() -> None:
    ccc = combining_classes()
    steps = decompositions()
    seconds = {b for _, b, composes in steps.values() if composes}
    seconds |= set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    unstable = {c for c in CODE_POINTS if c in ccc or c in seconds or nfc(chr(c)) != chr(c)}
    sets = {
        LETTER: matches(r"\p{L}"),
        NUMBER: matches(r"\p{N}"),
        SPACE: matches(r"\s"),
        MARK: matches(r"\p{M}"),
        DIGIT: digits(),
        WORD: word_characters(),
        NFC: unstable,
    }
    classes = [0] * 0x110000
    for bit, members in sets.items():
        for c in members:
            classes[c] |= bit
    write("// Written by make_unicode.py. Do not edit.")
    write("// clang-format off")
    table("uint32_t", "kClassRuns", map(hex, runs(classes.__getitem__)))
    table("uint32_t", "kCombiningRuns", map(hex, runs(lambda c: ccc.get(c, 0))))
    rows = sorted(steps.items())
    singles = (f"{{{c:#x},{a:#x},{b:#x}}}" for c, (a, b, _) in rows)
    table("Decomposition", "kDecompositions", singles)
    pairs = sorted((a, b, c) for c, (a, b, composes) in rows if composes)
    table("Composition", "kCompositions", (f"{{{a:#x},{b:#x},{c:#x}}}" for a, b, c in pairs))
    write("// clang-format on")


if __name__ == "__main__":
    main()
