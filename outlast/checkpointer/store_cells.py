"""The cell of an item of the long-term store: what is in it, and what follows it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from langgraph.store.base import Item

from outlast.checkpointer import keys, records
from outlast.checkpointer.store_index import Namespace, Place

_RECENT: Final = 3

VALUE, VECTORS = "b", "x"


def item_key(namespace: Namespace, name: str) -> str:
    """Return the key of an item's cell; the keys of its records start with it."""
    return f"m-{keys.digest(*namespace, name)}"


@dataclass(frozen=True)
class Draft:
    """A put, serialised: nothing of it can fail any more for what the user gave. `value` is None for a delete."""

    namespace: Namespace
    name: str
    value: tuple[str, bytes] | None
    vectors: tuple[str, bytes] | None = None
    ttl: float | None = None

    @property
    def cell(self) -> str:
        return item_key(self.namespace, self.name)


@dataclass(frozen=True)
class Stored:
    """The cell of an item as it was read. `body` is None where nothing ever was."""

    cell: str
    body: Any
    etag: str

    @property
    def written(self) -> bool:
        """Whether there is an item, expired or not."""
        return self.body is not None and not self.body.get("d")

    def live(self, now: float) -> bool:
        """Whether there is an item that has not expired."""
        return self.written and (self.body["e"] is None or now < self.body["e"])

    @property
    def place(self) -> Place:
        """Where the item is entered."""
        return Place(self.body["p"], self.body["t"])

    @property
    def ref(self) -> tuple[Namespace, str]:
        """Namespace and key."""
        return tuple(self.body["n"]), self.body["k"]

    def records(self) -> list[str]:
        """The keys of the records that this cell, or the one before it, needed."""
        return [*record_keys(self.body), *self.body["o"]] if self.body else []

    def item(self, value: dict[str, Any]) -> Item:
        namespace, name = self.ref
        return Item(value=value, key=name, namespace=namespace, **self.times())

    def times(self) -> dict[str, datetime]:
        return {
            "created_at": datetime.fromtimestamp(self.body["c"], UTC),
            "updated_at": datetime.fromtimestamp(self.body["u"], UTC),
        }


def is_of(stored: Stored, place: Place) -> bool:
    """Tell whether the entry at `place` is of the life of the item that the cell is about, or was."""
    return stored.body is not None and stored.body["t"] == place.token


def tombstone(stored: Stored, name: str) -> dict[str, Any]:
    return {"d": True, "t": stored.body["t"], "o": record_keys(stored.body), "r": recent(stored, name)}


def recent(stored: Stored, name: str) -> list[str]:
    return [*(stored.body["r"] if stored.body else ()), name][-_RECENT:]


def record_keys(body: Any) -> list[str]:
    found: list[str] = []
    for part in (VALUE, VECTORS):
        ref = body.get(part) if body else None
        if ref and isinstance(ref[1], int):
            found += [*(f"{ref[0]}-c{number}" for number in range(ref[1])), ref[0]]
    return found


def typed_of(ref: Any, found: dict[str, bytes]) -> tuple[str, bytes] | None:
    if not ref:
        return None
    if isinstance(ref[1], bytes):
        return ref[0], ref[1]
    kind, data = records.decode(ref[0], records.VALUE, found[ref[0]])
    return kind, data
