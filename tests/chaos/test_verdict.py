"""Judging: what counts as repeated, recorded, doubled, different."""

from __future__ import annotations

from typing import Any

from outlast.chaos.events import Event
from outlast.chaos.proxy import Calls
from outlast.chaos.verdict import Disturbance, Seen, differences, judge

CALM = Seen("calm", (), Calls(), {"out": 1}, "done")


def _event(what: Any, at: float, key: str = "k", pid: int = 1, detail: str = "", type: str = "tool") -> Event:
    return Event(what, "run", key, type, "pay", pid, at, detail)


def _judge(*events: Event, **of: Any) -> Any:
    disturbance = Disturbance("kill-worker", "killed", **{"at": 2.5, **of})
    return judge([CALM], Seen("run", events, Calls(), {"out": 1}, "done"), disturbance, ())


def test_a_recorded_step_that_is_made_again_breaks_the_promise() -> None:
    verdict = _judge(
        _event("begin", 1), _event("end", 2), _event("recorded", 2.1, detail="result"), _event("begin", 3, pid=2)
    )
    assert verdict.recorded_again == ["pay"]
    assert not verdict.held


def test_a_call_in_flight_is_safe_with_a_key_and_in_doubt_without() -> None:
    calls = (_event("begin", 1), _event("end", 2), _event("begin", 3, pid=2), _event("end", 4, pid=2))
    without = _judge(*calls)
    assert (without.doubled, without.held) == (["pay"], False)
    with_key = _judge(*calls, _event("read", 3.5, pid=2))
    assert (with_key.keyed, with_key.doubled, with_key.held) == (["pay"], [], True)


def test_a_call_that_was_never_made_is_not_doubled() -> None:
    calls = (_event("begin", 1), _event("held", 2, detail="begin"), _event("begin", 3, pid=2), _event("end", 4, pid=2))
    verdict = _judge(*calls, unmade="k")
    assert (verdict.repeated, verdict.held) == ([], True)


def test_a_call_that_hung_and_timed_out_is_made_once() -> None:
    verdict = _judge(
        _event("begin", 1), _event("hung", 1.1), _event("failed", 2, detail="StepTimeoutError"),
        _event("begin", 3), _event("end", 4), _event("recorded", 5, detail="result"),
    )  # fmt: skip
    assert (verdict.repeated, verdict.held) == ([], True)


def test_recovery_is_the_time_to_the_next_step_by_somebody_awake() -> None:
    events = (_event("begin", 1), _event("begin", 3, key="l", pid=9), _event("begin", 4, key="m", pid=2))
    assert _judge(*events, at=2.5, stale=9).seconds == 1.5


def test_what_varies_by_itself_is_not_compared() -> None:
    calm = [{"id": "a", "said": ["x", "y"]}, {"id": "b", "said": ["x", "y"]}]
    assert differences(calm, {"id": "c", "said": ["x", "y"]}) == []
    assert differences(calm, {"id": "c", "said": ["x", "z"]}) == ['said[1] is "z", undisturbed "y"']
    assert differences(calm, {"id": "c", "said": ["x"]}) == ['said[1] is absent, undisturbed "y"']
