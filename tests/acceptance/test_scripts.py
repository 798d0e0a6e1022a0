"""Ordinary scripts: the agent is defined in `__main__`, in a closure, or by a decorated function."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.procs import Child, count_lines

pytestmark = [pytest.mark.acceptance, pytest.mark.kill]

COMMON = """
import os, pathlib, signal, sys, uuid
from typing import TypedDict
from langgraph.graph import START, StateGraph
from outlast import durable

folder = pathlib.Path(sys.argv[1])

class State(TypedDict, total=False):
    value: int

def effect(name):
    with (folder / "effects").open("a") as out:
        print(name, file=out)

def first(state: State):
    effect("first")
    return {"value": state["value"] + 1}

def second(state: State):
    effect("second")
    if not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": state["value"] * 2}

def build():
    builder = StateGraph(State).add_node("first", first).add_node("second", second)
    return builder.add_edge(START, "first").add_edge("first", "second").compile()
"""

IN_MAIN = """
agent = durable(build(), name=sys.argv[2])
"""

IN_A_CLOSURE = """
def closure():
    offset = 0
    builder = StateGraph(State)
    builder.add_node("first", lambda state: first({"value": state["value"] + offset}))
    builder.add_node("second", lambda state: second(state))
    return durable(builder.add_edge(START, "first").add_edge("first", "second").compile(), name=sys.argv[2])
agent = closure()
"""

DECORATED = """
@durable(name=sys.argv[2])
def agent():
    return build()
"""

LAST = """
config = {"configurable": {"thread_id": sys.argv[2]}, "run_id": sys.argv[2]}
if sys.argv[3] == "submit":
    agent.invoke({"value": 1}, config)
else:
    print("result", agent.get_run(sys.argv[2]).result(30))
"""


@pytest.mark.parametrize("definition", [IN_MAIN, IN_A_CLOSURE, DECORATED], ids=["main", "closure", "decorated"])
def test_a_script_run_again_finds_its_run_by_the_agents_name(
    definition: str, tmp_path: Path, sidecar_env: dict[str, str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMMON + definition + LAST)
    start: Callable[[str], Child] = lambda what: Child.python(  # noqa: E731
        script, tmp_path, "the-run", what, log=tmp_path / "log", env=sidecar_env, cwd=tmp_path
    )
    assert start("submit").wait() == -signal.SIGKILL
    again = start("attach")
    assert again.wait_for_line(r"^result (.+)$")[1] == "{'value': 4}"
    again.check()
    effects = tmp_path / "effects"
    assert [count_lines(effects, name) for name in ("first", "second")] == [1, 2]
