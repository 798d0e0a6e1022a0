"""A LangGraph submission as a record: the input, and of the config and the options what can be stored."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.serde.base import SerializerProtocol

from outlast.errors import OutlastError, SerializationError
from outlast.recovery.runs import Typed

_STORED: Final = ("tags", "metadata", "configurable", "recursion_limit", "max_concurrency", "run_name")
"""Config that goes into the record. Callbacks are the process's own: a resumed run has those of the new process."""

RUN_OPTIONS: Final = frozenset(
    {"context", "output_keys", "interrupt_before", "interrupt_after", "print_mode", "debug", "version", "stream_mode"}
)
"""Arguments of `invoke` that an attempt passes on to LangGraph. `durability` and `control` are the controller's."""


_CONTROLLERS: Final = frozenset({"durability", "control", "checkpoint_during", "subgraphs"})


def run_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a caller's arguments that are passed on to LangGraph.

    Raises:
        TypeError: If there is one that LangGraph has not.
    """
    unknown = given.keys() - RUN_OPTIONS - _CONTROLLERS
    if unknown:
        raise TypeError(f"unexpected argument {sorted(unknown)[0]!r}; a run takes {', '.join(sorted(RUN_OPTIONS))}")
    return {key: value for key, value in given.items() if key in RUN_OPTIONS and value is not None}


def dumps(serde: SerializerProtocol, what: str, value: Any) -> Typed:
    """Serialise a part of a submission.

    Raises:
        SerializationError: If it cannot be; the message names `what`.
    """
    try:
        return serde.dumps_typed(value)
    except OutlastError:
        raise
    except Exception as error:
        raise SerializationError(
            f"the {what} of this run cannot be stored: {error}. A run that is to survive a crash may hold plain data, "
            "messages, pydantic models and dataclasses; give live objects (clients, connections) to the nodes by a "
            "closure, or make them inside the node"
        ) from error


def encode(
    serde: SerializerProtocol,
    input: Any,
    config: RunnableConfig | None,
    options: Mapping[str, Any] | None = None,
    mode: str = "sync",
    stream: Any = None,
) -> Typed:
    """Return the record of a submission, or of an answer to a run that waits.

    Args:
        config: None for an answer that comes without a call of its own: the options in force remain.
        options: Arguments of `invoke` or `stream` beside input and config.
        mode: `sync` or `async`, as the caller called.
        stream: `{"modes": [...], "subgraphs": bool}` for a streamed run, else None.
    """
    body: dict[str, Any] = {"input": list(dumps(serde, "input", input))}
    if config is None:
        return dumps(serde, "answer", body)
    body |= {
        "config": {
            key: {name: _stored(serde, f"config[{key!r}][{name!r}]", item) for name, item in value.items()}
            if isinstance(value, Mapping)
            else value
            for key, value in config.items()
            if key in _STORED and value is not None
        },
        "options": {key: _stored(serde, f"argument {key!r}", value) for key, value in (options or {}).items()},
        "mode": mode,
        "stream": stream,
    }
    return dumps(serde, "submission", body)


def _stored(serde: SerializerProtocol, what: str, value: Any) -> list[Any]:
    return list(dumps(serde, what, value))


def decode(serde: SerializerProtocol, payload: Typed) -> dict[str, Any]:
    """Return what `encode` was given, as `input` and, if there was a call, `config`, `options`, `mode` and `stream`."""
    body: dict[str, Any] = serde.loads_typed(payload)

    def loads(typed: Any) -> Any:
        kind, data = typed
        return serde.loads_typed((kind, data))

    if "config" not in body:
        return {"input": loads(body["input"])}
    return {
        **body,
        "input": loads(body["input"]),
        "config": {
            key: {name: loads(item) for name, item in value.items()} if isinstance(value, Mapping) else value
            for key, value in body["config"].items()
        },
        "options": {key: loads(value) for key, value in body["options"].items()},
    }


def fingerprint(serde: SerializerProtocol, agent: str, thread_id: str, input: Any) -> str:
    """Return a digest that two submissions share if they ask for the same."""
    kind, data = dumps(serde, "input", input)
    parts = (agent.encode(), thread_id.encode("utf-8", "surrogatepass"), kind.encode(), data)
    return hashlib.sha256(b"\x00".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def run_id_of(config: RunnableConfig) -> str:
    """Return the run id that a config asks for, or a new one."""
    return str(config.get("run_id") or uuid.uuid4())
