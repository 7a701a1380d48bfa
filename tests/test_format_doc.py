"""docs/format.md against the code: its reader reads our packs, and old packs stay readable."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from packs import Reader, slow_matrix, write_random_pack
from pliant.codec.plies import EncodedBlock, decode_block, padded_rows
from pliant.codec.tree import LEVELS
from pliant.store import Pack
from pliant.store import manifest as manifest_module
from pliant.store.model import ACTIVATIONS, ModelSpec

DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"
DATA = Path(__file__).parent / "data"

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=["plain", "odd"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {"layers": 1, "coding": {"layers.0.q": "bf16"}}
    if request.param == "odd":
        shape |= {"hidden": 70, "vocab": 131, "ffn": 33, "embed_block_rows": 32, "tied": False}
    return write_random_pack(
        tmp_path_factory.mktemp("doc") / "pack",
        seed=3,
        least=1,
        tree=np.array(LEVELS),  # that of the codec, whose decoder knows no other
        rung_bytes=4096,
        shard_bytes=6000,
        **shape,
    )


def coded(pack: Pack) -> list[str]:
    return [matrix.name for matrix in pack.manifest.matrices if matrix.coding == "plies"]


def codec_matrix(pack: Pack, name: str, rungs: int) -> Floats:
    """A matrix with the first `rungs` rungs, by the decoder that the packer measures with."""
    matrix = next(matrix for matrix in pack.manifest.matrices if matrix.name == name)
    depths = pack.layout.depths(rungs)
    pieces: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
    for rung in range(rungs):
        data = np.frombuffer(pack.read_rung(rung), np.uint8)
        units, bits, offsets = pack.layout.plies_of(rung)
        sizes = pack.units.bytes_of(units, bits)
        for unit, bit, offset, size in zip(
            units.tolist(), bits.tolist(), offsets.tolist(), sizes.tolist(), strict=True
        ):
            pieces[unit, bit] = data[offset : offset + size]
    blocks, first = [], 0
    for block, rows in enumerate(matrix.blocks):
        plane = padded_rows(rows) * 8
        numbers = [pack.units.number(name, block, group) for group in range(matrix.groups)]
        codes = np.zeros(
            (matrix.groups, int(pack.units.first_ply_bytes[numbers[0]]) - plane), np.uint8
        )
        planes = np.zeros((matrix.groups, 8, plane), np.uint8)
        for group, unit in enumerate(numbers):
            for bit in range(1, int(depths[unit]) + 1):
                planes[group, bit - 1] = pieces[unit, bit][-plane:]
            if depths[unit]:
                codes[group] = pieces[unit, 1][:-plane]
        weights = decode_block(
            EncodedBlock(rows, codes, masked(planes, depths[numbers])),
            pack.base[name + ".row_scale"][first : first + rows],
            pack.base[name + ".group_scale"][block],
            depths[numbers].tolist(),
        )
        blocks.append(weights)
        first += rows
    stored = np.concatenate(blocks)[:, : matrix.columns]
    order = pack.base.get(name + ".row_order", np.arange(matrix.rows))
    result = np.empty_like(stored)
    result[np.ix_(order, pack.base[f"order.{matrix.input}"])] = stored
    return result


def masked(planes: npt.NDArray[np.uint8], depths: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Nothing may come from planes that are not resident: noise where there are none."""
    noise = np.random.default_rng(0).integers(0, 256, planes.shape, np.uint8)
    absent = np.arange(8)[None, :] >= depths[:, None]
    return np.where(absent[:, :, None], noise, planes)


@pytest.mark.parametrize("shards", [1, 2, 99])
def test_three_decoders_agree(pack: Path, reader: Reader, shards: int) -> None:
    opened = Pack.open(pack)
    assert len(opened.manifest.shards) >= 3
    rungs = sum(shard.rungs for shard in opened.manifest.shards[:shards])
    for name in coded(opened):
        expected = slow_matrix(pack, name, rungs)
        size = float(np.abs(expected).max())
        for found in (reader(str(pack), name, shards), codec_matrix(opened, name, rungs)):
            assert found.shape == expected.shape
            assert float(np.abs(found - expected).max()) <= 2e-6 * size
    assert np.abs(slow_matrix(pack, "embed", rungs)).max() > 0


def test_any_safetensors_reader_opens_every_file(pack: Path) -> None:
    opened = Pack.open(pack)
    with safe_open(pack / "base.safetensors", "np") as file:
        names = set(file.keys())
        for name in names - {"layers.0.q.weight"}:  # numpy has no BF16
            mine = opened.ladder if name == "ladder" else opened.base[name]
            theirs = file.get_tensor(name)
            assert theirs.dtype == mine.dtype
            np.testing.assert_array_equal(theirs, mine)
        assert file.get_slice("layers.0.q.weight").get_dtype() == "BF16"
    assert names == {*opened.base, "ladder"}
    rung = 0
    for shard in opened.manifest.shards:
        with safe_open(pack / shard.file, "np") as file:
            for name in sorted(file.keys()):
                assert name == f"rung.{rung:06d}"
                assert file.get_tensor(name).tobytes() == opened.read_rung(rung)
                assert opened.rung_location(rung).offset % 4096 == 0
                rung += 1
    assert rung == len(opened.manifest.rungs)


@pytest.mark.parametrize("version", [1, 2])
def test_packs_of_every_version_stay_readable(reader: Reader, version: int) -> None:
    path = DATA / f"pack-v{version}"
    pack = Pack.open(path, verify=True)
    checksums = json.loads((DATA / f"pack-v{version}.json").read_text())
    assert sorted(checksums) == sorted(coded(pack))
    for name, expected in checksums.items():
        for shards in (1, 2, 3):
            found = reader(str(path), name, shards).astype("<f4")
            assert hashlib.sha256(found.tobytes()).hexdigest() == expected[shards - 1], name
        # Not by the codec: its tree and steps may be others by now, and a pack brings its own.
        slow, size = slow_matrix(path, name), float(np.abs(found).max())
        assert float(np.abs(slow - found).max()) <= 2e-6 * size
    for name in ("layers.0.q", "layers.0.k"):
        assert np.isfinite(slow_matrix(path, name)).all()


def test_every_version_is_kept() -> None:
    versions = range(1, manifest_module.VERSION + 1)
    assert sorted(p.name for p in DATA.iterdir() if p.is_dir()) == [f"pack-v{v}" for v in versions]


def test_the_document_names_what_the_code_knows() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    described = manifest_module.Manifest.__dataclass_fields__
    model = ModelSpec.__dataclass_fields__
    for name in (*described, *model, *ACTIVATIONS, *manifest_module.LISTED_FILES):
        assert f"`{name}`" in text, name
    assert f"# The pack format, version {manifest_module.VERSION}" in text


def test_the_reader_needs_no_pliant() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").split("\n## 9. ")[1]
    imports = re.findall(r"^(?:import|from) .*$", text, re.MULTILINE)
    assert imports == ["import json, numpy as np", "from safetensors import safe_open"]
