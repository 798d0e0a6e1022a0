"""What to do when a step fails, hangs or is found in doubt: policies, waits, circuit breakers."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

from outlast.errors import CircuitOpenError, StepTimeoutError

InDoubt = Literal["retry", "ask", "fail"]

_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429})
_TRANSIENT_NAMES: Final = frozenset({"APIConnectionError", "APITimeoutError", "RateLimitError", "InternalServerError"})


def transient(error: BaseException) -> bool:
    """Tell whether trying again may help: lost connections, timeouts, rate limits and errors of a server.

    Knows an HTTP error by its `status_code`, its own or its response's: 408, 409, 425, 429 and from 500 on, which is
    what the openai and anthropic clients retry.
    """
    if isinstance(error, (ConnectionError, TimeoutError, StepTimeoutError, CircuitOpenError)):
        return True
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _TRANSIENT_STATUS or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & _TRANSIENT_NAMES) or any(
        kind.__module__.partition(".")[0] in ("httpx", "httpx2") and kind.__name__ == "TransportError"
        for kind in type(error).__mro__
    )


def retry_after(error: BaseException) -> float | None:
    """Return the seconds a server asks to wait, from `Retry-After` (RFC 9110, 10.2.3) or `retry-after-ms`, if it does.

    Looks at the `retry_after` of the exception, or the headers of its response.
    """
    own = getattr(error, "retry_after", None)
    if isinstance(own, int | float):
        return max(0.0, float(own))
    headers: Any = getattr(getattr(error, "response", None), "headers", None)
    if not isinstance(headers, Mapping):
        return None
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value: Any = headers.get(name) or headers.get(name.title())
        if value is None:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            parsed = email.utils.parsedate_tz(str(value))
            if parsed:
                return max(0.0, email.utils.mktime_tz(parsed) - time.time())
    return None


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when a failed step, or a failed run, is tried again.

    A server's `Retry-After` takes the place of the backoff where it asks for longer. A wait up to `hold` seconds is
    slept in place; a longer one ends the attempt, and the run sleeps on a durable timer with no worker held.

    Attributes:
        attempts: Tries in all, the first included.
        backoff: Seconds before the second try.
        factor: How much longer each wait is than the one before.
        max_backoff: Seconds that a backoff takes at most.
        jitter: Part of a backoff, 0 to 1, that is drawn at random, so that many runs do not come back at once.
        retry_on: Types of exceptions, or a function that tells of an exception, which errors are tried again.
            Default: see `transient`.
        hold: Seconds that a wait may take in place.

    Raises:
        ValueError: If a number makes no sense.
    """

    attempts: int = 4
    backoff: float = 0.5
    factor: float = 2.0
    max_backoff: float = 60.0
    jitter: float = 0.5
    retry_on: tuple[type[BaseException], ...] | Callable[[BaseException], bool] = transient
    hold: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff < 0 or self.factor < 1 or self.hold < 0 or not 0 <= self.jitter <= 1:
            raise ValueError(
                f"{self}: attempts must be at least 1, factor at least 1, backoff and hold not negative, jitter in 0..1"
            )

    def wait(self, error: BaseException, tries: int) -> float | None:
        """Return the seconds to wait after try number `tries` failed with `error`; None if that was the last."""
        again = isinstance(error, self.retry_on) if isinstance(self.retry_on, tuple) else self.retry_on(error)
        if tries >= self.attempts or not again:
            return None
        backoff = min(self.backoff * self.factor ** min(tries - 1, 64), self.max_backoff)
        backoff *= 1 - self.jitter * random.random()
        return max(backoff, retry_after(error) or 0.0)


@dataclass(frozen=True)
class CircuitBreaker:
    """When to stop calling an endpoint that fails: shared by all runs of a worker.

    Attributes:
        failures: Failures in a row after which no call is made any more.
        reset_after: Seconds after which one call is let through, to see.
    """

    failures: int = 5
    reset_after: float = 30.0


