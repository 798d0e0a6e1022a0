"""Sessions as steps: what a run writes into a session of any kind is written once.

What a crash left in flight is found by reading the session again, in attempts that take over only: what is there
beyond what the run knew to be there is not written again.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from outlast.adapters.openai_agents.models import canonical
from outlast.adapters.openai_agents.place import Place
from outlast.recovery import steps
from outlast.recovery.journal import digest
from outlast.recovery.steps import StepCall

Items = list[Any]


def journaled(session: Any, place: Place) -> Any:
    """Return the journaled form of a session for a run at `place`."""
    if isinstance(getattr(session, "_outlast_place", None), Place):
        session = session._outlast_session
    from agents.memory.session import _session_accepts_wrapper

    return (_WithWrapper if _session_accepts_wrapper(session) else JournaledSession)(session, place)


class JournaledSession:
    """A session whose reads and writes are steps of a durable run.

    Args:
        session: The session; everything else is its own.
        place: The run.
    """

    def __init__(self, session: Any, place: Place) -> None:
        self._outlast_session = session
        self._outlast_place = place
        self._outlast_known: Items | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # The SDK asks for some kinds of sessions by isinstance.
        return type(self._outlast_session)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_outlast"):
            raise AttributeError(name)
        return getattr(self._outlast_session, name)

    async def get_items(self, limit: int | None = None) -> Items:
        """Return the history, as it was when the run first asked for it."""
        return await self._outlast_get(limit)

    async def add_items(self, items: Items) -> None:
        """Append items, once."""
        await self._outlast_add(items)

    async def pop_item(self) -> Any:
        """Remove and return the newest item, once."""
        return await self._outlast_pop()

    async def clear_session(self) -> None:
        """Remove all items."""
        await self._outlast_clear()

    # --- the rules, the same with and without `wrapper`

    async def _outlast_get(self, limit: int | None, **wrapper: Any) -> Items:
        async def read() -> Items:
            return list(await self._outlast_session.get_items(limit, **wrapper))

        items: Items = await self._outlast_step("get", limit, read)
        self._outlast_known = list(items)
        return items

    async def _outlast_add(self, items: Items, **wrapper: Any) -> None:
        async def write() -> None:
            missing = await self._outlast_missing(items, wrapper) if self._outlast_in_doubt else items
            if missing:
                await self._outlast_session.add_items(missing, **wrapper)

        await self._outlast_begin(len(items) + 1, wrapper)
        await self._outlast_step("add", items, write)
        self._outlast_known = [*(self._outlast_known or ()), *items]

    async def _outlast_pop(self, **wrapper: Any) -> Any:
        async def pop() -> Any:
            known = self._outlast_known
            if self._outlast_in_doubt and known:
                found = await self._outlast_session.get_items(len(known), **wrapper)
                if _marks(found)[-len(known) :] != _marks(known):
                    return known[-1]
            return await self._outlast_session.pop_item(**wrapper)

        await self._outlast_begin(2, wrapper)
        item = await self._outlast_step("pop", None, pop)
        self._outlast_known = (self._outlast_known or [])[:-1]
        return item

    async def _outlast_clear(self, **wrapper: Any) -> None:
        async def clear() -> None:
            await self._outlast_session.clear_session(**wrapper)

        await self._outlast_step("clear", None, clear)
        self._outlast_known = []

    async def _outlast_begin(self, count: int, wrapper: dict[str, Any]) -> None:
        """Know how the session ends, where the run has not read it before it writes."""
        if self._outlast_known is None and not self._outlast_counts_itself:
            await self._outlast_get(count, **wrapper)

    @property
    def _outlast_in_doubt(self) -> bool:
        """Whether a write that is not recorded may have been in flight when an attempt before was lost."""
        return self._outlast_place.track.attempt.head.attempts > 1 and not self._outlast_counts_itself

    @property
    def _outlast_counts_itself(self) -> bool:
        return bool(getattr(self._outlast_session, "outlast_exactly_once", False))

    async def _outlast_missing(self, items: Items, wrapper: dict[str, Any]) -> Items:
        """Return those of `items` that the session has not: all, a tail of them, or none."""
        known, marks = _marks(self._outlast_known or []), _marks(items)
        found = _marks(await self._outlast_session.get_items(None, **wrapper))
        for count in range(len(items), 0, -1):
            expected = [*known, *marks[:count]]
            if found[-len(expected) :] == expected:
                return items[count:]
        if found[len(found) - len(known) :] == known:
            return items
        # Another run has written meanwhile: what is there more often than the run knew is taken for its own.
        for mark in known:
            if mark in found:
                found.remove(mark)
        missing = []
        for item, mark in zip(items, marks, strict=True):
            if mark in found:
                found.remove(mark)
            else:
                missing.append(item)
        return missing

    async def _outlast_step(self, name: str, request: Any, invoke: Callable[[], Awaitable[Any]]) -> Any:
        scope, place = steps.scope(), self._outlast_place
        if scope is None:
            return await invoke()
        session_id = str(getattr(self._outlast_session, "session_id", ""))
        said = canonical(request)
        call = StepCall(
            type="session",
            name=session_id,
            digest="",
            request=lambda: f"{name} {said}",
            key=f"session/{digest(session_id)[:8]}/{name}{place.number(f'session {session_id} {name}')}",
        )
        call = replace(call, key="/".join(filter(None, (place.path, call.key))))
        replayed = functools.partial(place.track.replayed, call)
        return await steps.arun(steps.perform(_at_root(scope), call, replayed), invoke)


def _at_root(scope: steps.Scope) -> steps.Scope:
    """Return the scope with the place left to the key: a session belongs to its run, wherever it is called from."""
    return replace(scope, locate=lambda: ("", 1))


class _WithWrapper(JournaledSession):
    """A session whose methods take the SDK's `wrapper`."""

    async def get_items(self, limit: int | None = None, *, wrapper: Any = None) -> Items:
        return await self._outlast_get(limit, wrapper=wrapper)

    async def add_items(self, items: Items, *, wrapper: Any = None) -> None:
        await self._outlast_add(items, wrapper=wrapper)

    async def pop_item(self, *, wrapper: Any = None) -> Any:
        return await self._outlast_pop(wrapper=wrapper)

    async def clear_session(self, *, wrapper: Any = None) -> None:
        await self._outlast_clear(wrapper=wrapper)


def _marks(items: Items) -> list[str]:
    """Return what items are known by: their contents, without ids that a server has given them."""
    return [
        digest(canonical({k: v for k, v in dict(item).items() if v is not None and k not in ("id", "status")}))[:16]
        for item in items
    ]
