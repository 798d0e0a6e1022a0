"""DaprSession: an OpenAI Agents session in the state store.

A session is a log of what was done to it: items appended, the newest taken away, everything cleared. Entries are never
changed, so appending costs the same at any length; each has an id, and one that is entered twice counts once.
"""

from __future__ import annotations

import functools
import uuid
from dataclasses import dataclass
from typing import Any, Final

from agents.memory import SessionABC, SessionSettings

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.checkpointer import keys
from outlast.checkpointer.blobs import PackReader, PackWriter
from outlast.checkpointer.client import StateClient, Steps
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.thread import ThreadLog
from outlast.errors import CorruptRecordError
from outlast.recovery import steps
from outlast.recovery.runtime import default_runtime

_CODEC: Final = AgentsCodec()
_NS: Final = "i"
Items = list[Any]


class DaprSession(SessionABC):
    """Keeps the history of a conversation in a Dapr state store; for runs durable or not.

    Args:
        session_id: Names the conversation.
        store: Name of the state store component.
        session_settings: The SDK's settings, such as how many items a run is given.
        client: The store; the process's own for `store`, if not given.
    """

    outlast_exactly_once: Final = True
    """Tells outlast that an item written again under the same step counts once."""

    def __init__(
        self,
        session_id: str,
        *,
        store: str = "statestore",
        session_settings: SessionSettings | None = None,
        client: StateClient | None = None,
    ) -> None:
        self.session_id = session_id
        self._settings = self.session_settings = session_settings or SessionSettings()
        self._store = store
        self._given = client

    @property
    def reference(self) -> dict[str, Any]:
        """The arguments that make this session again in another process."""
        return {"session_id": self.session_id, "store": self._store, "session_settings": self._settings}

    @functools.cached_property
    def _client(self) -> StateClient:
        return self._given or default_runtime(self._store).client

    async def get_items(self, limit: int | None = None) -> Items:
        """Return the history, oldest first.

        Args:
            limit: At most so many items, the newest; by default what the settings say, else all.
        """
        limit = self._settings.limit if limit is None else limit
        items: Items = await self._client.arun(_items(self.session_id))
        if limit is None:
            return items
        return items[len(items) - limit :] if 0 < limit < len(items) else items[:limit] if limit <= 0 else items

    async def add_items(self, items: Items) -> None:
        """Append items."""
        if items:
            await self._client.arun(self._append({"do": "add", "items": [dict(item) for item in items]}))

    async def pop_item(self) -> Any:
        """Remove and return the newest item; None if there is none."""
        id = _id()
        await self._client.arun(self._append({"do": "pop"}, id))
        return (await self._client.arun(_popped(self.session_id))).get(id)

    async def clear_session(self) -> None:
        """Remove all items, and free their space."""
        await self._client.arun(_Log(self.session_id).delete())

    def _append(self, operation: dict[str, Any], id: str = "") -> Steps[None]:
        """Enter an operation. The number before its id only has to grow: it tells what came first."""
        limit = self._client.capabilities.quirks.max_value
        log = _Log(self.session_id)
        name = log.names.next()
        pack = PackWriter(log.key, name)
        id = id or _id()
        number = yield from _number(log)
        sequence = f"{number:012d}.{id}"
        pack.writes.append([_NS, sequence, "", "", 0, "", pack.add(_CODEC.dumps_typed({**operation, "id": id})), False])
        yield from log.commit([Entry(_NS, sequence, pack=pack.name)], pack.finish(limit), pack.name)


class _Log(ThreadLog):
    """The log under a session."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id, key=session_key(session_id))

    def _first(self) -> Steps[Head]:
        yield from ()
        return Head(self.thread_id)


def session_key(session_id: str) -> str:
    """Return the key of a session's head; the keys of its records start with it."""
    return f"e-{keys.digest(session_id)}"


def _id() -> str:
    """Return what names a write: in a durable run the same in every attempt."""
    scope = steps.scope()
    if scope is not None and scope.info is not None:
        return scope.info.idempotency_key
    return uuid.uuid4().hex[:26]


def _number(log: ThreadLog) -> Steps[int]:
    """Return the number of the next entry: above all that were there when this was asked."""
    head = yield from log.read()
    return int(head.newest.partition(".")[0]) + 1 if head and head.newest else 1


@dataclass
class _State:
    """What a log comes to."""

    items: Items
    popped: dict[str, Any]


def _fold(operations: list[dict[str, Any]]) -> _State:
    state, seen = _State([], {}), set()
    for operation in operations:
        if operation["id"] in seen:
            continue
        seen.add(operation["id"])
        if operation["do"] == "add":
            state.items += operation["items"]
        else:
            state.popped[operation["id"]] = state.items.pop() if state.items else None
    return state


def _read(session_id: str) -> Steps[_State]:
    log = _Log(session_id)
    head = yield from log.read()
    while head is not None:
        try:
            return _fold((yield from _operations(log, head)))
        except CorruptRecordError as error:
            # Cleared while it was read?
            head = yield from log.reread(head, error)
    return _State([], {})


def _operations(log: ThreadLog, head: Head) -> Steps[list[dict[str, Any]]]:
    entries = sorted((yield from log.index.entries(head)), key=lambda entry: entry.checkpoint_id)
    reader = PackReader(log.key, _CODEC.loads_typed)
    packs = yield from reader.packs(dict.fromkeys(entry.pack for entry in entries))
    where = {row[1]: row[6] for entry in entries for row in packs[entry.pack]["w"]}
    locators = [where[entry.checkpoint_id] for entry in entries]
    yield from reader.fetch(locators)
    return [_CODEC.loads_typed(reader.typed(locator)) for locator in locators]


def _items(session_id: str) -> Steps[Items]:
    return (yield from _read(session_id)).items


def _popped(session_id: str) -> Steps[dict[str, Any]]:
    return (yield from _read(session_id)).popped
