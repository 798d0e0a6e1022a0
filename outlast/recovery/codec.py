"""What turns values into bytes and back: LangGraph's `SerializerProtocol`, without needing LangGraph."""

from __future__ import annotations

from typing import Any, Protocol

Typed = tuple[str, bytes]


class Codec(Protocol):
    """Serialises the values of an agent."""

    def dumps_typed(self, obj: Any) -> Typed:
        """Return a tag and the bytes of a value.

        Raises:
            Exception: If it cannot be serialised.
        """

    def loads_typed(self, data: Typed) -> Any:
        """Return the value that `dumps_typed` was given."""
