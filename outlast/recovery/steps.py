"""Steps: calls whose outcome is recorded, so that an attempt that takes over does not make them again.

Each rule is written once, as a generator of operations; `run` and `arun` carry them out in sync and async code.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, overload

from outlast.checkpointer import keys
from outlast.errors import (
    BudgetExceededError,
    CircuitOpenError,
    FencedError,
    JournalMismatchError,
    StepInDoubtError,
    StepTimeoutError,
)
from outlast.recovery import failures
from outlast.recovery.journal import Kind, Place, Record, Round, Usage, shortened
from outlast.recovery.policy import StepPolicy, transient

if TYPE_CHECKING:
    from outlast.recovery.attempt import Attempt

logger = logging.getLogger("outlast.steps")

T = TypeVar("T")

_POLL: Final = 0.02
_OUTAGE: Final = 30.0
"""Seconds that a store may answer with errors before an outcome that cannot be recorded is given up."""
_Type = type[BaseException]


class AttemptStopped(BaseException):
    """Unwinds an attempt that is to end in the middle of a step. What it ends with is in `Attempt.stop`."""


@dataclass(frozen=True)
class Question:
    """What a waiting run asks a person.

    Attributes:
        id: Names the question; an answer to it is given once.
        kind: `in_doubt`: may a call that was in flight be made again; `budget`: may the run spend more.
        step: Name of the tool, function or model.
        text: The question in words.
        request: The request of the step, shortened.
    """

    id: str
    kind: Literal["in_doubt", "budget"]
    step: str
    text: str
    request: str = ""


@dataclass(frozen=True)
class Stop:
    """Why an attempt is to end in the middle of a step: an error, a question, or a sleep until a Unix time."""

    error: BaseException | None = None
    question: Question | None = None
    until: float | None = None


@dataclass(frozen=True)
class StepInfo:
    """The step that runs here.

    Attributes:
        run_id: The run.
        attempt: Number of the run's attempt, from 1 on.
        idempotency_key: The same however often this step is made again, in whatever attempt; pass it on to services
            that know such keys, and an effect that was in flight at a crash is not doubled.
        name: Name of the tool, function or model.
    """

    run_id: str
    attempt: int
    idempotency_key: str
    name: str


@dataclass(frozen=True)
class Scope:
    """Where in which run the code is.

    Attributes:
        attempt: The attempt.
        locate: Tells the place inside the framework's run, and the round there; the same in every attempt.
        path: Key of the step this code runs in; empty outside of steps.
        info: That step.
    """

    attempt: Attempt
    locate: Callable[[], tuple[str, int]]
    path: str = ""
    info: StepInfo | None = None
    above: tuple[object, ...] = ()


_SCOPE: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("outlast_scope", default=None)


def scope() -> Scope | None:
    """Return where this code runs, or None outside of durable runs."""
    return _SCOPE.get()


def enter(attempt: Attempt, locate: Callable[[], tuple[str, int]]) -> contextvars.Token[Scope | None]:
    """Make this context part of an attempt."""
    return _SCOPE.set(Scope(attempt, locate))


def leave(token: contextvars.Token[Scope | None]) -> None:
    """Undo `enter`."""
    _SCOPE.reset(token)


class _Missing(enum.Enum):
    MISSING = enum.auto()


@overload
def current_step() -> StepInfo: ...


@overload
def current_step(default: T) -> StepInfo | T: ...


def current_step(default: Any = _Missing.MISSING) -> Any:
    """Return the step that this code runs in.

    Args:
        default: What to return outside of steps, for code that is also used without durable runs.

    Raises:
        LookupError: If it runs in none, and no default is given.
    """
    here = _SCOPE.get()
    if here is not None and here.info is not None:
        return here.info
    if default is _Missing.MISSING:
        raise LookupError(
            "current_step() is called outside of a step: call it in a tool or in a function marked with @step, "
            "while a durable run is carried out; current_step(None) is None elsewhere"
        )
    return default


@dataclass(frozen=True)
class StepCall:
    """A call that is to be a step.

    Attributes:
        type: `model`, `tool` or `function`.
        name: Name of the model, tool or function.
        digest: Digest of the request.
        request: The request in words.
        id: What names the call within its place; the digest, if empty.
        key: Names the call within its place instead of type, name and id.
        own: Policy it was marked with.
        usage: Tells the tokens of a result.
        dumps, loads: Turn the result into what the journal's codec stores, and back.
        endpoint: What a circuit breaker watches; the name, if empty.
        arguments: What the call is made with, if it can be compensated.
        volatile: Exceptions that are no outcome of the step but end it, as the framework's own interrupts.
    """

    type: str
    name: str
    digest: str
    request: Callable[[], str]
    id: str = ""
    key: str = ""
    own: StepPolicy | None = None
    usage: Callable[[Any], Usage | None] = lambda result: None
    dumps: Callable[[Any], Any] = lambda result: result
    loads: Callable[[Any], Any] = lambda stored: stored
    endpoint: str = ""
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    volatile: tuple[_Type, ...] = ()


@dataclass
class Invoke:
    """Make the call; the result is what it returns."""

    context: Scope
    timeout: float | None


@dataclass
class Wait:
    """Wait for a commit."""

    future: Future[None]


@dataclass
class Sleep:
    """Wait some seconds."""

    seconds: float


Operation = Invoke | Wait | Sleep
Steps = Generator[Operation, Any, T]


@dataclass(eq=False)
class _Making:
    """A call being made: where it is recorded, and under which policy."""

    scope: Scope
    call: StepCall
    policy: StepPolicy
    place: Place
    round: Round
    started: float = field(default_factory=time.time)

    @property
    def attempt(self) -> Attempt:
        return self.scope.attempt

    def record(self, kind: Kind, **fields: Any) -> Record:
        slot = self.place.slot
        return Record(
            kind=kind,
            key=self.place.key,
            slot=slot.index,
            number=len(slot.outcomes),
            type=self.call.type,
            name=self.call.name,
            digest=self.call.digest,
            request=shortened(self.call.request()),
            round=self.round,
            started=self.started,
            ended=time.time(),
            **fields,
        )

    def result(self, value: Any, usage: Usage | None = None) -> Record:
        undo, codec = None, self.attempt.journal.codec
        if self.policy.compensate and self.call.arguments is not None:
            args, kwargs = self.call.arguments
            given = [[self.call.loads(value), *args], kwargs]
            undo = {"at": path_of(self.policy.compensate), "args": list(codec.dumps_typed(given))}
        return self.record("result", value=value, usage=usage, undo=undo)

    def failure(self, error: Exception) -> Record:
        return self.record("error", error=failures.encode(error, self.attempt.journal.codec))

    @property
    def question_id(self) -> str:
        slot = self.place.slot
        return keys.digest(self.place.key, str(slot.index), str(len(slot.outcomes)), str(slot.intents))[:12]

    @property
    def idempotency_key(self) -> str:
        return keys.digest(self.attempt.run_id, self.place.key, str(self.place.slot.index))


def perform(here: Scope, call: StepCall, replayed: Callable[[], None] = lambda: None) -> Steps[Any]:
    """Return the recorded outcome of a call, or make it and record the outcome.

    Args:
        replayed: Called before a recorded outcome is given back.

    Raises:
        JournalMismatchError: If the call was recorded with another request.
        Exception: What the call raised, now or when it was recorded.
    """
    attempt = here.attempt
    attempt.check()
    where, tried = here.locate()
    named = call.key or f"{call.type}/{call.name}/{call.id or call.digest}"
    key = "/".join(filter(None, (here.path, where, named)))
    round = (attempt.head.retries, tried)
    place = attempt.journal.take(key, round)
    if place.found is not None:
        _compare(attempt, place.found, call)
        replayed()
        logger.debug("run %s: %s %s is replayed", attempt.run_id, call.type, call.name)
        if place.found.kind == "error":
            raise place.found.exception(attempt.journal.codec)
        return call.loads(place.found.value)
    making = _Making(here, call, attempt.policies.of(call.type, call.name, call.own), place, round)
    attempt.flying.add(making)
    try:
        return (yield from _make(making))
    except AttemptStopped:
        yield from _let_others_end(making)
        raise
    finally:
        attempt.flying.discard(making)
        attempt.journal.leave(place)


def _compare(attempt: Attempt, found: Record, call: StepCall) -> None:
    if found.digest == call.digest:
        return
    if attempt.policies.on_mismatch == "accept":
        logger.warning(
            "run %s: %s %s is recorded with another request; the recorded outcome is used",
            attempt.run_id, call.type, call.name,
        )  # fmt: skip
        return
    raise JournalMismatchError(
        f"run {attempt.run_id!r}: {call.type} {call.name!r} is recorded with another request. "
        f"Recorded: {found.request}\nNow: {shortened(call.request())}\n"
        "The code, or something it depends on, changed between attempts. Run it with the code that began it, or "
        "accept what is recorded: durable(..., policies=Policies(on_mismatch='accept'))"
    )


def _make(making: _Making) -> Steps[Any]:
    call, policy = making.call, making.policy
    outcome = yield from _resolve_doubt(making)
    if outcome is not None:
        return call.loads(outcome.value)
    tries = before = making.place.slot.tries
    while True:
        tries += 1
        yield from _budget(making)
        if policy.on_in_doubt in ("ask", "fail") and tries == before + 1:
            yield from _write(making, making.record("intent"))
        try:
            value = yield from _try(making)
        except Exception as error:
            if isinstance(error, call.volatile):
                making.attempt.account.end(making, call.type, None, made=False)
                yield from _not_in_doubt(making, tries - 1)
                raise
            if isinstance(error, FencedError) or failures.away(error):
                # Not the step failed but what keeps its run: no outcome of the step, and nothing to go on from.
                making.attempt.end_with(Stop(error=error))
                raise AttemptStopped from error
            making.attempt.account.end(making, call.type, None, made=not isinstance(error, CircuitOpenError))
            wait = policy.retry.wait(error, tries) if policy.retry else None
            if wait is None:
                yield from _settle(making, making.failure(error))
                raise
            logger.warning(
                "run %s: %s %s failed (try %d), again in %.1f s: %s",
                making.attempt.run_id, call.type, call.name, tries, wait, "; ".join(failures.describe(error)),
            )  # fmt: skip
            yield from _pause(making, tries, wait)
        except AttemptStopped:
            # A step in this one ends the attempt; this one will be made again, and that is no doubt.
            making.attempt.account.end(making, call.type, None, made=False)
            if making.attempt.stop is not None and making.attempt.stop.error is None:
                yield from _not_in_doubt(making, tries - 1)
            raise
        except BaseException:
            making.attempt.account.end(making, call.type, None, made=False)
            raise
        else:
            usage = call.usage(value)
            making.attempt.account.end(making, call.type, usage)
            yield from _settle(making, making.result(call.dumps(value), usage))
            return value


def _try(making: _Making) -> Steps[Any]:
    """Make the call once."""
    here, call, policy = making.scope, making.call, making.policy
    info = StepInfo(making.attempt.run_id, making.attempt.head.attempts, making.idempotency_key, call.name)
    inner = replace(here, path=making.place.key, info=info, above=(*here.above, making))
    if not policy.breaker:
        return (yield Invoke(inner, policy.timeout))
    endpoint = call.endpoint or call.name
    making.attempt.breakers.enter(endpoint, policy.breaker)
    failed: bool | None = None
    try:
        value = yield Invoke(inner, policy.timeout)
        failed = False
        return value
    except Exception as error:
        failed = transient(error)
        raise
    finally:
        making.attempt.breakers.left(endpoint, policy.breaker, failed)


def _not_in_doubt(making: _Making, tries: int) -> Steps[None]:
    """Take an intent back: the call has ended, without an outcome."""
    if making.place.slot.intents:
        yield from _write(making, making.record("pause", value=tries))


def _write(making: _Making, record: Record) -> Steps[None]:
    """Write a record that is no outcome."""
    yield from _committed(making, record)
    making.attempt.journal.note(record)


def _settle(making: _Making, record: Record) -> Steps[None]:
    def settle() -> None:
        making.attempt.journal.settle(making.place, record, making.round)

    yield from _committed(making, record, settle)
    settle()


def _committed(making: _Making, record: Record, then: Callable[[], None] = lambda: None) -> Steps[None]:
    def committed(future: Future[None]) -> None:
        # Here too, for a waiter that is cancelled while the commit goes through.
        if not future.cancelled() and future.exception() is None:
            then()

    delay, until = _POLL, time.monotonic() + _OUTAGE
    while True:
        try:
            future = making.attempt.journal.write(record)
            future.add_done_callback(committed)
            yield Wait(future)
        except Exception as error:
            if failures.away(error) and time.monotonic() < until and not making.attempt.abandoned:
                # The call is made and paid for: a store that is away for a while must not cost it.
                yield Sleep(delay)
                delay = min(delay * 2, 1.0)
                continue
            # What cannot be recorded must not be built upon: no user code may catch this and go on.
            making.attempt.end_with(Stop(error=error))
            raise AttemptStopped from error
        return


def _resolve_doubt(making: _Making) -> Steps[Record | None]:
    """Decide on a call whose intent is recorded and whose outcome is not. Returns the outcome a person gave, if any."""
    slot, call = making.place.slot, making.call
    if not slot.intents:
        return None
    policy = making.policy.on_in_doubt or "retry"
    text = (
        f"{call.type} {call.name!r} was in flight when its worker was lost: "
        f"whether it took effect is not known (idempotency key {making.idempotency_key})"
    )
    answer = making.attempt.answers.get(making.question_id)
    if answer is None and policy == "ask":
        question = Question(making.question_id, "in_doubt", call.name, text, shortened(call.request()))
        making.attempt.end_with(Stop(question=question))
        raise AttemptStopped
    if answer is not None and answer["do"] == "done":
        record = making.result(call.dumps(answer.get("result")))
        yield from _settle(making, record)
        return record
    if policy == "fail" or (answer is not None and answer["do"] == "fail"):
        error = StepInDoubtError(text + ((answer and answer.get("reason") and f": {answer['reason']}") or ""))
        yield from _settle(making, making.failure(error))
        raise error
    return None


def _budget(making: _Making) -> Steps[None]:
    """Stop before the call that would cross a limit, unless a person has allowed more."""
    attempt, call = making.attempt, making.call
    if attempt.account.unlimited:
        return
    while True:
        crossed = attempt.account.begin(making, call.type, call.name, len(call.request()))
        if crossed is None:
            return
        limit = crossed.partition(":")[0]
        question_id = keys.digest(attempt.run_id, "budget", limit, str(attempt.account.grants))[:12]
        answer = attempt.answers.pop(question_id, None)
        if answer is not None and answer["do"] == "allow":
            record = replace(making.record("grant", value=answer["more"]), key="")
            yield from _write(making, record)
            attempt.account.grant(answer["more"])
            continue
        text = f"the budget of run {attempt.run_id!r} does not allow {call.type} {call.name!r}: {crossed}"
        if answer is None and attempt.budget.on_limit == "ask":
            question = Question(question_id, "budget", call.name, text, shortened(call.request()))
            attempt.end_with(Stop(question=question))
            raise AttemptStopped
        raise BudgetExceededError(text)


def _pause(making: _Making, tries: int, seconds: float) -> Steps[None]:
    """Wait before the next try: here if that is soon, else without a worker."""
    assert making.policy.retry is not None
    until = time.time() + seconds
    while (left := until - time.time()) > 0:
        making.attempt.check()
        if left > making.policy.retry.hold or making.attempt.draining:
            yield from _write(making, making.record("pause", value=tries))
            making.attempt.end_with(Stop(until=until))
            raise AttemptStopped
        yield Sleep(min(left, 0.5))


def _let_others_end(making: _Making) -> Steps[None]:
    """Wait for calls in flight beside this one, so that what they come to is recorded before the attempt ends."""
    attempt = making.attempt
    attempt.flying.discard(making)
    # Those around this one end by its end.
    attempt.doomed.update(making.scope.above)
    if attempt.stop is None or attempt.stop.error is not None:
        return
    while set(attempt.flying) - set(attempt.doomed):
        yield Sleep(_POLL)


def path_of(function: Callable[..., Any]) -> str:
    """Return where a function can be imported from, as `module:name`; empty if it cannot."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    return f"{module}:{name}" if module and name and "<" not in name else ""


