"""A pack on disk: checked when it is opened, read where it is asked to.

The order of checks is the order of trust. First the manifest, against itself; then the sizes of
files and the headers, against the manifest; only then is memory taken for the base tensors, whose
size has been measured by then. The rungs are not read: the engine reads them by their locations.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pliant.errors import BudgetError, ChecksumError, FormatError, PackError
from pliant.store.base import check_infos, check_kv_ladder, check_values
from pliant.store.files import RegularFile, size_of
from pliant.store.layout import Layout, UnitTable
from pliant.store.manifest import (
    ALIGNMENT,
    MAX_MANIFEST_BYTES,
    REQUIRED_FILES,
    FileDigest,
    Manifest,
    rung_name,
    shard_name,
)
from pliant.store.safetensors import DTYPES, Header, TensorInfo, read_header

__all__ = ["MANIFEST", "Pack", "Progress", "RungLocation"]

MANIFEST = "pliant.json"
BASE = "base.safetensors"
_CHUNK = 2**20

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in all."""


class RungLocation(NamedTuple):
    """Where the bytes of a rung are: `bytes` of them from `offset` on, with this zlib.crc32."""

    path: Path
    offset: int
    bytes: int
    crc32: int


class Pack:
    """An open pack. No file stays open and nothing stays mapped.

    path:       the directory
    manifest:   the checked manifest
    base:       every tensor of base.safetensors but the ladder, by name; numpy arrays of the dtypes
                of docs/format.md (BF16 as uint16). Nobody else holds them: what is deleted is freed
    ladder:     uint32 [plies], the unit of each ply
    units:      sizes of the units
    layout:     which plies are in which rung, and bytes at each rung
    rungs_available: how many rungs the shards that are here have; the rest is not downloaded yet
    digest:     BLAKE2b-128 of the file of the manifest, which has the digests of all others
    """

    __slots__ = ("_offsets", "base", "digest", "layout", "manifest", "path", "rungs_available")

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        base: dict[str, npt.NDArray[Any]],
        layout: Layout,
        rungs_available: int,
        digest: bytes,
    ) -> None:
        """For `open`, which checks what it passes."""
        self.path = path
        self.manifest = manifest
        self.base = base
        self.layout = layout
        self.rungs_available = rungs_available
        self.digest = digest
        self._offsets = _rung_offsets(manifest)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify: bool = False, limit: int | None = None
    ) -> Pack:
        """Open a pack and check all of it but the bytes of the rungs; with `verify`, these too.

        `limit` is the most bytes that the base tensors may take, all of the machine's memory if
        it is None; BudgetError if they need more.
        Raises FormatError, ChecksumError, VersionError, or PackError if a file cannot be read.
        """
        directory = Path(path)
        manifest, digest = _read_manifest(directory)
        _check_sizes(directory, manifest)
        shards = _check_shards(directory, manifest)
        base = _read_base(directory / BASE, manifest, limit)
        ladder = base.pop("ladder", np.empty(0, np.uint32))
        where = f"{directory / BASE}: ladder"
        layout = Layout(UnitTable(manifest.matrices), ladder, manifest.rungs.plies, where)
        layout.check(manifest.rungs, str(directory / MANIFEST))
        available = sum(shard.rungs for shard in manifest.shards[:shards])
        pack = cls(directory, manifest, base, layout, available, digest)
        if verify:
            pack.verify()
        return pack

    @property
    def ladder(self) -> npt.NDArray[np.uint32]:
        """The unit of each ply, in ladder order; uint32 [plies]."""
        return self.layout.ladder

    @property
    def units(self) -> UnitTable:
        """The sizes of the units."""
        return self.layout.units

    @property
    def base_bytes(self) -> int:
        """Bytes that the arrays of `base` and the ladder hold."""
        return sum(array.nbytes for array in self.base.values()) + self.ladder.nbytes

    def bytes_to_rungs(self, weight_bytes: int) -> int:
        """How many of the rungs that are here fit into `weight_bytes` of plies and scales."""
        return min(self.layout.rungs_for(weight_bytes), self.rungs_available)

    def rung_location(self, index: int) -> RungLocation:
        """Where a rung is. Raises PackError for a rung whose shard is not here."""
        self._require(index)
        shard, offset = int(self._offsets[index, 0]), int(self._offsets[index, 1])
        rungs = self.manifest.rungs
        return RungLocation(
            self.path / shard_name(shard), offset, int(rungs.bytes[index]), int(rungs.crc32[index])
        )

    def read_rung(self, index: int) -> bytes:
        """The bytes of one rung with their padding; for tools and tests.

        Raises ChecksumError if they are not those that were written.
        """
        place = self.rung_location(index)
        with self._shard(place.path) as file:
            file.seek(place.offset)
            data = file.read(place.bytes)
        self._check_rung(index, zlib.crc32(data), data[-ALIGNMENT:])
        return data

    def file_path(self, name: str) -> Path:
        """The path of a file that the manifest lists; PackError if it lists none of that name."""
        if name not in self.manifest.files:
            raise PackError(f"{self.path} lists no file {name!r}")
        return self.path / name

    def read_file(self, name: str) -> bytes:
        """The content of a listed file, such as `tokenizer.bin`, after its digest was checked."""
        path, digest = self.file_path(name), self.manifest.files[name]
        with _open(path) as file:
            file.expect(digest.bytes)
            data = file.read(digest.bytes)
        _check_digest(path, hashlib.sha256(data).hexdigest(), digest)
        return data

    def verify(self, progress: Progress | None = None) -> None:
        """Read every file that is here and check all digests and checksums.

        Takes 1 MiB of memory. Raises ChecksumError for the first that is wrong.
        """
        buffer = np.empty(_CHUNK, np.uint8)
        listed = {
            name: digest
            for name, digest in self.manifest.files.items()
            if size_of(self.path / name) is not None
        }
        rungs = self.manifest.rungs.bytes[: self.rungs_available].tolist()
        total, done = sum(digest.bytes for digest in listed.values()) + sum(rungs), 0

        def pieces(file: RegularFile, size: int) -> Any:
            nonlocal done
            while size:
                piece = buffer[: min(size, _CHUNK)]
                file.fill(piece)
                yield piece
                size -= len(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)

        for name, digest in listed.items():
            hashed = hashlib.sha256()
            with _open(self.path / name) as file:
                file.expect(digest.bytes)
                for piece in pieces(file, digest.bytes):
                    hashed.update(piece)
            _check_digest(self.path / name, hashed.hexdigest(), digest)
        first = 0
        for number, shard in enumerate(self.manifest.shards):
            if first == self.rungs_available:
                break
            with self._shard(self.path / shard_name(number)) as file:
                file.seek(int(self._offsets[first, 1]))
                for index in range(first, first + shard.rungs):
                    checksum, tail = 0, b""
                    for piece in pieces(file, rungs[index]):
                        checksum = zlib.crc32(piece, checksum)
                        tail = piece[-ALIGNMENT:].tobytes()
                    self._check_rung(index, checksum, tail)
            first += shard.rungs

    def _require(self, index: int) -> None:
        count = len(self.manifest.rungs)
        if not 0 <= index < count:
            raise PackError(f"{self.path} has no rung {index}: it has {count}")
        if index >= self.rungs_available:
            raise PackError(
                f"{self.path}: rung {index} of {count} is in a shard that is not here; "
                f"{self.rungs_available} are: download the rest of the pack"
            )

    def _shard(self, path: Path) -> RegularFile:
        file = _open(path)
        try:
            file.expect(next(s.bytes for s in self.manifest.shards if s.file == path.name))
        except BaseException:
            file.close()
            raise
        return file

    def _check_rung(self, index: int, checksum: int, tail: bytes) -> None:
        """`tail` is the end of the rung, with all of its padding."""
        expected = int(self.manifest.rungs.crc32[index])
        path = self.path / shard_name(int(self._offsets[index, 0]))
        if checksum != expected:
            raise ChecksumError(
                f"{path}: rung {index} has the checksum {checksum:08x}, and {expected:08x} was "
                "written: copy or download the file again"
            )
        payload = int(self.layout.payload[index + 1] - self.layout.payload[index])
        padding = int(self.manifest.rungs.bytes[index]) - payload
        if padding and any(tail[-padding:]):
            raise FormatError(f"{path}: the {padding} bytes after rung {index} must be zero")


