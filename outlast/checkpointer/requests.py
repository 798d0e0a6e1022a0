"""What a saver commits: checkpoints and pending writes, as requests to the lane of their thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from langgraph.checkpoint.base import WRITES_IDX_MAP, ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde.base import SerializerProtocol

from outlast.checkpointer.blobs import PackReader, PackWriter, Typed
from outlast.checkpointer.client import Steps
from outlast.checkpointer.head import Entry
from outlast.checkpointer.lane import Lane
from outlast.checkpointer.lists import ListState, store_list
from outlast.checkpointer.names import Names
from outlast.checkpointer.upkeep import Row, WriteRow, row_of
from outlast.errors import OutlastError, SerializationError

HIDDEN_NS: Final = "outlast_ns"
"""Where a checkpoint has its namespace, if the index has a digest of it."""


@dataclass
class Put:
    """A checkpoint to commit."""

    names: Names
    ns: str
    parent_id: str
    checkpoint: Checkpoint
    metadata: CheckpointMetadata
    new_versions: ChannelVersions
    completes: bool = True

    def prepare(self, lane: Lane, pack: PackWriter) -> Steps[Entry]:
        values = self.checkpoint["channel_values"]
        versions = self.checkpoint["channel_versions"]
        known = yield from self._parent_channels(lane)
        stored: dict[str, tuple[Any, Any]] = {}
        lists: list[tuple[str, ListState]] = []
        for name, value in values.items():
            version = versions.get(name)
            if name not in self.new_versions and name in known and known[name][0] == version:
                stored[name] = known[name]
            elif type(value) is list:
                state = store_list(value, lane.lists.get((self.ns, name)), pack, self._dumps)
                lists.append((name, state))
                stored[name] = (version, state.locator)
            else:
                stored[name] = (version, pack.add(self._dumps(value)))
        bare = {key: value for key, value in self.checkpoint.items() if key != "channel_values"}
        place = self.names.place(self.ns)
        if place != self.ns:
            bare[HIDDEN_NS] = self.ns
        row = Row(
            ns=place,
            checkpoint_id=self.checkpoint["id"],
            parent_id=self.parent_id,
            checkpoint=pack.add(self._dumps(bare)),
            metadata=pack.add(self._dumps(self.metadata)),
            channels={self.names.hide(name): locator for name, (_, locator) in stored.items()},
        )
        pack.checkpoints.append(list(row))
        lane.remember(self.ns, self.checkpoint["id"], stored)
        for name, state in lists:
            lane.remember_list(self.ns, name, state)
        return Entry(place, self.checkpoint["id"], pack=pack.name)

    def _dumps(self, value: Any) -> Typed:
        return dumps(self.names.serde, value)

    def _parent_channels(self, lane: Lane) -> Steps[dict[str, tuple[Any, Any]]]:
        """Return where the parent's values are, so that those that did not change are not written again."""
        if not self.parent_id or not (self.checkpoint["channel_values"].keys() - self.new_versions.keys()):
            return {}
        known = lane.channels.get((self.ns, self.parent_id))
        if known is not None:
            return known
        head = yield from lane.log.read()
        entry = (yield from lane.log.index.find(head, self.names.place(self.ns), self.parent_id)) if head else None
        if entry is None or not entry.pack:
            return {}
        reader = PackReader(lane.log.key, self.names.serde.loads_typed)
        row = row_of(lane.log.key, (yield from reader.packs([entry.pack])), entry)
        yield from reader.fetch([row.checkpoint])
        versions = reader.value(row.checkpoint)["channel_versions"]
        channels = {self.names.show(name): locator for name, locator in row.channels.items()}
        return {name: (versions.get(name), locator) for name, locator in channels.items()}


@dataclass
class Writes:
    """Pending writes of one task to commit, serialised already."""

    names: Names
    ns: str
    checkpoint_id: str
    task_id: str
    task_path: str
    writes: list[tuple[str, int, Typed]]
    completes: bool = False

    def prepare(self, lane: Lane, pack: PackWriter) -> Steps[Entry]:
        yield from ()
        ns, task_path = self.names.place(self.ns), self.names.hide(self.task_path)
        replaces = all(channel in WRITES_IDX_MAP for channel, _, _ in self.writes)
        for channel, position, value in self.writes:
            place = (ns, self.checkpoint_id, self.task_id, task_path, position)
            pack.writes.append(list(WriteRow(*place, self.names.hide(channel), pack.add(value), replaces)))
        return Entry(ns, self.checkpoint_id, writes=(pack.name,))


def dumps(serde: SerializerProtocol, value: Any) -> Typed:
    try:
        return serde.dumps_typed(value)
    except OutlastError:
        raise
    except Exception as error:
        raise SerializationError(
            f"cannot serialise a value of type {type(value).__qualname__}: {error}. Keep plain data, messages, "
            "pydantic models or dataclasses in the state, or give the checkpointer a `serde` that knows this type"
        ) from error
