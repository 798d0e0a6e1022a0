"""Where the items of the long-term store are: a tree of namespaces, and in each a chain of pages of entries.

Dapr cannot list keys. Every namespace, and every prefix of one, has a node: a cell with the labels one level below
(full lists are sealed into pages, chained backwards) and, once it holds items, the first page of its entries. An entry
is the token of one life of an item (from the put that brings it to the delete that ends it) and the key of its cell.
Entries are appended to the last page, so they lie in the order of their first put, and taken out one by one; each costs
the same however many there are. A page that was full once takes no more entries, and when it is empty it is dead:
whoever walks the chain then links past it.

An item is entered before its cell is written and taken out after, so the index may name items that are not there, and
never lacks one that is. Nodes and pages are never deleted: some stores accept a stale ETag for a key that is gone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.client import Create, Steps, load
from outlast.errors import CorruptRecordError

Namespace = tuple[str, ...]

PAGE: Final = 100
"""Entries of a page; the cells they name fit one bulk read."""
_LABELS: Final = 64
_LABEL_BYTES: Final = 16_000
_TAILS: Final = 1024
_EMPTY: Final[dict[str, Any]] = {"a": 0, "e": [], "x": "", "d": False}


class Place(NamedTuple):
    """Where an item is entered: the key of the page, and the token of the item's life."""

    page: str
    token: str


class Entry(NamedTuple):
    """An entry as it was read: its place, and the key of the item's cell."""

    place: Place
    cell: str


@dataclass(frozen=True)
class Node:
    """A namespace that holds items, or once did.

    Attributes:
        since: When its first item was put, in nanoseconds.
        first: Key of its first page.
    """

    namespace: Namespace
    since: int
    first: str


def node_key(namespace: Namespace) -> str:
    """Return the key of a namespace's node; the keys of its pages start with it."""
    return f"n-{keys.digest(*namespace)}"


class Index:
    """Reads and changes the tree and the pages. Safe to use from any thread."""

    def __init__(self) -> None:
        self._names = keys.RecordNames()
        self._tails: dict[Namespace, str] = {}

    # --- entries

    def enter(self, namespace: Namespace, item_cells: Sequence[str]) -> Steps[dict[str, Place]]:
        """Enter a new life of each of these items of `namespace`. Returns where, by cell."""
        todo = {self._names.next(): cell for cell in item_cells}
        placed: dict[str, Place] = {}

        def add(page: Any) -> Any:
            if page is None or page["x"]:
                return None
            here = {token for token, _ in page["e"]}
            rows = [[token, cell] for token, cell in todo.items() if token not in here][: PAGE - page["a"]]
            return {**page, "a": page["a"] + len(rows), "e": [*page["e"], *rows]} if rows else None

        key = self._tails.get(namespace) or (yield from self._open(namespace))
        while todo:
            page = yield from cells.update(key, records.ENTRIES, add)
            if page is None and self._tails.pop(namespace, ""):
                key = yield from self._open(namespace)
                continue
            page = _present(key, page)
            for token, _ in page["e"]:
                if token in todo:
                    placed[todo.pop(token)] = Place(key, token)
            if todo:
                key = page["x"] or (yield from self._extend(namespace, key))
        if len(self._tails) >= _TAILS:
            self._tails.clear()
        self._tails[namespace] = key
        return placed

    def leave(self, places: Iterable[Place]) -> Steps[None]:
        """Take entries out; those already gone do no harm."""
        tokens: dict[str, set[str]] = {}
        for place in places:
            tokens.setdefault(place.page, set()).add(place.token)
        for key, gone in tokens.items():
            yield from cells.update(key, records.ENTRIES, _without(gone))

    def _extend(self, namespace: Namespace, key: str) -> Steps[str]:
        """Return the page after the full one at `key`."""
        new = yield from self._page(namespace, _number(key) + 1)

        def close(page: Any) -> Any:
            return None if page is None or page["x"] else {**page, "x": new, "d": not page["e"]}

        def hint(node: Any) -> Any:
            # Whoever starts from an older page walks on from there.
            return {**node, "l": new} if _number(node["l"] or key) <= _number(key) else None

        closed = _present(key, (yield from cells.update(key, records.ENTRIES, close)))
        yield from cells.update(node_key(namespace), records.NODE, hint)
        following: str = closed["x"]
        return following

    def _page(self, namespace: Namespace, number: int) -> Steps[str]:
        """Return the key of a page, which is there then: numbered, so that what a dead writer began is taken up."""
        key = f"{node_key(namespace)}-e{number}"
        yield Create(key, records.encode(records.ENTRIES, _EMPTY))
        return key

    # --- namespaces

    def _open(self, namespace: Namespace) -> Steps[str]:
        """Return a page of `namespace` to append from; brings the namespace into the tree if it is new."""
        path = [namespace[:depth] for depth in range(len(namespace) + 1)]
        known = yield from cells.read_many([node_key(part) for part in path], records.NODE)
        node = known.get(node_key(namespace))
        if node is None or not node["f"]:
            # A node exists only when the way to it does: links are made from the root down.
            linked = max((depth for depth, part in enumerate(path) if node_key(part) in known), default=0)
            for depth in range(linked, len(namespace)):
                yield from self._link(path[depth], namespace[depth])
            new = yield from self._page(namespace, 0)
            since = time.time_ns()

            def settle(now: Any) -> Any:
                return None if now and now["f"] else {**(now or _blank(namespace)), "f": new, "s": since}

            node = yield from cells.update(node_key(namespace), records.NODE, settle)
        tail: str = node["l"] or node["f"]
        return tail

    def _link(self, parent: Namespace, label: str) -> Steps[None]:
        key = node_key(parent)
        known: tuple[Any, str] | None = yield from cells.read(key, records.NODE)
        full = known[0]["k"] if known and known[0] else []
        if len(full) >= _LABELS or sum(len(name.encode("utf-8", "surrogatepass")) for name in full) > _LABEL_BYTES:
            # Whoever creates the next page says what is in it, and it has its place before the node names it.
            assert known is not None
            before = known[0]["b"]
            page = f"{key}-l{_number(before) + 1 if before else 0}"
            yield Create(page, records.encode(records.PAGE, {"names": full, "before": before}))
            sealed = frozenset(records.decode(page, records.PAGE, (yield from load([page])).get(page, b""))["names"])

            def seal(now: Any) -> Any:
                left = [name for name in now["k"] if name not in sealed]
                return {**now, "k": left, "b": page} if now["b"] == before else None

            yield from cells.update(key, records.NODE, seal)
            known = None

        def enter(now: Any) -> Any:
            now = now or _blank(parent)
            return None if label in now["k"] else {**now, "k": [*now["k"], label]}

        yield from cells.update(key, records.NODE, enter, known)

    def nodes(self, prefix: Namespace) -> Steps[list[Node]]:
        """Return the namespaces that start with `prefix`, in the order in which they were first put to."""
        found: list[Node] = []
        level = [prefix]
        while level:
            bodies = yield from cells.read_many([node_key(namespace) for namespace in level], records.NODE)
            below: list[Namespace] = []
            for namespace in level:
                body = bodies.get(node_key(namespace))
                if body is None:
                    continue
                if body["f"]:
                    found.append(Node(namespace, body["s"], body["f"]))
                labels = yield from self._labels(body)
                below += [(*namespace, label) for label in labels]
            level = below
        return sorted(found, key=lambda node: (node.since, node.namespace))

    def _labels(self, body: Any) -> Steps[list[str]]:
        pages = [body["k"]]
        before = body["b"]
        while before:
            page = records.decode(before, records.PAGE, (yield from load([before])).get(before, b""))
            pages.append(page["names"])
            before = page["before"]
        return list(dict.fromkeys(label for page in reversed(pages) for label in page))