# --- carrying steps out


def run(steps: Steps[T], invoke: Callable[[], Any]) -> T:
    """Carry `steps` out in sync code; `invoke` makes the call."""
    try:
        operation = next(steps)
        while True:
            try:
                result = run_operation(operation, invoke)
            except BaseException as error:
                operation = steps.throw(error)
            else:
                operation = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


def run_operation(operation: Operation, invoke: Callable[[], Any]) -> Any:
    """Carry one operation out in sync code."""
    match operation:
        case Invoke():
            token = _SCOPE.set(operation.context)
            try:
                if operation.timeout is None:
                    return invoke()
                context = contextvars.copy_context()
                return _within(operation.timeout, lambda: context.run(invoke), operation.context)
            finally:
                _SCOPE.reset(token)
        case Wait():
            return operation.future.result()
        case Sleep():
            return time.sleep(operation.seconds)


def _within(timeout: float, invoke: Callable[[], Any], here: Scope) -> Any:
    """Make a call on a thread of its own, which is given up after `timeout` seconds."""
    future: Future[Any] = Future()

    def body() -> None:
        try:
            future.set_result(invoke())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, name="outlast-step", daemon=True).start()
    try:
        return future.result(timeout)
    except TimeoutError as error:
        if future.done():
            raise
        raise _too_long(here, timeout) from error


