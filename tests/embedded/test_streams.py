"""Who gets which work item."""

from __future__ import annotations

import pytest

from outlast.embedded import streams
from outlast.embedded.streams import Streams, WorkerStream
from outlast.embedded.workflows import Task, Turn


def _turn(token: str) -> Turn:
    return Turn(token, 1, "app", token, 0, 0, [], [], None)


def test_work_goes_round_but_not_to_a_worker_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [WorkerStream(keeps_history=True) for _ in range(2)]
    connected = Streams()
    for stream in both:
        connected.add(stream)
    assert {connected.assign(Task(f"t{number}", number, b"")) for number in range(2)} == set(both)

    frozen = connected.assign(_turn("a"))
    monkeypatch.setattr(streams, "_SLOW_SECONDS", 0.0)
    others = {connected.assign(Task(f"u{number}", number, b"")) for number in range(4)}
    assert others == set(both) - {frozen}

    # Awake again, it answers, and has its part again.
    assert connected.take_turn("a")
    assert connected.assign(Task("v", 1, b"")) is frozen


def test_a_worker_frozen_in_an_activity_does_not_get_the_one_that_overtakes_it() -> None:
    """It may have no turn to be found by: a run overtaken has one turn and one activity, and turns may go elsewhere."""
    both, connected = [WorkerStream(keeps_history=True) for _ in range(2)], Streams()
    for stream in both:
        connected.add(stream)
    for first in range(4):
        frozen = connected.assign(Task(f"stuck{first}", 1, b""))
        turned = connected.assign(_turn(f"turn{first}"))
        assert connected.take_turn(f"turn{first}")
        assert turned
        overtakes = connected.assign(Task(f"overtakes{first}", 1, b""))
        assert overtakes is not frozen
        assert connected.take_task(f"stuck{first}")
        assert connected.take_task(f"overtakes{first}")


def test_the_only_worker_gets_work_however_slow() -> None:
    alone, connected = WorkerStream(keeps_history=True), Streams()
    connected.add(alone)
    assert connected.assign(_turn("a")) is alone
    assert connected.assign(_turn("b")) is alone
