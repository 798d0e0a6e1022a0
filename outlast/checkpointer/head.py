"""The head of a thread: who owns it, which run it serves, and the index of what is committed.

The index is a log of entries, one per checkpoint, in pages of fixed size. The head holds the open page and the refs of
up to `_PAGE` sealed ones; full lists of refs are sealed into pages of their own, chained backwards. So a commit costs
the same at the first and at the ten-thousandth checkpoint. An entry that changes after its page was sealed (late
writes) is entered again; the newest entry of a checkpoint counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from outlast.checkpointer import life as lives
from outlast.checkpointer import records
from outlast.checkpointer.client import Steps, load
from outlast.checkpointer.life import Life

_PAGE: Final = 32
_FOLD: Final = 16
"""Names of writes an entry holds at most; more are folded into a record, so that heads and pages stay small."""
_FOLDED, _SEALED, _LINKS, _WRITERS = "-w", "-p", "-q", "-a"
SUFFIXES: Final = ("", _FOLDED, _SEALED, _LINKS, _WRITERS)
"""What follows the name of a record that a head names, after the number: by kind."""
_AT_ONCE: Final = 16
"""Writers that a head holds."""
_AHEAD: Final = 8
"""Numbers a writer is given beyond those it asks for, so that it seldom has to ask."""
_RECENT: Final = 16


@dataclass(frozen=True)
class Entry:
    """One checkpoint in the index.

    Attributes:
        ns: Checkpoint namespace.
        checkpoint_id: LangGraph's id of the checkpoint.
        pack: Name of the record that holds it; empty while only writes for it are known.
        writes: Names of the records that hold pending writes for it, oldest first. The first may be that of a record of
            such names; `Index` gives out entries with all of them.
    """

    ns: str
    checkpoint_id: str
    pack: str = ""
    writes: tuple[str, ...] = ()

    def body(self) -> list[Any]:
        return [self.ns, self.checkpoint_id, self.pack, list(self.writes)]

    @staticmethod
    def of(body: list[Any]) -> Entry:
        ns, checkpoint_id, pack, writes = body
        return Entry(ns, checkpoint_id, pack, tuple(writes))

    def merged(self, newer: Entry) -> Entry:
        """Return this entry with what `newer` adds to it."""
        # A pack that is replaced stays known, so that it goes when the thread does.
        replaced = (self.pack,) if newer.pack and self.pack else ()
        extra = tuple(name for name in dict.fromkeys((*replaced, *newer.writes)) if name not in self.writes)
        return Entry(self.ns, self.checkpoint_id, newer.pack or self.pack, self.writes + extra)


@dataclass(frozen=True)
class PageRef:
    """A sealed page of entries: its name and the range of checkpoint ids in it."""

    name: str
    first: str
    last: str


@dataclass(frozen=True)
class Head:
    """The one record of a thread that is overwritten. See the module's docstring for the index fields.

    Attributes:
        thread_id: The thread.
        epoch: Number of the attempt that owns the thread; 0 if no run ever did.
        owner: Id of the worker of that attempt.
        active: Id of the run the thread serves now.
        queue: Ids of the runs that wait for their turn.
        recent: Ids of the last commits, to recognise one whose acknowledgement was lost.
        root: The newest checkpoint of the root namespace.
        newest: The highest checkpoint id entered so far, in any namespace.
        generation: How often the thread was rewritten; what was prepared before a rewrite must not be committed after.
        garbage: Name of a record with an earlier head, whose records are to be deleted where this head does not reach.
        life: How long the thread lives; None for ever.
        writers: Who writes records outside of a transaction with the head, so that those of one that dies before its
            commit can be found: the writer, and the number that its records do not reach.
        earlier: Name of a page with writers of before.
    """

    thread_id: str
    epoch: int = 0
    owner: str = ""
    active: str = ""
    queue: tuple[str, ...] = ()
    recent: tuple[str, ...] = ()
    root: Entry | None = None
    newest: str = ""
    open: tuple[Entry, ...] = ()
    pages: tuple[PageRef, ...] = ()
    chain: str = ""
    generation: int = 0
    garbage: str = ""
    deleted: bool = False
    life: Life | None = None
    writers: tuple[tuple[str, int], ...] = ()
    earlier: str = ""

    def encode(self) -> bytes:
        """Return the record of this head."""
        return records.encode(
            records.THREAD_HEAD,
            {
                "t": self.thread_id,
                "e": self.epoch,
                "o": self.owner,
                "a": self.active,
                "q": list(self.queue),
                "k": list(self.recent),
                "r": self.root.body() if self.root else None,
                "m": self.newest,
                "x": [entry.body() for entry in self.open],
                "p": [[ref.name, ref.first, ref.last] for ref in self.pages],
                "c": self.chain,
                "v": self.generation,
                "g": self.garbage,
                "d": self.deleted,
                "l": self.life.body() if self.life else None,
                "w": [list(writer) for writer in self.writers],
                "y": self.earlier,
            },
        )

    @staticmethod
    def decode(key: str, data: bytes) -> Head:
        """Return the head stored at `key`."""
        body = records.decode(key, records.THREAD_HEAD, data)
        return records.build(key, lambda: Head._of(body))

    @staticmethod
    def _of(body: dict[str, Any]) -> Head:
        return Head(
            thread_id=body["t"],
            epoch=body["e"],
            owner=body["o"],
            active=body["a"],
            queue=tuple(body["q"]),
            recent=tuple(body["k"]),
            root=Entry.of(body["r"]) if body["r"] else None,
            newest=body["m"],
            open=tuple(Entry.of(entry) for entry in body["x"]),
            pages=tuple(PageRef(*ref) for ref in body["p"]),
            chain=body["c"],
            generation=body["v"],
            garbage=body["g"],
            deleted=body["d"],
            life=Life(*body["l"]) if body.get("l") else None,
            writers=tuple((writer, number) for writer, number in body.get("w", ())),
            earlier=body.get("y", ""),
        )

    @property
    def empty(self) -> bool:
        """Whether the index reaches nothing."""
        return not (self.root or self.open or self.pages or self.chain or self.garbage or self.earlier)

    @property
    def expired(self) -> bool:
        """Whether the thread's time is over. A thread that a run holds, or waits for, does not expire."""
        until = self.life.until if self.life else None
        held = self.active or self.queue
        return until is not None and not held and not self.deleted and lives.now() >= until

    def announces(self, needed: Mapping[str, int]) -> bool:
        """Tell whether `writers` has these, with numbers as high as these."""
        known = dict(self.writers)
        return all(number <= known.get(writer, 0) for writer, number in needed.items())

    def announcing(self, needed: Mapping[str, int]) -> Head:
        """Return this head with these writers, of records that are about to be written."""
        known = dict(self.writers)
        others = tuple(pair for pair in self.writers if pair[0] not in needed)
        mine = tuple((writer, max(number + _AHEAD, known.get(writer, 0))) for writer, number in needed.items())
        return replace(self, writers=(*others, *mine))

    def committed(self, commit_id: str) -> Head:
        """Return this head marked as the outcome of `commit_id`."""
        return replace(self, recent=(*self.recent[-_RECENT + 1 :], commit_id))


