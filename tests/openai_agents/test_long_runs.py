"""A long run is carried on from its newest checkpoint, with the same result; its checkpoints do not grow with it."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from outlast.adapters.openai_agents.checkpoints import difference, patched
from tests.acceptance.scenario import Stage, died
from tests.openai_agents.roles import MODEL_URL

TURNS = 44


@pytest.mark.kill
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["run", "streamed"])
def test_a_long_run_is_carried_on_from_a_checkpoint(stage: Stage, mode: str) -> None:
    names = {"run_id": f"run-{secrets.token_hex(4)}", "turns": TURNS, "mode": mode}
    with stage.scenario("undisturbed") as scenario:
        scenario.env[MODEL_URL] = "http://127.0.0.1:9/v1"
        scenario.fork("tests.openai_agents.roles.long", again=False, **names).check(120)
        expected = scenario.json("result")
        sizes = scenario.json("checkpoints")
        told = scenario.json("told") if mode == "streamed" else []
    assert len(expected["responses"]) == TURNS + 1
    assert len(sizes) > 5
    assert max(sizes[1:]) < 1.2 * min(sizes[1:]), f"checkpoints grow: {sizes}"
    with stage.scenario("killed") as scenario:
        scenario.env[MODEL_URL] = "http://127.0.0.1:9/v1"
        for turn in (3, 23, 24, TURNS):
            # Twice from the same checkpoint, and once from the beginning.
            scenario.at("kill_at", f"node turn {turn} before")
            first = scenario.fork("tests.openai_agents.roles.long", again=False, **names)
            first.wait()
            assert died(first)
        scenario.fork("tests.openai_agents.roles.long", again=True, **names).check(120)
        assert scenario.json("result") == expected
        assert scenario.effects == Counter({"tick": TURNS, **{f"turn {turn}": 1 for turn in range(TURNS + 1)}})
        if mode == "streamed":
            assert Counter(scenario.json("told")) == Counter(told)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"a": 1, "b": [1]}, {"a": 2, "b": [1, 2], "c": {"=": 1}}),
        ({"a": [1, 2]}, {"a": [2]}),
        ({"a": None, "b": 1}, {"a": 0}),
        ({"a": {"~": [1]}, "n": 1}, {"a": {"~": [1, 2]}, "n": True}),
        ({"a": []}, {"a": [1]}),
    ],
)
def test_what_has_changed_makes_the_new_of_the_old(old: Any, new: Any) -> None:
    change = json.loads(json.dumps(difference(old, new)))
    assert json.dumps(patched(old, change), sort_keys=True) == json.dumps(new, sort_keys=True)


def test_nothing_of_the_sdk_is_patched_by_an_import(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "from agents.run_internal import run_loop; from agents.run import get_default_agent_runner as get\n"
        "before = run_loop.get_model, type(get())\n"
        "import outlast.adapters.openai_agents\n"
        "assert before == (run_loop.get_model, type(get()))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2], timeout=60)
