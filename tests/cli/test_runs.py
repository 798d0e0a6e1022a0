"""`outlast runs` and `outlast show`."""

from __future__ import annotations

import os
import re
from datetime import datetime

import pytest
from typer.testing import CliRunner

from outlast.cli import app
from tests.cli.conftest import Cli

RUN_KEYS = {"run_id", "agent", "thread_id", "status", "attempts", "created", "updated", "error"}


@pytest.fixture
def three(cli: Cli) -> Cli:
    """The command line on a store with a run that is done, one that failed, and one that waits."""
    cli.submit("sample/r-done/work", "sample/r-failed/fail", "sample/r-waiting/ask")
    return cli


@pytest.mark.acceptance
def test_runs_are_listed_newest_first(three: Cli) -> None:
    listed = three.json("runs")

    assert [run["run_id"] for run in listed] == ["r-waiting", "r-failed", "r-done"]
    assert [run["status"] for run in listed] == ["waiting", "failed", "done"]
    assert all(run.keys() == RUN_KEYS for run in listed)
    assert listed[1]["error"] == {"type": "ValueError", "message": "cannot [do] that"}
    assert listed[2] == {
        **listed[2],
        "agent": "sample",
        "thread_id": "thread-of-r-done",
        "attempts": 1,
        "error": None,
    }
    created = [datetime.fromisoformat(run["created"]) for run in listed]
    assert created == sorted(created, reverse=True)

    table = three("runs").stdout
    assert re.search(r"^r-failed +sample +thread-of-r-failed +failed +1 .*ValueError: cannot \[do\] that$", table, re.M)


def test_runs_are_chosen(three: Cli) -> None:
    def chosen(*options: str) -> list[str]:
        return [run["run_id"] for run in three.json("runs", *options)]

    assert chosen("--failed") == ["r-failed"]
    assert chosen("--status", "done", "--status", "waiting") == ["r-waiting", "r-done"]
    assert chosen("--thread", "thread-of-r-done") == ["r-done"]
    assert chosen("--agent", "another") == []
    assert chosen("--limit", "1") == ["r-waiting"]
    limited = three("runs", "--limit", "1")
    assert "r-failed" not in limited.stdout
    assert "--limit 3" in limited.stderr
    assert "no such runs" in three("runs", "--agent", "another").stderr


@pytest.mark.acceptance
def test_a_run_is_shown_whole(three: Cli) -> None:
    shown = three.json("show", "r-done")

    assert shown.keys() == RUN_KEYS | {
        "epoch",
        "worker",
        "workflow",
        "cancel_requested",
        "result",
        "interrupts",
        "question",
        "steps",
        "checkpoints",
    }
    assert (shown["question"], shown["steps"]) == (None, [])
    # A type of the user's own: its fields, without importing its module.
    assert shown["result"] == {"todo": "work", "notes": [{"text": "thought"}, {"text": "done"}]}
    steps = [(step["step"], step["source"], step["ran"], step["next"]) for step in shown["checkpoints"]]
    assert steps == [
        (-1, "input", [], []),
        (0, "loop", [], ["think"]),
        (1, "loop", ["think"], ["act"]),
        (2, "loop", ["act"], []),
    ]
    assert {step["run_id"] for step in shown["checkpoints"]} == {"r-done"}

    done = three("show", "r-done")
    assert re.search(r"^status +done$", done.stdout, re.M)
    assert re.search(r"^ +2 +loop +act +.* this$", done.stdout, re.M)
    assert done.stderr == ""


def test_what_a_run_waits_for_and_what_it_failed_with_is_shown(three: Cli) -> None:
    shown = three.json("show", "r-waiting")

    assert [item["value"] for item in shown["interrupts"]] == ["May I?"]
    assert re.search(r"^waits for +answer [0-9a-f]{32}: May I\?$", three("show", "r-waiting").stdout, re.M)
    assert "ValueError: cannot [do] that" in three("show", "r-failed").stdout


def test_what_was_submitted_is_shown_only_when_asked_for(cli: Cli) -> None:
    cli.submit("sample/r-1/secret", wait=False)

    assert "secret" not in cli("show", "r-1").stdout
    assert "secret" in cli("show", "r-1", "--payload").stdout
    assert cli.json("show", "r-1", "--payload")["submitted"]["input"] == {"todo": "secret"}


def test_reading_carries_nothing_on(cli: Cli) -> None:
    cli.submit("sample/r-1/work", wait=False)

    assert [run["status"] for run in cli.json("runs")] == ["accepted"]
    assert cli.json("show", "r-1")["attempts"] == 0
    assert cli.json("runs")[0]["status"] == "accepted"


def test_an_unknown_run(cli: Cli) -> None:
    cli.submit("sample/r-1/work", wait=False)
    done = cli("show", "nope", "--json")

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no run 'nope'")
    assert "`outlast runs`" in done.stderr


def test_no_store_is_created_to_look_into_it(empty: Cli) -> None:
    for command in (["runs"], ["runs", "--json"], ["show", "r-1"]):
        done = empty(*command)

        assert done.returncode == 1
        assert done.stdout == ""
        assert "does not exist" in done.stderr
        assert "OUTLAST_EMBEDDED_PATH" in done.stderr
    assert list(empty.cwd.iterdir()) == []


def test_an_unknown_store(cli: Cli) -> None:
    cli.submit("sample/r-1/work", wait=False)
    done = cli("runs", "--store", "nope")

    assert done.returncode == 1
    assert re.match(r"error: .*nope", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_sidecar_that_is_down(empty: Cli) -> None:
    done = empty("runs", DAPR_GRPC_PORT="1")

    assert done.returncode == 1
    assert done.stderr.startswith("error: no answer from the Dapr sidecar at 127.0.0.1:1")
    assert "DAPR_GRPC_PORT" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "--status", "lost"],
        ["runs", "--limit", "0"],
        ["show"],
        ["nothing"],
        ["runs", "--nothing"],
        ["worker"],
        ["worker", "sample.py:agent"],
        ["worker", "sample"],
        ["sidecar", "--grpc-port", "70000"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage:" in done.stderr


def test_wrong_usage_of_the_program(empty: Cli) -> None:
    done = empty("runs", "--status", "lost")

    assert done.returncode == 2
    assert "'lost' is none of accepted, queued," in done.stderr


def test_version_and_help(empty: Cli) -> None:
    version = empty("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("outlast ")
    shown = empty("--help").stdout
    assert all(command in shown for command in ("demo", "worker", "sidecar", "runs", "show"))


def test_a_command_leaves_the_environment_as_it_was() -> None:
    CliRunner().invoke(app, ["worker", "nothing.of.that.name:agent"])
    CliRunner().invoke(app, ["runs"])
    assert "OUTLAST_WORKER" not in os.environ
