"""A submission of the SDK's `Runner` as a record: what can be stored of its arguments, and what cannot be named.

What cannot be stored (hooks, callbacks, sessions that only their process can open) comes from the caller while that is
in the process that carries the run on, else from what `durable(agent, ...)` was given.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Final, Literal

from agents import RunConfig
from agents.models.interface import Model
from agents.models.multi_provider import MultiProvider

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.adapters.openai_agents.context import ContextCodec
from outlast.adapters.openai_agents.dapr_session import DaprSession
from outlast.errors import OutlastError, SerializationError
from outlast.recovery.runs import Typed

CODEC: Final = AgentsCodec()
Mode = Literal["run", "streamed"]

OPTIONS: Final = frozenset(
    {
        "context", "max_turns", "hooks", "run_config", "error_handlers", "previous_response_id",
        "auto_previous_response_id", "conversation_id", "session",
    }
)  # fmt: skip
"""Arguments of the SDK's `Runner` beside agent and input."""
_PLAIN: Final = ("max_turns", "previous_response_id", "auto_previous_response_id", "conversation_id")


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a caller's arguments; a `run_config` given as a dict becomes what the SDK makes of it.

    Raises:
        TypeError: If there is one that the SDK's Runner has not.
    """
    unknown = options.keys() - OPTIONS
    if unknown:
        raise TypeError(f"unexpected argument {sorted(unknown)[0]!r}; a run takes {', '.join(sorted(OPTIONS))}")
    found = {key: value for key, value in options.items() if value is not None or key == "max_turns"}
    if isinstance(found.get("run_config"), dict):
        from agents.run_config import _coerce_run_config

        found["run_config"] = _coerce_run_config(found["run_config"])
    return found


def encode(input: Any, options: Mapping[str, Any], mode: Mode, contexts: ContextCodec) -> Typed:
    """Return the record of a submission.

    Args:
        options: What `checked` returned.

    Raises:
        SerializationError: If input or context cannot be stored.
    """
    config, live = _config(options.get("run_config"))
    session = options.get("session")
    live += [name for name in ("hooks", "error_handlers") if options.get(name) is not None]
    if session is not None and not isinstance(session, DaprSession):
        live.append("session")
    context = options.get("context")
    body = {
        "input": list(dumps("input", input)),
        "mode": mode,
        "options": {name: options[name] for name in _PLAIN if name in options},
        "context": None if context is None else list(contexts.encode(context)),
        "run_config": config,
        "session": session.reference if isinstance(session, DaprSession) else None,
        "session_id": getattr(session, "session_id", None),
        "live": sorted(live),
    }
    return dumps("submission", body)


def dumps(what: str, value: Any) -> Typed:
    """Serialise a part of a submission.

    Raises:
        SerializationError: If it cannot be; the message names `what`.
    """
    try:
        return CODEC.dumps_typed(value)
    except OutlastError as error:
        raise SerializationError(f"the {what} of this run cannot be stored: {error}") from error


def decode(payload: Typed) -> dict[str, Any]:
    """Return what `encode` was given, as far as it is stored."""
    body: dict[str, Any] = CODEC.loads_typed(payload)
    kind, data = body["input"]
    context = body["context"]
    return {**body, "input": CODEC.loads_typed((kind, data)), "context": tuple(context) if context else None}


def fingerprint(agent: str, thread_id: str, input: Any) -> str:
    """Return a digest that two submissions share if they ask for the same."""
    kind, data = dumps("input", input)
    parts = (agent.encode(), thread_id.encode("utf-8", "surrogatepass"), kind.encode(), data)
    return hashlib.sha256(b"\x00".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _config(config: RunConfig | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the fields of a RunConfig that can be stored, and the names of those that cannot."""
    if config is None:
        return None, []
    default, stored, live = RunConfig(), {}, []
    for item in dataclasses.fields(RunConfig):
        value = getattr(config, item.name)
        if item.name == "model_provider":
            if type(value) is not MultiProvider or _settings(value) != _settings(default.model_provider):
                live.append("run_config.model_provider")
            continue
        if value == getattr(default, item.name):
            continue
        try:
            if isinstance(value, Model):
                raise SerializationError("a model is a live object")
            stored[item.name] = list(CODEC.dumps_typed(value))
        except SerializationError:
            live.append(f"run_config.{item.name}")
    return stored, live


def _settings(provider: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in {**vars(provider), **vars(provider.openai_provider)}.items()
        if value is None or isinstance(value, str | bool | int | float)
    }


class MissingPartsError(OutlastError):
    """What cannot be stored of a submission is not to be had in this process."""


def options_of(
    submitted: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any], run_id: str
) -> dict[str, Any]:
    """Return the arguments for the SDK's Runner, but the context.

    Args:
        submitted: What `decode` returned.
        given: The caller's own arguments, if the caller is in this process.
        defaults: What `durable(agent, ...)` was given.

    Raises:
        MissingPartsError: If something is wanting.
    """
    options = dict(submitted["options"])
    wanting = []
    for name in submitted["live"]:
        option, _, part = name.partition(".")
        source = given.get(option) if given.get(option) is not None else defaults.get(option)
        if source is None or (part and getattr(source, part) is None):
            wanting.append(name)
    if wanting:
        raise MissingPartsError(
            f"run {run_id!r} was submitted with {', '.join(wanting)}, which cannot be stored. It goes on where its "
            "caller is, or where durable(agent, ...) was given them"
        )
    for name in ("hooks", "error_handlers"):
        value = given.get(name) if given.get(name) is not None else defaults.get(name)
        if value is not None:
            options[name] = value
    options["run_config"] = _run_config(submitted, given, defaults)
    session = _session(submitted, given, defaults)
    if session is not None:
        options["session"] = session
    return options


def _run_config(submitted: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> RunConfig:
    config: RunConfig | None = given.get("run_config")
    if config is not None:
        return copy.copy(config)
    base: RunConfig = defaults.get("run_config") or RunConfig()
    stored = {name: CODEC.loads_typed((kind, data)) for name, (kind, data) in (submitted["run_config"] or {}).items()}
    return dataclasses.replace(base, **stored)


def _session(submitted: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    if given.get("session") is not None:
        return given["session"]
    if submitted["session"] is not None:
        return DaprSession(**submitted["session"])
    if submitted["session_id"] is None:
        return None
    make = defaults.get("session")
    return make(submitted["session_id"]) if callable(make) else make
