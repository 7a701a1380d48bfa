"""The manifest of a pack, `pliant.json`: docs/format.md section 2 as frozen dataclasses.

`Manifest.from_json` accepts exactly what the specification allows, so whoever holds a Manifest may
rely on every size, name and limit in it. It says nothing about the other files; `Pack` does.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pliant.errors import FormatError, VersionError
from pliant.store.model import ModelSpec, read_model
from pliant.store.strict import MAX_INTEGER, Fields, integer, loads, show

__all__ = [
    "ALIGNMENT",
    "CODINGS",
    "FORMAT",
    "GROUP",
    "LISTED_FILES",
    "MAX_LISTED_BYTES",
    "MAX_MANIFEST_BYTES",
    "REQUIRED_FILES",
    "VERSION",
    "Calibration",
    "FileDigest",
    "KvLadder",
    "Manifest",
    "MatrixSpec",
    "QualityPoint",
    "Rungs",
    "Shard",
    "Source",
    "Tokens",
    "kv_units",
    "rung_name",
    "shard_name",
]

FORMAT = "pliant-pack"
VERSION = 2
GROUP = 64  # input channels of a group
ALIGNMENT = 4096  # of rungs, in shards
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_LISTED_BYTES = 256 * 2**20  # of each listed file but the base: they are read whole
CODINGS = ("plies", "f32", "bf16")
REQUIRED_FILES = ("base.safetensors", "tokenizer.bin")
LISTED_FILES = (
    *REQUIRED_FILES,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""The files that may stand in `files`, section 1."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,127}")
_MAX_ROWS = 2**31 - 32  # of a matrix in plies: rows of a unit are kept in 32 bits
_MAX_SHARDS = 99_999  # five digits in the name
_MAX_RUNGS = 1_000_000  # six digits
_MAX_TEXT = 1024


def shard_name(index: int) -> str:
    """The file name of shard `index`, counted from 0."""
    return f"plies-{index + 1:05d}.safetensors"


def rung_name(index: int) -> str:
    """The tensor name of rung `index`, counted from 0 over the whole pack."""
    return f"rung.{index:06d}"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the model came from; for people."""

    name: str
    origin: str
    license: str | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Special tokens: `eos` may be several or none."""

    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool

    @property
    def begin(self) -> tuple[int, ...]:
        """What comes before a text."""
        return (self.bos,) if self.add_bos and self.bos is not None else ()


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """One matrix, section 2.2. `input` is None and `blocks` empty unless it is coded in plies."""

    name: str
    rows: int
    columns: int
    coding: str
    input: str | None = None
    blocks: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """How many groups of 64 input channels it has."""
        return -(-self.columns // GROUP)

    @property
    def units(self) -> int:
        """How many units of the ladder it has: none unless it is coded in plies."""
        return len(self.blocks) * self.groups


@dataclass(frozen=True, slots=True, eq=False)
class Rungs:
    """Three arrays of one length, read-only: `plies` int64, `bytes` int64, `crc32` uint32."""

    plies: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.uint32]

    def __post_init__(self) -> None:
        for array in (self.plies, self.bytes, self.crc32):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.plies)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rungs):
            return NotImplemented
        return all(
            np.array_equal(mine, theirs)
            for mine, theirs in (
                (self.plies, other.plies),
                (self.bytes, other.bytes),
                (self.crc32, other.crc32),
            )
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of rungs: `bytes` of the whole file, `rungs` in it."""

    file: str
    rungs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class QualityPoint:
    """`kl`: expected mean KL divergence (nats) with `bytes` of plies and scales resident."""

    bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class KvLadder:
    """How pages of the KV cache are coded: `rungs` has the plies of each rung, and `quality` the
    expected KL divergence to an exact cache with it and those before."""

    rungs: tuple[int, ...]
    quality: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that the order of the ladder was measured on."""

    text: str
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and SHA-256 (lower-case hexadecimal) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of `pliant.json`."""

    writer: str
    source: Source
    model: ModelSpec
    tokens: Tokens
    matrices: tuple[MatrixSpec, ...]
    rungs: Rungs
    shards: tuple[Shard, ...]
    quality: tuple[QualityPoint, ...]
    calibration: Calibration
    files: dict[str, FileDigest]
    kv: KvLadder | None = None

    @classmethod
    def from_json(cls, data: bytes, *, where: str = "pliant.json", beside: int = 0) -> Manifest:
        """Read and check a manifest.

        `where` names the file in messages; `beside` is the size in bytes of the files that it
        describes and bounds the memory that parsing may take (see `strict.loads`). Raises
        VersionError if it is of another version, FormatError for every other defect.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise FormatError(
                f"{where}: {len(data)} bytes, and a manifest may have {MAX_MANIFEST_BYTES}"
            )
        value = loads(data, where, beside=beside)
        # Before anything else: another version may have other keys.
        if type(value) is not dict or value.get("format") != FORMAT:
            raise FormatError(f"{where}: not a pack: `format` must be {FORMAT!r}")
        version = integer(value.get("version"), f"{where}: version", 1)
        if version > VERSION:
            raise VersionError(
                f"{where}: the pack has version {version} of the format, and this program reads "
                f"versions up to {VERSION}: use a newer pliant, or pack the model again"
            )
        keys = ("format", "version", *cls.__dataclass_fields__)
        if version < 2:
            keys = tuple(key for key in keys if key != "kv")
        fields = Fields(value, where, keys)
        model = read_model(fields.raw("model"), fields.at("model"))
        rungs = _rungs(fields.raw("rungs"), fields.at("rungs"))
        matrices = _matrices(fields, model)
        if len(rungs) and not any(matrix.units for matrix in matrices):
            raise FormatError(f"{where}: there are rungs, but no matrix is coded in plies")
        return cls(
            writer=fields.text("writer", 256),
            source=_source(fields.raw("source"), fields.at("source")),
            model=model,
            tokens=_tokens(fields.raw("tokens"), fields.at("tokens"), model.vocab),
            matrices=matrices,
            rungs=rungs,
            shards=_shards(fields, rungs),
            quality=_quality(fields),
            calibration=_calibration(fields.raw("calibration"), fields.at("calibration")),
            files=_files(fields.raw("files"), fields.at("files")),
            kv=None if version < 2 else _kv(fields, model, matrices),
        )

    def to_json(self) -> bytes:
        """The manifest as ASCII JSON, a line for each key and matrix; inverse of from_json."""
        value: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        value["matrices"] = [
            {
                k: v
                for k, v in asdict(m).items()
                if m.coding == "plies" or k not in ("input", "blocks")
            }
            for m in self.matrices
        ]
        value["rungs"] = {
            "plies": self.rungs.plies.tolist(),
            "bytes": self.rungs.bytes.tolist(),
            "crc32": self.rungs.crc32.tolist(),
        }
        return encode(value)


def encode(value: dict[str, Any]) -> bytes:
    """A manifest given as plain values, as ASCII JSON."""
    lines = []
    for key, item in value.items():
        if key in ("matrices", "shards", "quality") and item:
            listed = ",\n  ".join(_compact(entry) for entry in item)
            lines.append(f"{_compact(key)}: [\n  {listed}\n ]")
        else:
            lines.append(f"{_compact(key)}: {_compact(item)}")
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode("ascii")


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _source(value: object, where: str) -> Source:
    fields = Fields(value, where, Source.__dataclass_fields__)
    return Source(
        name=fields.text("name", _MAX_TEXT),
        origin=fields.text("origin", _MAX_TEXT),
        license=fields.optional_text("license", _MAX_TEXT),
    )


def _tokens(value: object, where: str, vocab: int) -> Tokens:
    fields = Fields(value, where, Tokens.__dataclass_fields__)
    return Tokens(
        bos=fields.optional_integer("bos", 0, vocab - 1),
        eos=tuple(fields.integers("eos", 0, vocab - 1).tolist()),
        add_bos=fields.flag("add_bos"),
    )


def _vector(matrix: str) -> str:
    """A name for the vector that a matrix reads: q, k and v read one, gate and up another."""
    layer, _, part = matrix.rpartition(".")
    return f"{layer}.{ {'k': 'q', 'v': 'q', 'up': 'gate'}.get(part, part) }"


def _matrices(fields: Fields, model: ModelSpec) -> tuple[MatrixSpec, ...]:
    shapes = {name: (rows, columns) for name, rows, columns in model.matrix_shapes()}
    widths: dict[str, int] = {}
    readers: dict[str, tuple[str, str]] = {}  # of a vector: the first matrix and its input

    def matrix(value: object, where: str) -> MatrixSpec:
        coding = value.get("coding") if type(value) is dict else None
        keys = ("name", "rows", "columns", "coding")
        one = Fields(value, where, (*keys, "input", "blocks") if coding == "plies" else keys)
        name, coding = one.text("name", 128), one.choice("coding", CODINGS)
        if name not in shapes:
            raise FormatError(f"{where}: a matrix {show(name)} is not expected, or there twice")
        rows, columns = one.integer("rows"), one.integer("columns")
        if (rows, columns) != shapes[name]:
            raise FormatError(
                f"{where}: {name} is {rows} x {columns}, and in this model "
                f"{shapes[name][0]} x {shapes[name][1]}"
            )
        del shapes[name]
        if coding != "plies":
            return MatrixSpec(name, rows, columns, coding)
        if columns > 2**16 or rows > _MAX_ROWS:
            raise FormatError(
                f"{where}: {name} has {rows} rows and {columns} columns, and a matrix in plies may "
                f"have {_MAX_ROWS} and {2**16}"
            )
        source = one.text("input", 120)
        if not _NAME.fullmatch(source):
            raise FormatError(f"{where}.input: {show(source)} cannot be the name of an order")
        if widths.setdefault(source, columns) != columns:
            raise FormatError(
                f"{where}: {name} has {columns} columns, and another matrix with the input "
                f"{source} has {widths[source]}"
            )
        first, shared = readers.setdefault(_vector(name), (name, source))
        if shared != source:
            raise FormatError(
                f"{where}: {name} has the input {source}, and {first}, which reads the same "
                f"vector, has {shared}"
            )
        blocks = tuple(one.integers("blocks", 1, rows).tolist())
        if sum(blocks) != rows:
            raise FormatError(f"{where}.blocks add up to {sum(blocks)}, and {name} has {rows} rows")
        if any(count % 32 for count in blocks[:-1]):
            raise FormatError(f"{where}.blocks: all but the last must be multiples of 32")
        return MatrixSpec(name, rows, columns, coding, source, blocks)

    matrices = fields.items("matrices", matrix)
    if shapes:
        raise FormatError(f"{fields.at('matrices')}: the matrix {next(iter(shapes))} is missing")
    weights = sum(matrix.rows * matrix.groups * GROUP for matrix in matrices)
    if weights > MAX_INTEGER:
        raise FormatError(f"{fields.at('matrices')}: {weights} weights in all are too many")
    return matrices


def _rungs(value: object, where: str) -> Rungs:
    fields = Fields(value, where, Rungs.__dataclass_fields__)
    plies = fields.integers("plies", 1, 2**48)
    sizes = fields.integers("bytes", ALIGNMENT)
    checksums = fields.integers("crc32", 0, 2**32 - 1)
    if not len(plies) == len(sizes) == len(checksums):
        raise FormatError(
            f"{where}: lists of {len(plies)} plies, {len(sizes)} bytes and {len(checksums)} crc32, "
            "and they must have one length"
        )
    if len(plies) > _MAX_RUNGS:
        raise FormatError(f"{where}: {len(plies)} rungs, and a pack may have {_MAX_RUNGS}")
    uneven = np.flatnonzero(sizes % ALIGNMENT)
    if len(uneven):
        first = int(uneven[0])
        raise FormatError(
            f"{where}.bytes[{first}] is {sizes[first]}, and must be a multiple of {ALIGNMENT}"
        )
    return Rungs(plies, sizes, checksums.astype(np.uint32))


def _shards(fields: Fields, rungs: Rungs) -> tuple[Shard, ...]:
    where = fields.at("shards")
    index = done = 0

    def shard(value: object, at: str) -> Shard:
        nonlocal index, done
        one = Fields(value, at, Shard.__dataclass_fields__)
        file = one.text("file", 128)
        if file != shard_name(index):
            raise FormatError(f"{at}.file is {show(file)}, and must be {shard_name(index)}")
        count, size = one.integer("rungs", 1), one.integer("bytes")
        if done + count > len(rungs):
            raise FormatError(f"{where} have more rungs than the {len(rungs)} of the pack")
        # Added as Python integers: a sum in 64 bits could wrap and look right.
        payload = sum(rungs.bytes[done : done + count].tolist())
        if size <= payload or (size - payload) % ALIGNMENT:
            raise FormatError(
                f"{at}.bytes is {size}, and must be {payload} bytes of rungs and a header that is "
                f"padded to a multiple of {ALIGNMENT}"
            )
        index, done = index + 1, done + count
        return Shard(shard_name(index - 1), count, size)

    if type(fields.raw("shards")) is list and len(fields.raw("shards")) > _MAX_SHARDS:
        raise FormatError(
            f"{where}: {len(fields.raw('shards'))}, and a pack may have {_MAX_SHARDS}"
        )
    shards = fields.items("shards", shard)
    if done != len(rungs):
        raise FormatError(f"{where} have {done} rungs, and the pack {len(rungs)}")
    return shards


def _quality(fields: Fields) -> tuple[QualityPoint, ...]:
    def point(value: object, where: str) -> QualityPoint:
        one = Fields(value, where, QualityPoint.__dataclass_fields__)
        return QualityPoint(one.integer("bytes"), one.number("kl", least=0.0))

    points = fields.items("quality", point)
    for index in range(1, len(points)):
        before, now = points[index - 1], points[index]
        if now.bytes <= before.bytes or now.kl > before.kl:
            raise FormatError(
                f"{fields.at('quality')}[{index}]: bytes must rise and kl fall, but "
                f"({now.bytes}, {now.kl:g}) follows ({before.bytes}, {before.kl:g})"
            )
    return points


def _kv(fields: Fields, model: ModelSpec, matrices: tuple[MatrixSpec, ...]) -> KvLadder | None:
    value, where = fields.raw("kv"), fields.at("kv")
    if value is None:
        return None
    if not any(matrix.units for matrix in matrices):
        raise FormatError(f"{where} must be null: no matrix is coded in plies")
    one = Fields(value, where, KvLadder.__dataclass_fields__)
    most = 8 * kv_units(model)
    rungs = tuple(one.integers("rungs", 1, most).tolist())
    quality = one.numbers("quality")
    if not rungs or len(rungs) != len(quality) or sum(rungs) > most:
        raise FormatError(
            f"{where}: {len(rungs)} rungs of {sum(rungs)} plies and {len(quality)} points of "
            f"quality: they must be as many, at least one, and have at most {most} plies"
        )
    if quality[-1] < 0 or any(now > before for before, now in itertools.pairwise(quality)):
        raise FormatError(f"{where}.quality must fall or stay equal, and not below 0")
    return KvLadder(rungs, quality)


def kv_units(model: ModelSpec) -> int:
    """Units of the KV cache: 32 channels of the keys or the values of a layer and KV head."""
    return model.layers * model.kv_heads * 2 * 2 * -(-model.head_dim // 64)


def _calibration(value: object, where: str) -> Calibration:
    fields = Fields(value, where, Calibration.__dataclass_fields__)
    return Calibration(
        fields.text("text", _MAX_TEXT), fields.integer("tokens"), fields.sha256("sha256")
    )


def _files(value: object, where: str) -> dict[str, FileDigest]:
    if type(value) is not dict:
        raise FormatError(f"{where} is {show(value)}, and must be an object")
    files = {}
    for name, item in cast("dict[str, Any]", value).items():
        if name not in LISTED_FILES:
            raise FormatError(f"{where}: {show(name)} is not the name of a file of a pack")
        one = Fields(item, f"{where}[{name!r}]", FileDigest.__dataclass_fields__)
        most = MAX_INTEGER if name == "base.safetensors" else MAX_LISTED_BYTES
        files[name] = FileDigest(one.integer("bytes", 0, most), one.sha256("sha256"))
    for name in REQUIRED_FILES:
        if name not in files:
            raise FormatError(f"{where}: {name} is missing")
    return files
