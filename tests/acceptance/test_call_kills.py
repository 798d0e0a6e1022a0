"""A run killed by SIGKILL at every model call and tool call makes no recorded call again."""

from __future__ import annotations

import functools
import secrets
from typing import Any

import pytest

from tests.acceptance.scenario import Scenario, Stage, died
from tests.acceptance.world import World, around

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(900)]

FAN = ("outline", "check", "polish")
MODEL_CALLS = {
    "trio": dict.fromkeys(["trip", "trip after tool"], 1),
    "fan": dict.fromkeys(FAN, 1),
    "nest": dict.fromkeys([f"{where} {what}" for where in ("in", "out") for what in FAN], 1),
}
BOOKED = {
    "trio": {"search": 1, "price": 1, "book": 1},
    "fan": {"search": 1, "price": 1, "book": 2},
    "nest": {"search": 2, "price": 2, "book": 4},
}
WHEN = ("before", "during", "after")


def _undisturbed(stage: Stage, order: dict[str, Any]) -> tuple[Any, list[str]]:
    """What an undisturbed run ends with, and the points it goes through."""
    with stage.scenario("undisturbed") as scenario, around(scenario) as world:
        scenario.fork("call_roles.submit", **order, **_names()).check()
        assert world.model_calls == MODEL_CALLS[order["agent"]]
        assert world.booked == BOOKED[order["agent"]]
        return scenario.json("result"), scenario.trace


def _names() -> dict[str, str]:
    unique = secrets.token_hex(4)
    return {"thread": f"thread-{unique}", "run_id": f"run-{unique}"}


def _killed_at(point: str, expected: Any, order: dict[str, Any], scenario: Scenario) -> None:
    """Play the story of one kill."""
    names = _names()
    scenario.at("kill_at", point)
    with around(scenario) as world:
        first = scenario.fork("call_roles.submit", **order, **names)
        first.wait()
        if not died(first):
            # Calls at once may be recorded by fewer commits than they were the first time.
            assert first.returncode == 0, first.tail()
            assert point.startswith(("Swap", "Create", "Save")), f"{point} was not reached"
        else:
            begun = {point.removesuffix(" before") for point in scenario.trace if point.endswith(" before")}
            scenario.fork("call_roles.recover", **order, **names).check(60)
            _check(world, begun, scenario.json("recorded"), order["agent"])
        assert world.booked == BOOKED[order["agent"]]
    assert scenario.json("result") == expected


def _check(world: World, begun: set[str], recorded: dict[str, list[str]], agent: str) -> None:
    """Only what had begun before the kill, and was not recorded, may have been made twice."""
    for name, count in world.model_calls.items():
        in_flight = f"model {name}" in begun and name not in recorded["model"]
        assert count <= (2 if in_flight else 1), f"model call {name} made {count} times; recorded: {recorded}"
    for key, count in world.tool_calls.items():
        in_flight = f"tool {world.tool_of(key)}" in begun and key not in recorded["tool"]
        assert count <= (2 if in_flight else 1), f"tool call {key} made {count} times; recorded: {recorded}"
    assert set(world.model_calls) == set(MODEL_CALLS[agent])
    assert len(world.tool_calls) == sum(BOOKED[agent].values()), "a call made again had another idempotency key"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("agent", ["trio", "fan"])
def test_a_run_survives_a_kill_at_every_call(stage: Stage, agent: str, is_async: bool) -> None:
    order = {"agent": agent, "is_async": is_async}
    expected, trace = _undisturbed(stage, order)
    commits = [point for point in dict.fromkeys(trace) if point.endswith(WHEN) and point.split()[1] in ("j", "t")]
    assert sum(" j " in point for point in commits) >= 6, "calls are recorded one after another in both agents"
    # Recording is the same code in async: there a third of it will do. The thread's commits have a matrix of their own.
    points = _calls(agent, trace)
    points += [point for number, point in enumerate(commits) if number % (3 if is_async else 1) == 0 and " j " in point]
    points += [point for number, point in enumerate(commits) if number % 6 == 0 and " t " in point]
    _kill(stage, points, expected, order)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_calls_in_graphs_in_graphs_survive_a_kill_at_each(stage: Stage, is_async: bool) -> None:
    order = {"agent": "nest", "is_async": is_async}
    expected, trace = _undisturbed(stage, order)
    _kill(stage, _calls("nest", trace), expected, order)


def test_a_streamed_run_survives_a_kill_at_every_call(stage: Stage) -> None:
    order = {"agent": "trio", "is_async": False, "streamed": True}
    expected, trace = _undisturbed(stage, order)
    _kill(stage, _calls("trio", trace), expected, order)


def _calls(agent: str, trace: list[str]) -> list[str]:
    """The points around the calls of an agent, all of which an undisturbed run came through."""
    calls = {f"model {name}" for name in MODEL_CALLS[agent]} | {f"tool {name}" for name in BOOKED[agent]}
    points = sorted(f"{call} {when}" for call in calls for when in WHEN)
    assert set(points) <= set(trace)
    return points


def _kill(stage: Stage, points: list[str], expected: Any, order: dict[str, Any]) -> None:
    stories = {point.replace(" ", "-"): functools.partial(_killed_at, point, expected, order) for point in points}
    wrong = stage.play_all(stories)
    report = "\n\n".join(f"=== killed at {name}: {what}" for name, what in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(points)} kills: {', '.join(wrong)}\n{report}"
