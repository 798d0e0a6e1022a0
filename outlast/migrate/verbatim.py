"""A serialiser that carries values over as they are stored, without the classes they are made of.

A migration runs where the user's code is not: LangGraph's serialiser would turn a value of a class that it cannot
import into None or a plain dict. This one opens only the outermost layer and keeps what is in it as bytes.
"""

from __future__ import annotations

import json
from typing import Any, Final

import ormsgpack
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import EXT_DELTA_SNAPSHOT
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from outlast.errors import SerializationError

_OPTIONS: Final = ormsgpack.OPT_NON_STR_KEYS | ormsgpack.OPT_REPLACE_SURROGATES


class Opaque:
    """An object inside a msgpack value: its extension code and its bytes."""

    __slots__ = ("code", "data")

    def __init__(self, code: int, data: bytes) -> None:
        self.code = code
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and (self.code, self.data) == (other.code, other.data)

    def __hash__(self) -> int:
        return hash((self.code, self.data))

    def __repr__(self) -> str:
        return f"Opaque({self.code}, {len(self.data)} bytes)"


class Foreign:
    """A whole value in a form that is not opened here: LangGraph's older JSON, pickle, or an encrypted one."""

    __slots__ = ("data", "kind")

    def __init__(self, kind: str, data: bytes) -> None:
        self.kind = kind
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Foreign) and (self.kind, self.data) == (other.kind, other.data)

    def __hash__(self) -> int:
        return hash((self.kind, self.data))

    def __repr__(self) -> str:
        return f"Foreign({self.kind!r}, {len(self.data)} bytes)"


class Verbatim(SerializerProtocol):
    """Reads and writes values in the forms LangGraph's own serialiser has."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """Return the stored form of `obj`, the same bytes it was read from."""
        match obj:
            case None:
                return "null", b""
            case Foreign():
                return obj.kind, obj.data
            case bytes():
                return "bytes", obj
            case bytearray():
                return "bytearray", bytes(obj)
        return "msgpack", pack(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """Return the value with its outermost layer opened."""
        kind, body = data
        match kind:
            case "null":
                return None
            case "bytes":
                return bytes(body)
            case "bytearray":
                return bytearray(body)
            case "msgpack":
                return ormsgpack.unpackb(bytes(body), ext_hook=_opened, option=ormsgpack.OPT_NON_STR_KEYS)
            case "json":
                return _of_json(bytes(body))
        return Foreign(kind, bytes(body))


def pack(value: Any) -> bytes:
    """Return `value` as msgpack.

    Raises:
        SerializationError: If it holds a value that only a store with a place for each value can take.
    """
    try:
        return ormsgpack.packb(value, default=_closed, option=_OPTIONS)
    except ormsgpack.MsgpackEncodeError as error:
        raise SerializationError(f"cannot carry a value over as it is stored: {error}") from error


def _opened(code: int, data: bytes) -> Any:
    if code == EXT_DELTA_SNAPSHOT:
        # Savers treat these apart from other values.
        return _DeltaSnapshot(ormsgpack.unpackb(data, ext_hook=_opened, option=ormsgpack.OPT_NON_STR_KEYS))
    return Opaque(code, data)


def _closed(value: Any) -> Any:
    if isinstance(value, Opaque):
        return ormsgpack.Ext(value.code, value.data)
    if isinstance(value, _DeltaSnapshot):
        return ormsgpack.Ext(EXT_DELTA_SNAPSHOT, pack(value.value))
    raise TypeError(f"{value!r} has no place inside another value")


def _of_json(body: bytes) -> Any:
    # LangGraph wrote JSON before 2025. Only a whole checkpoint is opened; its values stay as they are.
    value = json.loads(body)
    if isinstance(value, dict) and value.keys() >= {"id", "channel_values", "channel_versions", "versions_seen"}:
        values = {name: _closed_json(item) for name, item in value["channel_values"].items()}
        return {**value, "channel_values": values}
    return Foreign("json", body)


def _closed_json(value: Any) -> Any:
    plain = value is None or isinstance(value, str | bool | int | float)
    return value if plain else Foreign("json", json.dumps(value, ensure_ascii=False).encode())