class Entries:
    """The entries of `nodes`, node by node, oldest first, read only as far as they are asked for."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = deque(nodes)
        self._first: dict[str, Any] = {}
        self._next = ""
        self._buffer: deque[Entry] = deque()
        # To link past dead pages: the last page (or node) before them, and the first of them.
        self._holder = ("", "")
        self._dead = ""
        self._detours: list[tuple[tuple[str, str], str, str]] = []

    def take(self, count: int) -> Steps[list[Entry]]:
        """Return the next `count` entries; fewer at the end."""
        while len(self._buffer) < count and (self._next or self._nodes):
            if not self._next:
                yield from self._turn(count)
            key = self._next
            page = self._first.pop(key, None) or (yield from cells.read(key, records.ENTRIES))[0]
            page = _present(key, page)
            self._buffer.extend(Entry(Place(key, token), cell) for token, cell in page["e"])
            if page["d"]:
                self._dead = self._dead or key
            else:
                if self._dead:
                    self._detours.append((self._holder, self._dead, key))
                self._holder, self._dead = (records.ENTRIES, key), ""
            self._next = page["x"]
        return [self._buffer.popleft() for _ in range(min(count, len(self._buffer)))]

    def _turn(self, count: int) -> Steps[None]:
        """Go on to the next node; first pages are read ahead, so that many small namespaces cost few requests."""
        if self._nodes[0].first not in self._first:
            ahead = [node.first for node, _ in zip(self._nodes, range(count), strict=False)]
            self._first = yield from cells.read_many(ahead, records.ENTRIES)
        node = self._nodes.popleft()
        self._next = node.first
        self._holder, self._dead = (records.NODE, node_key(node.namespace)), ""

    def shorten(self) -> Steps[None]:
        """Link past the dead pages that were met."""
        for (kind, key), dead, alive in self._detours:
            yield from cells.update(key, kind, _past(kind, dead, alive))


def _number(page: str) -> int:
    """Return the number of a page of entries or labels."""
    return int(page.rpartition("-")[2][1:])


def _blank(namespace: Namespace) -> dict[str, Any]:
    return {"n": list(namespace), "s": 0, "f": "", "l": "", "k": [], "b": ""}


def _present(key: str, page: Any) -> Any:
    if page is None:
        raise CorruptRecordError(f"page {key!r} of the long-term store is missing; restore it from a backup")
    return page


def _without(tokens: set[str]) -> Callable[[Any], Any]:
    def remove(page: Any) -> Any:
        rows = [row for row in page["e"] if row[0] not in tokens] if page else []
        if page is None or len(rows) == len(page["e"]):
            return None
        return {**page, "e": rows, "d": bool(page["x"]) and not rows}

    return remove


def _past(kind: str, dead: str, alive: str) -> Callable[[Any], Any]:
    def change(now: Any) -> Any:
        link = "f" if kind == records.NODE else "x"
        # Links only ever skip what is dead, so it does no harm when `now` is dead itself meanwhile.
        return {**now, link: alive} if now and now[link] == dead else None

    return change
