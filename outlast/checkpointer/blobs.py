"""Where channel values are kept: packs, blobs of their own for large ones, and segments for lists.

A pack is the record of one commit: the checkpoints and writes in it and the small values they hold. A value is found by
its locator:

* `[pack, index]`: a value in a pack's table; one larger than `INLINE` is a record of its own that the table names;
* `{"l": [length, base, tail]}`: a list, kept by segments. `tail` has up to `TAIL` pairs `[locator, items]`, one for
  each time the list grew; `base` is the locator of a node that holds what came before, merged into larger segments:
  up to `FAN` of its own, after those of the full nodes that it names (which name none themselves).
  So a list that grows by one item a turn costs the same at every turn, and is read in a bounded number of bulk reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ormsgpack

from outlast.checkpointer import records
from outlast.checkpointer.client import Steps, load
from outlast.errors import CorruptRecordError

INLINE: Final = 16_384
TAIL: Final = 16
FAN: Final = 32
NODE: Final = "outlast-node"

Typed = tuple[str, bytes]
Locator = Any


@dataclass
class PackWriter:
    """Collects what one commit writes.

    Args:
        key: Key of the thread's head.
        name: Name of the pack's record, relative to `key`.
    """

    key: str
    name: str
    table: list[list[Any]] = field(default_factory=list)
    checkpoints: list[list[Any]] = field(default_factory=list)
    writes: list[list[Any]] = field(default_factory=list)
    _known: dict[Typed, int] = field(default_factory=dict)
    _large: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, value: Typed) -> Locator:
        """Enter a serialised value and return its locator; equal values are stored once."""
        index = self._known.get(value)
        if index is None:
            kind, data = value
            index = self._known[value] = len(self.table)
            if len(data) <= INLINE:
                self.table.append([kind, data])
            else:
                name = f"{self.name}-b{index}"
                self._large.append((f"{self.key}-{name}", records.encode(records.BLOB, data)))
                self.table.append([kind, None, name])
        return [self.name, index]

    def finish(self, limit: int) -> list[tuple[str, bytes]]:
        """Return the records of this commit, none with a value longer than `limit` bytes."""
        body = _packed({"b": self.table, "c": self.checkpoints, "w": self.writes}, self.name)
        whole = [(f"{self.key}-{self.name}", records.encode(records.PACK, body)), *self._large]
        parts = [part for key, data in whole for part in records.split(key, data, limit)]
        # What names others comes before them.
        return sorted(parts, key=lambda part: records.depth(part[0]))


class PackReader:
    """Reads values by locator, each record once.

    Args:
        key: Key of the thread's head.
        loads: Deserialises a typed value.
    """

    def __init__(self, key: str, loads: Callable[[Typed], Any]) -> None:
        self._key = key
        self._loads = loads
        self._packs: dict[str, Any] = {}
        self._large: dict[str, bytes] = {}

    def packs(self, names: Iterable[str]) -> Steps[dict[str, Any]]:
        """Read the packs of these names in bulk and return all that were read so far."""
        missing = [name for name in dict.fromkeys(names) if name not in self._packs]
        found = yield from load([f"{self._key}-{name}" for name in missing])
        for name in missing:
            key = f"{self._key}-{name}"
            body = records.decode(key, records.PACK, found.get(key, b""))
            self._packs[name] = records.build(key, functools.partial(_unpacked, body, name))
        return self._packs

    def fetch(self, locators: Sequence[Locator]) -> Steps[None]:
        """Read everything that `value` needs for `locators`, in a bounded number of bulk reads."""
        lists = [locator["l"] for locator in locators if isinstance(locator, dict)]
        wanted = [locator for locator in locators if isinstance(locator, list)]
        wanted += [segment for _, _, tail in lists for segment, _ in tail]
        bases = [base for _, base, _ in lists if base]
        yield from self._tables([*wanted, *bases])
        nodes = [self.node(base) for base in bases]
        full = [up for node in nodes for up in node["u"]]
        yield from self._tables(full)
        nodes += [self.node(up) for up in full]
        yield from self._tables([segment for node in nodes for segment, _ in node["s"]])

    def _tables(self, locators: list[Locator]) -> Steps[None]:
        packs = yield from self.packs(name for name, _ in locators)
        rows = [packs[name]["b"][index] for name, index in locators]
        large = [row[2] for row in rows if row[1] is None and row[2] not in self._large]
        found = yield from load([f"{self._key}-{name}" for name in dict.fromkeys(large)])
        for name in large:
            key = f"{self._key}-{name}"
            self._large[name] = records.decode(key, records.BLOB, found.get(key, b""))

    def typed(self, locator: Locator) -> Typed:
        """Return the serialised value at a plain locator that was fetched."""
        name, index = locator
        try:
            row = self._packs[name]["b"][index]
        except (IndexError, TypeError) as error:
            raise CorruptRecordError(f"record {self._key}-{name} has no value {index!r}") from error
        return (row[0], row[1] if row[1] is not None else self._large[row[2]])

    def copy(self, locator: Locator, pack: PackWriter, copied: dict[tuple[str, int], Locator]) -> Locator:
        """Copy the value at `locator`, all of which was fetched, and return where it is then.

        Args:
            copied: What was copied before, old place → new locator; segments shared by versions stay shared.
        """
        if isinstance(locator, dict):
            length, base, tail = locator["l"]
            moved = [[self.copy(segment, pack, copied), count] for segment, count in tail]
            return {"l": [length, self.copy(base, pack, copied) if base else None, moved]}
        place = (locator[0], locator[1])
        if place not in copied:
            kind, data = self.typed(locator)
            if kind == NODE:
                node = self.node(locator)
                segments = [[self.copy(segment, pack, copied), count] for segment, count in node["s"]]
                full = [self.copy(up, pack, copied) for up in node["u"]]
                data = ormsgpack.packb({"s": segments, "u": full})
            copied[place] = pack.add((kind, data))
        return copied[place]

    def value(self, locator: Locator) -> Any:
        """Return the value at `locator`, all of which was fetched."""
        if isinstance(locator, list):
            return self._loads(self.typed(locator))
        length, base, tail = locator["l"]
        items: list[Any] = []
        for segment in [*self._segments(base), *(segment for segment, _ in tail)]:
            items.extend(self._loads(self.typed(segment)))
        if len(items) != length:
            raise CorruptRecordError(f"a list of {self._key} has {len(items)} of {length} items")
        return items

    def _segments(self, base: Locator | None) -> list[Locator]:
        if base is None:
            return []
        last = self.node(base)
        return [segment for node in (*map(self.node, last["u"]), last) for segment, _ in node["s"]]

    def node(self, locator: Locator) -> Any:
        """Return the node of a list at `locator`, which was fetched."""
        kind, data = self.typed(locator)
        if kind != NODE:
            raise CorruptRecordError(f"a list of {self._key} points to a value that is no node")
        return ormsgpack.unpackb(data)


def _packed(rows: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the rows of the pack `name` with short locators.

    A record of the same writer is the number by which it comes before this pack, and the tail of a list is columns.
    """
    writer, _, number = name.rpartition("-")

    def short(record: str) -> int | str:
        head, _, own = record.rpartition("-")
        return int(number) - int(own) if head == writer else record

    def change(locator: Locator) -> Locator:
        if isinstance(locator, dict):
            length, base, tail = locator["l"]
            columns = [short(segment[0]) for segment, _ in tail], [segment[1] for segment, _ in tail]
            return {"l": [length, base and change(base), *columns, [count for _, count in tail]]}
        return [short(locator[0]), locator[1]]

    return _changed(rows, change)


