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
    assert {connected.assign(Task(f"v{number}", number, b"")) for number in range(2)} == set(both)


def test_the_only_worker_gets_work_however_slow() -> None:
    alone, connected = WorkerStream(keeps_history=True), Streams()
    connected.add(alone)
    assert connected.assign(_turn("a")) is alone
    assert connected.assign(_turn("b")) is alone
