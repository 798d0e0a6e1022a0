"""The migration itself: thread after thread, each checkpoint copied, read back and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from outlast.migrate.sides import MigrationError, Place, Record, Side, Write, same, side_of
from outlast.migrate.verbatim import pack

_WINDOW: Final = 16
"""Checkpoints that are on their way, and in memory, at once."""


@dataclass
class ThreadReport:
    """What a migration did with one thread.

    Attributes:
        thread_id: The thread.
        checkpoints: Checkpoints the source has.
        writes: Their pending writes (not counted by a dry run).
        copied: Checkpoints written now; in a dry run those that would be.
        present: Checkpoints that were in the target already, the same.
        problem: Why the thread is not copied completely; empty if it is.
    """

    thread_id: str
    checkpoints: int = 0
    writes: int = 0
    copied: int = 0
    present: int = 0
    problem: str = ""


def migrate(
    source: BaseCheckpointSaver[Any] | Side,
    target: BaseCheckpointSaver[Any] | Side | None,
    *,
    threads: Iterable[str] | None = None,
    dry_run: bool = False,
    on_progress: Callable[[ThreadReport], None] | None = None,
) -> Iterator[ThreadReport]:
    """Copy threads from one checkpointer to another, and yield a report for each.

    Called again it goes on where it was cut short, and brings over what the source got since; checkpoints that are in
    the target already are compared and not written again. Other threads of the target are not touched.

    Args:
        source: Where the threads are.
        target: Where they go; with `dry_run` it may be None, for one that does not exist yet.
        threads: Ids of threads; all if not given.
        dry_run: Write nothing.
        on_progress: Called after each few checkpoints with the report so far.
    """
    origin = source if isinstance(source, Side) else side_of(source)
    destination = target if target is None or isinstance(target, Side) else side_of(target)
    if destination is None and not dry_run:
        raise MigrationError("there is no target to copy to")
    try:
        for thread_id in origin.threads() if threads is None else threads:
            report = ThreadReport(str(thread_id))
            steps = _Copy(origin, destination, report, dry_run).steps()
            try:
                for _ in steps:
                    if on_progress:
                        on_progress(report)
            except Exception as error:
                # One thread that cannot be copied must not hold up the others.
                report.problem = str(error) or type(error).__name__
            finally:
                origin.forget()
                if destination:
                    destination.forget()
            yield report
    finally:
        if not isinstance(source, Side):
            origin.close()
        if destination is not None and not isinstance(target, Side):
            destination.close()


class _Copy:
    """The copying of one thread."""

    def __init__(self, source: Side, target: Side | None, report: ThreadReport, dry_run: bool) -> None:
        self._source = source
        self._target = target
        self._report = report
        self._dry_run = dry_run
        self._versions = _Versions(target) if target else None

    def steps(self) -> Iterator[None]:
        report, thread_id = self._report, self._report.thread_id
        places = self._source.places(thread_id)
        if not places:
            raise MigrationError(f"the source has no thread {thread_id!r}")
        report.checkpoints = len(places)
        there = set(self._target.places(thread_id)) if self._target else set()
        missing = [place for place in places if place not in there]
        if self._dry_run or self._target is None or self._versions is None:
            report.copied, report.present = len(missing), len(places) - len(missing)
            return
        ahead = there - set(places)
        if missing and (run := self._target.busy(thread_id)):
            raise MigrationError(f"the target's thread is busy with run {run!r}; wait until it has ended")
        if missing and ahead:
            raise MigrationError(
                f"source and target both went on: the target has {len(ahead)} checkpoints the source lacks, the source "
                f"{len(missing)} others. Keep one of them: delete the thread in the target, or leave it as it is"
            )
        for start in range(0, len(places), _WINDOW):
            self._window(self._target, self._versions, places[start : start + _WINDOW], there, bool(ahead))
            yield

    def _window(self, target: Side, versions: _Versions, window: list[Place], there: set[Place], ahead: bool) -> None:
        thread_id, report = self._report.thread_id, self._report
        expected: list[Record] = []
        read = self._source.read_many(thread_id, window)
        for place in window:
            record = read.get(place)
            if record is None:
                report.checkpoints -= 1  # pruned meanwhile
                continue
            record = versions.of(record)
            if target.json_metadata:
                record = replace(record, metadata=_as_json(record.metadata))
            expected.append(record)
            if place not in there:
                target.write(thread_id, record)
        target.settle()
        copies = target.read_many(thread_id, [(record.ns, record.checkpoint_id) for record in expected])
        for record in expected:
            place = (record.ns, record.checkpoint_id)
            self._verify(target, record, copies.get(place), place in there, ahead)
            report.writes += len(record.writes)
            if place in there:
                report.present += 1
            else:
                report.copied += 1

    def _verify(self, target: Side, record: Record, found: Record | None, was_there: bool, ahead: bool) -> None:
        thread_id, place = self._report.thread_id, (record.ns, record.checkpoint_id)
        wrong = _difference(record, found)
        if wrong and not was_there:
            # A value may differ from its parent's under the same version; have every value stored.
            target.write(thread_id, record, whole=True)
        elif wrong == "writes" and not ahead and found and not _has_all(found, record):
            target.write_writes(thread_id, record)
        elif wrong == "writes" and found and (ahead or _has_all(found, record)):
            return  # the target has gone on from here
        elif wrong:
            raise MigrationError(
                f"checkpoint {record.checkpoint_id} is in the target already, with another {wrong}: the thread there "
                "is not a copy of this one. Delete it in the target, or leave it out with --thread"
            )
        else:
            return
        target.settle()
        wrong = _difference(record, target.read(thread_id, place))
        if wrong:
            raise MigrationError(
                f"checkpoint {record.checkpoint_id} reads back with another {wrong} than the source has; "
                "do not use the copy, and report this"
            )


class _Versions:
    """Channel versions as the target must have them.

    A saver that goes on with textual versions cannot compare them with numbers. And one that finds values by version
    alone cannot hold two values of one version, as forks have them: the second then gets a version of its own, which
    sorts before the first, so that what was seen of the first counts as seen of it.
    """

    def __init__(self, target: Side) -> None:
        self._textual = target.textual_versions
        self._shared = target.shares_versions
        self._seen: dict[tuple[str, str, Any], bytes] = {}

    def of(self, record: Record) -> Record:
        if not self._textual:
            return record
        checkpoint = record.checkpoint
        values = checkpoint["channel_values"]
        versions = {name: _text(version) for name, version in checkpoint["channel_versions"].items()}
        if self._shared:
            # To have no value is one, too: without a version of its own such a channel would be given another's.
            versions = {
                name: self._own(record.ns, name, version, _bytes(values[name]) if name in values else b"")
                for name, version in versions.items()
            }
        seen = {
            node: {name: _text(version) for name, version in channels.items()}
            for node, channels in checkpoint["versions_seen"].items()
        }
        return replace(record, checkpoint={**checkpoint, "channel_versions": versions, "versions_seen": seen})

    def _own(self, ns: str, channel: str, version: Any, value: bytes) -> Any:
        digest = hashlib.blake2b(value, digest_size=12).digest()
        if self._seen.setdefault((ns, channel, version), digest) == digest:
            return version
        return f"{str(version).partition('.')[0]}.-{digest.hex()}"


def _text(version: Any) -> Any:
    return f"{int(version):032}.0" if isinstance(version, int | float) else version


def _bytes(value: Any) -> bytes:
    for dumps in (pack, lambda value: JsonPlusSerializer().dumps_typed(value)[1]):
        try:
            return dumps(value)
        except Exception:
            continue
    return repr(value).encode()


def _as_json(metadata: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(metadata))
    return plain


def _difference(wanted: Record, found: Record | None) -> str:
    """Return what differs, or nothing."""
    if found is None:
        return "presence"
    if wanted.parent_id != found.parent_id:
        return "parent"
    if not same(wanted.metadata, found.metadata):
        return "metadata"
    for name in dict.fromkeys((*wanted.checkpoint, *found.checkpoint)):
        if not same(wanted.checkpoint.get(name), found.checkpoint.get(name)):
            return str(name)
    return "" if same(_order(wanted.writes), _order(found.writes)) else "writes"


def _order(writes: Iterable[Write]) -> list[tuple[str, str, str, Any]]:
    return [(write.task_id, write.path, write.channel, write.value) for write in writes]


def _has_all(found: Record, wanted: Record) -> bool:
    there = {(write.task_id, write.position): write for write in found.writes}
    for write in wanted.writes:
        other = there.get((write.task_id, write.position))
        if other is None or (write.position >= 0 and not same(write.value, other.value)):
            return False
    return True