@dataclass(frozen=True)
class StepPolicy:
    """What outlast does with a kind of step, or with one tool or function. What is None is left to the wider policy.

    Attributes:
        retry: Tries of a failed call. Turn the client's own retries off (`max_retries=0`) where this is on.
        timeout: Seconds a call may take; then it fails with StepTimeoutError, which `retry` may try again.
            A sync function cannot be stopped: it goes on in its thread, and what it returns is dropped.
        on_in_doubt: What happens to a call that was in flight when its worker was lost: `retry` makes it again with
            the same idempotency key, `ask` lets the run wait for a person, `fail` raises StepInDoubtError.
        breaker: Stops calls to an endpoint that fails; `retry` then waits for it to be tried again.
        compensate: Undoes a finished step when its run fails for good or is cancelled with compensation: called with
            the step's result, then the call's own arguments.
    """

    retry: RetryPolicy | None = None
    timeout: float | None = None
    on_in_doubt: InDoubt | None = None
    breaker: CircuitBreaker | None = None
    compensate: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.on_in_doubt not in (None, "retry", "ask", "fail"):
            raise ValueError(f"on_in_doubt={self.on_in_doubt!r}: use 'retry', 'ask' or 'fail'")
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout!r}: give a number of seconds above 0")

    def over(self, wider: StepPolicy) -> StepPolicy:
        """Return this policy with what it leaves open taken from `wider`."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(wider, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class Policies:
    """The policies of an agent.

    Attributes:
        models, tools, functions: For each kind of step.
        named: For single tools, functions or models, by name; goes before that of the kind.
        run: Tries of a run that fails.
        timeout: Seconds a run may take in all, waiting included; then it fails with RunTimeoutError.
        on_mismatch: What to do if a recorded step is met again with another request: raise JournalMismatchError, or
            accept what is recorded.
    """

    models: StepPolicy = StepPolicy()
    tools: StepPolicy = StepPolicy()
    functions: StepPolicy = StepPolicy()
    named: Mapping[str, StepPolicy] = field(default_factory=dict)
    run: RetryPolicy | None = None
    timeout: float | None = None
    on_mismatch: Literal["error", "accept"] = "error"

    def of(self, type: str, name: str, own: StepPolicy | None = None) -> StepPolicy:
        """Return the policy of a step; `own` is what its function was marked with."""
        wider = {"model": self.models, "tool": self.tools}.get(type, self.functions)
        if own is not None:
            wider = own.over(wider)
        named = self.named.get(name)
        return named.over(wider) if named else wider


class Breakers:
    """The circuit breakers of a worker, one per endpoint. A closed one counts failures, an open one refuses calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, _Circuit] = {}

    def enter(self, endpoint: str, breaker: CircuitBreaker) -> None:
        """Ask to make a call.

        Raises:
            CircuitOpenError: If the endpoint has failed too often of late; `retry_after` says when to ask again.
        """
        with self._lock:
            circuit = self._states.setdefault(endpoint, _Circuit())
            left = circuit.opened + breaker.reset_after - time.monotonic()
            if circuit.failures < breaker.failures:
                return
            if left > 0 or circuit.trying:
                raise CircuitOpenError(endpoint, circuit.failures, max(left, 0.1))
            circuit.trying = True

    def left(self, endpoint: str, breaker: CircuitBreaker, failed: bool | None) -> None:
        """Tell how a call went; None if that says nothing of the endpoint."""
        with self._lock:
            circuit = self._states.setdefault(endpoint, _Circuit())
            circuit.trying = False
            if failed is None:
                return
            circuit.failures = circuit.failures + 1 if failed else 0
            if circuit.failures >= breaker.failures:
                circuit.opened = time.monotonic()


@dataclass
class _Circuit:
    failures: int = 0
    opened: float = 0.0
    trying: bool = False
