"""`@step`, what happens to failing steps, and how a run ends that has undone them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.tools import tool
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy as NodeRetry
from langgraph.types import interrupt

from outlast import (
    Budget,
    BudgetExceededError,
    CircuitBreaker,
    CircuitOpenError,
    JournalMismatchError,
    Policies,
    RetryPolicy,
    RunCancelledError,
    RunFailedError,
    RunHandle,
    RunStateError,
    RunTimeoutError,
    SerializationError,
    StepPolicy,
    StepTimeoutError,
    StoreError,
    current_step,
    durable,
    step,
)
from outlast.checkpointer.sidecar import Address
from outlast.embedded import EmbeddedSidecar
from outlast.recovery.runtime import Runtime
from tests.checkpointer.test_client import Refused
from tests.checkpointer.test_encrypted import everything
from tests.journal.conftest import Broken, State, Twice, one_node

QUICK = RetryPolicy(attempts=3, backoff=0.01, jitter=0)
UNDONE: list[Any] = []
Names = Callable[[], str]


def undo(result: Any, *args: Any, **kwargs: Any) -> None:
    UNDONE.append((result, args, kwargs))


async def undo_async(result: Any, *args: Any) -> None:
    await asyncio.sleep(0)
    UNDONE.append((result, args))


def undo_never(result: Any, *args: Any) -> None:
    raise OSError("the shop is closed")


# --- marked functions


def test_marked_functions_run_once(twice: Twice) -> None:
    calls: list[Any] = []

    @step
    def add(a: int, b: int = 1) -> dict[str, Any]:
        calls.append((a, b))
        return {"sum": a + b, "key": current_step().idempotency_key}

    first, second, handle = twice(lambda _: (add(1), add(1, b=2), step(str.upper)("x"), add(1)))
    assert first == second
    assert calls == [(1, 1), (1, 2), (1, 1)]
    assert len({first[0]["key"], first[1]["key"], first[3]["key"]}) == 3
    assert [record.name for record in handle.steps()] == ["add", "add", "upper", "add"]


async def test_async_functions_run_once(atwice: Twice) -> None:
    calls: list[int] = []

    @step(name="fetch")
    async def get(n: int) -> tuple[int, int]:
        calls.append(n)
        await asyncio.sleep(0.01 * (3 - n))
        return n, current_step().attempt

    async def body(_: Any) -> Any:
        return [tuple(each) for each in await asyncio.gather(get(1), get(2), get(1))]

    first, second, _ = await atwice(body)
    assert first == second == [(1, 1), (2, 1), (1, 1)]
    assert sorted(calls) == [1, 1, 2]


def test_a_step_in_a_step(twice: Twice) -> None:
    calls: list[str] = []

    @step
    def inner(name: str) -> str:
        calls.append(f"inner {name}")
        return name

    @step
    def outer(name: str) -> str:
        calls.append(f"outer {name}")
        return inner("same") + name

    first, second, _ = twice(lambda _: outer("a") + outer("b") + inner("same"))
    assert first == second == "sameasamebsame"
    assert calls == ["outer a", "inner same", "outer b", "inner same", "inner same"]


def test_outside_of_a_run_a_function_is_itself() -> None:
    @step(retry=QUICK)
    def fail() -> None:
        raise ConnectionError("once")

    with pytest.raises(ConnectionError, match="once"):
        fail()


def test_what_is_no_step_is_refused() -> None:
    def generate() -> Any:
        yield 1

    with pytest.raises(TypeError, match="returns its result"):
        step(generate)
    with pytest.raises(ValueError, match="imported by name"):
        step(compensate=lambda result: None)(undo)
    with pytest.raises(ValueError, match="'retry', 'ask' or 'fail'"):
        StepPolicy(on_in_doubt="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attempts"):
        RetryPolicy(attempts=0)


def test_arguments_that_cannot_be_serialised(twice: Twice) -> None:
    calls: list[object] = []

    def use(lock: Any, n: int) -> int:
        calls.append(n)
        return n

    with pytest.raises(SerializationError, match=r"step 'use'.*key="):
        twice(lambda _: step(use)(threading.Lock(), 1))
    named = step(key=lambda lock, n: f"use-{n}")(use)
    first, second, _ = twice(lambda _: named(threading.Lock(), 1))
    assert (first, second, calls) == (1, 1, [1])


@pytest.mark.parametrize("accept", [False, True])
def test_a_recorded_step_met_again_with_another_request(twice: Twice, accept: bool) -> None:
    numbers = iter([1, 2])

    @step(key=lambda n: "one")
    def use(n: int) -> int:
        return n * 10

    policies = Policies(on_mismatch="accept" if accept else "error")
    if accept:
        first, second, _ = twice(lambda _: use(next(numbers)), policies=policies)
        assert first == second == 10
    else:
        with pytest.raises(JournalMismatchError, match=r"(?s)Recorded: use\(1\).*Now: use\(2\).*on_mismatch"):
            twice(lambda _: use(next(numbers)), policies=policies)


def test_a_node_that_langgraph_tries_again_does_not_repeat_its_steps(runtime: Runtime, name: Names) -> None:
    calls: list[str] = []
    keys: list[str] = []

    @step
    def sound() -> str:
        calls.append("sound")
        return "s"

    @step
    def shaky() -> str:
        calls.append("shaky")
        keys.append(current_step().idempotency_key)
        if len(keys) < 3:
            raise ConnectionError("down")
        return "y"

    builder = StateGraph(State)
    retry = NodeRetry(max_attempts=4, initial_interval=0.01, jitter=False)
    builder.add_node("node", lambda state: {"out": sound() + shaky()}, retry_policy=retry)
    graph = durable(builder.add_edge(START, "node").compile(), name=name(), runtime=runtime)
    assert graph.invoke({"given": 1})["out"] == "sy"
    assert calls == ["sound", "shaky", "shaky", "shaky"]
    assert len(set(keys)) == 1, "a failed call that is made again keeps its idempotency key"


# --- failing


def run(runtime: Runtime, name: str, body: Callable[[Any], Any], **options: Any) -> Any:
    graph = one_node(lambda state: {"out": body(state.get("given"))})
    return durable(graph, name=name, runtime=runtime, **options).start({"given": 1})


def test_a_failing_step_is_tried_again(runtime: Runtime, name: Names) -> None:
    tries: list[str] = []

    @step(retry=QUICK)
    def shaky() -> int:
        tries.append(current_step().idempotency_key)
        if len(tries) < 3:
            raise ConnectionError("down")
        return len(tries)

    handle = run(runtime, name(), lambda _: shaky())
    assert handle.result(20)["out"] == 3
    assert len(set(tries)) == 1
    assert [record.kind for record in handle.steps()] == ["result"]


def test_what_is_not_worth_it_is_not_tried_again(runtime: Runtime, name: Names) -> None:
    tries: list[int] = []

    @step(retry=QUICK)
    def wrong() -> None:
        tries.append(1)
        raise ValueError("bad input")

    handle = run(runtime, name(), lambda _: wrong())
    with pytest.raises(ValueError, match="bad input"):
        handle.result(20)
    assert tries == [1]
    (record,) = handle.steps()
    assert (record.kind, record.error["type"], record.request) == ("error", "ValueError", "wrong()")


class RateLimitedError(Exception):
    status_code = 429

    def __init__(self, seconds: float) -> None:
        super().__init__("slow down")
        self.retry_after = seconds


def test_a_long_wait_is_slept_without_a_worker(runtime: Runtime, name: Names) -> None:
    tries: list[int] = []

    @step(retry=RetryPolicy(attempts=3, backoff=0.01, hold=0.5))
    def limited() -> str:
        tries.append(current_step().attempt)
        if len(tries) < 3:
            raise RateLimitedError(1.5)
        return "through"

    handle = run(runtime, name(), lambda _: limited())
    deadline = time.monotonic() + 10
    while handle.status() != "sleeping" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert handle.status() == "sleeping"
    worker = runtime.start_worker()
    assert worker is not None
    assert worker._held.attempt(handle.run_id) is None
    assert handle.result(20)["out"] == "through"
    assert tries == [1, 2, 3], "each try is another attempt, and they are counted over all of them"


def test_a_step_that_takes_too_long(runtime: Runtime, name: Names) -> None:
    release = threading.Event()

    @step(timeout=0.1)
    def hang() -> None:
        release.wait(20)

    handle = run(runtime, name(), lambda _: hang())
    with pytest.raises(StepTimeoutError, match=r"'hang' took longer than 0\.1 s"):
        handle.result(20)
    release.set()


async def test_an_async_step_that_takes_too_long(runtime: Runtime, name: Names) -> None:
    seen: list[int] = []

    @step(timeout=0.1, retry=QUICK)
    async def hang() -> str:
        seen.append(1)
        if len(seen) == 1:
            await asyncio.sleep(20)
        return "done"

    async def node(state: State) -> State:
        return {"out": await hang()}

    graph = durable(one_node(node), name=name(), runtime=runtime)
    assert (await graph.ainvoke({"given": 1}))["out"] == "done"


def test_a_circuit_breaker_is_shared_by_runs(runtime: Runtime, name: Names) -> None:
    tries: list[int] = []
    own = name()

    @step(name=own, breaker=CircuitBreaker(failures=2, reset_after=0.3))
    def down() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("down")
        return "up"

    agent = durable(one_node(lambda state: {"out": down()}), name=own, runtime=runtime)
    for error in (ConnectionError, ConnectionError, CircuitOpenError):
        with pytest.raises(error):
            agent.invoke({"given": 1})
    assert len(tries) == 2
    time.sleep(0.35)
    assert agent.invoke({"given": 1})["out"] == "up"
    assert len(tries) == 3


def test_policies_by_kind_and_name(runtime: Runtime, name: Names) -> None:
    tries: dict[str, int] = {}

    def shaky(kind: str) -> Any:
        def call() -> str:
            tries[kind] = tries.get(kind, 0) + 1
            if tries[kind] < 3:
                raise ConnectionError("down")
            return kind

        return step(name=kind)(call)

    policies = Policies(functions=StepPolicy(retry=QUICK), named={"once": StepPolicy(retry=RetryPolicy(attempts=1))})
    assert run(runtime, name(), lambda _: shaky("often")(), policies=policies).result(20)["out"] == "often"
    with pytest.raises(ConnectionError):
        run(runtime, name(), lambda _: shaky("once")(), policies=policies).result(20)
    assert tries == {"often": 3, "once": 1}


# --- runs


def test_a_run_is_tried_again(runtime: Runtime, name: Names) -> None:
    calls: list[str] = []

    @step
    def paid() -> str:
        calls.append("paid")
        return "p"

    def body(_: Any) -> str:
        calls.append("node")
        paid()
        if calls.count("node") < 3:
            raise ConnectionError("down")
        return "done"

    handle = run(runtime, name(), body, policies=Policies(run=QUICK))
    assert handle.result(20)["out"] == "done"
    assert calls == ["node", "paid", "node", "node"]


def test_only_failed_runs_are_tried_again(runtime: Runtime, name: Names) -> None:
    handle = run(runtime, name(), lambda _: "fine")
    handle.result(20)
    with pytest.raises(RunStateError, match="it is done"):
        handle.retry()


def test_a_run_that_takes_too_long(runtime: Runtime, name: Names) -> None:
    @step(retry=RetryPolicy(attempts=9, backoff=30, jitter=0))
    def down() -> None:
        raise ConnectionError("down")

    handle = run(runtime, name(), lambda _: down(), policies=Policies(timeout=0.5))
    with pytest.raises(RunTimeoutError, match=r"longer than the 0\.5 s"):
        handle.result(20)
    assert handle.status() == "failed"


# --- undoing


def test_finished_steps_of_a_failed_run_are_undone_in_reverse_order(runtime: Runtime, name: Names) -> None:
    UNDONE.clear()

    @step(compensate=undo)
    def book(what: str, *, seats: int) -> str:
        return f"{what} booked"

    @step(compensate=undo_async)
    def pay(amount: int) -> int:
        return amount

    def body(_: Any) -> None:
        book("flight", seats=2)
        pay(100)
        raise Broken

    handle = run(runtime, name(), body)
    with pytest.raises(Broken):
        handle.result(20)
    assert UNDONE == [(100, (100,)), ("flight booked", ("flight",), {"seats": 2})]
    with pytest.raises(RunStateError, match="its steps were undone"):
        handle.retry()


def test_a_step_that_cannot_be_undone_is_told(runtime: Runtime, name: Names, caplog: pytest.LogCaptureFixture) -> None:
    UNDONE.clear()

    @step(compensate=undo)
    def first() -> int:
        return 1

    @step(compensate=undo_never)
    def second() -> int:
        return 2

    def body(_: Any) -> None:
        first()
        second()
        raise Broken("no")

    handle = run(runtime, name(), body)
    with caplog.at_level(logging.ERROR), pytest.raises(Broken):
        handle.result(20)
    assert UNDONE == [(1, (), {})]
    error = handle._head().error
    assert error is not None
    assert "no; function 'second' could not be undone (OSError: the shop is closed)" in error[1]


def test_a_cancelled_run_is_undone_if_asked(runtime: Runtime, name: Names) -> None:
    UNDONE.clear()
    paid, go = threading.Event(), threading.Event()

    @step(compensate=undo)
    def pay() -> str:
        return "paid"

    def first(state: State) -> State:
        pay()
        paid.set()
        go.wait(20)
        return {"out": 1}

    builder = StateGraph(State).add_node("first", first).add_node("second", lambda state: {"out": 2})
    graph = builder.add_edge(START, "first").add_edge("first", "second").compile()
    handle = durable(graph, name=name(), runtime=runtime).start({"given": 1})
    assert paid.wait(20)
    handle.cancel(compensate=True)
    time.sleep(0.1)
    go.set()
    # It ends at the next boundary once the worker has looked: it is asked to drain.
    attempt = runtime.start_worker()._held.attempt(handle.run_id)  # type: ignore[union-attr]
    if attempt is not None:
        attempt.drain()
    with pytest.raises(RunCancelledError):
        handle.result(30)
    assert UNDONE == [("paid", (), {})]
    assert handle.status() == "cancelled"


def test_a_budget_that_fails_a_run(runtime: Runtime, name: Names) -> None:
    calls: list[int] = []

    @tool
    def look(n: int) -> int:
        """Look."""
        calls.append(n)
        return n

    def body(_: Any) -> None:
        for n in range(5):
            look.invoke({"n": n})

    handle = run(runtime, name(), body, budget=Budget(tool_calls=3))
    with pytest.raises(BudgetExceededError, match="tool_calls: 3 of 3 used"):
        handle.result(20)
    assert calls == [0, 1, 2]


# --- secrets


def test_with_an_encrypting_serialiser_nothing_of_the_users_is_readable(tmp_path: Path, name: Names) -> None:
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")

    @step(compensate=undo)
    def buy(what: str) -> str:
        return f"bought-{what}"

    def body(given: Any) -> None:
        raise ValueError(f"failed-{buy('marker1')}")

    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        runtime = Runtime("statestore", Address("127.0.0.1", sidecar.grpc_port, embedded=True))
        handle = run(runtime, name(), body, serde=serde)
        with pytest.raises(ValueError, match="failed-bought-marker1"):
            handle.result(20)
        assert handle._head().error == ("ValueError", "(encrypted)")
        elsewhere = RunHandle(runtime, handle.run_id, serde, lambda run_id, value: None)
        with pytest.raises(RunFailedError, match="failed-bought-marker1"):
            elsewhere.result(20)
        runtime.close()
    values = [value for _, value in everything(tmp_path / "outlast.db")]
    assert [value for value in values if handle.run_id.encode() in value], "what is readable is found"
    assert not [value for value in values if b"marker1" in value]


# --- unwinding


async def test_an_attempt_is_unwound_whatever_user_code_makes_of_it(runtime: Runtime, name: Names) -> None:
    """A sleeping step in a task group, in code that catches everything, beside one that goes on meanwhile."""
    tries: list[str] = []

    @step(retry=RetryPolicy(attempts=2, backoff=0.01, hold=0))
    async def limited() -> str:
        tries.append("limited")
        if len(tries) < 2:
            raise RateLimitedError(0.3)
        return "through"

    @step
    async def beside() -> str:
        tries.append("beside")
        await asyncio.sleep(0.2)
        return "beside"

    async def node(state: State) -> State:
        try:
            async with asyncio.TaskGroup() as group:
                both = [group.create_task(limited()), group.create_task(beside())]
        except BaseException:
            return {"out": "swallowed"}
        return {"out": [task.result() for task in both]}

    graph = durable(one_node(node), name=name(), runtime=runtime)
    assert (await graph.ainvoke({"given": 1}))["out"] == ["through", "beside"]
    assert tries.count("beside") == 1, "what was in flight beside it is waited for and recorded"


def test_an_interrupt_in_a_step_leaves_no_doubt(runtime: Runtime, name: Names) -> None:
    """A tool that asks before it acts was called, and came to nothing: whoever resumes it is not asked twice."""
    calls: list[str] = []

    @tool
    def refund(amount: int) -> str:
        """Refund."""
        calls.append("asked")
        answer = interrupt(f"refund {amount}?")
        calls.append("done")
        return f"refunded {amount}: {answer}"

    graph = one_node(lambda state: {"out": refund.invoke({"amount": 5})})
    policies = Policies(tools=StepPolicy(on_in_doubt="ask"))
    handle = durable(graph, name=name(), runtime=runtime, policies=policies).start({"given": 1})
    assert handle.result(20)["__interrupt__"][0].value == "refund 5?"
    assert handle.question() is None
    handle.resume("yes")
    assert handle.result(20)["out"] == "refunded 5: yes"
    assert calls == ["asked", "asked", "done"]
    assert [record.kind for record in handle.steps()] == ["intent", "pause", "intent", "result"]


def test_what_fails_the_store_is_no_outcome_of_a_step(runtime: Runtime, name: Names) -> None:
    calls: list[int] = []

    @step
    def remember() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise StoreError("the store is away")
        return "remembered"

    handle = run(runtime, name(), lambda _: remember())
    assert handle.result(20)["out"] == "remembered"
    assert [record.kind for record in handle.steps()] == ["result"]


def test_a_store_that_is_away_costs_no_call(
    runtime: Runtime, name: Names, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store answers with errors from when the call is made; it is recorded once the store is back."""
    calls: list[int] = []
    stub = runtime.client._stub
    away = threading.Event()

    class Away:
        def __getattr__(self, method: str) -> Any:
            def call(request: Any, **more: Any) -> Any:
                if away.is_set():
                    raise Refused("dial tcp: connection refused")
                return getattr(stub, method)(request, **more)

            return call

    @step
    def pay() -> str:
        calls.append(1)
        away.set()
        threading.Timer(1.0, away.clear).start()
        return "paid"

    monkeypatch.setattr(runtime.client, "_stub", Away())
    handle = run(runtime, name(), lambda _: pay())
    assert handle.result(30)["out"] == "paid"
    assert calls == [1]
    assert "waiting goes on" in caplog.text
    assert [item.kind for item in handle.steps()] == ["result"]
