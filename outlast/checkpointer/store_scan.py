"""Walking through the items of namespaces in their order, and noting on the way what can be cleared away. Sans I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from outlast.checkpointer import cells, records
from outlast.checkpointer.client import Steps
from outlast.checkpointer.store_cells import VALUE, Stored
from outlast.checkpointer.store_index import PAGE, Entries, Entry, Node, Place
from outlast.checkpointer.store_items import Items
from outlast.checkpointer.store_match import accepts

_AHEAD: Final = 10


class Scan:
    """One walk through `nodes`.

    Args:
        items: Where cells are read.
        nodes: The namespaces, in the order they are walked through.
        now: The time at which items must not have expired.
    """

    def __init__(self, items: Items, nodes: Sequence[Node], now: float) -> None:
        self._items = items
        self._entries = Entries(nodes)
        self._now = now
        self._seen: set[str] = set()
        self._moved: dict[str, Stored] = {}
        self._stale: list[tuple[Stored, Place]] = []
        self._begun: list[tuple[Stored, Place]] = []

    def collect(self, stop: int | None, conditions: Mapping[str, Any] | None) -> Steps[list[Stored]]:
        """Return the first `stop` items (all, if None) that meet `conditions`; a filter as `search` takes it."""
        found: list[Stored] = []
        while stop is None or len(found) < stop:
            # Without conditions nearly every entry is an item that counts.
            count = PAGE if stop is None or conditions else min(PAGE, max(stop - len(found), _AHEAD))
            batch = yield from self._entries.take(count)
            if not batch:
                # Put anew during the walk, at a place it had passed already.
                found += yield from self._accepted(self._moved.values(), conditions)
                break
            stored = yield from self._items.read(entry.cell for entry in batch)
            rows = [row for entry in batch if (row := self._live(entry, stored[entry.cell])) is not None]
            found += yield from self._accepted(rows, conditions)
        return found[:stop]

    def _live(self, entry: Entry, stored: Stored) -> Stored | None:
        """Return the item an entry leads to, unless there is none there; notes what else there is."""
        if stored.live(self._now):
            if stored.place == entry.place:
                self._seen.add(stored.cell)
                self._moved.pop(stored.cell, None)
                return stored
            self._stale.append((stored, entry.place))
            if stored.cell not in self._seen:
                self._moved[stored.cell] = stored
        elif stored.body is not None and stored.body["t"] == entry.place.token:
            self._stale.append((stored, entry.place))
        else:
            # A put may be about to write the cell.
            self._begun.append((stored, entry.place))
        return None

    def _accepted(self, rows: Any, conditions: Mapping[str, Any] | None) -> Steps[list[Stored]]:
        if not conditions:
            return list(rows)
        found = yield from self._items.contents(rows, VALUE)
        return [row for row, value in found.values() if accepts(value, conditions)]

    @property
    def begun(self) -> list[Place]:
        """Entries that were met of items that are not there: of puts under way, or of writers that have died."""
        return [place for _, place in self._begun]

    def settle(self, places: Collection[Place]) -> Steps[None]:
        """Clear away what was begun at these places; puts that are under way after all begin anew."""
        cells_done: set[str] = set()
        for stored, place in self._begun:
            if place in places:
                if stored.cell in cells_done:
                    # To fence it off has changed the cell.
                    stored = (yield from self._items.read([stored.cell]))[stored.cell]
                yield from self._items.clear([(stored, place)])
                cells_done.add(stored.cell)

    def tidy(self, limit: int | None = None) -> Steps[int]:
        """Clear away up to `limit` of what was met and is of no use. Returns how many expired items were among it."""
        count = yield from self._items.clear(self._stale[:limit])
        yield from self._entries.shorten()
        return count


def first_seen(items: Items, nodes: Sequence[Node], now: float) -> Steps[set[str]]:
    """Return the `first` of those nodes whose first entry leads to an item: a quick look at all of them together."""
    pages = yield from cells.read_many([node.first for node in nodes], records.ENTRIES)
    heads = {key: page["e"][0] for key, page in pages.items() if page["e"]}
    stored = yield from items.read(cell for _, cell in heads.values())
    return {key for key, (_, cell) in heads.items() if stored[cell].live(now)}
