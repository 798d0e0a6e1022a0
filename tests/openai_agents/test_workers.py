"""Runs that are carried on by other processes than their caller's."""

from __future__ import annotations

import json
import secrets

import pytest

from tests.acceptance.scenario import Stage, died
from tests.openai_agents.roles import MODEL_URL

pytestmark = [pytest.mark.kill, pytest.mark.timeout(300)]


def test_a_worker_that_is_asked_to_stop_leaves_its_run_to_another(stage: Stage) -> None:
    """SIGTERM: the run stops before its next model call, and goes on in another process; nothing is done twice."""
    names = {"run_id": f"run-{secrets.token_hex(4)}", "turns": 6}
    with stage.scenario("drained") as scenario:
        scenario.env[MODEL_URL] = "http://127.0.0.1:9/v1"
        scenario.at("hold_at", "node turn 3 after")
        first = scenario.fork("tests.openai_agents.roles.serve", turns=6)
        first.wait_for_line("serving")
        scenario.fork("tests.openai_agents.roles.start", **names).check()
        scenario.until_traced("held")
        first.terminate()
        scenario.until_traced("stopping")
        scenario.go()
        first.wait()
        assert first.returncode == 0, first.tail()
        done = scenario.effects
        assert done["turn 3"] == 1
        assert done["turn 4"] == 0
        second = scenario.fork("tests.openai_agents.roles.serve", turns=6)
        second.wait_for_line("serving")
        scenario.until(lambda: scenario.effects["turn 6"], "the run to end")
        assert set(scenario.effects.values()) == {1, 6}
        scenario.fork("tests.openai_agents.roles.look", **names).check()
        assert scenario.json("looked")["output"] == "done"


def test_an_approval_comes_from_another_process_after_a_kill(stage: Stage) -> None:
    names = {"run_id": f"run-{secrets.token_hex(4)}"}
    with stage.scenario("approved") as scenario:
        scenario.env[MODEL_URL] = "http://127.0.0.1:9/v1"
        scenario.fork("tests.openai_agents.roles.ask", **names).check()
        asked = json.loads((scenario.folder / "asked").read_text())
        assert asked == [["ask-1", "wipe"], ["ask-2", "wipe"]]
        scenario.at("kill_at", "node wipe before")
        first = scenario.fork("tests.openai_agents.roles.answer", **names)
        first.wait()
        assert died(first)
        scenario.fork("tests.openai_agents.roles.answered", **names).check()
        assert scenario.json("outputs") == ["not this one", "wiped"]
        assert scenario.effects["wipe"] == 1
