"""Pages of the KV cache that are kept because an answer may begin with the same tokens.

A page is found by a digest of all tokens up to its end, so that equal beginnings are equal pages:
a tree whose edges are pages, kept as a dictionary (as in Kwon et al., PagedAttention, SOSP 2023;
Zheng et al., SGLang, NeurIPS 2024). Pages that no answer uses stay until their memory is needed;
the least recently used go first, and always leaves before what they hang on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

__all__ = ["Prefixes", "page_keys"]


def page_keys(
    ids: array[int], page_tokens: int, depth: int, known: Sequence[bytes] = ()
) -> list[bytes]:
    """The digest of each whole page of `ids` (int32), over the depth and all tokens to its end.

    `depth`: the state (`Depth.state`) in which the pages are computed; those of another are others.
    `known`: digests of the first pages, which are not computed again. 128 bits of BLAKE2b: nobody
    can make two beginnings that are mistaken for one another.
    """
    keys = list(known)
    for start in range(len(keys) * page_tokens, len(ids) - page_tokens + 1, page_tokens):
        digest = hashlib.blake2b(keys[-1] if keys else b"%d" % depth, digest_size=16)
        digest.update(ids[start : start + page_tokens].tobytes())
        keys.append(digest.digest())
    return keys


class _Entry:
    __slots__ = ("page", "users")

    def __init__(self, page: int) -> None:
        self.page = page
        self.users = 1


class Prefixes:
    """Counts who uses which page. Belongs to the cache; `count` and `idle` are for any thread.

    It has one count on each of its pages in the cache itself, and gives it back with `drop`; before
    that, `keep` is told which pages go, those that are used next last. An
    answer that uses a page uses all pages before it too, and releases the last first: so the order
    in which pages fell idle has leaves before what they hang on.
    """

    __slots__ = ("_drop", "_entries", "_idle", "_keep")

    def __init__(
        self,
        drop: Callable[[list[int]], None],
        keep: Callable[[list[tuple[bytes, int]]], None] = lambda pages: None,
    ) -> None:
        self._drop = drop
        self._keep = keep
        self._entries: dict[bytes, _Entry] = {}
        self._idle: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def idle(self) -> int:
        """Pages that no answer uses."""
        return len(self._idle)

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, from the first on, are there."""
        found = 0
        while found < len(keys) and keys[found] in self._entries:
            found += 1
        return found

    def idle_among(self, keys: Sequence[bytes]) -> int:
        """How many of these pages nobody uses."""
        return sum(key in self._idle for key in keys)

    def acquire(self, keys: Sequence[bytes]) -> list[int]:
        """Use pages that are there; returns their numbers."""
        pages = []
        for key in keys:
            entry = self._entries[key]
            entry.users += 1
            self._idle.pop(key, None)
            pages.append(entry.page)
        return pages

    def pages(self, keys: Sequence[bytes]) -> list[int]:
        """The numbers of pages that are there."""
        return [self._entries[key].page for key in keys]

    def insert(self, key: bytes, page: int) -> bool:
        """Keep a page that the caller uses and has held for it. False if there is one already that
        is used, by the caller too from now on, instead of having its own kept; one that is idle may
        be shallower, and goes."""
        entry = self._entries.get(key)
        if entry is not None and entry.users:
            self.acquire([key])
            return False
        if entry is not None:
            del self._idle[key]
            self._drop([entry.page])
        self._entries[key] = _Entry(page)
        return True

    def release(self, keys: Sequence[bytes]) -> None:
        """The end of a use of all these, which are in order."""
        for key in reversed(keys):
            entry = self._entries[key]
            entry.users -= 1
            if not entry.users:
                self._idle[key] = entry

    def idle_pages(self) -> list[int]:
        """The numbers of the pages that no answer uses."""
        return [entry.page for entry in self._idle.values()]

    def evict(self, pages: int) -> int:
        """Give back up to `pages` idle pages; returns how many."""
        given: list[tuple[bytes, int]] = []
        while self._idle and len(given) < pages:
            key, entry = self._idle.popitem(last=False)
            del self._entries[key]
            given.append((key, entry.page))
        if given:
            self._keep(given)
            self._drop([page for _, page in given])
        return len(given)
