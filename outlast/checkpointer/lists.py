"""Lists kept by segments that versions share: what has changed since a list was stored last, and what to write for it.

A list is recognised by a fingerprint of each item, so that an edit in place is noticed, too. Most items are messages
that nobody has touched: those are compared with a snapshot of their fields, all of them in a few calls.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ormsgpack
from pydantic import BaseModel

from outlast.checkpointer.blobs import FAN, NODE, TAIL, Locator, PackReader, PackWriter, Typed

_MERGE_LIMIT: Final = 65_536

Dumps = Callable[[Any], Typed]


@dataclass
class Seen:
    """The items of a list as they were stored last.

    Attributes:
        prints: A fingerprint of each item.
        types, fields, extras: Type, fields and further fields of each item, up to the first one that is no model.
    """

    prints: list[Any]
    types: list[type]
    fields: list[dict[str, Any]]
    extras: list[Any]

    @staticmethod
    def of(items: Sequence[Any], dumps: Dumps) -> Seen:
        """Return what is to be known of `items`."""
        return Seen([], [], [], []).again(items, dumps)

    def again(self, items: Sequence[Any], dumps: Dumps) -> Seen:
        """Return what is to be known of `items`, most of which are those seen."""
        same = self._unchanged(items)
        prints = [*self.prints[:same], *(fingerprint(item, dumps) for item in items[same:])]
        seen = Seen(prints, self.types[:same], self.fields[:same], self.extras[:same])
        for item in items[same:] if len(seen.types) == same else ():
            if not isinstance(item, BaseModel):
                break
            seen.types.append(type(item))
            seen.fields.append({name: _snapshot(value, dumps) for name, value in item.__dict__.items()})
            seen.extras.append(_snapshot(item.__pydantic_extra__, dumps))
        return seen

    def _unchanged(self, items: Sequence[Any]) -> int:
        """Return how many items at the start are as they were, as far as can be told quickly."""
        models = items[: len(self.types)]
        if list(map(type, models)) != self.types[: len(models)]:
            return 0
        equal = [*map(operator.eq, map(vars, models), self.fields)]
        extra = [*map(operator.eq, map(_EXTRA, models), self.extras)]
        places = (flags.index(False) if False in flags else len(models) for flags in (equal, extra))
        return min(places)


_EXTRA: Final = operator.attrgetter("__pydantic_extra__")


class _Packed:
    """Equal to what is packed alike."""

    __slots__ = ("_dumps", "_packed")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any, dumps: Dumps) -> None:
        self._dumps = dumps
        self._packed = _packed(value, dumps)

    def __eq__(self, value: object) -> bool:
        return _packed(value, self._dumps) == self._packed


def _snapshot(value: Any, dumps: Dumps) -> Any:
    """Return something that `value` is equal to until it is changed, in place or not."""
    if type(value) in _SCALARS:
        return value
    return type(value)() if type(value) in _CONTAINERS and not value else _Packed(value, dumps)


@dataclass
class ListState:
    """A list as it was last stored, to find what has changed since."""

    seen: Seen
    base: Locator | None
    tail: list[list[Any]]
    node: dict[str, Any] | None = None

    @property
    def locator(self) -> Locator:
        return {"l": [len(self.seen.prints), self.base, self.tail]}


def state_of(reader: PackReader, locator: Locator, items: list[Any], dumps: Dumps) -> ListState:
    """Return what `store_list` must know of the list at `locator`, whose value, fetched by `reader`, is `items`."""
    _, base, tail = locator["l"]
    return ListState(Seen.of(items, dumps), base, tail, reader.node(base) if base else None)


def store_list(items: list[Any], old: ListState | None, pack: PackWriter, dumps: Dumps) -> ListState:
    """Store `items` in `pack`, sharing the segments of `old` that are unchanged, and return the new state."""
    seen = old.seen.again(items, dumps) if old else Seen.of(items, dumps)
    kept = _common(seen.prints, old.seen.prints) if old else 0
    base: Locator | None = None
    node: dict[str, Any] | None = None
    tail: list[list[Any]] = []
    covered = 0
    if old and kept:
        covered = len(old.seen.prints) - sum(count for _, count in old.tail)
        if kept >= covered:
            base, node = old.base, old.node
            for segment, count in old.tail:
                if covered + count > kept:
                    break
                tail.append([segment, count])
                covered += count
        else:
            covered = 0
    if covered < len(items):
        tail.append([pack.add(dumps(items[covered:])), len(items) - covered])
    if len(tail) > TAIL:
        base, node = _merge(items, node, tail, pack, dumps)
        tail = []
    return ListState(seen, base, tail, node)


def _common(new: list[Any], old: list[Any]) -> int:
    """Return how many items two lists have in common at their start."""
    if new[: len(old)] == old:
        return len(old)
    return next((place for place, (a, b) in enumerate(zip(new, old, strict=False)) if a != b), min(len(new), len(old)))


def fingerprint(item: Any, dumps: Dumps) -> Any:
    """Return something that is equal for items that would be stored alike, and differs after an edit in place.

    Quicker than serialising: a message's plain fields stand for themselves, and most of the others are empty.
    """
    kind = type(item)
    if kind in _SCALARS:
        return kind, item
    if not isinstance(item, BaseModel):
        return kind, _digest(item, dumps)
    fields = [
        value if type(value) in _SCALARS else _digest(value, dumps) if value else type(value)
        for value in item.__dict__.values()
    ]
    return kind, fields, tuple(item.__dict__), item.__pydantic_extra__ and _digest(item.__pydantic_extra__, dumps)


_SCALARS: Final = frozenset((str, int, float, bool, bytes, type(None)))
_CONTAINERS: Final = frozenset((dict, list, tuple, set))


def _digest(value: Any, dumps: Dumps) -> bytes:
    return hashlib.blake2b(_packed(value, dumps), digest_size=16).digest()


def _packed(value: Any, dumps: Dumps) -> bytes:
    try:
        return ormsgpack.packb(value, option=ormsgpack.OPT_NON_STR_KEYS | ormsgpack.OPT_PASSTHROUGH_SUBCLASS)
    except TypeError:
        return b"".join((part.encode() if isinstance(part, str) else part) for part in dumps(value))


def _merge(
    items: list[Any],
    node: dict[str, Any] | None,
    tail: list[list[Any]],
    pack: PackWriter,
    dumps: Dumps,
) -> tuple[Locator, dict[str, Any]]:
    """Move `tail` into a new node, as one segment where that is small, and return its locator and content."""
    covered = len(items) - sum(count for _, count in tail)
    merged = dumps(items[covered:])
    segments = [[pack.add(merged), len(items) - covered]] if len(merged[1]) <= _MERGE_LIMIT else tail
    node = node or {"s": [], "u": []}
    if node["s"] and len(node["s"]) + len(segments) > FAN:
        full = pack.add((NODE, ormsgpack.packb({"s": node["s"], "u": []})))
        node = {"s": segments, "u": [*node["u"], full]}
    else:
        node = {"s": [*node["s"], *segments], "u": node["u"]}
    return pack.add((NODE, ormsgpack.packb(node))), node
