"""What persons answer to the questions that outlast itself asks of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from outlast.errors import RunStateError
from outlast.recovery import runs
from outlast.recovery.codec import Codec
from outlast.recovery.runs import RunHead, Typed
from outlast.recovery.steps import Question

if TYPE_CHECKING:
    from outlast.recovery.runtime import Runtime


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


_PLAIN: Final = "outlast-json"
"""Tag of an answer given without the agent's own serialiser."""
_FITTING: Final = {"in_doubt": ("done", "again", "fail"), "budget": ("allow", "fail")}
_ABOUT: Final = {"in_doubt": "a step in doubt", "budget": "its budget"}


def question(runtime: Runtime, codec: Codec, head: RunHead) -> Question | None:
    """Return what outlast asks of a waiting run, or None."""
    if head.status != "waiting" or not head.question or head.answers:
        return None
    typed = runtime.client.run(runs.read_typed(head.run_id, head.question[2]))
    return Question(**codec.loads_typed(typed))


def give_answer(runtime: Runtime, codec: Codec, run_id: str, answer: Answer) -> None:
    """Answer the question that a waiting run asks.

    Raises:
        RunNotFoundError: If there is no such run.
        RunStateError: If it asks nothing, or the answer does not fit the question.
    """
    _give(runtime, run_id, answer, codec.dumps_typed(vars(answer)))


def give_plain_answer(runtime: Runtime, run_id: str, answer: Answer) -> None:
    """Answer as `give_answer`, from a process that has not the agent. A result must be plain data."""
    _give(runtime, run_id, answer, (_PLAIN, json.dumps(vars(answer)).encode()))


def _give(runtime: Runtime, run_id: str, answer: Answer, typed: Typed) -> None:
    head = runtime.client.run(runs.read(run_id))
    if head.status != "waiting" or not head.question or head.answers:
        raise RunStateError(f"run {run_id!r} asks nothing that done(), again(), fail() or allow() would answer")
    question_id, kind, _ = head.question
    if answer.do not in _FITTING[kind]:
        fitting = " or ".join(f"{name}(...)" for name in _FITTING[kind])
        raise RunStateError(f"run {run_id!r} asks about {_ABOUT[kind]}: answer {fitting}, not {answer.do}()")
    runtime.answer(run_id, question_id, typed)


def loads(codec: Codec, typed: Typed) -> dict[str, Any]:
    """Return the contents of an answer."""
    kind, data = typed
    found: dict[str, Any] = json.loads(data) if kind == _PLAIN else codec.loads_typed(typed)
    return found
