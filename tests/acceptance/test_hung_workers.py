"""A worker that lives and beats, but is stuck in user code, is overtaken by a new attempt."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from tests.acceptance.calls import TRIP
from tests.acceptance.roles import INPUT
from tests.acceptance.scenario import Scenario, Stage
from tests.acceptance.world import World, around
from tests.acceptance.zygote import Forked

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

QUICK = {"OUTLAST_HEARTBEAT_TIMEOUT": "2"}


@pytest.fixture
def scenario(stage: Stage) -> Iterator[Scenario]:
    with stage.scenario("hung") as playing:
        yield playing


@pytest.fixture
def world(scenario: Scenario) -> Iterator[World]:
    with around(scenario) as there:
        scenario.fork("client")
        yield there
        scenario.go()


def _worker(scenario: Scenario, *agents: str, is_async: bool = False) -> Forked:
    worker = scenario.fork("serve", env=QUICK, agent_names=list(agents), is_async=is_async)
    worker.wait_for_line("serving")
    return worker


def test_a_blocked_event_loop_is_noticed_and_the_run_goes_on_elsewhere(scenario: Scenario, world: World) -> None:
    """An async node that never gives its event loop back: neither does its attempt, nor any other on that loop."""
    unique, beside = secrets.token_hex(4), secrets.token_hex(4)
    worker = _worker(scenario, "trip", is_async=True)
    scenario.at("hold_at", "node left before")
    for name in (unique, beside):
        scenario.ask("start", "trip", input=INPUT, thread=name, run_id=name, is_async=True)
    scenario.until_traced("held")
    for name in (unique, beside):
        assert "__interrupt__" in scenario.ask("result", "trip", run_id=name)["out"]
    before = scenario.ask("history", "trip", thread=unique), scenario.ask("history", "trip", thread=beside)
    # Given back at last, the old attempt commits nothing.
    scenario.go()
    # The other run's old attempt may come to its node, too, once the loop turns again.
    scenario.until(lambda: scenario.effects["left"] >= 3, "the old attempt to go on")
    assert before == (
        scenario.ask("history", "trip", thread=unique),
        scenario.ask("history", "trip", thread=beside),
    )
    for name in (unique, beside):
        scenario.ask("resume", "trip", run_id=name, value="yes")
        assert scenario.ask("result", "trip", run_id=name)["out"]["log"][-1] == "booked Rome"
    assert scenario.effects["finish"] == 2
    assert worker.alive
    assert not world.model_calls


@pytest.mark.parametrize("again", ["call", "run"])
def test_a_sync_tool_that_never_returns_is_given_up(scenario: Scenario, world: World, again: str) -> None:
    """Its time is up: the call, or the run, is tried again; when it returns after all, it changes nothing."""
    agent, unique = f"hasty-{again}", secrets.token_hex(4)
    worker = _worker(scenario, agent)
    scenario.at("hold_at", "tool price before")
    scenario.ask("start", agent, input=TRIP, thread=unique, run_id=unique)
    scenario.until_traced("held")
    out = scenario.ask("result", agent, run_id=unique)
    assert "out" in out, out
    state = scenario.ask("history", agent, thread=unique)
    scenario.go()
    scenario.until(lambda: len(world.keys_of("price")) == 2, "the first call to go on")
    assert len(set(world.keys_of("price"))) == 1
    assert world.booked == {"search": 1, "price": 1, "book": 1}
    assert len(world.keys_of("search")) == len(world.keys_of("book")) == 1
    assert world.model_calls == {"trip": 1, "trip after tool": 1}
    assert scenario.ask("history", agent, thread=unique) == state
    assert worker.alive


def test_an_async_tool_that_blocks_its_event_loop_is_overtaken(scenario: Scenario, world: World) -> None:
    """Its timeout cannot be served, for the loop does not turn: another attempt, on another loop, ends the run."""
    agent, unique = "hasty-call", secrets.token_hex(4)
    worker = _worker(scenario, agent)
    scenario.at("hold_at", "tool price before")
    scenario.ask("start", agent, input=TRIP, thread=unique, run_id=unique, is_async=True)
    scenario.until_traced("held")
    out = scenario.ask("result", agent, run_id=unique)
    assert "out" in out, out
    assert world.model_calls == {"trip": 1, "trip after tool": 1}
    assert world.booked == {"search": 1, "price": 1, "book": 1}
    scenario.go()
    assert worker.alive
