"""Records that no head reaches, of writers that died before their commit.

They can only come from writes outside of a transaction with the head, and a writer is announced in the head before the
first of those. What names other records is written before them, so whatever is there can be found from the top down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from outlast.checkpointer import records
from outlast.checkpointer.client import Get, Item, Steps
from outlast.checkpointer.head import SUFFIXES
from outlast.errors import OutlastError

_BATCH: Final = 100


def unreached(key: str, writers: Mapping[str, int], reached: Collection[str]) -> Steps[list[str]]:
    """Return the keys of the records of `writers` that are there and not among `reached`.

    Args:
        key: Key of the thread's head.
        writers: The writers, and the numbers that their records do not reach.
        reached: Keys of the records that the head reaches.
    """
    found: list[str] = []
    for batch in _batches(key, writers, reached):
        items: dict[str, Item] = yield Get(batch)
        for name, item in items.items():
            if item.data:
                found += yield from _below(key, name, item.data)
    return [name for name in dict.fromkeys(found) if name not in reached]


def _batches(key: str, writers: Mapping[str, int], reached: Collection[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for writer, end in writers.items():
        for number in range(end):
            names = (f"{key}-{writer}-{number}{suffix}" for suffix in SUFFIXES)
            batch += [name for name in names if name not in reached]
            if len(batch) >= _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _below(thread: str, key: str, data: bytes) -> Steps[list[str]]:
    """Return the keys of the record at `key` and of those it names; what names others comes after them."""
    chunks: list[str] = []
    try:
        chunks = records.chunk_keys(key, data)
        found: dict[str, Item] = (yield Get(chunks)) if chunks else {}
        whole = records.join(key, data, {name: item.data for name, item in found.items()}) if chunks else data
        body: Any = records.decode(key, records.PACK, whole)
        large = [f"{thread}-{row[2]}" for row in body["b"] if row[1] is None]
    except (OutlastError, KeyError, IndexError, TypeError, ValueError):
        large = []  # no pack, or only a part of one: then its blobs were not written yet
    items: dict[str, Item] = (yield Get(large)) if large else {}
    pieces = [name for blob, item in items.items() for name in (*records.chunk_keys(blob, item.data), blob)]
    return [*pieces, *chunks, key]
