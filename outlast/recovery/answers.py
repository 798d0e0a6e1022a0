"""What persons answer to the questions that outlast itself asks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from outlast.errors import RunStateError
from outlast.recovery import runs
from outlast.recovery.codec import Codec
from outlast.recovery.runs import RunHead
from outlast.recovery.runtime import Runtime
from outlast.recovery.steps import Question


@dataclass(frozen=True)
class Answer:
    """An answer; made by `done`, `again`, `fail` and `allow`."""

    do: Literal["done", "again", "fail", "allow"]
    result: Any = None
    reason: str = ""
    more: dict[str, float] = field(default_factory=dict)


def done(result: Any = None) -> Answer:
    """The step in doubt did take effect, and this is its result."""
    return Answer("done", result=result)


def again() -> Answer:
    """The step in doubt is to be made again, with the same idempotency key."""
    return Answer("again")


def fail(reason: str = "") -> Answer:
    """The step in doubt counts as failed, or the budget is not raised."""
    return Answer("fail", reason=reason)


def allow(
    *,
    tokens: float = 0,
    cost: float = 0,
    model_calls: float = 0,
    tool_calls: float = 0,
    wall_time: float = 0,
) -> Answer:
    """The run may spend so much more; see Budget for the units."""
    more = {
        "tokens": tokens,
        "cost": cost,
        "model_calls": model_calls,
        "tool_calls": tool_calls,
        "wall_time": wall_time,
    }
    return Answer("allow", more={name: value for name, value in more.items() if value})


_FITTING = {"in_doubt": ("done", "again", "fail"), "budget": ("allow", "fail")}


def question(runtime: Runtime, codec: Codec, head: RunHead) -> Question | None:
    """Return what outlast asks of a waiting run, or None."""
    if head.status != "waiting" or not head.question or head.answers:
        return None
    typed = runtime.client.run(runs.read_typed(head.run_id, head.question[1]))
    return Question(**codec.loads_typed(typed))


def give_answer(runtime: Runtime, codec: Codec, run_id: str, answer: Answer) -> None:
    """Answer the question that a waiting run asks.

    Raises:
        RunNotFoundError: If there is no such run.
        RunStateError: If it asks nothing, or the answer does not fit the question.
    """
    asked = question(runtime, codec, runtime.client.run(runs.read(run_id)))
    if asked is None:
        raise RunStateError(f"run {run_id!r} asks nothing that done(), again(), fail() or allow() would answer")
    if answer.do not in _FITTING[asked.kind]:
        fitting = " or ".join(f"{name}(...)" for name in _FITTING[asked.kind])
        raise RunStateError(f"run {run_id!r} asks: {asked.text}; answer {fitting}, not {answer.do}()")
    runtime.answer(run_id, asked.id, codec.dumps_typed(vars(answer)))
