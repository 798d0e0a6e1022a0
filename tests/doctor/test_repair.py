"""What was broken on purpose is found, and mended or named; what is whole is not touched."""

from __future__ import annotations

import itertools
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from outlast.checkpointer import DaprSaver, keys
from outlast.checkpointer.blobs import PackWriter
from outlast.checkpointer.client import Delete, Get, Save, StateClient, Swap
from outlast.checkpointer.registry import ACTIVE, RUNS, THREADS
from outlast.checkpointer.thread import ThreadLog
from outlast.doctor import Repairs, repair
from outlast.errors import CorruptRecordError
from outlast.recovery import runs, turns
from outlast.recovery.runs import RunInput
from tests.doctor.test_doctor import doctor

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


class State(TypedDict):
    items: Annotated[list[str], operator.add]
    note: str


def talk(saver: DaprSaver, thread_id: str, turns: int = 4) -> None:
    builder = StateGraph(State)
    builder.add_node("reply", lambda state: {"items": [f"{len(state['items'])} " * 20], "note": "x" * 30_000})
    builder.add_edge(START, "reply")
    graph: Any = builder.compile(checkpointer=saver)
    for turn in range(turns):
        graph.invoke({"items": [f"turn {turn}"]}, {"configurable": {"thread_id": thread_id}})


def contents(saver: DaprSaver, thread_id: str) -> list[str]:
    return [repr(item) for item in saver.list({"configurable": {"thread_id": thread_id}})]


@pytest.fixture
def client(sidecar_env: dict[str, str]) -> StateClient:
    return StateClient("statestore")


@pytest.fixture
def saver(client: StateClient) -> DaprSaver:
    saver = DaprSaver(client=client)
    talk(saver, "whole")
    talk(saver, "other")
    return saver


def kinds(found: Repairs) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.mended) for finding in found.findings]


def test_nothing_is_found_where_nothing_is_wrong(client: StateClient, saver: DaprSaver) -> None:
    before = contents(saver, "whole"), contents(saver, "other")
    saver.delete_thread("nobody")
    found = repair(client, grace=0)
    assert kinds(found) == []
    assert (found.threads, found.checkpoints) == (2, 24)
    assert (contents(saver, "whole"), contents(saver, "other")) == before


class _Cut(Exception):
    pass


