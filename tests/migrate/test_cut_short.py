"""A migration that is cut short anywhere is completed by calling it again, and touches no other thread."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import Create, Delete, Save, StateClient, Swap
from outlast.migrate import migrate, opened
from tests.harness.procs import Child, clean_env, count_lines
from tests.migrate.graphs import config, fill, go_on, graph, seen

pytestmark = pytest.mark.timeout(300)


class _CutShort(Exception):
    pass


def copy(source: str, target: str) -> list[str]:
    with opened(source) as origin, opened(target, target=True) as destination:
        return [report.problem for report in migrate(origin, destination)]


def make(path: Path, turns: int) -> list[str]:
    with SqliteSaver.from_conn_string(str(path)) as saver:
        talk = graph(saver)
        talk.invoke({"messages": [("user", "ask")]}, config("one"))
        for turn in range(turns):
            talk.invoke({"messages": [("user", f"hello {turn}")]}, config("two"))
        return [repr(seen(saver, "one")), repr(seen(saver, "two"))]


def from_request(number: int, after: bool, cut: list[int]) -> Callable[[StateClient, Any], Any]:
    """Let nothing through from the store's `number`-th change on, as from a killed process; `cut` tells."""
    perform, count = StateClient._perform, itertools.count()

    def failing(self: StateClient, operation: Any) -> Any:
        if not cut and (not isinstance(operation, Save | Create | Swap | Delete) or next(count) != number):
            return perform(self, operation)
        if after and not cut:
            perform(self, operation)
        cut.append(1)
        raise _CutShort

    return failing


def from_call(number: int, cut: list[int]) -> Callable[[Any], Any]:
    """Let calls fail from the `number`-th on."""
    count = itertools.count()

    def failing(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if cut or next(count) == number:
                cut.append(1)
                raise _CutShort
            return real(*arguments, **options)

        return call

    return failing


@pytest.mark.parametrize("after", [False, True])
def test_cut_at_every_request_on_the_way_in(
    tmp_path: Path, sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr("outlast.migrate.copying._WINDOW", 3)
    path = tmp_path / "a.sqlite"
    expected = make(path, 3)
    saver = DaprSaver()
    go_on(saver, "other")
    other = repr(seen(saver, "other"))
    for number in range(200):
        cut: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(StateClient, "_perform", from_request(number, after, cut))
            copy(f"sqlite:{path}", "statestore")
        assert not any(copy(f"sqlite:{path}", "statestore"))
        assert [repr(seen(saver, "one")), repr(seen(saver, "two"))] == expected
        assert repr(seen(saver, "other")) == other
        if not cut:
            assert number > 6
            return
        for thread in ("one", "two"):
            saver.delete_thread(thread)
    pytest.fail("never reached the end")


def test_cut_at_every_write_on_the_way_out(
    tmp_path: Path, sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.sqlite"
    expected = make(path, 1)
    assert not any(copy(f"sqlite:{path}", "statestore"))
    for number in range(200):
        target = tmp_path / f"out-{number}.sqlite"
        cut: list[int] = []
        failing = from_call(number, cut)
        with monkeypatch.context() as patched:
            patched.setattr(SqliteSaver, "put", failing(SqliteSaver.put))
            patched.setattr(SqliteSaver, "put_writes", failing(SqliteSaver.put_writes))
            copy("statestore", f"sqlite:{target}")
        assert not any(copy("statestore", f"sqlite:{target}"))
        with SqliteSaver.from_conn_string(str(target)) as saver:
            assert [repr(seen(saver, "one")), repr(seen(saver, "two"))] == expected
        if not cut:
            assert number > 20
            return
    pytest.fail("never reached the end")


@pytest.mark.kill
@pytest.mark.acceptance
def test_killed_again_and_again(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    path = tmp_path / "a.sqlite"
    with SqliteSaver.from_conn_string(str(path)) as old:
        threads = fill(old)
        for thread in ("many", "more"):
            for turn in range(40):
                graph(old).invoke({"messages": [("user", f"{turn} " * 100)]}, config(thread))
            threads.append(thread)
        command = ("-m", "outlast.cli", "migrate", "--from", f"sqlite:{path}", "--to", "statestore", "--json")
        kills = 0
        for attempt in range(20):
            log = tmp_path / f"{attempt}.log"
            with Child.python(*command, log=log, env=sidecar_env, cwd=tmp_path) as child:
                # One thread further each time, and then anywhere.
                while child.alive and count_lines(log) <= attempt:
                    time.sleep(0.002)
                time.sleep(random.random() * 0.1)
                if not child.alive:
                    child.check()
                    break
                child.kill()
                kills += 1
        assert kills >= 2
        last = json.loads(log.read_text().splitlines()[-1])
        assert last["problems"] == 0
        assert last["threads"] == len(threads)
        new = DaprSaver()
        for thread in threads:
            assert seen(new, thread) == seen(old, thread)


@pytest.mark.acceptance
def test_the_command(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    path = tmp_path / "a.sqlite"
    with SqliteSaver.from_conn_string(str(path)) as old:
        threads = fill(old)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "outlast.cli", "migrate", *arguments],
                env=clean_env(sidecar_env),
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=90,
            )

        into = ("--from", f"sqlite:{path}", "--to", "statestore")
        dry = run(*into, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert f"{len(threads)} threads" in dry.stdout
        assert "to be copied" in dry.stdout
        done = run(*into, "--json")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert {line["thread_id"] for line in lines[:-1]} == set(threads)
        assert lines[-1]["copied"] == lines[-1]["checkpoints"] > 20
        out = run("--from", "statestore", "--to", f"sqlite:{tmp_path / 'b.sqlite'}", "--thread", "plain")
        assert out.returncode == 0, out.stderr
        with SqliteSaver.from_conn_string(str(tmp_path / "b.sqlite")) as back:
            assert seen(back, "plain") == seen(old, "plain")
            assert list(back.list(config("forked"))) == []
        for arguments, words in (
            (("--from", "statestore", "--to", "statestore"), "the same"),
            (("--from", f"sqlite:{path}", "--to", "statestore", "--thread", "nobody"), "no thread 'nobody'"),
            (("--from", f"sqlite:{path}", "--to", "redis://x"), "not copied to Redis"),
        ):
            wrong = run(*arguments)
            assert wrong.returncode == 1
            assert words in " ".join((wrong.stdout + wrong.stderr).split())