def _open(path: Path) -> RegularFile:
    try:
        return RegularFile(path)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing: copy or download it again") from None


def _read_manifest(directory: Path) -> tuple[Manifest, bytes]:
    """The manifest, and the BLAKE2b-128 of its file."""
    path = directory / MANIFEST
    try:
        file = RegularFile(path)
    except FileNotFoundError:
        if directory.is_dir():
            problem = f"{directory} is not a pack: it has no {MANIFEST}"
        else:
            problem = f"there is no pack at {directory}: make one with `pliant pack`"
        raise PackError(problem) from None
    with file:
        if file.size > MAX_MANIFEST_BYTES:
            raise FormatError(
                f"{path} has {file.size} bytes, and a manifest may have {MAX_MANIFEST_BYTES}"
            )
        data = file.read(file.size)
    # What it describes, in bytes: parsing it may not take more memory than that (strict.loads).
    beside = size_of(directory / BASE) or 0
    for index in range(2**20):
        size = size_of(directory / shard_name(index))
        if size is None:
            break
        beside += size
    manifest = Manifest.from_json(data, where=str(path), beside=beside)
    return manifest, hashlib.blake2b(data, digest_size=16).digest()


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    for name, digest in manifest.files.items():
        path = directory / name
        try:
            with RegularFile(path) as file:
                file.expect(digest.bytes)
        except FileNotFoundError:
            if name in REQUIRED_FILES:
                raise FormatError(f"{path} is missing: copy or download it again") from None


