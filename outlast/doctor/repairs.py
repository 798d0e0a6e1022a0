"""Looks through all threads and runs of a store for what a crash or damage has left, and mends what can be mended.

Nothing that a commit in progress may still need is touched: what looks left over is looked at again after a while, or
after the thread's generation has been raised, which makes every commit prepared before start anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from outlast.checkpointer import records, upkeep
from outlast.checkpointer.blobs import PackReader
from outlast.checkpointer.client import Delete, Get, Item, Pause, StateClient, Steps
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.registry import ACTIVE, RUNS, THREADS
from outlast.checkpointer.thread import ThreadLog
from outlast.errors import CorruptRecordError, OutlastError, RunNotFoundError, UnknownFormatError
from outlast.recovery import runs, turns
from outlast.recovery.journal import journal_key

_BATCH: Final = 20


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        kind: What sort of thing.
        where: The thread, run or record.
        detail: What was seen.
        mended: Whether it is as it should be now.
    """

    kind: str
    where: str
    detail: str
    mended: bool


@dataclass
class Repairs:
    """What was looked at, and what was found."""

    threads: int = 0
    checkpoints: int = 0
    runs: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def left(self) -> list[Finding]:
        """What was found and not mended."""
        return [finding for finding in self.findings if not finding.mended]

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON has it."""
        return asdict(self)


def repair(
    client: StateClient,
    *,
    drop: bool = False,
    dry_run: bool = False,
    grace: float = 60.0,
    on_progress: Callable[[Repairs], None] | None = None,
) -> Repairs:
    """Look through a store, and mend it.

    Args:
        client: The store.
        drop: Remove checkpoints that cannot be read any more, so that their threads can go on from those before.
        dry_run: Mend nothing.
        grace: Seconds after which what a submission in progress explains must be explained.
        on_progress: Called now and then with what was found so far.
    """
    work = _Repair(drop, dry_run, grace, client.capabilities.quirks.max_value)
    try:
        names = client.run(THREADS.names())
    except OutlastError as error:
        work.note("registry", "threads", str(error), False)
        names = []
    for thread_id in names:
        work.found.threads += 1
        client.run(work.thread(thread_id))
        if on_progress:
            on_progress(work.found)
    client.run(work.all_runs())
    client.run(work.memories(client))
    return work.found


class _Repair:
    def __init__(self, drop: bool, dry_run: bool, grace: float, limit: int) -> None:
        self._drop = drop
        self._dry_run = dry_run
        self._grace = grace
        self._limit = limit
        self.found = Repairs()

    def note(self, kind: str, where: str, detail: str, mended: bool) -> None:
        self.found.findings.append(Finding(kind, where, detail, mended and not self._dry_run))

    def memories(self, client: StateClient) -> Steps[None]:
        """Look at the long-term store."""
        try:
            from outlast.doctor.memories import mend
        except ModuleNotFoundError:
            return  # without LangGraph nobody has written to it
        try:
            yield from mend(client, self.note, dry_run=self._dry_run, grace=self._grace)
        except (CorruptRecordError, UnknownFormatError) as error:
            self.note("damaged long-term store", "store", str(error), False)

    # --- threads

    def thread(self, thread_id: str) -> Steps[None]:
        log = ThreadLog(thread_id)
        try:
            head = yield from log._load()
            if head is None:
                return  # entered in the registry by somebody who then died, or is about to create it: harmless
            if head.deleted:
                if not head.empty:
                    yield from self._do(log.delete())
                    self.note("deletion cut short", thread_id, "records were left behind a deleted thread", True)
                else:
                    yield from self._orphans(log, thread_id)
                return
            if head.expired:
                yield from self._do(log.delete(expired=True))
                self.note("expired thread", thread_id, "its time to live is over", True)
                return
            if head.garbage:
                yield from self._do(log.sweep())
                self.note("rewrite cut short", thread_id, "records of before a pruning were left", True)
            broken = yield from self._entries(log, thread_id)
            if not broken:
                yield from self._orphans(log, thread_id)
        except UnknownFormatError as error:
            self.note("newer format", thread_id, str(error), False)
        except CorruptRecordError as error:
            self.note("damaged index", thread_id, str(error), False)

    def _do(self, steps: Steps[Any]) -> Steps[None]:
        if not self._dry_run:
            yield from steps

    def _entries(self, log: ThreadLog, thread_id: str) -> Steps[list[Entry]]:
        """Read every checkpoint of a thread and return those that cannot be read."""
        head = yield from log.read()
        entries = (yield from log.index.entries(head)) if head else []
        self.found.checkpoints += sum(bool(entry.pack) for entry in entries)
        broken: dict[Entry, str] = {}
        for start in range(0, len(entries), _BATCH):
            batch = entries[start : start + _BATCH]
            if not (yield from _trouble(log.key, batch)):
                continue
            for entry in batch:
                trouble = yield from _trouble(log.key, [entry])
                if trouble:
                    broken[entry] = trouble
        now = yield from log.read()
        if not broken or now is None or (head and now.generation != head.generation):
            return []  # nothing, or pruned or deleted meanwhile
        mended = self._drop and (yield from self._dropped(log, broken))
        for entry, trouble in broken.items():
            hint = "" if self._drop else "; --drop removes such checkpoints, the thread then goes on from those before"
            where = f"{thread_id} checkpoint {entry.checkpoint_id}" + (f" in {entry.ns}" if entry.ns else "")
            self.note("unreadable checkpoint", where, f"{trouble}{hint}", mended)
        return [] if mended and not self._dry_run else list(broken)

    def _dropped(self, log: ThreadLog, broken: dict[Entry, str]) -> Steps[bool]:
        """Let the thread consist of what can be read."""
        if self._dry_run:
            return True
        gone = {(entry.ns, entry.checkpoint_id) for entry in broken}

        def keep(head: Head, entries: list[Entry]) -> Steps[list[Entry]]:
            yield from ()
            return [entry for entry in entries if (entry.ns, entry.checkpoint_id) not in gone]

        try:
            yield from upkeep._rewrite(log, keep, _typed, self._limit)
        except CorruptRecordError:
            # The index is mended; what is left to do is to delete, and a damaged record does not tell what it names.
            names = {f"{log.key}-{name}" for entry in broken for name in (entry.pack, *entry.writes) if name}
            items: dict[str, Item] = yield Get(sorted(names))
            yield Delete([key for key, item in items.items() if not _readable(key, item.data)])
            yield from log.sweep()
        return True

    def _orphans(self, log: ThreadLog, where: str) -> Steps[None]:
        """Delete records that no head reaches."""
        head = yield from log._load()
        if head is None:
            return
        found = yield from log.leftovers(head)
        if found and not self._dry_run:
            if not head.deleted:
                # Every commit prepared before this is prepared anew, under another name.
                head = yield from log.change(lambda now: replace(now, generation=now.generation + 1))
            reached = set((yield from log._records(head)))
            found = [key for key in found if key not in reached]
            yield Delete(found)
        if found:
            detail = f"{len(found)} records that no head reaches, such as {found[-1]}"
            self.note("orphans", where, detail, True)

    # --- runs

    def all_runs(self) -> Steps[None]:
        """Look at the runs, at who looks after them, and at the threads they hold."""
        try:
            yield from self._runs()
        except (CorruptRecordError, UnknownFormatError) as error:
            self.note("damaged run", "runs", str(error), False)

    def _runs(self) -> Steps[None]:
        active = yield from ACTIVE.items()
        ids = yield from RUNS.names()
        self.found.runs = len(ids)
        doubtful: list[str] = []
        for run_id in active:
            head = yield from _run(run_id)
            if head is None:
                doubtful.append(run_id)
            elif head.ended:
                yield from self._do(turns.release(head))
                self.note("ended run in the active set", run_id, f"it is {head.status}", True)
        for run_id in ids:
            yield from self._journal(run_id)
            head = yield from _run(run_id) if run_id not in active else _nothing()
            if head is not None and not head.ended:
                yield from self._do(ACTIVE.put(run_id, 1))
                self.note("run nobody looks after", run_id, f"it is {head.status} and not in the active set", True)
        holders = yield from self._holders()
        if doubtful or holders:
            # A submission in progress looks like this for a moment.
            yield Pause(self._grace)
        for run_id in doubtful:
            if (yield from _run(run_id)) is None:
                yield from self._do(ACTIVE.discard(run_id))
                self.note("active entry without run", run_id, "its submitter died before the run was accepted", True)
        for thread_id, run_id in holders:
            yield from self._let_go(thread_id, run_id)

    def _journal(self, run_id: str) -> Steps[None]:
        """Look at the recorded steps of a run."""
        log = ThreadLog(run_id, key=journal_key(run_id))
        where = f"journal of run {run_id}"
        try:
            head = yield from log.read()
            entries = (yield from log.index.entries(head)) if head else []
            reader = PackReader(log.key, _typed)
            packs = yield from reader.packs(entry.pack for entry in entries)
            yield from reader.fetch([row[6] for body in packs.values() for row in body["w"]])
            yield from self._orphans(log, where)
        except (CorruptRecordError, UnknownFormatError) as error:
            self.note("damaged journal", where, f"{error}; the run cannot be taken over any more", False)

    def _holders(self) -> Steps[list[tuple[str, str]]]:
        """Return the threads held by runs that will not let go of them."""
        found: list[tuple[str, str]] = []
        for thread_id in (yield from THREADS.names()):
            try:
                head = yield from ThreadLog(thread_id).read()
            except (CorruptRecordError, UnknownFormatError):
                continue  # named before
            for run_id in (head.active, *head.queue) if head else ():
                run = (yield from _run(run_id)) if run_id else None
                if run_id and (run is None or run.ended):
                    found.append((thread_id, run_id))
        return found

    def _let_go(self, thread_id: str, run_id: str) -> Steps[None]:
        run = yield from _run(run_id)
        head = yield from ThreadLog(thread_id).read()
        if head is None or run_id not in (head.active, *head.queue) or (run is not None and not run.ended):
            return
        if run is not None:
            yield from self._do(turns.release(run))
        else:

            def leave(now: Head) -> Head | None:
                line = [name for name in (now.active, *now.queue) if name and name != run_id]
                changed = replace(now, active=line[0] if line else "", queue=tuple(line[1:]))
                return None if changed == now else changed

            yield from self._do(ThreadLog(thread_id).change(leave))
        state = run.status if run else "not there"
        self.note("thread held by a run that is over", thread_id, f"run {run_id!r} is {state}", True)


def _trouble(key: str, entries: Sequence[Entry]) -> Steps[str]:
    """Read all of some checkpoints and their writes; return what is wrong with them, or nothing."""
    reader = PackReader(key, _typed)
    try:
        packs = yield from reader.packs(name for entry in entries for name in (entry.pack, *entry.writes) if name)
        rows = [upkeep.row_of(key, packs, entry) for entry in entries if entry.pack]
        writes = [write.value for entry in entries for write in upkeep.writes_of(packs, entry)]
        yield from reader.fetch([*(locator for row in rows for locator in row.locators), *writes])
    except (CorruptRecordError, UnknownFormatError) as error:
        return str(error)
    return ""


def _run(run_id: str) -> Steps[runs.RunHead | None]:
    try:
        return (yield from runs.read(run_id))
    except RunNotFoundError:
        return None


def _nothing() -> Steps[None]:
    yield from ()


def _readable(key: str, data: bytes) -> bool:
    try:
        if not records.chunk_keys(key, data):
            records.decode(key, records.PACK, data)
    except OutlastError:
        return False
    return True


def _typed(value: Any) -> Any:
    return value


__all__ = ["Finding", "Repairs", "repair"]
