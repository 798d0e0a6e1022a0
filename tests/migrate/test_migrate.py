"""Threads of every sort, there and back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver

from outlast.checkpointer import DaprSaver
from outlast.migrate import MigrationError, ThreadReport, migrate, opened
from tests.migrate import postgres
from tests.migrate.graphs import config, fill, go_on, graph, seen

pytestmark = pytest.mark.timeout(180)

Open = Callable[[str], BaseCheckpointSaver[Any]]


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    pytest.importorskip("langgraph.checkpoint.postgres")
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL is installed")
    with postgres.server() as url:
        yield url


@pytest.fixture
def database(postgres_url: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty database."""
    import psycopg

    name = f"test_{abs(hash(request.node.nodeid))}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_url.replace("/postgres", f"/{name}", 1).replace(f"{name}://", "postgres://")


def url_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    if kind == "postgres":
        found: str = request.getfixturevalue("database")
        return found
    return f"sqlite:{folder / 'langgraph.sqlite'}" if kind == "sqlite" else kind


@contextmanager
def saver_at(url: str) -> Iterator[BaseCheckpointSaver[Any]]:
    """The checkpointer as a program would open it."""
    if url.startswith("postgres"):
        from langgraph.checkpoint.postgres import PostgresSaver

        with PostgresSaver.from_conn_string(url) as saver:
            saver.setup()
            yield saver
    elif url.startswith("sqlite:"):
        with SqliteSaver.from_conn_string(url.removeprefix("sqlite:")) as sqlite_saver:
            yield sqlite_saver
    else:
        yield DaprSaver(url)


def copy(source: str, target: str, **options: Any) -> list[ThreadReport]:
    with opened(source) as origin, opened(target, target=True) as destination:
        return list(migrate(origin, destination, **options))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_there_and_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    url = url_of(kind, request, tmp_path)
    with ExitStack() as stack:
        old = stack.enter_context(saver_at(url))
        threads = fill(old)
        reports = copy(url, "statestore")
        assert {report.thread_id: report.problem for report in reports} == dict.fromkeys(threads, "")
        assert all(report.copied == report.checkpoints > 0 for report in reports)
        new = DaprSaver()
        for thread in threads:
            assert seen(new, thread) == seen(old, thread)
        again = copy(url, "statestore")
        assert all(report.present == report.checkpoints and not report.copied for report in again)
        # The way back out, to a place of its own.
        back = f"sqlite:{tmp_path / 'back.sqlite'}"
        assert not any(report.problem for report in copy("statestore", back))
        returned = stack.enter_context(saver_at(back))
        for thread in threads:
            assert seen(returned, thread) == seen(old, thread)
        for thread in threads:
            expected = go_on(old, thread)
            assert go_on(new, thread) == expected
            assert go_on(returned, thread) == expected


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_threads_made_here_go_elsewhere(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, sidecar_env: dict[str, str]
) -> None:
    """They have numbers for versions, which other savers cannot go on with, and forks that share them."""
    old = DaprSaver()
    threads = fill(old)
    url = url_of(kind, request, tmp_path)
    for _ in range(2):
        reports = copy("statestore", url)
        assert {report.thread_id: report.problem for report in reports} == dict.fromkeys(threads, "")
    with saver_at(url) as new:
        for thread in threads:
            assert seen(new, thread) == seen(old, thread)
        for thread in threads:
            assert go_on(new, thread) == go_on(old, thread)


def test_between_savers_in_memory(sidecar_env: dict[str, str]) -> None:
    memory, dapr = InMemorySaver(), DaprSaver()
    threads = fill(memory)
    assert not any(report.problem for report in migrate(memory, dapr))
    back = InMemorySaver()
    assert not any(report.problem for report in migrate(dapr, back))
    for thread in threads:
        assert seen(dapr, thread) == seen(memory, thread)
        assert seen(back, thread) == seen(memory, thread)


