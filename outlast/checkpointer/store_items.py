"""The items of the long-term store: one cell each, swapped with the ETag it was read with. Sans I/O.

A cell holds a small value itself and names the record of a large one, and of the vectors; those records are written
once, before the cell, and deleted after the cell has moved on. The cell alone decides whether an item exists and
whether it has expired. A deleted item leaves a small tombstone, because some stores hand out the same ETags again after
a delete; for the same reason, and because reads can extend it, the time to live is never left to the store.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from langgraph.checkpoint.serde.base import SerializerProtocol

from outlast.checkpointer import keys, records
from outlast.checkpointer.client import Create, Delete, Get, Pause, Save, StateClient, Steps, Swap, load
from outlast.checkpointer.store_cells import (
    VALUE,
    VECTORS,
    Draft,
    Stored,
    is_of,
    recent,
    record_keys,
    tombstone,
    typed_of,
)
from outlast.checkpointer.store_index import Index, Namespace, Place
from outlast.checkpointer.store_vectors import Vector, pack, unpack
from outlast.errors import CorruptRecordError, OutlastError, RecordTooLargeError, SerializationError, StoreError

_INLINE: Final = 16_000
_NAME_BYTES: Final = 60_000
_TRIES: Final = 200
_REFRESH: Final = 1.0
"""Seconds by which an expiry must move for a read to write it."""

_OF_VECTORS: Final = "-x"


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
        packed = pack(vectors) if vectors else None
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
                    return {cell: (row, self._unpack(part, typed_of(refs[cell], found))) for cell, row in todo.items()}
                failure = CorruptRecordError(f"record {lacking[0]!r} is missing; restore it from a backup")
            again = yield from self.read(todo)
            if all(again[cell].body == row.body for cell, row in todo.items()):
                raise failure
            todo = {cell: row for cell, row in again.items() if row.live(now)}
        raise StoreError("items are overwritten faster than they can be read")

    def _unpack(self, part: str, typed: tuple[str, bytes] | None) -> Any:
        value = None if typed is None else self._serde.loads_typed(typed)
        return value if part == VALUE else unpack(value)

    # --- writing

    def write(self, drafts: Sequence[Draft]) -> Steps[None]:
        """Carry out puts and deletes, each of another item, in order."""
        known = yield from self.read(draft.cell for draft in drafts)
        now = self._clock()
        writes = [_Write(draft, self._names.next()) for draft in drafts]
        new: dict[Namespace, list[_Write]] = {}
        for write in writes:
            if write.draft.value is not None and not known[write.draft.cell].live(now):
                new.setdefault(write.draft.namespace, []).append(write)
        for namespace, entering in new.items():
            places = yield from self._index.enter(namespace, [write.draft.cell for write in entering])
            for write in entering:
                write.enter(places[write.draft.cell])
        for write in writes:
            if write.draft.value is not None:
                self._prepare(write)
        # Records of items to be created cannot share a transaction with the cell; those of others go with its swap.
        early = [pair for write in writes if known[write.draft.cell].body is None for pair in write.records]
        if early:
            yield Save(early)
        garbage: list[str] = []
        left: list[Place] = []
        for write in writes:
            yield from self._settle(write, known[write.draft.cell], garbage, left)
        yield from self._clear(garbage, left)

    def _settle(self, write: _Write, stored: Stored, garbage: list[str], left: list[Place]) -> Steps[None]:
        """Swap one cell; adds the records and entries that are of no use any more to `garbage` and `left`."""
        draft = write.draft
        for attempt in range(_TRIES):
            if attempt:
                stored = (yield from self.read([draft.cell]))[draft.cell]
                if stored.body is not None and write.name in stored.body["r"]:
                    # It went through; only its acknowledgement was lost.
                    write.tidy(stored.body, garbage, left)
                    return
                if attempt > 2:
                    yield Pause(random.uniform(0, min(0.002 * attempt, 0.1)))
                if draft.value is not None:
                    # The last try may have gone through and been overwritten since: what it wrote counts as a leftover.
                    write.place = None
                    if not stored.live(self._clock()):
                        places = yield from self._index.enter(draft.namespace, [draft.cell])
                        write.enter(places[draft.cell])
                    self._prepare(write)
                    if write.records and stored.body is None:
                        yield Save(write.records)
            now = self._clock()
            if draft.value is None:
                if not stored.written:
                    return
                body = tombstone(stored, write.name)
            else:
                place = stored.place if stored.live(now) else write.place
                if place is None:
                    place = (yield from self._index.enter(draft.namespace, [draft.cell]))[draft.cell]
                    write.enter(place)
                body = write.over(stored, place, now)
            data = records.encode(records.ITEM, body)
            if stored.body is None:
                done = yield Create(draft.cell, data)
            else:
                done = yield Swap(draft.cell, data, stored.etag, write.records)
            if done:
                garbage += stored.records()
                write.tidy(body, garbage, left)
                if stored.written and (draft.value is None or stored.place.token != body["t"]):
                    left.append(stored.place)
                return
        raise StoreError(f"item {draft.name!r} of {draft.namespace!r} could not be written in {_TRIES} tries")

    def _prepare(self, write: _Write) -> None:
        """Give a put records of its own, under names that nothing has yet.

        Those of an item to be created are named after its entry in the index, by which they are found if the writer
        dies before it has written the cell.
        """
        draft, pairs = write.draft, list[tuple[str, bytes]]()
        assert draft.value is not None
        name = write.place.token if write.place else self._names.next()
        value: list[Any] = list(draft.value)
        if len(draft.value[1]) > _INLINE:
            value = self._record(f"{draft.cell}-{name}", draft.value, pairs)
        vectors = self._record(f"{draft.cell}-{name}{_OF_VECTORS}", draft.vectors, pairs) if draft.vectors else None
        write.body = {"n": list(draft.namespace), "k": draft.name, VALUE: value, VECTORS: vectors, "m": draft.ttl}
        write.records = pairs
        write.keys += [key for key, _ in pairs]

    def _record(self, key: str, typed: tuple[str, bytes], pairs: list[tuple[str, bytes]]) -> list[Any]:
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
        """Delete items that have expired, and what deletes and puts that were cut short have left behind.

        Args:
            stale: Cells with the place of an entry that led there and is of no use any more, unless the cell has
                changed since it was read.

        Returns:
            How many expired items were deleted.
        """
        garbage: list[str] = []
        left: list[Place] = []
        count = 0
        begun = yield from self._begun([(stored, place) for stored, place in stale if not is_of(stored, place)])
        for stored, place in stale:
            if stored.written and stored.place == place:
                data = records.encode(records.ITEM, tombstone(stored, self._names.next()))
                if not (yield Swap(stored.cell, data, stored.etag)):
                    continue  # somebody was faster, or will be next time
                count += 1
                garbage += stored.records()
            elif not stored.written:
                garbage += stored.records()
            under_way = not stored.written and not is_of(stored, place)
            if (place in begun or under_way) and not (yield from self._fence(stored)):
                continue
            garbage += begun.get(place, ())
            left.append(place)
        yield from self._clear(garbage, left)
        return count

    def _begun(self, stale: Sequence[tuple[Stored, Place]]) -> Steps[dict[Place, list[str]]]:
        """Return the keys of the records of puts that have entered their item and not written its cell."""
        roots = {f"{stored.cell}-{place.token}{part}": place for stored, place in stale for part in ("", _OF_VECTORS)}
        items = (yield Get(list(roots))) if roots else {}
        found: dict[Place, list[str]] = {}
        for key, item in items.items():
            if item.data:
                found.setdefault(roots[key], []).extend([*records.chunk_keys(key, item.data), key])
        return found

    def _fence(self, stored: Stored) -> Steps[bool]:
        """Change a cell, so that whoever has read it before does not write it any more, but begins anew."""
        name = self._names.next()
        if stored.body is None:
            body = {"d": True, "t": "", "o": [], "r": [name]}
            done = yield Create(stored.cell, records.encode(records.ITEM, body))
        else:
            body = {**stored.body, "r": recent(stored, name)}
            done = yield Swap(stored.cell, records.encode(records.ITEM, body), stored.etag)
        return bool(done)


@dataclass
class _Write:
    """One put or delete under way.

    Attributes:
        name: Marks the cells it has written.
        body: The parts of the cell that are of the put alone.
        records: What the cell names.
        place: Where the item is entered for the next try, if it has been.
        keys, places: The records and entries of all tries.
    """

    draft: Draft
    name: str
    body: dict[str, Any] = field(default_factory=dict)
    records: list[tuple[str, bytes]] = field(default_factory=list)
    place: Place | None = None
    keys: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def enter(self, place: Place) -> None:
        self.place = place
        self.places.append(place)

    def tidy(self, body: dict[str, Any], garbage: list[str], left: list[Place]) -> None:
        """Add what was tried and `body`, the cell as it is now, does not use."""
        used = {*record_keys(body), *body["o"]}
        garbage += [key for key in self.keys if key not in used]
        left += [place for place in self.places if place.token != body["t"]]

    def over(self, stored: Stored, place: Place, now: float) -> dict[str, Any]:
        """Return the cell that follows `stored`, of an item entered at `place`."""
        same_life = stored.written and stored.place == place
        return {
            **self.body,
            "p": place.page,
            "t": place.token,
            "c": stored.body["c"] if same_life else now,
            "u": now,
            "e": now + self.draft.ttl * 60 if self.draft.ttl is not None else None,
            "o": record_keys(stored.body),
            "r": recent(stored, self.name),
        }
