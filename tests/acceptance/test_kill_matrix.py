"""A run killed by SIGKILL at every boundary goes on by itself and does nothing twice that was committed."""

from __future__ import annotations

import functools
import secrets
from typing import Any

import pytest

from tests.acceptance.agents import NODE_OF
from tests.acceptance.roles import INPUT
from tests.acceptance.scenario import Scenario, Stage, died

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.timeout(300)]

EFFECTS = ["plan", "left", "right", "inner_first", "inner_second", "ask", "model", "search", "price", "book", "finish"]
TOGETHER = [{"left", "right"}, {"search", "price", "book"}]
"""Effects of one superstep: what of it is in flight at a kill is in doubt."""


def _names() -> dict[str, str]:
    unique = secrets.token_hex(4)
    return {"thread": f"thread-{unique}", "run_id": f"run-{unique}"}


def _undisturbed(stage: Stage, is_async: bool) -> tuple[Any, list[str]]:
    """What an undisturbed run ends with, and the points it goes through."""
    with stage.scenario("undisturbed") as scenario:
        scenario.fork("submit_trip", is_async=is_async, **_names()).check()
        assert scenario.effects == dict.fromkeys(EFFECTS, 1)
        result = scenario.json("result")
        assert result["status"] == "done"
        return result, scenario.trace


def _killed_at(point: str, expected: Any, is_async: bool, scenario: Scenario) -> None:
    """Play the story of one kill."""
    names = _names()
    scenario.at("kill_at", point)
    first = scenario.fork("submit_trip", is_async=is_async, **names)
    first.wait()
    if not died(first):
        # Background work did not come to this point this time: then the run was undisturbed.
        assert first.returncode == 0
        assert (scenario.folder / "kill_at").exists()
        assert not point.startswith("node")
    else:
        accepted = "Create r #1 after" in scenario.trace
        answered = "Swap r #3 after" in scenario.trace
        before = scenario.effects
        second = scenario.fork("recover_trip", is_async=is_async, **names)
        second.check(60)
        assert not (accepted and "resubmitted" in scenario.trace), "an accepted run was not there"
        assert not (answered and "answered" in scenario.trace), "a given answer was not there"
        in_flight = set(scenario.json("pending")) if accepted else set()
        for name, count in scenario.effects.items():
            in_doubt = NODE_OF.get(name, name) in in_flight
            limit = before[name] + 1 if in_doubt else max(1, before[name])
            assert count <= limit, f"{name} ran {count} times; in flight at the kill: {sorted(in_flight)}"
            assert count <= 2
    assert set(scenario.effects) == set(EFFECTS)
    assert scenario.json("result") == expected


@pytest.mark.parametrize("is_async", [False, True], ids=["invoke", "ainvoke"])
def test_a_run_survives_a_kill_at_every_boundary(stage: Stage, is_async: bool) -> None:
    expected, trace = _undisturbed(stage, is_async)
    points = [point for point in dict.fromkeys(trace) if point.endswith((" before", " after"))]
    assert len(points) > 80, points
    if is_async:
        # The store's part is the same code: of its boundaries a third will do.
        points = [point for number, point in enumerate(points) if point.startswith("node") or number % 3 == 0]
    stories = {point.replace(" ", "-"): functools.partial(_killed_at, point, expected, is_async) for point in points}
    wrong = stage.play_all(stories)
    report = "\n\n".join(f"=== killed at {name}: {what}" for name, what in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(points)} kills: {', '.join(wrong)}\n{report}"


def test_another_replica_takes_over(replicated: Stage) -> None:
    """The worker that runs a node is killed in the node; nobody restarts it; the other replica ends the run."""
    expected, _ = _undisturbed(replicated, False)
    with replicated.scenario("replicas") as scenario:
        scenario.fork("client")
        workers = {0: scenario.fork("serve", 0, agent_names=["trip"])}
        for name in EFFECTS:
            for when in ("before", "after"):
                for replica in {0, 1} - workers.keys():
                    workers[replica] = scenario.fork("serve", replica, agent_names=["trip"])
                    workers[replica].wait_for_line("serving")
                names = _names()
                seen = scenario.effects
                point = f"node {name} {when}"
                scenario.at("kill_at", point)
                scenario.ask("start", "trip", input=INPUT, **names)
                asked = scenario.ask("result", "trip", run_id=names["run_id"])
                assert "__interrupt__" in asked["out"], asked
                scenario.ask("resume", "trip", run_id=names["run_id"], value="yes")
                assert scenario.ask("result", "trip", run_id=names["run_id"])["out"] == expected["out"]
                assert scenario.ask("history", "trip", thread=names["thread"])["history"] == expected["history"]
                dead = [replica for replica, worker in workers.items() if died(worker)]
                assert len(dead) == 1, f"{point}: {dead}"
                del workers[dead[0]]
                again = next((others for others in TOGETHER if name in others), {name})
                done = scenario.effects - seen
                assert set(done) == set(EFFECTS)
                assert not {each for each, count in done.items() if count > (2 if each in again else 1)}, (point, done)


def test_kills_do_not_restart_the_recursion_limit(stage: Stage) -> None:
    """An endless loop that is killed again and again still ends where LangGraph would have ended it."""
    with stage.scenario("endless") as scenario:
        names = _names()
        scenario.fork("client")
        scenario.at("kill_at", "node round-3 before")
        worker = scenario.fork("serve", agent_names=["endless"])
        worker.wait_for_line("serving")
        scenario.ask("start", "endless", input=INPUT, config={"recursion_limit": 10}, **names)
        for number in (6, 9):
            worker.wait()
            scenario.at("kill_at", f"node round-{number} after")
            worker = scenario.fork("serve", agent_names=["endless"])
        worker.wait()
        scenario.fork("serve", agent_names=["endless"])
        failure = scenario.ask("result", "endless", run_id=names["run_id"])
        assert failure["error"] == "RunFailedError"
        assert "GraphRecursionError" in failure["message"]
        again = {"round-6": 2, "round-9": 2}
        assert scenario.effects == {f"round-{number}": again.get(f"round-{number}", 1) for number in range(1, 11)}
