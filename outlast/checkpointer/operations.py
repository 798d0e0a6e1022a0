"""What the rules ask of the state store: operations as values, and generators of them (`Steps`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from outlast.checkpointer import records

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A value read from the store. `data` is empty where there is none; `etag` is what a swap must show."""

    data: bytes = b""
    etag: str = ""


@dataclass(frozen=True)
class Get:
    """Read `keys`; the result is a `dict[str, Item]` that has all of them."""

    keys: Sequence[str]


@dataclass(frozen=True)
class Save:
    """Write `records`, whose keys nobody else writes. The result is None."""

    records: Sequence[tuple[str, bytes]]
    ttl: int | None = None


@dataclass(frozen=True)
class Create:
    """Write `value` at `key` if nothing is there. The result is False where something was, or where that is unclear."""

    key: str
    value: bytes


@dataclass(frozen=True)
class Swap:
    """Write `records`, then `value` at `key` if its ETag still is `etag`.

    The result is False where it no longer is, or where that is unclear: read the key back and look.
    """

    key: str
    value: bytes
    etag: str
    records: Sequence[tuple[str, bytes]] = ()


@dataclass(frozen=True)
class Whole:
    """Tell, without asking the store, whether a swap would be carried out whole or not at all. The result is a bool."""

    swap: Swap


@dataclass(frozen=True)
class Delete:
    """Remove `keys`, whether they are there or not. The result is None."""

    keys: Sequence[str]


@dataclass(frozen=True)
class Pause:
    """Wait for `seconds`. The result is None."""

    seconds: float


Operation = Get | Save | Create | Swap | Whole | Delete | Pause
Steps = Generator[Operation, Any, T]
"""A rule, written sans I/O: yields operations, is sent their results, returns a `T`."""


def load(keys: Sequence[str]) -> Steps[dict[str, bytes]]:
    """Read records by key, put together where they are stored in chunks. Absent ones are left out."""
    if not keys:
        return {}
    items: dict[str, Item] = yield Get(keys)
    parts = {key: records.chunk_keys(key, item.data) for key, item in items.items()}
    wanted = [name for names in parts.values() for name in names]
    chunks: dict[str, Item] = (yield Get(wanted)) if wanted else {}
    found: dict[str, bytes] = {}
    for key, item in items.items():
        if parts[key]:
            found[key] = records.join(key, item.data, {name: chunks[name].data for name in parts[key]})
        elif item.data:
            found[key] = item.data
    return found
