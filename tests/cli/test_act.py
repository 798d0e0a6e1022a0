"""`outlast retry`, `outlast answer`, `outlast cancel`: a person at work on a run, from a process without its agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.harness.procs import Child, wait_for

Start = Callable[..., Child]


def status(cli: Cli, run_id: str) -> str:
    found: str = cli.json("show", run_id)["status"]
    return found


@pytest.mark.acceptance
def test_a_failed_run_goes_on_where_it_failed_and_asks_before_it_spends_more(
    cli: Cli, start: Start, tmp_path: Path
) -> None:
    effects = tmp_path / "steps.log"
    start("worker", "sample:paying")
    cli.submit("paying/r-1/buy", wait=False)
    wait_for(lambda: status(cli, "r-1") == "failed", 30, "the run to fail")

    assert [run["run_id"] for run in cli.json("runs", "--failed")] == ["r-1"]
    (step,) = cli.json("show", "r-1")["steps"]
    assert (step["type"], step["name"], step["outcome"], step["request"]) == (
        "function",
        "charge",
        "result",
        "charge(7)",
    )
    assert "ConnectionError: the shop is closed" in cli("show", "r-1").stdout

    (tmp_path / "open").touch()
    retried = cli("retry", "r-1")
    assert retried.returncode == 0, retried.stderr
    wait_for(lambda: status(cli, "r-1") == "waiting", 30, "the run to ask")
    question = cli.json("show", "r-1")["question"]
    assert (question["kind"], question["step"]) == ("budget", "look")
    assert "tool_calls: 1 of 1 used" in question["text"]
    assert "outlast answer r-1" in cli("show", "r-1").stdout

    refused = cli("answer", "r-1", "--again")
    assert refused.returncode == 1
    assert "allow(...)" in refused.stderr
    answered = cli("answer", "r-1", "--allow", "tool_calls=1")
    assert answered.returncode == 0, answered.stderr
    wait_for(lambda: status(cli, "r-1") == "done", 30, "the run")
    assert cli.json("show", "r-1")["result"]["notes"] == [{"text": text} for text in ("charged 7", "A", "B")]
    assert effects.read_text().splitlines() == ["charge 7", "look a", "look b"]


def test_what_cannot_be_done_is_said(cli: Cli) -> None:
    cli.submit("sample/r-done/work")

    assert "it is done; submit a new run" in cli("retry", "r-done").stderr
    assert "no run 'r-nothing'" in cli("retry", "r-nothing").stderr
    assert "asks nothing" in cli("answer", "r-done", "--again").stderr
    assert cli("answer", "r-done", "--again", "--fail", "no").returncode == 2
    assert cli("answer", "r-done", "--allow", "fun=1").returncode == 2
    assert "takes JSON" in cli("answer", "r-done", "--done", "{").stderr


def test_a_waiting_run_is_cancelled(cli: Cli, start: Start) -> None:
    start("worker", "sample:agent")
    cli.submit("sample/r-1/ask", wait=False)
    wait_for(lambda: status(cli, "r-1") == "waiting", 30, "the run to ask")

    assert cli("cancel", "r-1").returncode == 0
    wait_for(lambda: status(cli, "r-1") == "cancelled", 30, "the run to end")