@dataclass
class Index:
    """Reads and extends the index of one thread.

    Sealed pages never change, so those once read are kept.

    Args:
        key: Key of the thread's head.
    """

    key: str
    _pages: dict[str, Any] = field(default_factory=dict)
    _listed: tuple[Head, list[Entry]] | None = None

    def _bodies(self, names: Iterable[str], lenient: bool = False) -> Steps[None]:
        missing = [name for name in names if name not in self._pages]
        found = yield from load([f"{self.key}-{name}" for name in missing])
        for name in missing:
            key = f"{self.key}-{name}"
            if lenient and key not in found:
                self._pages[name] = {"x": [], "p": [], "c": "", "w": [], "a": []}
            else:
                self._pages[name] = records.decode(key, records.PAGE, found.get(key, b""))

    def sealed(self) -> list[str]:
        """Return the names of the sealed pages read so far."""
        return list(self._pages)

    def _unfolded(self, entry: Entry, lenient: bool = False) -> Steps[Entry]:
        """Return an entry with the names of all of its writes."""
        names = entry.writes
        while names and _FOLDED in names[0]:
            yield from self._bodies([names[0]], lenient)
            names = (*self._pages[names[0]]["w"], *names[1:])
        return entry if names is entry.writes else replace(entry, writes=names)

    def _entries(self, ref: str) -> list[Entry]:
        return [Entry.of(body) for body in self._pages[ref]["x"]]

    def find(self, head: Head, ns: str, checkpoint_id: str) -> Steps[Entry | None]:
        """Return the entry of a checkpoint, or None."""
        near = [head.root] if head.root else []
        for entry in (*near, *reversed(head.open)):
            if (entry.ns, entry.checkpoint_id) == (ns, checkpoint_id):
                return (yield from self._unfolded(entry))
        pages, chain = head.pages, head.chain
        while True:
            hits = [ref.name for ref in reversed(pages) if ref.first <= checkpoint_id <= ref.last]
            yield from self._bodies(hits)
            for name in hits:
                for entry in reversed(self._entries(name)):
                    if (entry.ns, entry.checkpoint_id) == (ns, checkpoint_id):
                        return (yield from self._unfolded(entry))
            if not chain:
                return None
            pages, chain = yield from self._older(chain)

    def _older(self, chain: str, lenient: bool = False) -> Steps[tuple[tuple[PageRef, ...], str]]:
        yield from self._bodies([chain], lenient)
        body = self._pages[chain]
        return tuple(PageRef(*ref) for ref in body["p"]), body["c"]

    def latest(self, head: Head, ns: str) -> Steps[Entry | None]:
        """Return the newest checkpoint of a namespace, or None."""
        if ns == "":
            return (yield from self._unfolded(head.root)) if head.root else None
        entries = yield from self.entries(head)
        mine = [entry for entry in entries if entry.ns == ns and entry.pack]
        return max(mine, key=lambda entry: entry.checkpoint_id, default=None)

    def entries(self, head: Head, lenient: bool = False) -> Steps[list[Entry]]:
        """Return all entries, those of the newest checkpoint ids first, each checkpoint once.

        Args:
            lenient: Take a missing page for an empty one, as when a deletion goes on that was cut short.
        """
        if self._listed is None or lenient or (self._listed[0] is not head and self._listed[0] != head):
            newest: dict[tuple[str, str], Entry] = {}
            for entry in (yield from self.versions(head, lenient)):
                newest.setdefault((entry.ns, entry.checkpoint_id), entry)
            ordered = sorted(newest.values(), key=lambda entry: (entry.checkpoint_id, entry.ns), reverse=True)
            # A listing comes back for each batch of it.
            self._listed = (head, ordered)
        return list(self._listed[1])

    def versions(self, head: Head, lenient: bool = False) -> Steps[list[Entry]]:
        """Return all entries as they were entered, newest first; a checkpoint entered again is there again."""
        found = [*([head.root] if head.root else []), *reversed(head.open)]
        pages, chain = head.pages, head.chain
        while True:
            yield from self._bodies([ref.name for ref in pages], lenient)
            for ref in reversed(pages):
                found += reversed(self._entries(ref.name))
            if not chain:
                break
            pages, chain = yield from self._older(chain, lenient)
        unfolded: list[Entry] = []
        for entry in found:
            unfolded.append((yield from self._unfolded(entry, lenient)))
        return unfolded

    def make_room(self, head: Head, fresh: Callable[[], str]) -> tuple[Head, list[tuple[str, bytes]]]:
        """Return `head` with a bounded number of writers, and the record that the others have been moved to."""
        if len(head.writers) <= _AT_ONCE:
            return head, []
        name = f"{fresh()}{_WRITERS}"
        body = {"a": [list(pair) for pair in head.writers[: -_AT_ONCE // 2]], "c": head.earlier}
        page = (f"{self.key}-{name}", records.encode(records.PAGE, body))
        return replace(head, writers=head.writers[-_AT_ONCE // 2 :], earlier=name), [page]

    def writers(self, head: Head, lenient: bool = False) -> Steps[dict[str, int]]:
        """Return all writers that were ever announced, and the numbers that their records do not reach."""
        found: dict[str, int] = {}
        pairs: Iterable[tuple[str, int]] = head.writers
        earlier = head.earlier
        while True:
            for writer, number in pairs:
                found[writer] = max(number, found.get(writer, 0))
            if not earlier:
                return found
            yield from self._bodies([earlier], lenient)
            pairs, earlier = self._pages[earlier]["a"], self._pages[earlier]["c"]

    def extend(
        self, head: Head, changes: Iterable[Entry], fresh: Callable[[], str]
    ) -> Steps[tuple[Head, list[tuple[str, bytes]]]]:
        """Return `head` with `changes` entered, and the records of the pages that this sealed.

        Args:
            fresh: Returns a record name not used before.
        """
        entries = list(head.open)
        root, newest = head.root, head.newest
        for change in changes:
            position = _position(entries, change)
            if position is not None:
                entry = entries[position] = entries[position].merged(change)
            else:
                # Checkpoint ids grow with time, so one above all others cannot be in a sealed page.
                newer = change.checkpoint_id > newest
                old = None if newer else (yield from self.find(head, change.ns, change.checkpoint_id))
                entry = old.merged(change) if old else change
                entries.append(entry)
            if not entry.ns and entry.pack and (root is None or entry.checkpoint_id >= root.checkpoint_id):
                root = entry
            newest = max(newest, entry.checkpoint_id)
        pages, chain = list(head.pages), head.chain
        sealed: list[tuple[str, bytes]] = []
        for place, entry in enumerate(entries):
            if len(entry.writes) > _FOLD:
                folded = f"{fresh()}{_FOLDED}"
                sealed.append((f"{self.key}-{folded}", records.encode(records.PAGE, {"w": list(entry.writes)})))
                entries[place] = replace(entry, writes=(folded,))
                root = entries[place] if entry is root else root
        if len(entries) >= _PAGE:
            ids = [entry.checkpoint_id for entry in entries]
            name = f"{fresh()}{_SEALED}"
            pages.append(PageRef(name, min(ids), max(ids)))
            body = {"x": [entry.body() for entry in entries]}
            sealed.append((f"{self.key}-{name}", records.encode(records.PAGE, body)))
            entries = []
        if len(pages) >= _PAGE:
            links = {"p": [[ref.name, ref.first, ref.last] for ref in pages], "c": chain}
            chain = f"{fresh()}{_LINKS}"
            sealed.append((f"{self.key}-{chain}", records.encode(records.PAGE, links)))
            pages = []
        extended = replace(head, root=root, newest=newest, open=tuple(entries), pages=tuple(pages), chain=chain)
        return extended, sealed


def parts(name: str) -> tuple[str, int]:
    """Return the writer and the number in the name of a record."""
    writer, number, *_ = name.split("-")
    return writer, int(number)


def _position(entries: list[Entry], wanted: Entry) -> int | None:
    for position in range(len(entries) - 1, -1, -1):
        if (entries[position].ns, entries[position].checkpoint_id) == (wanted.ns, wanted.checkpoint_id):
            return position
    return None
