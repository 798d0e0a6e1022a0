"""Make LangGraph graphs and OpenAI Agents runs durable: a `kill -9` at any instant costs nothing.

from outlast import durable

agent = durable(graph, name="weather")          # the one line
agent.invoke({"messages": [...]}, {"configurable": {"thread_id": "t1"}})
"""

from __future__ import annotations

import functools
from typing import Any

from outlast.checkpointer.client import Guarantee
from outlast.errors import (
    AgentNotFoundError,
    BudgetExceededError,
    CircuitOpenError,
    CorruptRecordError,
    DuplicateAgentError,
    FencedError,
    JournalMismatchError,
    OutlastError,
    RecordTooLargeError,
    RunCancelledError,
    RunConflictError,
    RunFailedError,
    RunNotFoundError,
    RunStateError,
    RunTimeoutError,
    SerializationError,
    SidecarUnavailableError,
    StepError,
    StepFailedError,
    StepInDoubtError,
    StepTimeoutError,
    StoreError,
    StoreNotFoundError,
    ThreadBusyError,
    UnknownFormatError,
    UnsupportedStoreError,
)
from outlast.recovery.answers import Answer, again, allow, done, fail
from outlast.recovery.budget import Budget, Price
from outlast.recovery.handle import RunHandle
from outlast.recovery.marked import step
from outlast.recovery.policy import CircuitBreaker, Policies, RetryPolicy, StepPolicy
from outlast.recovery.runtime import Runtime, default_runtime
from outlast.recovery.steps import Question, StepInfo, current_step

__all__ = [
    "AgentNotFoundError",
    "Answer",
    "Budget",
    "BudgetExceededError",
    "CircuitBreaker",
    "CircuitOpenError",
    "CorruptRecordError",
    "DuplicateAgentError",
    "FencedError",
    "JournalMismatchError",
    "OutlastError",
    "Policies",
    "Price",
    "Question",
    "RecordTooLargeError",
    "RetryPolicy",
    "RunCancelledError",
    "RunConflictError",
    "RunFailedError",
    "RunHandle",
    "RunNotFoundError",
    "RunStateError",
    "RunTimeoutError",
    "Runtime",
    "SerializationError",
    "SidecarUnavailableError",
    "StepError",
    "StepFailedError",
    "StepInDoubtError",
    "StepInfo",
    "StepPolicy",
    "StepTimeoutError",
    "StoreError",
    "StoreNotFoundError",
    "ThreadBusyError",
    "UnknownFormatError",
    "UnsupportedStoreError",
    "again",
    "allow",
    "current_step",
    "done",
    "durable",
    "fail",
    "step",
]


def durable(
    agent: Any = None,
    *,
    name: str | None = None,
    store: str = "statestore",
    runtime: Runtime | None = None,
    guarantee: Guarantee | None = None,
    **options: Any,
) -> Any:
    """Return a durable form of an agent: the same calls, the same results, and runs that survive the process.

    Also a decorator, plain or with arguments, on a function without arguments that returns an agent.

    Args:
        agent: A compiled LangGraph graph (also `create_agent(...)` and `@entrypoint`), which is not changed.
        name: Finds the agent's runs again after a restart: keep it. Default: the agent's or the function's own name.
        store: Name of the Dapr state store component.
        runtime: Use this runtime instead of the process's own for `store`.
        guarantee: `exactly-once` (default) refuses a store without a sound compare-and-swap; `at-least-once` takes any.
        **options: Options of the framework's adapter, such as `if_busy="reject"`, `policies=Policies(...)` and
            `budget=Budget(...)`.

    Raises:
        TypeError: If it is no agent of a supported framework.
        ValueError: If the agent has no name.
        DuplicateAgentError: If another agent of this process has the name.
    """
    if agent is None:
        return functools.partial(durable, name=name, store=store, runtime=runtime, guarantee=guarantee, **options)
    from outlast.adapters import adapt

    return adapt(agent, name, runtime or default_runtime(store, guarantee), **options)
