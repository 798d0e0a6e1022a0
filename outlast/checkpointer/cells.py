"""Cells: the few small records that are overwritten, each swapped only with the ETag it was read with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from outlast.checkpointer import records
from outlast.checkpointer.client import Create, Get, Item, Pause, Steps, Swap
from outlast.errors import StoreError

_TRIES = 200


def read(key: str, kind: str) -> Steps[tuple[Any, str]]:
    """Return the body of the cell at `key` and its ETag; `(None, "")` if there is none."""
    item: Item = (yield Get((key,)))[key]
    if not item.data:
        return None, ""
    return records.decode(key, kind, item.data), item.etag


def read_many(keys: Sequence[str], kind: str) -> Steps[dict[str, Any]]:
    """Return the bodies of the cells at `keys`; absent ones are left out."""
    items: dict[str, Item] = (yield Get(keys)) if keys else {}
    return {key: records.decode(key, kind, item.data) for key, item in items.items() if item.data}


def update(key: str, kind: str, change: Callable[[Any], Any], known: tuple[Any, str] | None = None) -> Steps[Any]:
    """Replace the body of the cell at `key` by `change(body)`; `change` gets None where there is no cell yet.

    `change` may be called again, with its own outcome applied or not, so it must be idempotent. It returns None to
    leave the cell as it is. Returns the body that the cell then has. `known` is what `read` has just returned.

    Raises:
        StoreError: If other writers win without end.
    """
    for attempt in range(_TRIES):
        body, etag = known if known and not attempt else (yield from read(key, kind))
        changed = change(body)
        if changed is None:
            return body
        data = records.encode(kind, changed)
        operation = Create(key, data) if body is None else Swap(key, data, etag)
        if (yield operation):
            return changed
        if attempt > 2:
            yield Pause(random.uniform(0, min(0.002 * attempt, 0.1)))
    raise StoreError(f"record {key!r} could not be swapped in {_TRIES} tries; is the store's optimistic locking sound?")
