"""What `search` and `list_namespaces` compare: filters and namespaces. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from langgraph.store.base import MatchCondition

_ORDER: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "$gt": lambda a, b: a > b,
    "$gte": lambda a, b: a >= b,
    "$lt": lambda a, b: a < b,
    "$lte": lambda a, b: a <= b,
}


def accepts(value: Mapping[str, Any], conditions: Mapping[str, Any] | None) -> bool:
    """Return whether an item's value has everything that `conditions` ask of it."""
    return all(_compare(value.get(key), wanted) for key, wanted in (conditions or {}).items())


def _compare(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        if any(key.startswith("$") for key in wanted):
            return all(_apply(value, operator, operand) for operator, operand in wanted.items())
        return isinstance(value, dict) and all(_compare(value.get(key), part) for key, part in wanted.items())
    if isinstance(wanted, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(wanted)
            and all(_compare(part, other) for part, other in zip(value, wanted, strict=True))
        )
    return bool(value == wanted)


def _apply(value: Any, operator: str, operand: Any) -> bool:
    if operator == "$eq":
        return bool(value == operand)
    if operator == "$ne":
        return bool(value != operand)
    if operator not in _ORDER:
        raise ValueError(f"unsupported operator in a filter: {operator!r}; use $eq, $ne, $gt, $gte, $lt or $lte")
    try:
        return _ORDER[operator](float(value), float(operand))
    except (TypeError, ValueError):
        # Numbers compare as numbers, text as text (so do ISO dates); what cannot be compared does not match.
        return isinstance(value, str) and isinstance(operand, str) and _ORDER[operator](value, operand)


def matches(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    """Return whether a namespace starts, or ends, as `condition` says; `*` stands for any one label."""
    path = tuple(condition.path)
    if condition.match_type == "prefix":
        labels = namespace[: len(path)]
    elif condition.match_type == "suffix":
        labels = namespace[len(namespace) - len(path) :] if len(path) <= len(namespace) else ()
    else:
        raise ValueError(f"unsupported match type: {condition.match_type!r}; use 'prefix' or 'suffix'")
    return len(labels) == len(path) and all(part in ("*", label) for label, part in zip(labels, path, strict=True))


def stem(conditions: Iterable[MatchCondition]) -> tuple[str, ...]:
    """Return the longest prefix without wildcards that every match must have."""
    found: tuple[str, ...] = ()
    for condition in conditions:
        path = tuple(condition.path)
        if condition.match_type == "prefix":
            fixed = path[: path.index("*")] if "*" in path else path
            found = max(found, fixed, key=len)
    return found
