from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.harness.procs import Child, clean_env, count_lines, free_ports, wait_for, wait_for_lines

TICKER = "import time\nwhile True:\n    print('tick')\n    time.sleep(0.01)"


@pytest.mark.kill
def test_a_killed_child_is_gone_when_kill_returns(tmp_path: Path) -> None:
    child = Child.python("-c", TICKER, log=tmp_path / "log")
    child.wait_for_line("tick")
    child.kill()
    assert child.returncode == -signal.SIGKILL
    child.kill()  # a second time is harmless


@pytest.mark.kill
def test_a_frozen_child_does_nothing_until_it_is_thawed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Child.python("-c", TICKER, log=log) as child:
        child.wait_for_line("tick")
        child.freeze()
        time.sleep(0.05)
        frozen = count_lines(log)
        time.sleep(0.2)
        assert count_lines(log) == frozen
        child.thaw()
        wait_for_lines(log, frozen + 1)


def test_waiting_for_a_line_fails_at_once_when_the_child_ended(tmp_path: Path) -> None:
    child = Child.python("-c", "print('only this')", log=tmp_path / "log")
    with pytest.raises(AssertionError, match=r"ended with status 0(.|\n)*only this"):
        child.wait_for_line("something else")


def test_a_restarted_child_is_not_taken_for_its_predecessor(tmp_path: Path) -> None:
    log = tmp_path / "log"
    Child.python("-c", "print('ready 1')", log=log).check()
    assert Child.python("-c", "print('ready 2')", log=log).wait_for_line(r"ready (\d)")[1] == "2"


def test_children_do_not_inherit_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAPR_GRPC_PORT", "1")
    monkeypatch.setenv("OUTLAST_EMBEDDED_PATH", "x")
    env = clean_env({"DAPR_HTTP_PORT": "2"})
    assert "DAPR_GRPC_PORT" not in env
    assert "OUTLAST_EMBEDDED_PATH" not in env
    assert env["DAPR_HTTP_PORT"] == "2"


def test_count_lines_does_not_count_a_half_written_one(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    assert count_lines(file) == 0
    file.write_text('{"a":1}\n{"b":2}\n{"a"')
    assert count_lines(file) == 2
    assert count_lines(file, '"a"') == 1


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_wait_for_says_what_it_waited_for() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.02 s for a miracle"):
        wait_for(lambda: None, 0.02, "a miracle")
