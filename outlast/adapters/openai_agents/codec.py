"""Values of OpenAI Agents runs as plain data tagged with their class, in msgpack. No pickle, no constructor is called.

A tagged value is a dict with the one key `$`: `{"$": [tag, ...]}`. Classes are pydantic models, dataclasses and enums;
they are found by module and name among what is imported, and in the packages `agents` and `openai`.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import importlib
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

import ormsgpack
from pydantic import BaseModel

from outlast.errors import SerializationError, UnknownFormatError
from outlast.recovery.codec import Typed

_TAG: Final = "$"
_KIND: Final = "msgpack"
_IMPORTABLE: Final = frozenset({"agents", "openai"})


class AgentsCodec:
    """Serialises inputs, contexts, model responses, tool outputs and results of OpenAI Agents runs."""

    def dumps_typed(self, obj: Any) -> Typed:
        """Return a tag and the bytes of a value.

        Raises:
            SerializationError: If it, or something in it, is of a class that has no plain form.
        """
        return _KIND, ormsgpack.packb(_plain(obj))

    def loads_typed(self, data: Typed) -> Any:
        """Return the value that `dumps_typed` was given.

        Raises:
            UnknownFormatError: If it was not written by this codec.
            SerializationError: If a class of it is not to be found in this process.
        """
        kind, packed = data
        if kind != _KIND:
            raise UnknownFormatError(f"a value of an OpenAI Agents run is stored as {kind!r}, not {_KIND!r}")
        return _revived(ormsgpack.unpackb(packed))


def _plain(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {_TAG: ["int", str(value)]}
    if kind is list:
        return [_plain(item) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _plain(item) for key, item in value.items()}
        return {_TAG: ["dict", [[_plain(key), _plain(item)] for key, item in value.items()]]}
    for plain_kind, name in ((tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if kind is plain_kind:
            return {_TAG: [name, [_plain(item) for item in value]]}
    if kind in _SCALARS:
        name, dump = _SCALARS[kind]
        return {_TAG: [name, dump(value)]}
    return _object(value)


def _object(value: Any) -> Any:
    kind = type(value)
    where = [kind.__module__, kind.__qualname__]
    if isinstance(value, enum.Enum):
        return {_TAG: ["enum", *where, _plain(value.value)]}
    if isinstance(value, pathlib.PurePath):
        return {_TAG: ["path", str(value)]}
    if "<" in kind.__qualname__:
        raise SerializationError(
            f"a {kind.__qualname__} cannot be stored: its class is made inside a function, so a new process could not "
            "find it; make it at the top of a module"
        )
    if isinstance(value, BaseModel):
        # With the fields as they are, so that what is in them keeps its class; unset ones stay unset.
        names = value.model_fields_set
        # The SDK attaches to responses what their types have no field for, under names of its own.
        fields = {name: _plain(item) for name, item in value.__dict__.items() if name in names or name.startswith("_")}
        extra = {name: _plain(item) for name, item in (value.__pydantic_extra__ or {}).items()}
        return {_TAG: ["model", *where, {**fields, **extra}]}
    if dataclasses.is_dataclass(value):
        fields = {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {_TAG: ["data", *where, fields]}
    made: Any
    for made in (str, int, float, list, dict):
        if isinstance(value, made):
            return _plain(made(value))
    if isinstance(value, Mapping):
        return _plain(dict(value))
    raise SerializationError(
        f"a {kind.__module__}.{kind.__qualname__} cannot be stored: use plain data, pydantic models or dataclasses"
    )


_SCALARS: Final[dict[type, tuple[str, Callable[[Any], Any]]]] = {
    datetime.datetime: ("datetime", datetime.datetime.isoformat),
    datetime.date: ("date", datetime.date.isoformat),
    datetime.time: ("time", datetime.time.isoformat),
    datetime.timedelta: ("timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    decimal.Decimal: ("decimal", str),
    uuid.UUID: ("uuid", str),
}


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return [_revived(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _revived(item) for key, item in value.items()}
    tag, *rest = value[_TAG]
    if tag in _LOADS:
        return _LOADS[tag](rest[0])
    if tag not in ("enum", "model", "data"):
        raise UnknownFormatError(f"a value of an OpenAI Agents run has the unknown tag {tag!r}; is outlast too old?")
    module, name, body = rest
    kind = _class(module, name)
    if tag == "enum":
        return kind(_revived(body))
    fields = {key: _revived(item) for key, item in body.items()}
    return _model(kind, fields) if tag == "model" else _dataclass(kind, fields)


_LOADS: Final[dict[str, Callable[[Any], Any]]] = {
    "int": int,
    "dict": lambda pairs: {_revived(key): _revived(item) for key, item in pairs},
    "tuple": lambda items: tuple(map(_revived, items)),
    "set": lambda items: set(map(_revived, items)),
    "frozenset": lambda items: frozenset(map(_revived, items)),
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
    "path": pathlib.Path,
}


def _class(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    if found is None and module.partition(".")[0] in _IMPORTABLE:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not (issubclass(found, BaseModel | enum.Enum) or dataclasses.is_dataclass(found)):
        raise SerializationError(
            f"a stored value is of class {module}.{name}, which this process has not: import its module before runs "
            "are carried on, and keep classes whose instances are stored under their names"
        )
    return found


def _model(kind: Any, fields: dict[str, Any]) -> Any:
    """Return a pydantic model with these fields, as `model_construct` would: nothing that was stored is refused."""
    made = kind.__new__(kind)
    known = kind.__pydantic_fields__
    values = {name: fields[name] for name in known if name in fields}
    for name, field in known.items():
        if name not in values and not field.is_required():
            values[name] = field.get_default(call_default_factory=True, validated_data=values)
    attached = {name: value for name, value in fields.items() if name not in known and name.startswith("_")}
    extra = {name: value for name, value in fields.items() if name not in known and name not in attached}
    object.__setattr__(made, "__dict__", values | attached)
    object.__setattr__(made, "__pydantic_fields_set__", fields.keys() - attached.keys())
    object.__setattr__(made, "__pydantic_extra__", extra if kind.model_config.get("extra") == "allow" else None)
    object.__setattr__(made, "__pydantic_private__", None)
    if kind.__private_attributes__:
        made.model_post_init(None)
    return made


def _dataclass(kind: Any, fields: dict[str, Any]) -> Any:
    made = kind.__new__(kind)
    for item in dataclasses.fields(kind):
        if item.name in fields:
            object.__setattr__(made, item.name, fields[item.name])
        elif item.default is not dataclasses.MISSING:
            object.__setattr__(made, item.name, item.default)
        elif item.default_factory is not dataclasses.MISSING:
            object.__setattr__(made, item.name, item.default_factory())
    return made


def copied(value: Any) -> Any:
    """Return an independent copy of a value that can be stored.

    Raises:
        SerializationError: If it cannot be.
    """
    return _revived(_plain(value))
