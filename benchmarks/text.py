"""Make the evaluation text out of Debian packages: ``python benchmarks/text.py OUT.txt``.

The text must not be in the repository and must be of another kind than the calibration text, so it
is taken from the documentation that Debian ships: the Debian administrator's handbook (prose and
shell transcripts), the Free On-line Dictionary of Computing (short encyclopedic articles) and the
Python manual (reference prose and code). The packages are fetched with ``apt-get download`` and
unpacked with ``dpkg -x``; nothing is installed. Pieces of the three are interleaved, so that every
prefix of the text holds all of them, and the same packages always give the same text.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("debian-handbook", "dict-foldoc", "python3-doc")
PIECE = 1500  # characters taken at a time from one of the three
BLOCK_TAGS = frozenset({"p", "div", "li", "dt", "dd", "tr", "pre", "table", "ul", "ol", "dl", "br"})
BLOCK_TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6", "section", "blockquote"}
SKIPPED_TAGS = frozenset({"script", "style", "nav", "header", "footer", "head", "button"})
VOID_TAGS = frozenset({"br", "hr", "img", "link", "meta", "input", "col"})


class _PlainText(HTMLParser):
    """Collects the readable text of a page; keeps line breaks of ``pre`` only."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.pre = 0
        self.skipped: list[str] = []  # open tags since (and with) the outermost skipped one

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID_TAGS:
            if tag == "br" and not self.skipped:
                self.parts.append("\n")
            return
        classes = (dict(attrs).get("class") or "").split()
        unwanted = tag in SKIPPED_TAGS or "headerlink" in classes or "sphinxsidebar" in classes
        if self.skipped or unwanted or "docnav" in classes or "related" in classes:
            self.skipped.append(tag)
            return
        if tag in BLOCK_TAGS:
            self.parts.append("\n\n")
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            # A page may leave tags open: close up to the last one of this name.
            if tag in self.skipped:
                while self.skipped.pop() != tag:
                    pass
            return
        if tag in BLOCK_TAGS:
            self.parts.append("\n\n")
        self.pre -= tag == "pre" and self.pre > 0

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def _tidy(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\u00b6", "").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def page_text(path: Path) -> str:
    """The plain text of one HTML page."""
    parser = _PlainText()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    return _tidy("".join(parser.parts))


def pages_text(pages: list[Path], limit: int) -> str:
    """About ``limit`` characters out of pages spread evenly over ``pages``.

    At most 6 KB come from a page, from its first third on, so that titles and tables of contents do
    not fill the text.
    """
    if not pages:
        raise FileNotFoundError("a package was unpacked but the pages expected in it are not there")
    kept: list[str] = []
    size = 0
    want = max(1, limit // 3500)
    step = max(1, len(pages) // want)
    for start in range(step):  # a second round takes the pages between those of the first
        for page in pages[start::step]:
            text = page_text(page)
            if len(text) < 3000:
                continue
            begin = text.find("\n\n", len(text) // 3)
            piece = text[max(begin, 0) :].strip()[:6000]
            piece = piece[: piece.rfind("\n") if "\n" in piece else None].strip()
            kept.append(piece)
            size += len(piece)
            if size >= limit:
                return "\n\n".join(kept)
    return "\n\n".join(kept)


def dictionary_text(path: Path, limit: int) -> str:
    """About ``limit`` characters of the dictionary, in runs of articles spread over it."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    runs = max(1, limit // 4000)
    kept = []
    for run in range(runs):
        middle = (run + 1) * len(text) // (runs + 1)
        begin = re.compile(r"\n(?=\S)").search(text, middle)  # an article starts at column 0
        at = begin.end() if begin else middle
        piece = text[at : at + 4000]
        kept.append(piece[: piece.rfind("\n\n")].strip())
    return _tidy("\n\n".join(kept))


def unpack(into: Path) -> None:
    """Fetch the packages (and what python3-doc points at) and unpack them under ``into``."""
    depends = subprocess.run(
        ["apt-cache", "depends", "python3-doc"], capture_output=True, text=True, check=True
    ).stdout
    manuals = re.findall(r"Depends: (python3\.\d+-doc)", depends)
    debs = into / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", *PACKAGES, *manuals]
    subprocess.run(command, cwd=debs, check=True, stdout=sys.stderr)
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(deb), str(into)], check=True)


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces of about PIECE characters."""
    at = 0
    while at < len(text):
        end = text.find("\n\n", at + PIECE)
        end = len(text) if end < 0 or end > at + 2 * PIECE else end
        if end == len(text) and len(text) - at > 2 * PIECE:
            end = text.find("\n", at + PIECE)
        yield text[at:end].strip("\n")
        at = end


def build(root: Path, size: int) -> str:
    """The evaluation text, about ``size`` characters, from packages unpacked under ``root``."""
    share = root / "usr" / "share"
    handbook = sorted((share / "doc/debian-handbook/html/en-US").glob("*.html"))
    manual = sorted(
        page
        for part in ("library", "tutorial", "howto", "reference", "faq")
        for page in (share / "doc").glob(f"python3*/html/{part}/*.html")
        if not page.is_symlink()
    )
    third = size // 3
    texts = (
        pages_text(handbook, third),
        dictionary_text(share / "dictd" / "foldoc.dict.dz", third),
        pages_text(manual, third),
    )
    parts = [list(pieces(text)) for text in texts]
    rounds = max(len(part) for part in parts)
    mixed = [part[index] for index in range(rounds) for part in parts if index < len(part)]
    return "\n\n".join(mixed) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--size", type=int, default=300_000, help="characters (default 300,000)")
    parser.add_argument("--root", type=Path, help="packages already unpacked with dpkg -x here")
    args = parser.parse_args()
    if args.root is not None:
        text = build(args.root, args.size)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch).chmod(0o755)  # the download user of apt must be able to read it
            unpack(Path(scratch))
            text = build(Path(scratch), args.size)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(text.encode()):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
