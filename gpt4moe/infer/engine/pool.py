"""Who owns which page of the key/value cache, and which pages hold a beginning that another request has too.

In: requests for pages, and a name of what a full page holds. Out: page numbers. The pages themselves are on the device;
this is bookkeeping on the host. A page is empty, used (by one row or by several that begin alike), or cached: nobody
uses it, but what it holds has a name, and it is found again until it must make room.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from gpt4moe.config.check import require_count


class PagePool:
    """Counts the users of every page; `sharing` False gives no page a name."""

    def __init__(self, num_pages: int, *, sharing: bool = True):
        require_count("num_pages", num_pages)
        self.num_pages, self.sharing = num_pages, sharing
        self._empty = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._name_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()  # least recently used first

    @property
    def num_used(self) -> int:
        """Pages that rows use."""
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and that hold something with a name."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `take` can give: empty or cached."""
        return len(self._empty) + len(self._cached)

    def take(self) -> int | None:
        """An empty page for one user, if need be the cached one that was used longest ago; None where all are used."""
        if self._empty:
            page = self._empty.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._users[page] = 1
        return page

    def share(self, names: Iterable[bytes]) -> list[int]:
        """The pages that hold these names from the first on, as far as there are any, with one user more each."""
        pages = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            self._cached.pop(page, None)
            self._users[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, name: bytes) -> None:
        """Gives what a used page holds a name; it keeps none where another page has the name already."""
        if self.sharing and self._name_of[page] is None and name not in self._page_of:
            self._page_of[name], self._name_of[page] = page, name

    def release(self, pages: Sequence[int]) -> None:
        """Takes one user off each page of a row, in the row's order: the last of them is the first to make room."""
        for page in reversed(pages):
            assert self._users[page] > 0, f"page {page} has no user"
            self._users[page] -= 1
            if self._users[page] == 0 and self._name_of[page] is None:
                self._empty.append(page)
            elif self._users[page] == 0:
                self._cached[page] = None

    def _forget(self, page: int) -> None:
        del self._page_of[self._name_of[page]]
        self._name_of[page] = None


def page_names(
    tokens: Sequence[int], page_size: int, seen: Sequence[tuple[int, bytes]] = (), known: Sequence[bytes] = ()
) -> list[bytes]:
    """A name for each full page of `tokens`, of what it holds and of everything before it; without the `known` ones.

    seen: (place, digest) of the pictures; from its place on, a picture is part of what the tokens are.
    """
    names, name = [], known[-1] if known else b""
    for start in range(len(known) * page_size, len(tokens) - page_size + 1, page_size):
        end = start + page_size
        pictures = b"".join(digest for place, digest in seen if start <= place < end)
        held = np.asarray(tokens[start:end], np.int64).tobytes()
        name = hashlib.blake2b(name + held + pictures, digest_size=16).digest()
        names.append(name)
    return names
