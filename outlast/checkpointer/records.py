"""The envelope of every record: magic, format version, kind, checksum, msgpack body; and chunks for large ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Final

import ormsgpack

from outlast.errors import CorruptRecordError, SerializationError, UnknownFormatError

FORMAT: Final = 1
_MAGIC: Final = b"OL"
_HEADER: Final = 8
_OPTIONS: Final = ormsgpack.OPT_NON_STR_KEYS

THREAD_HEAD: Final = "H"
PACK: Final = "P"
BLOB: Final = "B"
PAGE: Final = "I"
RUN: Final = "R"
RUN_HEAD: Final = "S"
RESULT: Final = "O"
REGISTRY: Final = "G"
WORKER: Final = "W"
STREAM: Final = "T"
NODE, ENTRIES, ITEM, VALUE = "N", "E", "M", "V"
CHUNKS: Final = "C"
CHUNK: Final = "D"


def encode(kind: str, body: Any) -> bytes:
    """Return `body` as the bytes of a record of `kind`.

    Raises:
        SerializationError: If `body` holds something msgpack has no form for.
    """
    try:
        packed = ormsgpack.packb(body, option=_OPTIONS)
    except (TypeError, ValueError) as error:
        raise SerializationError(f"cannot serialise a record of kind {kind!r}: {error}") from error
    return _seal(kind, packed)


def _seal(kind: str, body: bytes) -> bytes:
    head = _MAGIC + bytes((FORMAT,)) + kind.encode("ascii")
    return head + zlib.crc32(head + body).to_bytes(4, "big") + body


def _open(key: str, kinds: str, data: bytes) -> tuple[str, bytes]:
    if len(data) < _HEADER or data[:2] != _MAGIC:
        raise CorruptRecordError(
            f"record {key!r} was not written by outlast ({len(data)} bytes); "
            "give outlast a state store, or a keyPrefix, of its own"
        )
    if data[2] != FORMAT:
        raise UnknownFormatError(
            f"record {key!r} has format version {data[2]}, this outlast reads version {FORMAT}; "
            "install the version of outlast that wrote it, or a newer one"
        )
    if zlib.crc32(data[:4] + data[_HEADER:]).to_bytes(4, "big") != data[4:_HEADER]:
        raise CorruptRecordError(f"record {key!r} is damaged: its checksum does not match; restore it from a backup")
    kind = chr(data[3])
    if kind not in kinds:
        raise CorruptRecordError(f"record {key!r} is of kind {kind!r} where one of {kinds!r} belongs")
    return kind, data[_HEADER:]


def decode(key: str, kind: str, data: bytes) -> Any:
    """Return the body of the record `data` that was read at `key`.

    Raises:
        CorruptRecordError: If the record is damaged, foreign, or of another kind.
        UnknownFormatError: If a newer outlast wrote it.
    """
    body = _open(key, kind, data)[1]
    try:
        return ormsgpack.unpackb(body, option=_OPTIONS)
    except (ValueError, TypeError) as error:
        raise CorruptRecordError(f"record {key!r} is damaged: {error}; restore it from a backup") from error


def split(key: str, data: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    """Yield `data` as the key-value pairs it is stored in, none with a value longer than `limit` bytes."""
    if len(data) <= limit:
        yield key, data
        return
    room = limit - _HEADER
    count = -(-len(data) // room)
    for number in range(count):
        yield f"{key}-c{number}", _seal(CHUNK, data[number * room : (number + 1) * room])
    yield key, _seal(CHUNKS, ormsgpack.packb([count, len(data)]))


def chunk_keys(key: str, data: bytes) -> list[str]:
    """Return the keys of the chunks that `data`, read at `key`, stands for; an empty list if it is whole."""
    if len(data) < _HEADER or data[:2] != _MAGIC or data[3:4] != CHUNKS.encode("ascii"):
        return []
    count, _ = ormsgpack.unpackb(_open(key, CHUNKS, data)[1])
    return [f"{key}-c{number}" for number in range(count)]


def join(key: str, data: bytes, chunks: dict[str, bytes]) -> bytes:
    """Return the record at `key` put together from its `chunks`.

    Raises:
        CorruptRecordError: If a chunk is missing or damaged.
    """
    count, length = ormsgpack.unpackb(_open(key, CHUNKS, data)[1])
    parts: list[bytes] = []
    for number in range(count):
        name = f"{key}-c{number}"
        if not chunks.get(name):
            raise CorruptRecordError(f"record {key!r} lacks its chunk {name!r}; restore it from a backup")
        parts.append(_open(name, CHUNK, chunks[name])[1])
    whole = b"".join(parts)
    if len(whole) != length:
        raise CorruptRecordError(f"record {key!r} has {len(whole)} of {length} bytes; restore it from a backup")
    return whole
