"""The items of the long-term store: one cell each, swapped with the ETag it was read with. Sans I/O.

A cell holds a small value itself and names the record of a large one, and of the vectors; those records are written
once, before the cell, and deleted after the cell has moved on. The cell alone decides whether an item exists and
whether it has expired. A deleted item leaves a small tombstone, because some stores hand out the same ETags again after
a delete; for the same reason, and because reads can extend it, the time to live is never left to the store.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import ormsgpack
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.store.base import Item

from outlast.checkpointer import keys, records
from outlast.checkpointer.client import Create, Delete, Get, Pause, Save, StateClient, Steps, Swap, load
from outlast.checkpointer.store_index import Index, Namespace, Place
from outlast.errors import CorruptRecordError, OutlastError, RecordTooLargeError, SerializationError, StoreError

_INLINE: Final = 16_000
_NAME_BYTES: Final = 60_000
_RECENT: Final = 3
_TRIES: Final = 200
_REFRESH: Final = 1.0
"""Seconds by which an expiry must move for a read to write it."""

Vector = Sequence[float]
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
        return [*_record_keys(self.body), *self.body["o"]] if self.body else []

    def item(self, value: dict[str, Any]) -> Item:
        namespace, name = self.ref
        return Item(value=value, key=name, namespace=namespace, **self.times())

    def times(self) -> dict[str, datetime]:
        return {
            "created_at": datetime.fromtimestamp(self.body["c"], UTC),
            "updated_at": datetime.fromtimestamp(self.body["u"], UTC),
        }


class Items:
    """Reads and writes items, and keeps the index in step.

    Args:
        client: The store.
        serde: Serialises values and vectors.
        index: Where items are entered.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, client: StateClient, serde: SerializerProtocol, index: Index, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._serde = serde
        self._index = index
        self._clock = clock
        self._names = keys.RecordNames()

    def draft(
        self, namespace: Namespace, name: str, value: Any, vectors: Sequence[Vector] = (), ttl: float | None = None
    ) -> Draft:
        """Serialise a put, or with `value` None a delete.

        Raises:
            SerializationError: If the value cannot be serialised.
            RecordTooLargeError: If namespace and key are too long for a record.
        """
        if sum(len(part.encode("utf-8", "surrogatepass")) for part in (*namespace, name)) > _NAME_BYTES:
            raise RecordTooLargeError(
                f"namespace and key of an item may have {_NAME_BYTES} bytes together: put long text in the value"
            )
        if value is None:
            return Draft(namespace, name, None)
        packed = _pack_vectors(vectors) if vectors else None
        return Draft(
            namespace, name, self._dumps(dict(value)), self._dumps(packed) if packed is not None else None, ttl
        )

    def _dumps(self, value: Any) -> tuple[str, bytes]:
        try:
            return self._serde.dumps_typed(value)
        except OutlastError:
            raise
        except Exception as error:
            raise SerializationError(
                f"cannot serialise the value of an item: {error}. Keep plain data, messages, pydantic models or "
                "dataclasses in it, or give the store a `serde` that knows this type"
            ) from error

    # --- reading

    def read(self, cells: Iterable[str]) -> Steps[dict[str, Stored]]:
        """Return the cells of items."""
        wanted = list(dict.fromkeys(cells))
        items = (yield Get(wanted)) if wanted else {}
        return {
            key: Stored(key, records.decode(key, records.ITEM, item.data) if item.data else None, item.etag)
            for key, item in items.items()
        }

    def contents(self, rows: Iterable[Stored], part: str) -> Steps[dict[str, tuple[Stored, Any]]]:
        """Return the values (`VALUE`) or the vectors (`VECTORS`, a list) of items that exist, by cell.

        An item that was overwritten meanwhile comes with its newer cell; one that is gone is left out.
        """
        now = self._clock()
        todo = {row.cell: row for row in rows}
        for _ in range(_TRIES):
            refs = {cell: row.body[part] for cell, row in todo.items()}
            try:
                found = yield from load([ref[0] for ref in refs.values() if ref and not isinstance(ref[1], bytes)])
            except CorruptRecordError as corrupt:
                found, failure = {}, corrupt
            else:
                lacking = [ref[0] for ref in refs.values() if ref and isinstance(ref[1], int) and ref[0] not in found]
                if not lacking:
                    return {cell: (row, self._unpack(part, _typed(refs[cell], found))) for cell, row in todo.items()}
                failure = CorruptRecordError(f"record {lacking[0]!r} is missing; restore it from a backup")
            again = yield from self.read(todo)
            if all(again[cell].body == row.body for cell, row in todo.items()):
                raise failure
            todo = {cell: row for cell, row in again.items() if row.live(now)}
        raise StoreError("items are overwritten faster than they can be read")

    def _unpack(self, part: str, typed: tuple[str, bytes] | None) -> Any:
        value = None if typed is None else self._serde.loads_typed(typed)
        return value if part == VALUE else _unpack_vectors(value)

    # --- writing

    def write(self, drafts: Sequence[Draft]) -> Steps[None]:
        """Carry out puts and deletes, each of another item, in order."""
        known = yield from self.read(draft.cell for draft in drafts)
        now = self._clock()
        new: dict[Namespace, list[str]] = {}
        records_of: dict[str, list[tuple[str, bytes]]] = {}
        bodies: dict[str, dict[str, Any]] = {}
        for draft in drafts:
            if draft.value is not None:
                bodies[draft.cell], records_of[draft.cell] = self._body(draft)
                if not known[draft.cell].live(now):
                    new.setdefault(draft.namespace, []).append(draft.cell)
        # Records of items to be created cannot share a transaction with the cell; those of others go with its swap.
        early = [pair for cell, pairs in records_of.items() if known[cell].body is None for pair in pairs]
        if early:
            yield Save(early)
        places: dict[str, Place] = {}
        for namespace, item_cells in new.items():
            places.update((yield from self._index.enter(namespace, item_cells)))
        garbage: list[str] = []
        left: list[Place] = []
        for draft in drafts:
            write = _Write(
                draft, bodies.get(draft.cell, {}), records_of.get(draft.cell, []), known[draft.cell], self._names.next()
            )
            yield from self._settle(write, places.get(draft.cell), garbage, left)
        yield from self._clear(garbage, left)

    def _settle(self, write: _Write, place: Place | None, garbage: list[str], left: list[Place]) -> Steps[None]:
        """Swap one cell; adds the records and entries that are of no use any more to `garbage` and `left`."""
        draft, stored = write.draft, write.known
        tried = [place] if place else []
        for attempt in range(_TRIES):
            if attempt:
                stored = (yield from self.read([draft.cell]))[draft.cell]
                if stored.body is not None and write.name in stored.body["r"]:
                    # It went through; only its acknowledgement was lost.
                    left += [tried_one for tried_one in tried if tried_one.token != stored.body["t"]]
                    return
                if attempt > 2:
                    yield Pause(random.uniform(0, min(0.002 * attempt, 0.1)))
            now = self._clock()
            if draft.value is None:
                if not stored.written:
                    return
                body = _tombstone(stored, write.name)
            else:
                keeps = stored.live(now)
                if not keeps and place is None:
                    place = (yield from self._index.enter(draft.namespace, [draft.cell]))[draft.cell]
                    tried.append(place)
                body = write.over(stored, stored.place if keeps else place, now)
            data = records.encode(records.ITEM, body)
            if stored.body is None:
                done = yield Create(draft.cell, data)
            else:
                done = yield Swap(draft.cell, data, stored.etag, write.records)
            if done:
                garbage += stored.records()
                left += [tried_one for tried_one in tried if tried_one.token != body["t"]]
                if stored.written and (draft.value is None or stored.place.token != body["t"]):
                    left.append(stored.place)
                return
            # Its entry may be taken for a leftover from now on: another try needs another one.
            place = None
        raise StoreError(f"item {draft.name!r} of {draft.namespace!r} could not be written in {_TRIES} tries")

    def _body(self, draft: Draft) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
        """Return the parts of a cell that are of the put alone, and the records it needs."""
        pairs: list[tuple[str, bytes]] = []
        assert draft.value is not None
        value: list[Any] = list(draft.value)
        if len(draft.value[1]) > _INLINE:
            value = self._record(draft, draft.value, pairs)
        vectors = self._record(draft, draft.vectors, pairs) if draft.vectors else None
        body = {"n": list(draft.namespace), "k": draft.name, VALUE: value, VECTORS: vectors, "m": draft.ttl}
        return body, pairs

    def _record(self, draft: Draft, typed: tuple[str, bytes], pairs: list[tuple[str, bytes]]) -> list[Any]:
        key = f"{draft.cell}-{self._names.next()}"
        limit = self._client.capabilities.quirks.max_value
        parts = list(records.split(key, records.encode(records.VALUE, list(typed)), limit))
        pairs += parts
        return [key, len(parts) - 1]

    def _clear(self, garbage: Sequence[str], left: Sequence[Place]) -> Steps[None]:
        if garbage:
            yield Delete(list(dict.fromkeys(garbage)))
        yield from self._index.leave(left)

    def refresh(self, rows: Iterable[Stored]) -> Steps[None]:
        """Begin the time to live of items anew."""
        for row in rows:
            stored = row
            for _ in range(_TRIES):
                now = self._clock()
                if not stored.live(now) or stored.body["m"] is None:
                    break
                expires = now + stored.body["m"] * 60
                if stored.body["e"] is not None and expires - stored.body["e"] < _REFRESH:
                    break
                data = records.encode(records.ITEM, {**stored.body, "e": expires})
                if (yield Swap(stored.cell, data, stored.etag)):
                    break
                stored = (yield from self.read([stored.cell]))[stored.cell]

    def clear(self, stale: Sequence[tuple[Stored, Place]]) -> Steps[int]:
        """Delete items that have expired, and what deletes that were cut short have left behind.

        Args:
            stale: Cells with the place of an entry that led there and is of no use any more, unless the cell has
                changed since it was read.

        Returns:
            How many expired items were deleted.
        """
        garbage: list[str] = []
        left: list[Place] = []
        count = 0
        for stored, place in stale:
            if stored.written and stored.place == place:
                data = records.encode(records.ITEM, _tombstone(stored, self._names.next()))
                if not (yield Swap(stored.cell, data, stored.etag)):
                    continue  # somebody was faster, or will be next time
                count += 1
                garbage += stored.records()
            elif not stored.written:
                garbage += stored.records()
            left.append(place)
        yield from self._clear(garbage, left)
        return count


