"""The envelope of every record: magic, format version, kind, checksum, msgpack body; and chunks for large ones.

A kind in lower case says that the body is compressed. Ids and names recur so often that most records shrink by half.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import ormsgpack

from outlast.errors import CorruptRecordError, SerializationError, UnknownFormatError

T = TypeVar("T")

FORMAT: Final = 2
_MAGIC: Final = b"OL"
_HEADER: Final = 8
_COMPRESS: Final = 200
_LONG: Final = 400
_PAIR: Final = b"\x92"
"""What begins an array of two in msgpack."""
_RAW: Final = -15
"""Deflate without header and checksum: the envelope has its own."""
_DICTIONARY: Final = (
    b"tool_call_idtool_callsinvalid_tool_callsusage_metadatainput_tokensoutput_tokenstotal_tokensfinish_reasonmodel_name"
    b"langchain_core.messages.systemSystemMessagelangchain_core.messages.toolToolMessagestatussuccessartifact"
    b"langgraph.typesSendCommandInterruptparentssubgraphupdateforkcounters_since_delta_snapshot__interrupt____resume__"
    b"__error__run_id__pregel_push\xb0channel_versions\xadversions_seen\x83\xa9__input__\x80\xa9__start__\x81\xa9__start__"
    b"\xb0updated_channels\x91\xadpending_sends\x90\xa1v\x04\xa2ts\xd9 2026-\xa2id\xd9$"
    b"branch:to:~__pregel_pull, agenttools"
    b"\x83\xa6source\xa5input\xa6source\xa4loop\xa4step\xa7parents\x80\xa6run_id\xa7msgpack\xa4null\xa8messages"
    b"langchain_core.messages.ai\xa9AIMessagelangchain_core.messages.human\xacHumanMessage\xa7content"
    b"\xb1additional_kwargs\x80\xb1response_metadata\x80\xa4type\xa5human\xa4name\xc0\xa2id\xd9$\xa4type\xa2ai\xa4name\xc0"
    b"\xaatool_calls\x90\xb2invalid_tool_calls\x90\xaeusage_metadata\xc0\xb3model_validate_json"
)
"""What packs begin alike with; part of the format, so never changed without a new one."""
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
        parts = _parted(body) if kind == PACK else [ormsgpack.packb(body, option=_OPTIONS)]
    except (TypeError, ValueError) as error:
        raise SerializationError(f"cannot serialise a record of kind {kind!r}: {error}") from error
    return _seal(kind, *parts)


def _parted(body: Any) -> list[bytes]:
    """Return a pack as the ids and names in it, then its long values: each is compressed better apart."""
    long = [row[1] for row in body["b"] if row[1] and len(row[1]) >= _LONG]
    rows = [[row[0], len(row[1])] if row[1] and len(row[1]) >= _LONG else row for row in body["b"]]
    packed = ormsgpack.packb({**body, "b": rows}, option=_OPTIONS)
    return [_PAIR + packed, ormsgpack.packb(b"".join(long))]


def _joined(parts: Any) -> Any:
    """Return the body of a pack; the inverse of `_parted`."""
    body, long = parts
    place = 0
    for row in body["b"]:
        if isinstance(row[1], int):
            row[1], place = long[place : place + row[1]], place + row[1]
    if place != len(long):
        raise ValueError(f"{len(long)} bytes of long values where {place} belong")
    return body


def _seal(kind: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    if len(body) > _COMPRESS and kind != CHUNK:
        packer = zlib.compressobj(9, wbits=_RAW, memLevel=9, zdict=_DICTIONARY)
        *first, last = parts
        # A block of its own for each part.
        small = b"".join(packer.compress(part) + packer.flush(zlib.Z_BLOCK) for part in first)
        small += packer.compress(last) + packer.flush()
        if len(small) < len(body):
            kind, body = kind.lower(), small
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
    if kind.upper() not in kinds:
        raise CorruptRecordError(f"record {key!r} is of kind {kind!r} where one of {kinds!r} belongs")
    if kind.isupper():
        return kind, data[_HEADER:]
    try:
        return kind.upper(), zlib.decompressobj(wbits=_RAW, zdict=_DICTIONARY).decompress(data[_HEADER:])
    except zlib.error as error:
        raise CorruptRecordError(f"record {key!r} is damaged: {error}; restore it from a backup") from error


def decode(key: str, kind: str, data: bytes) -> Any:
    """Return the body of the record `data` that was read at `key`.

    Raises:
        CorruptRecordError: If the record is damaged, foreign, or of another kind.
        UnknownFormatError: If a newer outlast wrote it.
    """
    body = _open(key, kind, data)[1]
    try:
        unpacked = ormsgpack.unpackb(body, option=_OPTIONS)
    except (ValueError, TypeError) as error:
        raise CorruptRecordError(f"record {key!r} is damaged: {error}; restore it from a backup") from error
    return build(key, lambda: _joined(unpacked)) if kind == PACK else unpacked


def build(key: str, make: Callable[[], T]) -> T:
    """Return `make()`, which takes the body of the record at `key` apart.

    Raises:
        CorruptRecordError: If the body is not of the form that `make` expects.
    """
    try:
        return make()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CorruptRecordError(
            f"record {key!r} is not of the form of format version {FORMAT} ({error!r}); restore it from a backup"
        ) from error


_BELOW: Final = re.compile(r"(-b\d+)?(-c\d+)?$")


def depth(key: str) -> int:
    """Return how far below a record that a head names the one at `key` is: 0 it is one; chunks, blobs, their chunks."""
    found = _BELOW.search(key)
    return 2 * bool(found[1]) + bool(found[2]) if found else 0


def split(key: str, data: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    """Yield `data` as the key-value pairs it is stored in, none with a value longer than `limit` bytes.

    The first one names the others.
    """
    if len(data) <= limit:
        yield key, data
        return
    room = limit - _HEADER
    count = -(-len(data) // room)
    yield key, _seal(CHUNKS, ormsgpack.packb([count, len(data)]))
    for number in range(count):
        yield f"{key}-c{number}", _seal(CHUNK, data[number * room : (number + 1) * room])


def chunk_keys(key: str, data: bytes) -> list[str]:
    """Return the keys of the chunks that `data`, read at `key`, stands for; an empty list if it is whole."""
    if len(data) < _HEADER or data[:2] != _MAGIC or data[3:4].upper() != CHUNKS.encode("ascii"):
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
