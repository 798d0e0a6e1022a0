"""A run that fails for good undoes its steps, each once, the last one first, even when killed while it does so."""

from __future__ import annotations

import functools
import secrets
from typing import Any

import pytest

from tests.acceptance.scenario import Scenario, Stage, died
from tests.acceptance.world import World, around

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.timeout(300)]

DONE = ["train", "hotel", "guide"]
UNDONE = ["undo-guide", "undo-hotel", "undo-train"]
ORDER = {"agent": "journey", "is_async": False}


def _names() -> dict[str, str]:
    unique = secrets.token_hex(4)
    return {"thread": f"thread-{unique}", "run_id": f"run-{unique}"}


def _booked(world: World) -> list[str]:
    return [call["request"]["tool"] for call in world.ledger.bookings()]


def _killed_at(point: str, scenario: Scenario) -> None:
    names = _names()
    scenario.at("kill_at", point)
    with around(scenario) as world:
        first = scenario.fork("call_roles.submit", **ORDER, **names)
        first.wait()
        if not died(first):
            # The store is written in another order each time: then the run was undisturbed.
            assert first.returncode == 0, first.tail()
            assert not point.startswith("tool")
            assert _booked(world) == [*DONE, *UNDONE]
            return
        begun = {point.removesuffix(" before") for point in scenario.trace if point.endswith(" before")}
        scenario.fork("call_roles.recover", **ORDER, **names).check(60)
        recorded: Any = scenario.json("recorded")
        assert _booked(world) == [*DONE, *UNDONE]
        for key, count in world.tool_calls.items():
            in_flight = f"tool {world.tool_of(key)}" in begun and key not in recorded["tool"] + recorded["compensation"]
            assert count <= (2 if in_flight else 1), world.ledger.calls()
    result = scenario.json("result")
    assert result["status"] == "failed"
    assert "no money" in result["out"]


def test_compensation_survives_a_kill_at_every_point(stage: Stage) -> None:
    with stage.scenario("undisturbed") as scenario, around(scenario) as world:
        scenario.fork("call_roles.submit", **ORDER, **_names()).check()
        assert _booked(world) == [*DONE, *UNDONE]
        assert scenario.json("result")["out"] == "no money"
        trace = list(dict.fromkeys(scenario.trace))
    # From the last booking on: the failure, the decision to undo, each undoing and its record, the end.
    points = [
        point for point in trace[trace.index("tool guide after") :] if point.endswith(("before", "during", "after"))
    ]
    assert {f"tool {name} during" for name in UNDONE} <= set(points)
    # Heartbeats are no part of the story.
    points = [point for point in points if point.startswith("tool") or point.split()[1] in ("j", "r", "t")]
    wrong = stage.play_all({point.replace(" ", "-"): functools.partial(_killed_at, point) for point in points})
    report = "\n\n".join(f"=== killed at {name}: {what}" for name, what in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(points)} kills: {', '.join(wrong)}\n{report}"
