"""Writing packs: round trips, whole or not at all, and nothing of others lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packs import (
    random_base,
    random_ladder,
    random_manifest,
    random_plies,
    slow_matrix,
    write_random_pack,
)
from pliant.errors import (
    FormatError,
    PackError,
    UsageError,
)
from pliant.pack.writer import write_pack
from pliant.store import Manifest, Pack


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    layers=st.integers(1, 2),
    hidden=st.integers(1, 130),
    vocab=st.integers(2, 200),
    ffn=st.integers(1, 100),
    tied=st.booleans(),
    coding=st.sampled_from(["plies", "f32", "bf16"]),
    least=st.integers(0, 8),
    block_rows=st.sampled_from([0, 32, 64]),
    rung_bytes=st.sampled_from([None, 1, 4096, 10_000]),
    shard_bytes=st.sampled_from([None, 1, 5000, 20_000]),
    options=st.fixed_dictionaries(
        {key: st.booleans() for key in ("post_norms", "qk_norms", "biases", "row_orders")}
    ),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    coding: str,
    least: int,
    rung_bytes: int | None,
    shard_bytes: int | None,
    options: dict[str, bool],
    **shape: Any,
) -> None:
    manifest = random_manifest(
        coding={"layers.0.q": "f32"} if coding == "plies" else coding, **shape
    )
    base = random_base(manifest, seed, **options)
    ladder = random_ladder(manifest, seed, least=least)
    plies = random_plies(manifest, seed)
    path = tmp_path_factory.mktemp("round") / "pack"
    steps: list[tuple[int, int]] = []
    write_pack(
        path, manifest=manifest, base=base, ladder=ladder, ply_bytes=plies,
        extra_files={"tokenizer.bin": b"t"}, rung_bytes=rung_bytes, shard_bytes=shard_bytes,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    pack = Pack.open(path, verify=True)
    assert pack.base.keys() == base.keys()
    for name, array in base.items():
        assert pack.base[name].dtype == array.dtype
        np.testing.assert_array_equal(pack.base[name], array)
    np.testing.assert_array_equal(pack.ladder, ladder)
    seen: dict[int, int] = {}
    for rung in range(len(pack.manifest.rungs)):
        data = pack.read_rung(rung)
        for unit, bit, offset in zip(
            *(a.tolist() for a in pack.layout.plies_of(rung)), strict=True
        ):
            seen[unit] = seen.get(unit, 0) + 1
            assert bit == seen[unit]
            expected = plies(unit, bit).tobytes()
            assert data[offset : offset + len(expected)] == expected
    written = json.loads((path / "pliant.json").read_bytes())
    for key, value in manifest.items():
        assert written[key] == value
    assert pack.manifest == Manifest.from_json(pack.manifest.to_json())
    assert pack.manifest.to_json() == (path / "pliant.json").read_bytes()
    if len(ladder):
        assert steps[-1] == (steps[-1][1], int(pack.layout.payload[-1]))
    assert [file.name for file in path.parent.iterdir()] == ["pack"]


def parts(seed: int = 0, **arguments: Any) -> dict[str, Any]:
    manifest = random_manifest(**arguments)
    return {
        "manifest": manifest,
        "base": random_base(manifest, seed),
        "ladder": random_ladder(manifest, seed),
        "ply_bytes": random_plies(manifest, seed),
        "extra_files": {"tokenizer.bin": b"t"},
    }


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_random_pack(tmp_path / name, seed=5) for name in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


def test_default_sizes_of_rungs_and_shards(tmp_path: Path) -> None:
    path = write_random_pack(
        tmp_path / "pack", hidden=512, vocab=20_480, ffn=1024, layers=2, least=8, rung_bytes=None,
        embed_block_rows=1024,
    )  # fmt: skip
    pack = Pack.open(path)
    sizes = [shard.bytes for shard in pack.manifest.shards]
    total = sum(sizes)
    assert total > 12 * 2**20
    assert (pack.manifest.rungs.bytes <= 2**16).all()
    assert 0.2 < sizes[0] / total < 0.45  # 4 MiB at least
    assert all(3 * 2**20 < size < 6 * 2**20 for size in sizes)


@pytest.mark.parametrize("seam", ["ply_bytes", "progress"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupting_leaves_nothing(tmp_path: Path, seam: str, error: type[BaseException]) -> None:
    arguments = parts()
    calls = 0
    plies = arguments["ply_bytes"]

    def interrupt(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return plies(*_) if seam == "ply_bytes" else None

    arguments[seam] = interrupt
    with pytest.raises(error):
        write_pack(tmp_path / "pack", rung_bytes=4096, **arguments)
    assert calls == 3
    assert list(tmp_path.iterdir()) == []


def test_a_pack_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    write_pack(path, **parts(1))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(UsageError, match="is there: remove it, or say that it may be overwritten"):
        write_pack(path, **parts(2))
    broken = parts(2)
    broken["ply_bytes"] = lambda unit, bit: b""
    with pytest.raises(FormatError, match=r"ply 1 of unit \d+ has 0 bytes, not"):
        write_pack(path, overwrite=True, **broken)
    assert before == {file.name: file.read_bytes() for file in path.iterdir()}
    write_pack(path, overwrite=True, **parts(2))
    assert before != {file.name: file.read_bytes() for file in path.iterdir()}
    Pack.open(path, verify=True)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_pack_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pack"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there and is not a pack"):
        write_pack(path, overwrite=True, **parts())
    (path / "notes.txt").unlink()
    write_pack(path, **parts())  # an empty directory is taken
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"'notes.txt', no part of a pack, which would be lost"):
        write_pack(path, overwrite=True, **parts())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is there and is not a pack"):
        write_pack(tmp_path / "file", overwrite=True, **parts())
    with pytest.raises(UsageError, match="is not a directory: make it first"):
        write_pack(tmp_path / "no" / "pack", **parts())
    assert (tmp_path / "file").read_text() == "mine"
    assert (path / "notes.txt").read_text() == "mine"


def test_a_failed_rename_puts_the_old_pack_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pack"
    write_pack(path, **parts(1))
    before = (path / "pliant.json").read_bytes()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PackError, match="cannot be written: No space left on device"):
        write_pack(path, overwrite=True, **parts(2))
    assert (path / "pliant.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_space_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(PackError, match="has 9 bytes free, and the rungs alone need"):
        write_pack(tmp_path / "pack", **parts())


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda a: a["manifest"].update(rungs={}),
            UsageError,
            "`rungs` of the manifest is made by",
        ),
        (lambda a: a["manifest"].update(writer=3), FormatError, "writer is 3, and must be text"),
        (lambda a: a["manifest"]["model"].update(heads=0), FormatError, "model.heads is 0"),
        (lambda a: a.update(extra_files={}), UsageError, "tokenizer.bin is missing"),
        (lambda a: a["extra_files"].update({"../x": b""}), UsageError, "'../x' is not the name"),
        (
            lambda a: a["extra_files"].update({"base.safetensors": b""}),
            UsageError,
            "is not the name",
        ),
        (lambda a: a["base"].pop("tree"), FormatError, "the tensor tree is missing"),
        (lambda a: a["base"].update(x=np.ones(1)), FormatError, "a tensor 'x' is not expected"),
        (
            lambda a: a["base"].update(tree=np.ones(3)),
            FormatError,
            r"tree is float64 \[3\], and must",
        ),
        (lambda a: a["base"]["tree"].fill(np.nan), FormatError, "tree: NaN or infinity"),
        (lambda a: a.update(ladder=a["ladder"] + 1), FormatError, r"ladder names unit \d+"),
        (lambda a: a.update(ladder=a["ladder"].astype(int)), UsageError, "ladder is int64"),
        (lambda a: a.update(rung_bytes=0), UsageError, "rung_bytes is 0"),
        (lambda a: a.update(shard_bytes=0), UsageError, "shard_bytes is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_content_that_no_pack_may_have(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    arguments = parts()
    arguments["ladder"] = random_ladder(arguments["manifest"], least=8)
    arguments["ply_bytes"] = lambda unit, bit: pytest.fail("found too late")
    edit(arguments)
    with pytest.raises(error, match=message):
        write_pack(tmp_path / "pack", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_files_are_copied_from_paths(tmp_path: Path) -> None:
    (tmp_path / "source.json").write_bytes(b"{}" * 10)
    path = write_random_pack(
        tmp_path / "pack", extra_files={"tokenizer.json": tmp_path / "source.json"}
    )
    assert Pack.open(path).read_file("tokenizer.json") == b"{}" * 10
    with pytest.raises(PackError, match="cannot be written: No such file"):
        write_random_pack(tmp_path / "other", extra_files={"tokenizer.json": tmp_path / "none"})


def test_plain_packs_have_no_ladder(tmp_path: Path) -> None:
    pack = Pack.open(write_random_pack(tmp_path / "plain", coding="bf16"), verify=True)
    assert (len(pack.ladder), len(pack.units), pack.rungs_available) == (0, 0, 0)
    assert pack.base["embed.weight"].dtype == np.uint16
    assert pack.manifest.shards == ()
    assert pack.bytes_to_rungs(10**9) == 0
    assert np.isfinite(slow_matrix(pack.path, "embed")).all()