@dataclass(frozen=True)
class _Write:
    """One put or delete under way. `name` marks the cells it has written."""

    draft: Draft
    body: dict[str, Any]
    records: list[tuple[str, bytes]]
    known: Stored
    name: str

    def over(self, stored: Stored, place: Place | None, now: float) -> dict[str, Any]:
        """Return the cell that follows `stored`, of an item entered at `place`."""
        assert place is not None
        same_life = stored.written and stored.place == place
        return {
            **self.body,
            "p": place.page,
            "t": place.token,
            "c": stored.body["c"] if same_life else now,
            "u": now,
            "e": now + self.draft.ttl * 60 if self.draft.ttl is not None else None,
            "o": _record_keys(stored.body),
            "r": _recent(stored, self.name),
        }


def _tombstone(stored: Stored, name: str) -> dict[str, Any]:
    return {"d": True, "t": stored.body["t"], "o": _record_keys(stored.body), "r": _recent(stored, name)}


def _recent(stored: Stored, name: str) -> list[str]:
    return [*(stored.body["r"] if stored.body else ()), name][-_RECENT:]


def _record_keys(body: Any) -> list[str]:
    found: list[str] = []
    for part in (VALUE, VECTORS):
        ref = body.get(part) if body else None
        if ref and isinstance(ref[1], int):
            found += [*(f"{ref[0]}-c{number}" for number in range(ref[1])), ref[0]]
    return found


def _typed(ref: Any, found: dict[str, bytes]) -> tuple[str, bytes] | None:
    if not ref:
        return None
    if isinstance(ref[1], bytes):
        return ref[0], ref[1]
    kind, data = records.decode(ref[0], records.VALUE, found[ref[0]])
    return kind, data


def _pack_vectors(vectors: Sequence[Vector]) -> bytes:
    """Return vectors as bytes: 4 a number where that loses nothing (most models give such), else 8."""
    packed = []
    for vector in vectors:
        try:
            data = struct.pack(f"<{len(vector)}f", *vector)
            exact = struct.unpack(f"<{len(vector)}f", data) == tuple(vector)
        except OverflowError:
            exact = False
        packed.append(["f", data] if exact else ["d", struct.pack(f"<{len(vector)}d", *vector)])
    return ormsgpack.packb(packed)


def _unpack_vectors(data: bytes | None) -> list[Vector]:
    if data is None:
        return []
    return [
        struct.unpack(f"<{len(raw) // (4 if code == 'f' else 8)}{code}", raw) for code, raw in ormsgpack.unpackb(data)
    ]