def _too_long(here: Scope, timeout: float) -> StepTimeoutError:
    name = here.info.name if here.info else "a step"
    return StepTimeoutError(f"{name!r} took longer than {timeout:g} s")


async def arun(steps: Steps[T], invoke: Callable[[], Awaitable[Any]]) -> T:
    """Carry `steps` out in async code; `invoke` makes the call."""
    try:
        operation = next(steps)
        while True:
            try:
                result = await arun_operation(operation, invoke)
            except BaseException as error:
                operation = steps.throw(error)
            else:
                operation = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def arun_operation(operation: Operation, invoke: Callable[[], Awaitable[Any]]) -> Any:
    """Carry one operation out in async code."""
    match operation:
        case Invoke():
            token = _SCOPE.set(operation.context)
            watched = operation.timeout and operation.context.attempt.watched(operation.timeout)
            try:
                if operation.timeout is None:
                    return await invoke()
                async with asyncio.timeout(operation.timeout) as timer:
                    return await invoke()
            except TimeoutError as error:
                if operation.timeout is None or not timer.expired():
                    raise
                raise _too_long(operation.context, operation.timeout) from error
            finally:
                _SCOPE.reset(token)
                if watched:
                    operation.context.attempt.unwatched(watched)
        case Wait():
            return await asyncio.shield(asyncio.wrap_future(operation.future))
        case Sleep():
            return await asyncio.sleep(operation.seconds)
