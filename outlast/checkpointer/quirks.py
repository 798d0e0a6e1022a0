"""What state store components do other than what they report. Each row was measured against the real component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""Bytes of a gRPC message that a `daprd` takes unless told otherwise."""


@dataclass(frozen=True)
class Quirks:
    """How one kind of component deviates from what it reports.

    Attributes:
        sound_cas: Whether a write with an ETag really refuses every other writer.
        max_value: Bytes of the largest value outlast writes at one key.
        max_operations: Operations of the largest transaction.
        why: What was seen, for the error message.
    """

    sound_cas: bool = True
    max_value: int = 1_000_000
    max_operations: int = 1000
    why: str = ""


_LOST = "it acknowledges writes that a race has lost"

TABLE: Final[dict[str, Quirks]] = {
    # etcd v1 and v2: of 80 acknowledged compare-and-swaps 46 to 57 were kept.
    "state.etcd": Quirks(sound_cas=False, max_operations=120, why=_LOST),
    "state.aws.dynamodb": Quirks(max_value=350_000, max_operations=90),
}


def of(component_type: str) -> Quirks:
    """Return the quirks of a component of `component_type`, such as `state.redis`."""
    return TABLE.get(component_type, Quirks())