def _unpacked(rows: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the rows of the pack `name` with whole locators; the inverse of `_packed`."""
    writer, _, number = name.rpartition("-")

    def long(record: int | str) -> str:
        return record if isinstance(record, str) else f"{writer}-{int(number) - record}"

    def change(locator: Locator) -> Locator:
        if isinstance(locator, dict):
            length, base, names, places, counts = locator["l"]
            tail = [[[long(record), place], count] for record, place, count in zip(names, places, counts, strict=True)]
            return {"l": [length, base and change(base), tail]}
        return [long(locator[0]), locator[1]]

    return _changed(rows, change)


def _changed(body: dict[str, Any], change: Callable[[Locator], Locator]) -> dict[str, Any]:
    """Return the body of a pack with every locator in its rows changed."""
    checkpoints = [
        [ns, checkpoint_id, parent_id, change(checkpoint), change(metadata), _each(channels, change)]
        for ns, checkpoint_id, parent_id, checkpoint, metadata, channels in body["c"]
    ]
    writes = [[*row[:6], change(row[6]), *row[7:]] for row in body["w"]]
    return {"b": body["b"], "c": checkpoints, "w": writes}


def _each(channels: dict[Any, Locator], change: Callable[[Locator], Locator]) -> dict[Any, Locator]:
    return {name: change(locator) for name, locator in channels.items()}
