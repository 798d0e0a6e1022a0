"""`@step`: a function of the user's as a step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast, overload

from outlast.errors import SerializationError
from outlast.recovery import steps
from outlast.recovery.journal import digest
from outlast.recovery.policy import CircuitBreaker, InDoubt, RetryPolicy, StepPolicy

P = ParamSpec("P")
T = TypeVar("T")


@overload
def step(function: Callable[P, T], /) -> Callable[P, T]: ...


@overload
def step(
    function: None = None,
    /,
    *,
    name: str = "",
    key: Callable[..., str] | None = None,
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    on_in_doubt: InDoubt | None = None,
    breaker: CircuitBreaker | None = None,
    compensate: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def step(
    function: Callable[P, T] | None = None,
    /,
    *,
    name: str = "",
    key: Callable[..., str] | None = None,
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    on_in_doubt: InDoubt | None = None,
    breaker: CircuitBreaker | None = None,
    compensate: Callable[..., Any] | None = None,
) -> Any:
    """Make a function a durable step: inside a durable run its recorded result is used instead of calling it again.

    For sync and async functions, in nodes, tools and agents of any framework; `step(fn)(...)` or a decorator. Outside a
    durable run the function is called as it is. Arguments and result must be serialisable; equal calls at one place of
    a run are told apart by their order.

    Args:
        function: The function.
        name: Names the step; the function's own name if not given. Keep it.
        key: Gives the name of a call within its place, from the call's arguments, instead of a digest of these.
        retry, timeout, on_in_doubt, breaker, compensate: See StepPolicy. `compensate` must be importable by name, for
            another process may have to call it.

    Raises:
        TypeError: If it is no function, or a generator.
        ValueError: If `compensate` cannot be imported by name.
        SerializationError: On a call whose arguments cannot be serialised, if no `key` is given.
    """
    if function is None:
        return functools.partial(
            cast(Any, step), name=name, key=key, retry=retry, timeout=timeout,
            on_in_doubt=on_in_doubt, breaker=breaker, compensate=compensate,
        )  # fmt: skip
    target: Any = function
    if not callable(target) or inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise TypeError(f"step() takes a function that returns its result, not {function!r}")
    if compensate is not None and not steps.path_of(compensate):
        raise ValueError(
            f"compensate={compensate!r} cannot be imported by name, so another process could not call it: "
            "make it a function of a module"
        )
    policy = StepPolicy(retry, timeout, on_in_doubt, breaker, compensate)
    own: str = name or getattr(function, "__name__", type(function).__name__)

    def call(here: steps.Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> steps.StepCall:
        return steps.StepCall(
            type="function",
            name=own,
            digest=_digest(here, own, args, kwargs, required=key is None),
            request=lambda: _said(own, args, kwargs),
            id=key(*args, **kwargs) if key else "",
            own=policy,
            arguments=(args, kwargs),
        )

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def arun(*args: Any, **kwargs: Any) -> Any:
            here = steps.scope()
            if here is None:
                return await target(*args, **kwargs)
            return await steps.arun(steps.perform(here, call(here, args, kwargs)), lambda: target(*args, **kwargs))

        return arun

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        here = steps.scope()
        if here is None:
            return target(*args, **kwargs)
        return steps.run(steps.perform(here, call(here, args, kwargs)), lambda: target(*args, **kwargs))

    return run


def _digest(here: steps.Scope, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], required: bool) -> str:
    try:
        kind, data = here.attempt.journal.codec.dumps_typed([list(args), sorted(kwargs.items())])
    except Exception as error:
        if not required:
            return ""
        raise SerializationError(
            f"the arguments of step {name!r} cannot be serialised: {error}. Give plain data, or name the call by "
            f"step(key=lambda ...: ...)"
        ) from error
    return digest(kind, data)


def _said(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    said = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
    return f"{name}({', '.join(said)})"
