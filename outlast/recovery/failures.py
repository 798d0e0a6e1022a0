"""Exceptions as records: type, message and plain contents of an exception, and the exception again."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

from outlast.errors import RecordTooLargeError, SidecarUnavailableError, StepFailedError, StoreError
from outlast.recovery.codec import Codec, Typed


def away(error: BaseException) -> bool:
    """Tell whether an error says that store or sidecar do not answer as they should, so that trying again may help."""
    return isinstance(error, (StoreError, SidecarUnavailableError)) and not isinstance(error, RecordTooLargeError)


def describe(error: BaseException) -> tuple[str, str]:
    """Return the qualified type name and the message of an exception."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return name, str(error)


def encode(error: BaseException, codec: Codec) -> dict[str, Any]:
    """Return an exception as plain data; what of its arguments and attributes cannot be stored is left out."""
    name, message = describe(error)
    return {
        "type": name,
        "module": type(error).__module__,
        "name": type(error).__qualname__,
        "message": message,
        "args": _stored(codec.dumps_typed, list(error.args)),
        "attributes": {
            key: typed
            for key, value in vars(error).items()
            if not key.startswith("__") and (typed := _stored(codec.dumps_typed, value)) is not None
        },
    }


def decode(body: dict[str, Any], codec: Codec) -> Exception:
    """Return the exception that `encode` was given, of its own type where this process has loaded that.

    No constructor is called, and no module is imported. Where type or arguments are not to be had, it is a
    StepFailedError that names them.
    """
    kind = _type(body["module"], body["name"])
    if kind is None or body["args"] is None:
        return StepFailedError(body["type"], body["message"])
    kind_, data = body["args"]
    error = kind.__new__(kind, *codec.loads_typed((kind_, data)))
    for key, typed in body["attributes"].items():
        setattr(error, key, codec.loads_typed((typed[0], typed[1])))
    return error if str(error) == body["message"] else StepFailedError(body["type"], body["message"])


def _type(module: str, name: str) -> type[Exception] | None:
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _stored(dumps: Callable[[Any], Typed], value: Any) -> list[Any] | None:
    try:
        return list(dumps(value))
    except Exception:
        # Live objects (responses, clients) stay behind; the message says what happened.
        return None
