"""What turns values into bytes and back: LangGraph's `SerializerProtocol`, without needing LangGraph."""

from __future__ import annotations

from typing import Any, Final, Protocol

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


_PROBE: Final = "outlast-probe"


def hides(codec: Codec) -> bool:
    """Tell whether a codec encrypts: then nothing of the user's may be stored past it."""
    return _PROBE.encode() not in codec.dumps_typed(_PROBE)[1]
