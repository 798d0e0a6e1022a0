"""Models as steps: inside a durable run every answer of a model is recorded, and not paid for again."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Final

from agents.items import ModelResponse, TResponseStreamEvent
from agents.models._retry_runtime import provider_managed_retries_disabled
from agents.models.interface import Model
from pydantic import BaseModel

from outlast.adapters.openai_agents.place import Place, here
from outlast.errors import StepTimeoutError
from outlast.recovery import steps
from outlast.recovery.journal import Usage, digest
from outlast.recovery.steps import Scope, StepCall

logger = logging.getLogger("outlast.steps")

_TERMINAL: Final = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "error", "response.error"}
)


def journaled(model: Model) -> Model:
    """Return what the SDK is to use in place of a model: inside a durable run its journaled form, else itself."""
    place = here()
    if place is None or steps.scope() is None or isinstance(model, JournaledModel):
        return model
    kept = place.track.models.get(id(model))
    if kept is None:
        kept = place.track.models[id(model)] = JournaledModel(model)
    found: Model = kept
    return found


class JournaledModel(Model):
    """A model whose answers are steps of the durable run that the code is in.

    Args:
        model: The model; everything but its answers is its own.
    """

    def __init__(self, model: Model) -> None:
        self._outlast_model = model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_outlast_model":
            raise AttributeError(name)
        return getattr(self._outlast_model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> JournaledModel:
        return self

    async def _cleanup_on_run_end(self, owner: object) -> None:
        await self._outlast_model._cleanup_on_run_end(owner)

    async def close(self) -> None:
        """Release what the model holds."""
        await self._outlast_model.close()

    def get_retry_advice(self, request: Any) -> Any:
        """Return the model's own advice."""
        return self._outlast_model.get_retry_advice(request)

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        """Return the recorded answer, or ask the model and record what it says."""
        scope, place = steps.scope(), here()
        if scope is None or place is None:
            return await self._outlast_model.get_response(*args, **kwargs)
        await stop_if_draining(place)
        call = self._call(scope, place, args, kwargs)
        ask = functools.partial(self._outlast_model.get_response, *args, **kwargs)
        todo = steps.perform(scope, call, functools.partial(place.track.replayed, call))
        found: ModelResponse = await steps.arun(todo, functools.partial(_owned, scope, call, ask))
        place.answers += 1
        return found

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[TResponseStreamEvent]:
        """Yield the model's events; of a recorded answer only the last, which has all of it."""
        scope, place = steps.scope(), here()
        ask = functools.partial(self._outlast_model.stream_response, *args, **kwargs)
        if scope is None or place is None:
            async for event in ask():
                yield event
            return
        await stop_if_draining(place)
        call = _streamed_call(self._call(scope, place, args, kwargs))
        todo = steps.perform(scope, call, functools.partial(place.track.replayed, call))
        async for event in _events(todo, ask, call, scope):
            if event.type in _TERMINAL:
                # Before the consumer sees it: it stops reading there.
                place.answers += 1
            yield event

    def _call(self, scope: Scope, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        given = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        name = model_name(self._outlast_model)

        @functools.cache
        def request() -> str:
            return canonical([given.get("system_instructions"), given.get("input")])

        def loads(stored: dict[str, Any]) -> ModelResponse:
            _tell_of_drift(scope, name, stored["asked"], request)
            response: ModelResponse = stored["response"]
            return response

        client = getattr(self._outlast_model, "_client", None)
        return StepCall(
            type="model",
            name=name,
            # Named by its place alone: instructions may say what time it is.
            digest="",
            request=request,
            key=f"m{place.answers}",
            usage=functools.partial(_usage, name),
            dumps=lambda response: {"asked": digest(request()), "response": response},
            loads=loads,
            endpoint=f"{type(self._outlast_model).__qualname__} {getattr(client, 'base_url', '')} {name}",
        )


_PARAMETERS: Final = (
    "system_instructions", "input", "model_settings", "tools", "output_schema", "handoffs", "tracing",
)  # fmt: skip


def model_name(model: Model) -> str:
    """Return the name of a model, as its provider calls it."""
    found = getattr(model, "model", None)
    return found if isinstance(found, str) else type(model).__name__


def canonical(value: Any) -> str:
    """Return a text that is the same in every process for the same request."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_said, separators=(",", ":"))


def _said(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return f"<{type(value).__qualname__}>"


def _tell_of_drift(scope: Scope, name: str, asked: str, request: Callable[[], str]) -> None:
    if digest(request()) != asked:
        logger.info("run %s: model %s is asked something else than when it answered; its recorded answer is used",
                    scope.attempt.run_id, name)  # fmt: skip


def _usage(name: str, response: ModelResponse) -> Usage | None:
    used = response.usage
    return Usage(used.input_tokens, used.output_tokens, name) if used.total_tokens else None


async def _owned(scope: Scope, call: StepCall, ask: Callable[[], Any]) -> Any:
    """Ask a model; where a RetryPolicy is given, the client's own retries are off, so that retries have one owner."""
    if scope.attempt.policies.of("model", call.name).retry is None:
        return await ask()
    with provider_managed_retries_disabled(True):
        return await ask()


async def stop_if_draining(place: Place) -> None:
    """Stop before a model is asked if the attempt is asked to stop, once what is in flight beside it has ended."""
    attempt = place.track.attempt
    if not attempt.draining or place.track.replaying:
        return
    while set(attempt.flying) - set(attempt.doomed) - set(_above()):  # noqa: ASYNC110  sync code ends them, too
        await asyncio.sleep(0.02)
    place.track.drained = True
    attempt.end_with(steps.Stop(until=0.0))
    raise steps.AttemptStopped


def _above() -> tuple[object, ...]:
    scope = steps.scope()
    return scope.above if scope else ()


# --- streams


class _BrokenStream(Exception):
    """A stream broke off after its consumer had seen a part: it cannot be tried again here."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _streamed_call(call: StepCall) -> StepCall:
    """Return the step of a streamed answer: its result is the last event."""

    def usage(event: Any) -> Usage | None:
        used = getattr(getattr(event, "response", None), "usage", None)
        return Usage(used.input_tokens, used.output_tokens, call.name) if used else None

    return replace(call, usage=usage, volatile=(_BrokenStream,))


async def _events(
    todo: steps.Steps[Any], ask: Callable[[], AsyncIterator[Any]], call: StepCall, scope: Scope
) -> AsyncIterator[Any]:
    """Carry a streamed step out, giving its events on as they come, and the last one once it is recorded."""
    seen: list[Any] = []
    last: Any = None
    try:
        operation = next(todo)
        while True:
            try:
                if isinstance(operation, steps.Invoke):
                    items, result = [], None
                    async for event in _within(ask, call, scope, operation.timeout):
                        if event.type in _TERMINAL:
                            result = event
                            break
                        if event.type == "response.output_item.done":
                            items.append(event.item)
                        seen.append(event.type)
                        yield event
                    response = getattr(result, "response", None)
                    if response is not None and not response.output and items:
                        # Some servers leave it empty where they have sent it in pieces.
                        response.output = items
                else:
                    result = await steps.arun_operation(operation, _nothing)
            except Exception as error:
                operation = todo.throw(_BrokenStream(error) if seen else error)
            except BaseException as error:
                operation = todo.throw(error)
            else:
                operation = todo.send(result)
    except StopIteration as stop:
        last = stop.value
    except _BrokenStream as broken:
        raise broken.error from None
    if last is not None:
        yield last


async def _within(
    ask: Callable[[], AsyncIterator[Any]], call: StepCall, scope: Scope, timeout: float | None
) -> AsyncIterator[Any]:
    """Yield a model's events; all of them within `timeout` seconds, if given."""
    loop = asyncio.get_running_loop()
    end = None if timeout is None else loop.time() + timeout
    events = ask().__aiter__()
    owned = scope.attempt.policies.of("model", call.name).retry is not None
    try:
        while True:
            try:
                with provider_managed_retries_disabled(owned):
                    if end is None:
                        event = await events.__anext__()
                    else:
                        event = await asyncio.wait_for(events.__anext__(), max(0.0, end - loop.time()))
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if end is None or loop.time() < end:
                    raise
                raise StepTimeoutError(f"model {call.name!r} took longer than {timeout:g} s") from error
            yield event
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def _nothing() -> None:
    return None
