"""The names in a thread's records: as they are, or hidden where the serialiser hides values.

Channels, nodes in the paths of tasks, and namespaces are the user's words as much as values are. With a serialiser that
encrypts, such as `EncryptedSerializer`, they are serialised, too; a namespace, by which checkpoints are looked up, is a
digest in the index and serialised beside its checkpoints. Ids (of threads, runs, checkpoints, tasks) are never hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import ormsgpack

from outlast.checkpointer import keys
from outlast.checkpointer.blobs import Typed

if TYPE_CHECKING:
    from langgraph.checkpoint.serde.base import SerializerProtocol

_PROBE: Final = "outlast, readable"

Hidden = str | bytes


class Names:
    """Writes and reads names.

    Args:
        serde: Serialises values.
    """

    def __init__(self, serde: SerializerProtocol) -> None:
        self.serde = serde
        self.hides = _PROBE.encode() not in serde.dumps_typed(_PROBE)[1]

    def hide(self, name: str) -> Hidden:
        """Return a name as it is stored."""
        return ormsgpack.packb(self.serde.dumps_typed(name)) if self.hides else name

    def show(self, name: Hidden) -> str:
        """Return a name that was stored, hidden or not."""
        return shown(name, self.serde.loads_typed)

    def place(self, ns: str) -> str:
        """Return what stands for a namespace in the index."""
        return keys.digest("ns", ns) if self.hides and ns else ns


def shown(name: Hidden, loads: Callable[[Typed], Any]) -> str:
    """Return a name that was stored, hidden or not."""
    if isinstance(name, str):
        return name
    kind, data = ormsgpack.unpackb(name)
    return str(loads((kind, data)))
