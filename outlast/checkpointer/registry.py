"""Registries: lists of names that grow for ever (threads, runs), and sets that stay small (runs not yet ended).

Dapr cannot list keys, so every name is entered here. Each registry is cut into shards, so that writers seldom meet,
and each shard keeps a page of names in its cell and seals full pages: an entry costs the same however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.client import Save, Steps, load

_PAGE: Final = 64


class Registry:
    """A list of names that only grows; entering one twice is harmless.

    Args:
        name: Which registry, part of its keys.
        shards: How many cells share the load; never change it for an existing store.
    """

    def __init__(self, name: str, shards: int = 16) -> None:
        self._name = name
        self._shards = shards
        self._names = keys.RecordNames()

    def _key(self, shard: int) -> str:
        return f"g-{self._name}-{shard}"

    def _shard_of(self, name: str) -> str:
        return self._key(int(keys.digest(name), 36) % self._shards)

    def add(self, name: str) -> Steps[None]:
        """Enter `name`."""
        key = self._shard_of(name)
        known: tuple[Any, str] | None = yield from cells.read(key, records.REGISTRY)
        body = known[0] if known else None
        if body is not None and len(body["open"]) >= _PAGE:
            # The sealed page is written before any cell points to it; a lost race leaves it unreachable.
            page = self._names.next()
            data = records.encode(records.PAGE, {"names": body["open"], "before": body["before"]})
            yield Save([(f"{key}-{page}", data)])
            sealed = body["open"]

            def seal(now: Any) -> Any:
                return {"open": [], "before": page} if now["open"] == sealed else None

            yield from cells.update(key, records.REGISTRY, seal)
            known = None

        def enter(now: Any) -> Any:
            now = now or {"open": [], "before": None}
            return None if name in now["open"] else {**now, "open": [*now["open"], name]}

        yield from cells.update(key, records.REGISTRY, enter, known)

    def names(self) -> Steps[list[str]]:
        """Return all names, oldest first within a shard, each once."""
        seen: dict[str, None] = {}
        shard_keys = [self._key(shard) for shard in range(self._shards)]
        bodies = yield from cells.read_many(shard_keys, records.REGISTRY)
        for key, body in bodies.items():
            pages = [body["open"]]
            before = body["before"]
            while before:
                name = f"{key}-{before}"
                page = records.decode(name, records.PAGE, (yield from load([name])).get(name, b""))
                pages.append(page["names"])
                before = page["before"]
            seen.update(dict.fromkeys(_flat(reversed(pages))))
        return list(seen)


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


def _flat(pages: Iterator[list[str]]) -> Iterator[str]:
    for page in pages:
        yield from page


THREADS: Final = Registry("threads")
RUNS: Final = Registry("runs")
ACTIVE: Final = ActiveSet("active")
WORKERS: Final = ActiveSet("workers", shards=4)
