"""Damaged, truncated, foreign and newer records: a specific error that names the key, at every place one can be."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import ormsgpack
import pytest

from outlast import CorruptRecordError, RecordTooLargeError, SerializationError, UnknownFormatError
from outlast.checkpointer import DaprSaver, keys, records
from outlast.checkpointer.client import Get, Save, StateClient
from outlast.checkpointer.thread import ThreadLog
from tests.checkpointer.writing import Writer

Fresh = Callable[[], DaprSaver]


def _read(key: str) -> Any:
    return (yield Get((key,)))[key]


def _write(key: str, data: bytes) -> Any:
    yield Save([(key, data)])


def test_a_record_comes_back_as_it_was() -> None:
    body = {"a": [1, None, b"bytes", "text"], 2: {"nested": True}}
    assert records.decode("key", "I", records.encode("I", body)) == body


@pytest.mark.parametrize("sizes", [[], [0], [399, 400, 401], [5000, 3, 700, 5000], [None, 400, None]])
def test_a_pack_comes_back_as_it_was(sizes: list[Any]) -> None:
    chance = random.Random(7)
    table = [["a kind", None, f"name-{n}"] if n is None else ["a kind", chance.randbytes(n)] for n in sizes]
    body = {"b": table, "c": [["", "id"]], "w": []}
    assert records.decode("key", "P", records.encode("P", body)) == body


@pytest.mark.parametrize("seed", range(20))
def test_no_flipped_bit_goes_unnoticed(seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(records.encode("I", {"values": list(range(50))}))
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with pytest.raises((CorruptRecordError, UnknownFormatError), match="'some-key'"):
        records.decode("some-key", "I", bytes(data))


def test_no_truncation_goes_unnoticed() -> None:
    data = records.encode("I", {"values": list(range(50))})
    for length in range(len(data)):
        with pytest.raises(CorruptRecordError, match="'some-key'"):
            records.decode("some-key", "I", data[:length])


def test_a_record_of_a_newer_format_names_the_mend() -> None:
    data = bytearray(records.encode("I", {}))
    data[2] = records.FORMAT + 1
    with pytest.raises(UnknownFormatError, match=rf"'some-key' has format version {records.FORMAT + 1}.*install"):
        records.decode("some-key", "I", bytes(data))


@pytest.mark.parametrize("foreign", [b"{}", b'{"json": "of somebody else"}', b"x" * 100, b"OL", b"\x00" * 8])
def test_a_foreign_record_names_the_mend(foreign: bytes) -> None:
    with pytest.raises((CorruptRecordError, UnknownFormatError), match="'some-key'"):
        records.decode("some-key", "P", foreign)


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(CorruptRecordError, match=r"'some-key' is of kind 'I'"):
        records.decode("some-key", "P", records.encode("I", {}))


def test_a_value_without_a_form_is_refused() -> None:
    with pytest.raises(SerializationError):
        records.encode("P", object())


@pytest.mark.parametrize("limit", [100, 1000, 100_000])
def test_chunks(limit: int) -> None:
    body = {"data": random.Random(0).randbytes(5000)}
    data = records.encode("I", body)
    stored = dict(records.split("key", data, limit))
    assert max(map(len, stored.values())) <= limit
    names = records.chunk_keys("key", stored["key"])
    assert set(stored) == {"key", *names}
    if names:
        chunks = {name: stored[name] for name in names}
        assert records.join("key", stored["key"], chunks) == data
        for name in names:
            without = {other: data for other, data in chunks.items() if other != name}
            for bad in ({**chunks, name: b""}, {**chunks, name: chunks[name][:-1]}, without):
                with pytest.raises(CorruptRecordError, match=name):
                    records.join("key", stored["key"], bad)


def _stored(client: StateClient, thread: str) -> Iterator[tuple[str, bytes]]:
    """All records of a thread that a read of its newest checkpoint comes by."""
    key = keys.thread_key(thread)
    seen: dict[str, bytes] = {}
    perform = client._perform

    def watched(operation: Any) -> Any:
        result = perform(operation)
        if isinstance(operation, Get):
            seen.update({name: item.data for name, item in result.items() if item.data})
        return result

    client._perform = watched  # type: ignore[method-assign]
    found = DaprSaver(client=client).get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
    list(DaprSaver(client=client).list({"configurable": {"thread_id": thread}}))
    client._perform = perform  # type: ignore[method-assign]
    assert found is not None
    assert key in seen
    yield from seen.items()


def _read_all(saver: DaprSaver, thread: str) -> None:
    saver.get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
    list(saver.list({"configurable": {"thread_id": thread}}))


def _kind(data: bytes) -> str:
    return chr(data[3]).upper()  # lower case: compressed


def _damaged(data: bytes) -> dict[str, bytes]:
    newer = bytearray(data)
    newer[2] = records.FORMAT + 1
    flipped = bytearray(data)
    flipped[-1] ^= 1
    return {"truncated": data[:-1], "flipped": bytes(flipped), "foreign": b'{"not": "ours"}', "newer": bytes(newer)}


def test_damage_anywhere_in_a_thread_names_the_record(client: StateClient, fresh: Fresh, thread: str) -> None:
    writer = Writer(fresh(), thread)
    chance = random.Random(0)
    items: list[Any] = []
    for number in range(80):
        items = [*items, chance.randbytes(2000)]
        large = chance.randbytes(20_000 if number % 40 else 1_500_000)
        writer.put({"items": items, "large": large, "number": number})
    checked = 0
    stored = list(_stored(client, thread))
    kinds = {_kind(data) for _, data in stored}
    assert kinds >= {records.THREAD_HEAD, records.PACK, records.BLOB, records.PAGE, records.CHUNKS, records.CHUNK}
    chosen: dict[str, list[tuple[str, bytes]]] = {}
    for key, data in stored:
        chosen.setdefault(_kind(data), []).append((key, data))
    for examples in chosen.values():
        for key, data in examples[:2] + examples[-2:]:
            for kind, bad in _damaged(data).items():
                client.run(_write(key, bad))
                reader = fresh()
                with pytest.raises((CorruptRecordError, UnknownFormatError), match=key) as caught:
                    _read_all(reader, thread)
                assert isinstance(caught.value, UnknownFormatError) == (kind == "newer")
                checked += 1
            client.run(_write(key, data))
    assert checked > 20
    writer.check(fresh)


def test_a_damaged_head_is_not_written_over(client: StateClient, fresh: Fresh, thread: str) -> None:
    """What cannot be read is kept for whoever mends it: neither a put nor a deletion destroys it."""
    writer = Writer(fresh(), thread)
    writer.put({"value": 1})
    key = keys.thread_key(thread)
    for bad in _damaged(client.run(_read(key)).data).values():
        client.run(_write(key, bad))
        again = Writer(fresh(), thread)
        with pytest.raises((CorruptRecordError, UnknownFormatError), match=key):
            again.put({"value": 2})
        with pytest.raises((CorruptRecordError, UnknownFormatError), match=key):
            fresh().delete_thread(thread)
        assert client.run(_read(key)).data == bad


def test_a_missing_record_is_named(client: StateClient, fresh: Fresh, thread: str) -> None:
    from outlast.checkpointer.client import Delete

    def remove(key: str) -> Any:
        yield Delete((key,))

    writer = Writer(fresh(), thread)
    writer.put({"value": 1, "large": random.Random(0).randbytes(50_000)})
    stored = dict(_stored(client, thread))
    for key, data in stored.items():
        if _kind(data) == records.THREAD_HEAD:
            continue
        client.run(remove(key))
        with pytest.raises(CorruptRecordError, match=key):
            fresh().get_tuple(writer.config)
        client.run(_write(key, data))
    writer.check(fresh)


def test_a_head_of_another_thread_is_not_taken_for_ones_own(client: StateClient, fresh: Fresh, thread: str) -> None:
    Writer(fresh(), thread).put({"value": 1})
    other = f"{thread}-other"
    client.run(_write(keys.thread_key(other), client.run(_read(keys.thread_key(thread))).data))
    with pytest.raises(CorruptRecordError, match=f"is of thread '{thread}'"):
        client.run(ThreadLog(other).read())


def test_an_unknown_key_of_a_newer_head_is_no_crash(client: StateClient, fresh: Fresh, thread: str) -> None:
    """A record that decodes but lacks what belongs in it is damage, too, not a KeyError."""
    Writer(fresh(), thread).put({"value": 1})
    key = keys.thread_key(thread)
    whole = client.run(_read(key)).data
    client.run(_write(key, records.encode(records.THREAD_HEAD, {"t": thread})))
    with pytest.raises(CorruptRecordError, match=key):
        fresh().get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
    client.run(_write(key, whole))


def test_the_envelope_is_not_msgpack_of_somebody_else() -> None:
    with pytest.raises(CorruptRecordError):
        records.decode("key", "P", ormsgpack.packb({"a": 1}))


def test_errors_have_what_callers_catch() -> None:
    assert issubclass(SerializationError, TypeError)
    assert issubclass(RecordTooLargeError, Exception)