@pytest.mark.parametrize("action", ["delete", "prune"])
def test_what_was_cut_short_is_completed(
    client: StateClient, saver: DaprSaver, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    whole = contents(saver, "whole")
    perform = StateClient._perform
    mended = 0
    for number in range(12):
        thread = f"{action} {number}"
        talk(saver, thread)
        before = contents(saver, thread)
        count = itertools.count()

        def failing(self: StateClient, operation: Any, count: Any = count, number: int = number) -> Any:
            if isinstance(operation, Save | Swap | Delete) and next(count) == number:
                raise _Cut
            return perform(self, operation)

        with monkeypatch.context() as patched:
            patched.setattr(StateClient, "_perform", failing)
            try:
                saver.delete_thread(thread) if action == "delete" else saver.prune([thread])
                ended = True
            except _Cut:
                ended = False
        found = repair(client, grace=0)
        assert not found.left
        mended += len(found.findings)
        assert kinds(repair(client, grace=0)) == []
        if action == "delete":
            assert contents(saver, thread) in ([], before)
        else:
            assert contents(saver, thread) in (before[:1], before)
        if ended:
            break
    else:
        pytest.fail("never reached the end")
    assert mended >= 1
    assert contents(saver, "whole") == whole


@pytest.mark.parametrize("how", ["missing", "damaged", "missing blob", "foreign"])
def test_checkpoints_that_cannot_be_read(client: StateClient, saver: DaprSaver, how: str) -> None:
    whole = contents(saver, "whole")
    talk(saver, "broken", 6)
    before = contents(saver, "broken")
    log = ThreadLog("broken")
    head = client.run(log.read())
    assert head is not None
    entry = client.run(log.index.entries(head))[0]
    key = f"{log.key}-{entry.pack}"
    data = client._perform(Get((key,)))[key].data
    if how == "missing":
        client._perform(Delete((key,)))
    elif how == "missing blob":
        client._perform(Delete([f"{key}-b{number}" for number in range(8)]))
    else:
        spoiled = data[:-1] + bytes((data[-1] ^ 1,)) if how == "damaged" else b"somebody else's"
        client._perform(Save([(key, spoiled)]))
    named = repair(client, grace=0)
    assert {kind for kind, _ in kinds(named)} == {"unreadable checkpoint"}
    assert all("broken" in finding.where and "--drop" in finding.detail for finding in named.left)
    lost = len(named.left)
    with pytest.raises(CorruptRecordError):
        contents(saver, "broken")
    tried = repair(client, drop=True, dry_run=True, grace=0)
    assert len(tried.left) == lost
    dropped = repair(client, drop=True, grace=0)
    assert not dropped.left
    assert len(dropped.findings) == lost
    left = contents(DaprSaver(client=client), "broken")
    assert 0 < len(left) == len(before) - lost
    assert set(left) < set(before)
    assert kinds(repair(client, grace=0)) == []
    talk(DaprSaver(client=client), "broken", 1)
    assert contents(saver, "whole") == whole


def test_a_damaged_head_is_named(client: StateClient, saver: DaprSaver) -> None:
    client._perform(Save([(keys.thread_key("whole"), b"OL\x02Hxxxxxxx")]))
    found = repair(client, grace=0)
    assert kinds(found) == [("damaged index", False)]
    assert found.left[0].where == "whole"


def test_orphans(client: StateClient, saver: DaprSaver) -> None:
    """Records of a commit whose head was never swapped, as where a store has no transactions and the writer dies."""
    before = contents(saver, "whole")
    log = ThreadLog("whole")
    pack = PackWriter(log.key, log.names.next())
    pack.add(("bytes", b"x" * 100))
    head = client.run(log.read())
    assert head is not None
    entry = client.run(log.index.entries(head))[0]
    # A commit that becomes visible, and then one of the same writer that does not.
    client.run(log.commit([replace(entry, pack="", writes=())], pack.finish(1_000_000), pack.name))
    head = client.run(log.read())
    assert head is not None
    client.run(log.announce(head, 8))
    lost = PackWriter(log.key, log.names.next())
    lost.add(("bytes", b"y" * 3_000_000))
    lost.add(("bytes", b"z" * 50_000))
    orphans = lost.finish(1_000_000)
    # All of them, or only the first: the writer died half-way.
    for written in (orphans, orphans[:2], orphans[:-1]):
        client._perform(Save(written))
        tried = repair(client, dry_run=True, grace=0)
        assert kinds(tried) == [("orphans", False)]
        found = repair(client, grace=0)
        assert kinds(found) == [("orphans", True)]
        names = [key for key, _ in orphans]
        assert not any(item.data for item in client._perform(Get(names)).values())
        assert kinds(repair(client, grace=0)) == []
    assert contents(saver, "whole") == before


def test_a_commit_in_progress_outlives_the_search_for_orphans(client: StateClient, saver: DaprSaver) -> None:
    log = ThreadLog("whole")
    client.run(log.generation())
    talk(saver, "whole", 1)
    repair(client, grace=0)
    talk(saver, "whole", 1)
    assert len(contents(saver, "whole")) == 18


def test_runs(client: StateClient, saver: DaprSaver) -> None:
    def accept(run_id: str, thread_id: str) -> runs.RunHead:
        submitted = RunInput("agent", thread_id, ("bytes", b""), "f")
        return client.run(turns.accept(run_id, submitted, 1_000_000))[0]

    ended = accept("ended", "busy")
    client.run(runs.change("ended", lambda now: replace(now, status="done")))
    accept("next", "busy")
    client.run(ACTIVE.put("never accepted", 1))
    accept("forgotten", "elsewhere")
    client.run(ACTIVE.discard("forgotten"))
    client.run(ThreadLog("whole").change(lambda now: replace(now, active="nowhere", queue=("next",))))
    found = repair(client, grace=0.05)
    assert sorted(kinds(found)) == sorted(
        [
            ("ended run in the active set", True),
            ("active entry without run", True),
            ("run nobody looks after", True),
            ("thread held by a run that is over", True),
        ]
    )
    assert sorted(client.run(ACTIVE.items())) == ["forgotten", "next"]
    assert client.run(RUNS.names())
    busy, whole = client.run(ThreadLog("busy").read()), client.run(ThreadLog("whole").read())
    assert busy is not None
    assert whole is not None
    assert busy.active == "next"
    assert whole.active == "next"
    assert ended.run_id not in (busy.active, *busy.queue)
    assert kinds(repair(client, grace=0.05)) == []


def test_the_command(client: StateClient, saver: DaprSaver, tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    client._perform(Save([(keys.thread_key("whole"), b"OL\x02Hxxxxxxx")]))
    done = doctor(tmp_path, sidecar_env, "--repair", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["guarantee"] == "exactly-once"
    assert found["good"] is False
    assert [finding["where"] for finding in found["repairs"]["findings"]] == ["whole"]
    client._perform(Delete((keys.thread_key("whole"),)))
    again = doctor(tmp_path, sidecar_env, "--repair")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 left" in again.stdout
    assert sorted(client.run(THREADS.names())) == ["other", "whole"]