def test_what_has_come_since_is_brought_over(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    url = f"sqlite:{tmp_path / 'a.sqlite'}"
    with saver_at(url) as old:
        fill(old)
        copy(url, "statestore", threads=["plain", "asking"])
        before = seen(DaprSaver(), "plain")
        go_on(old, "asking")
        (report,) = copy(url, "statestore", threads=["asking"])
        assert not report.problem
        assert 0 < report.copied < report.checkpoints
        assert seen(DaprSaver(), "asking") == seen(old, "asking")
        assert seen(DaprSaver(), "plain") == before


def test_a_thread_that_went_on_here_is_left_alone(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    url = f"sqlite:{tmp_path / 'a.sqlite'}"
    with saver_at(url) as old:
        fill(old)
        copy(url, "statestore", threads=["asking"])
        go_on(DaprSaver(), "asking")
        here = seen(DaprSaver(), "asking")
        (report,) = copy(url, "statestore", threads=["asking"])
        assert (report.problem, report.copied) == ("", 0)
        assert seen(DaprSaver(), "asking") == here
        go_on(old, "asking")
        (report,) = copy(url, "statestore", threads=["asking"])
        assert "both went on" in report.problem
        assert seen(DaprSaver(), "asking") == here


def test_another_thread_of_the_same_name_is_not_mixed_up(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    url = f"sqlite:{tmp_path / 'a.sqlite'}"
    with saver_at(url) as old:
        fill(old)
    go_on(DaprSaver(), "plain")
    here = seen(DaprSaver(), "plain")
    reports = {report.thread_id: report for report in copy(url, "statestore")}
    assert "both went on" in reports["plain"].problem
    assert not reports["asking"].problem
    assert seen(DaprSaver(), "plain") == here


def test_a_dry_run_writes_nothing(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    url = f"sqlite:{tmp_path / 'a.sqlite'}"
    with saver_at(url) as old:
        threads = fill(old)
    with opened(url) as source, opened("statestore") as target:
        reports = list(migrate(source, target, dry_run=True))
    assert len(reports) == len(threads)
    assert all(report.copied == report.checkpoints for report in reports)
    assert list(DaprSaver().list(None)) == []


def test_the_source_is_not_changed(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    path = tmp_path / "a.sqlite"
    with saver_at(f"sqlite:{path}") as old:
        fill(old)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    before = path.read_bytes()
    assert not any(report.problem for report in copy(f"sqlite:{path}", "statestore"))
    assert path.read_bytes() == before


def test_lists_share_what_they_have_in_common(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    url = f"sqlite:{tmp_path / 'a.sqlite'}"
    with saver_at(url) as old:
        for turn in range(40):
            graph(old).invoke({"messages": [("user", f"{turn} " * 200)]}, config("long"))
    copy(url, "statestore")
    if "OUTLAST_EMBEDDED_PATH" not in sidecar_env:
        return
    with sqlite3.connect(sidecar_env["OUTLAST_EMBEDDED_PATH"]) as connection:
        (stored,) = connection.execute("SELECT sum(length(value)) FROM state WHERE key LIKE '%t-%'").fetchone()
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        (bulk,) = connection.execute("SELECT sum(length(checkpoint)) FROM checkpoints").fetchone()
    assert stored < bulk / 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sqlite:missing.sqlite", "no file"),
        ("mysql://x", "names nothing"),
        ("postgres://nobody@127.0.0.1:1/x", "does not answer"),
    ],
)
def test_an_end_that_is_not_there(name: str, words: str) -> None:
    if name.startswith("postgres"):
        pytest.importorskip("psycopg")
    with pytest.raises(MigrationError, match=words), opened(name):
        pass


def test_a_file_that_is_not_a_checkpointers(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE x (y)")
    with pytest.raises(MigrationError, match="no table"), opened(f"sqlite:{tmp_path / 'empty.sqlite'}"):
        pass
    (tmp_path / "text").write_text("no database at all, but long enough to be read as one")
    with pytest.raises(MigrationError, match="no SQLite database"), opened(f"sqlite:{tmp_path / 'text'}"):
        pass
