"""A tool in flight at a kill, a budget used up, a long wait: the run waits, holding nothing, and goes on elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from outlast.testing import Fault
from tests.acceptance.calls import EMPTY, TRIP
from tests.acceptance.scenario import Scenario, Stage, died
from tests.acceptance.world import World, around
from tests.acceptance.zygote import Forked

pytestmark = [pytest.mark.acceptance, pytest.mark.kill, pytest.mark.timeout(120)]


@pytest.fixture
def scenario(stage: Stage) -> Iterator[Scenario]:
    with stage.scenario("doubt") as playing:
        yield playing


@pytest.fixture
def world(scenario: Scenario) -> Iterator[World]:
    with around(scenario) as there:
        scenario.fork("client")
        yield there


@pytest.fixture
def run_id() -> str:
    return secrets.token_hex(4)


def _worker(scenario: Scenario, *agents: str, **env: str) -> Forked:
    worker = scenario.fork("serve", env=env, agent_names=list(agents))
    worker.wait_for_line("serving")
    return worker


def _start(scenario: Scenario, agent: str, run_id: str, input: Any) -> None:
    assert "status" in scenario.ask("start", agent, input=input, thread=run_id, run_id=run_id)


def _killed_while_booking(scenario: Scenario, agent: str, run_id: str, point: str) -> None:
    """Kill the worker of a run at a point; another one comes."""
    worker = _worker(scenario, agent)
    scenario.at("kill_at", point)
    _start(scenario, agent, run_id, TRIP)
    worker.wait()
    assert died(worker)
    _worker(scenario, agent)


def _said_of_booking(out: dict[str, Any]) -> list[Any]:
    """What the model was told of the tool `book`."""
    calls = [message[2][0] for message in out["messages"] if message[0] == "tool"]
    assert len(set(calls)) == len(calls) == 3
    return [message[1] for message in out["messages"] if message[0] == "tool" and "book" in message[1]]


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("give", ["done", "again", "fail"])
def test_a_person_decides_on_a_call_in_doubt(
    scenario: Scenario, world: World, run_id: str, give: str, when: str
) -> None:
    agent = "careful-ask"
    _killed_while_booking(scenario, agent, run_id, f"tool book {when}")
    waiting = scenario.ask("result", agent, run_id=run_id)
    assert "__interrupt__" in waiting["out"], waiting
    question = scenario.ask("question", agent, run_id=run_id)["question"]
    assert (question["kind"], question["step"]) == ("in_doubt", "book")
    refused = scenario.ask("answer", agent, run_id=run_id, give="allow", more={"tokens": 1})
    assert refused["error"] == "RunStateError"
    given = {"done": ["booked by telephone"], "again": [], "fail": ["nobody knows"]}[give]
    assert scenario.ask("answer", agent, run_id=run_id, give=give, args=given) == {}
    ended = scenario.ask("result", agent, run_id=run_id)
    if give == "fail":
        assert ended["error"] == "RunFailedError"
        assert "StepInDoubtError" in ended["message"]
        assert "nobody knows" in ended["message"]
    else:
        said = _said_of_booking(ended["out"])
        assert said == [given[0] if given else "book of Rome"]
    # It was made again only if a person said so, and then with its own key; the other tools do not matter.
    in_flight = when != "before"
    keys = world.keys_of("book")
    assert len(keys) == in_flight + (give == "again")
    assert len(set(keys)) <= 1
    assert world.booked["search"] == world.booked["price"] == world.model_calls["trip"] == 1


def test_an_answer_holds_when_the_worker_is_killed_again(scenario: Scenario, world: World, run_id: str) -> None:
    """The call is made again as a person said, and the worker is lost in the middle of that: it is in doubt anew."""
    agent = "careful-ask"
    _killed_while_booking(scenario, agent, run_id, "tool book during")
    assert "__interrupt__" in scenario.ask("result", agent, run_id=run_id)["out"]
    first = scenario.ask("question", agent, run_id=run_id)["question"]
    scenario.at("kill_at", "tool book after")
    worker = scenario.processes[-1]
    assert scenario.ask("answer", agent, run_id=run_id, give="again") == {}
    worker.wait()
    _worker(scenario, agent)
    assert "__interrupt__" in scenario.ask("result", agent, run_id=run_id)["out"]
    second = scenario.ask("question", agent, run_id=run_id)["question"]
    assert second["id"] != first["id"]
    assert scenario.ask("answer", agent, run_id=run_id, give="done", args=["booked twice asked"]) == {}
    assert _said_of_booking(scenario.ask("result", agent, run_id=run_id)["out"]) == ["booked twice asked"]
    assert world.booked == {"search": 1, "price": 1, "book": 1}


@pytest.mark.parametrize(("policy", "ends"), [("fail", "RunFailedError"), ("retry", None)])
def test_the_policy_decides_on_a_call_in_doubt(
    scenario: Scenario, world: World, run_id: str, policy: str, ends: str | None
) -> None:
    agent = f"careful-{policy}"
    _killed_while_booking(scenario, agent, run_id, "tool book during")
    ended = scenario.ask("result", agent, run_id=run_id)
    assert ended.get("error") == ends
    assert world.booked["book"] == 1
    assert len(world.keys_of("book")) == (1 if ends else 2)
    assert ends is None or "StepInDoubtError" in ended["message"]


def test_a_budget_counts_on_across_kills(scenario: Scenario, world: World, run_id: str) -> None:
    agent = "thrifty-3"
    worker = _worker(scenario, agent)
    scenario.at("kill_at", "model part 1 during")
    _start(scenario, agent, run_id, EMPTY)
    worker.wait()
    worker = _worker(scenario, agent)
    assert "__interrupt__" in scenario.ask("result", agent, run_id=run_id)["out"]
    question = scenario.ask("question", agent, run_id=run_id)["question"]
    assert (question["kind"], question["step"]) == ("budget", "scripted")
    assert world.model_calls == {"part 0": 1, "part 1": 2, "part 2": 1}
    # Killed while it waits, and again after it was allowed more: that is not forgotten, and not given twice.
    worker.kill()
    worker = _worker(scenario, agent)
    scenario.at("kill_at", "model part 4 during")
    assert scenario.ask("answer", agent, run_id=run_id, give="allow", more={"model_calls": 2}) == {}
    worker.wait()
    _worker(scenario, agent)
    assert "__interrupt__" in scenario.ask("result", agent, run_id=run_id)["out"]
    again = scenario.ask("question", agent, run_id=run_id)["question"]
    assert again["id"] != question["id"]
    assert "5 of 5 used" in again["text"]
    assert scenario.ask("answer", agent, run_id=run_id, give="allow", more={"model_calls": 2}) == {}
    out = scenario.ask("result", agent, run_id=run_id)["out"]
    assert out["log"] == [f"part {number}!" for number in range(6)]
    assert world.model_calls == {f"part {number}": 1 for number in range(6)} | {"part 1": 2, "part 4": 2}


def test_a_long_wait_holds_no_worker_and_outlives_it(scenario: Scenario, world: World, run_id: str) -> None:
    """Rate limited: the run sleeps on a durable timer. The worker, which has one place, serves others; then it dies."""
    pause = 5.0
    agent = "patient"
    one_place = {"OUTLAST_CONCURRENCY": "1"}
    worker = _worker(scenario, agent, "line-ab", **one_place)
    world.model.fail(Fault(status=429, retry_after=pause, at_call=1))
    _start(scenario, agent, run_id, EMPTY)
    scenario.until(
        lambda: scenario.ask("status", agent, run_id=run_id)["status"] == "sleeping", "the run to go to sleep"
    )
    other = f"{run_id}-other"
    _start(scenario, "line-ab", other, {"log": [other]})
    assert scenario.ask("result", "line-ab", run_id=other)["out"]["log"] == [other, "a", "b"]
    assert scenario.ask("status", agent, run_id=run_id)["status"] == "sleeping"
    worker.kill()
    _worker(scenario, agent, "line-ab", **one_place)
    out = scenario.ask("result", agent, run_id=run_id)["out"]
    assert out["log"] == [f"part {number}!" for number in range(3)]
    assert world.model_calls == {"part 0": 1, "part 1": 2, "part 2": 1}
    limited, again = (call["time"] for call in world.model.requests()[1:3])
    assert again - limited >= pause
