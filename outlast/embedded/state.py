"""The rules of Dapr's state API over one table: ETags, concurrency, TTL, app-id scope."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from dapr.proto import common_v1

from outlast.embedded.errors import Conflict, Refused

MISMATCH = "possible etag mismatch. error from state store"
_FIRST_WRITE = common_v1.StateOptions.CONCURRENCY_FIRST_WRITE
_SEPARATOR = "||"
_MAX_TTL = 2**31 - 1


class Record(NamedTuple):
    """A stored value; an absent key is `ABSENT`."""

    value: bytes
    etag: str
    metadata: dict[str, str]


ABSENT = Record(b"", "", {})


def check_key(key: str) -> None:
    """Refuse a key with the separator of the app-id prefix, as daprd does."""
    if _SEPARATOR in key:
        raise Refused("INVALID_ARGUMENT", f"input key/keyPrefix '{key}' can't contain '{_SEPARATOR}'")


def get(connection: sqlite3.Connection, app: str, store: str, key: str) -> Record:
    row = connection.execute(
        "SELECT value, etag, expires FROM state WHERE app = ? AND store = ? AND key = ?", (app, store, key)
    ).fetchone()
    if row is None or (row[2] is not None and row[2] <= time.time()):
        return ABSENT
    metadata = {}
    if row[2] is not None:
        metadata["ttlExpireTime"] = datetime.fromtimestamp(row[2], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Record(row[0], row[1], metadata)


def put(connection: sqlite3.Connection, app: str, store: str, item: common_v1.StateItem) -> None:
    """Write one item.

    Raises:
        Conflict: Its ETag is stale, or first-write without an ETag found the key present.
        Refused: Its TTL is not a number.
    """
    now = time.time()
    expires = _expiry(item.metadata, now)
    where = (app, store, item.key)
    etag = str(uuid.uuid4())
    if item.etag.value:
        changed = connection.execute(
            "UPDATE state SET value = ?, etag = ?, expires = ? WHERE app = ? AND store = ? AND key = ? AND etag = ?"
            " AND (expires IS NULL OR expires > ?)",
            (item.value, etag, expires, *where, item.etag.value, now),
        ).rowcount
    else:
        present = " AND expires <= ?" if item.options.concurrency == _FIRST_WRITE else " OR ? IS NOT NULL"
        changed = connection.execute(
            "INSERT INTO state (app, store, key, value, etag, expires) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET value = excluded.value, etag = excluded.etag, expires = excluded.expires"
            f" WHERE (expires IS NOT NULL{present})",
            (*where, item.value, etag, expires, now),
        ).rowcount
    if not changed:
        raise Conflict(MISMATCH)


def delete(connection: sqlite3.Connection, app: str, store: str, key: str, etag: str) -> None:
    """Delete a key; without an ETag a missing key is fine.

    Raises:
        Conflict: The ETag is stale or the key is missing.
    """
    if not etag:
        connection.execute("DELETE FROM state WHERE app = ? AND store = ? AND key = ?", (app, store, key))
        return
    changed = connection.execute(
        "DELETE FROM state WHERE app = ? AND store = ? AND key = ? AND etag = ?", (app, store, key, etag)
    ).rowcount
    if not changed:
        raise Conflict(MISMATCH)


def put_many(
    connection: sqlite3.Connection, app: str, store: str, items: Iterable[common_v1.StateItem]
) -> Conflict | None:
    """Write items independently of each other, as Dapr's bulk save does; returns a conflict one of them met."""
    conflict: Conflict | None = None
    for item in items:
        try:
            put(connection, app, store, item)
        except Conflict as error:
            conflict = error
    return conflict


def reap(connection: sqlite3.Connection, limit: int = 1000) -> int:
    """Delete expired rows; returns how many."""
    return connection.execute(
        "DELETE FROM state WHERE rowid IN (SELECT rowid FROM state WHERE expires <= ? LIMIT ?)", (time.time(), limit)
    ).rowcount


def _expiry(metadata: Mapping[str, str], now: float) -> float | None:
    text = metadata.get("ttlInSeconds", "")
    if not text:
        return None
    try:
        seconds = int(text)
    except ValueError:
        seconds = -2
    if not -1 <= seconds <= _MAX_TTL:
        raise Refused(
            "INTERNAL", "error parsing TTL: incorrect value for metadata 'ttlInSeconds': must be -1 or greater"
        )
    return now + seconds if seconds > 0 else None
