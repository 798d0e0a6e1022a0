"""The context object of a run: recorded as steps change it, and brought back in place."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.errors import SerializationError
from outlast.recovery.runs import Typed

_CODEC = AgentsCodec()


@dataclass(frozen=True)
class ContextCodec:
    """How to store a context object that is no plain data, pydantic model or dataclass, or holds such.

    Attributes:
        dumps: Returns of a context what can be stored: plain data, pydantic models, dataclasses.
        loads: Returns the context that `dumps` was given. Live objects (clients, connections) are made anew here.
        update: Brings a context that exists to what `dumps` returned, in place; without it a context that the caller
            holds does not follow the run.
    """

    dumps: Callable[[Any], Any]
    loads: Callable[[Any], Any]
    update: Callable[[Any, Any], None] | None = None

    def encode(self, context: Any) -> Typed:
        """Return a context as a record can have it.

        Raises:
            SerializationError: If it cannot be stored; the message says how to give a codec.
        """
        try:
            return _CODEC.dumps_typed(self.dumps(context))
        except Exception as error:
            raise SerializationError(
                f"the context of this run, a {type(context).__qualname__}, cannot be stored: {error}. Use plain data, "
                "a pydantic model or a dataclass of such, or say how: "
                "durable(agent, context_codec=ContextCodec(dumps=..., loads=...))"
            ) from error

    def decode(self, typed: Typed) -> Any:
        """Return the context that `encode` was given, made anew."""
        return self.loads(_CODEC.loads_typed(typed))

    def restore(self, context: Any, typed: Typed) -> None:
        """Bring a context to what `encode` returned, in place where it can be."""
        stored = _CODEC.loads_typed(typed)
        if self.update is not None:
            self.update(context, stored)
        elif self.loads is _same:
            _update(context, stored)
        else:
            _update(context, self.loads(stored))


def _same(value: Any) -> Any:
    return value


PLAIN = ContextCodec(_same, _same)
"""For contexts that can be stored as they are."""


def _update(context: Any, now: Any) -> None:
    if isinstance(context, dict):
        context.clear()
        context.update(now)
    elif isinstance(context, list):
        context[:] = now
    elif isinstance(context, set):
        context.clear()
        context.update(now)
    elif isinstance(context, BaseModel):
        for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__"):
            object.__setattr__(context, name, getattr(now, name))
    elif dataclasses.is_dataclass(context):
        for item in dataclasses.fields(context):
            object.__setattr__(context, item.name, getattr(now, item.name))
    elif hasattr(context, "__dict__"):
        vars(context).update(vars(now))
    # Anything else cannot be changed, so nothing in the run has changed it.


class Contexts:
    """The context of one attempt.

    Args:
        value: The context object: the caller's own, if the caller is in this process.
        codec: How it is stored.
    """

    def __init__(self, value: Any, codec: ContextCodec) -> None:
        self.value = value
        self._codec = codec
        self._lock = threading.Lock()
        self._number = 0
        self._last: bytes | None = None

    def begin(self, typed: Typed | None, number: int = 0) -> None:
        """Bring the context to where the attempt begins; `number` changes were recorded before."""
        self._number = number
        if typed is None or self.value is None:
            return
        self._codec.restore(self.value, typed)
        self._last = bytes(typed[1])

    @property
    def number(self) -> int:
        """How many changes are recorded."""
        return self._number

    def encoded(self) -> list[Any] | None:
        """Return the context as it is now, for a record; None if there is none."""
        return None if self.value is None else list(self._codec.encode(self.value))

    def change(self) -> list[Any] | None:
        """Return the context with its number if it has changed since it was last recorded, else None.

        Raises:
            SerializationError: If it has become something that cannot be stored.
        """
        if self.value is None:
            return None
        with self._lock:
            kind, data = self._codec.encode(self.value)
            if data == self._last:
                return None
            self._number += 1
            self._last = data
            return [self._number, kind, data]

    def replay(self, recorded: list[Any] | None) -> None:
        """Bring the context to what a recorded step has left it as, unless a later one was brought back already."""
        if recorded is None or self.value is None:
            return
        number, kind, data = recorded
        with self._lock:
            if number <= self._number:
                return
            self._codec.restore(self.value, (kind, data))
            self._number, self._last = number, data