def _check_shards(directory: Path, manifest: Manifest) -> int:
    """Check the shards that are here, and return how many: a prefix of all."""
    here, first = 0, 0
    for index, shard in enumerate(manifest.shards):
        path = directory / shard_name(index)
        try:
            with RegularFile(path) as file:
                if here < index:
                    raise FormatError(
                        f"{directory / shard_name(here)} is missing, and {path.name} is there: "
                        "the shards must be there from the first on"
                    )
                file.expect(shard.bytes)
                header = read_header(file, at_most=ALIGNMENT + 128 * shard.rungs)
                _check_rung_headers(header, manifest, first, shard.rungs, path)
                here = index + 1
        except FileNotFoundError:
            pass
        first += shard.rungs
    if manifest.shards and not here:
        raise FormatError(f"{directory / shard_name(0)} is missing: copy or download it again")
    return here


def _check_rung_headers(
    header: Header, manifest: Manifest, first: int, count: int, path: Path
) -> None:
    # That rungs begin at multiples of 4096 follows from the sizes, which the manifest has checked.
    sizes = manifest.rungs.bytes[first : first + count].tolist()
    start, expected = 0, []
    for index, size in enumerate(sizes, first):
        expected.append((rung_name(index), TensorInfo("U8", (size,), start, start + size)))
        start += size
    if list(header.tensors.items()) != expected:
        raise FormatError(
            f"{path}: the header does not have the rungs {first} ... {first + count - 1} of the "
            "manifest: this is another file, or one of another pack"
        )


def _read_base(path: Path, manifest: Manifest, limit: int | None) -> dict[str, npt.NDArray[Any]]:
    digest = manifest.files[BASE]
    with _open(path) as file:
        file.expect(digest.bytes)
        header = read_header(file)
        checks = check_infos(manifest, header.tensors, str(path))
        size = file.size - header.data_start
        if limit is None:
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > limit:
            raise BudgetError(
                f"{path}: its tensors take {size} bytes of memory, and {limit} are left for them"
            )
        hashed = hashlib.sha256(header.raw)
        base: dict[str, npt.NDArray[Any]] = {}
        for name, info in header.tensors.items():
            try:
                array = np.empty(info.shape, DTYPES[info.dtype])
            except MemoryError:
                raise BudgetError(
                    f"{path}: its tensors take {size} bytes of memory, and there is not as much"
                ) from None
            flat = array.reshape(-1).view(np.uint8)
            file.fill(flat)
            hashed.update(flat.data)
            base[name] = array
    _check_digest(path, hashed.hexdigest(), digest)
    # Only now: altered bytes are told from wrong ones.
    for name, array in base.items():
        check_values(array, checks[name], f"{path}: {name}")
    if manifest.kv is not None:
        check_kv_ladder(base["kv.ladder"], manifest.model, f"{path}: kv.ladder")
    return base


def _check_digest(path: Path, found: str, expected: FileDigest) -> None:
    if found != expected.sha256:
        raise ChecksumError(
            f"{path} has the SHA-256 {found[:16]}..., and {expected.sha256[:16]}... was written: "
            "copy or download the file again"
        )


def _rung_offsets(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Shard and offset in its file of each rung; int64 [rungs, 2]."""
    table = np.empty((len(manifest.rungs), 2), np.int64)
    first = 0
    for index, shard in enumerate(manifest.shards):
        sizes = manifest.rungs.bytes[first : first + shard.rungs]
        ends = np.cumsum(sizes)
        table[first : first + shard.rungs, 0] = index
        table[first : first + shard.rungs, 1] = shard.bytes - ends[-1] + ends - sizes
        first += shard.rungs
    return table
