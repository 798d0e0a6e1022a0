"""Registries: lists of names that grow for ever (threads, runs), and sets that stay small (runs not yet ended).

Dapr cannot list keys, so every name is entered here. Each registry is cut into shards, so that writers seldom meet,
and each shard keeps a page of names in its cell and seals full pages: an entry costs the same however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.client import Create, Steps, load

_PAGE: Final = 64
_BYTES: Final = 12_000
"""Bytes of names after which a page is sealed earlier, so that a cell fits every store as text, compressed or not."""


class Registry:
    """A list of names that only grows; entering one twice is harmless.

    Args:
        name: Which registry, part of its keys.
        shards: How many cells share the load; never change it for an existing store.
    """

    def __init__(self, name: str, shards: int = 16) -> None:
        self._name = name
        self._shards = shards

    def _key(self, shard: int) -> str:
        return f"g-{self._name}-{shard}"

    def _shard_of(self, name: str) -> str:
        return self._key(int(keys.digest(name), 36) % self._shards)

    def add(self, name: str) -> Steps[None]:
        """Enter `name`."""
        key = self._shard_of(name)
        known: tuple[Any, str] | None = yield from cells.read(key, records.REGISTRY)
        body = known[0] if known else None
        if body is not None and _full(body["open"]):
            yield from self._seal(key, body)
            known = None

        def enter(now: Any) -> Any:
            now = now or {"open": [], "pages": 0}
            return None if name in now["open"] else {**now, "open": [*now["open"], name]}

        yield from cells.update(key, records.REGISTRY, enter, known)

    def _seal(self, key: str, body: Any) -> Steps[None]:
        """Move the names of a cell to its next page.

        Whoever creates the page says what is in it, and it has its place before the cell counts it: whoever is killed
        in between leaves nothing, the next one goes on from there.
        """
        page, number = _page_key(key, body["pages"]), body["pages"]
        yield Create(page, records.encode(records.PAGE, {"names": body["open"]}))
        sealed = frozenset((yield from _names(page)))

        def seal(now: Any) -> Any:
            if now["pages"] != number:
                return None
            return {"open": [name for name in now["open"] if name not in sealed], "pages": number + 1}

        yield from cells.update(key, records.REGISTRY, seal)

    def names(self) -> Steps[list[str]]:
        """Return all names, oldest first within a shard, each once."""
        seen: dict[str, None] = {}
        bodies = yield from cells.read_many(self._shard_keys(), records.REGISTRY)
        for key, body in bodies.items():
            for number in range(body["pages"]):
                seen.update(dict.fromkeys((yield from _names(_page_key(key, number)))))
            seen.update(dict.fromkeys(body["open"]))
        return list(seen)

    def keys(self) -> Steps[list[str]]:
        """Return the keys of all records of this registry."""
        bodies = yield from cells.read_many(self._shard_keys(), records.REGISTRY)
        # A page may be there that its cell does not count yet.
        return [
            *bodies,
            *(_page_key(key, number) for key, body in bodies.items() for number in range(body["pages"] + 1)),
        ]

    def _shard_keys(self) -> list[str]:
        return [self._key(shard) for shard in range(self._shards)]


def _page_key(cell: str, number: int) -> str:
    return f"{cell}-p{number}"


def _names(page: str) -> Steps[list[str]]:
    body = records.decode(page, records.PAGE, (yield from load([page])).get(page, b""))
    return records.build(page, lambda: list(body["names"]))


def _full(names: Sequence[str]) -> bool:
    return len(names) >= _PAGE or sum(len(name.encode("utf-8", "surrogatepass")) for name in names) >= _BYTES


class ActiveSet:
    """A set of names, each with a small value, that are removed again.

    Args:
        name: Which set, part of its keys.
        shards: How many cells share the load; never change it for an existing store.
    """

    def __init__(self, name: str, shards: int = 16) -> None:
        self._name = name
        self._shards = shards

    def _key_of(self, name: str) -> str:
        return f"a-{self._name}-{int(keys.digest(name), 36) % self._shards}"

    def put(self, name: str, value: Any) -> Steps[None]:
        """Enter `name`, or give it another value."""

        def enter(now: Any) -> Any:
            return None if now is not None and now.get(name) == value else {**(now or {}), name: value}

        yield from cells.update(self._key_of(name), records.REGISTRY, enter)

    def discard(self, name: str) -> Steps[None]:
        """Remove `name` if it is there."""

        def leave(now: Any) -> Any:
            return {k: v for k, v in now.items() if k != name} if now and name in now else None

        yield from cells.update(self._key_of(name), records.REGISTRY, leave)

    def items(self) -> Steps[dict[str, Any]]:
        """Return all names with their values."""
        shard_keys = [f"a-{self._name}-{shard}" for shard in range(self._shards)]
        bodies = yield from cells.read_many(shard_keys, records.REGISTRY)
        return {name: value for body in bodies.values() for name, value in body.items()}


THREADS: Final = Registry("threads")
RUNS: Final = Registry("runs")
ACTIVE: Final = ActiveSet("active")
WORKERS: Final = ActiveSet("workers", shards=4)
