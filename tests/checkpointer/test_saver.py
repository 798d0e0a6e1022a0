"""DaprSaver beyond LangGraph's own tests: fencing, lost answers of the store, deletions cut short, bad input."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from dapr.proto import api_service_v1, api_v1
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from outlast import (
    FencedError,
    SerializationError,
    SidecarUnavailableError,
    StoreNotFoundError,
    UnsupportedStoreError,
    durable,
)
from outlast.checkpointer import DaprSaver, keys
from outlast.checkpointer import client as client_module
from outlast.checkpointer.client import Create, Delete, Get, Save, StateClient, Swap
from outlast.checkpointer.sidecar import Address
from outlast.checkpointer.thread import Fence
from outlast.recovery.runtime import Runtime
from tests.checkpointer.writing import Writer, own
from tests.harness.procs import REPOSITORY, clean_env, free_ports

Fresh = Callable[[], DaprSaver]


def _config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


# --- fencing


def test_a_fenced_saver_commits_nothing_and_says_so(fresh: Fresh, thread: str, client: StateClient) -> None:
    stale = Writer(fresh().fenced(own(client, thread, 1)), thread)
    stale.put({"value": 1})
    stale.writes("task", ("value", "committed"))
    own(client, thread, 2)
    before = list(fresh().list(_config(thread)))
    for _ in range(2):
        with pytest.raises(FencedError, match="epoch 2"):
            stale.put({"value": "never"})
        with pytest.raises(FencedError, match="epoch 2"):
            stale.writes("task-2", ("value", "never"))
    assert list(fresh().list(_config(thread))) == before
    assert before[0].pending_writes == [("task", "value", "committed")]


async def test_the_async_face_is_fenced_too(fresh: Fresh, thread: str, client: StateClient) -> None:
    writer = Writer(fresh().fenced(own(client, thread, 1)), thread)
    await asyncio.to_thread(writer.put, {"value": 1})
    own(client, thread, 2)
    found = await fresh().aget_tuple(_config(thread))
    assert found is not None
    with pytest.raises(FencedError):
        await writer.saver.aput(writer.config, found.checkpoint, {}, {"value": 2})
    with pytest.raises(FencedError):
        await writer.saver.aput_writes(writer.config, [("value", 2)], "task")


def test_a_fence_of_a_thread_that_is_gone(fresh: Fresh, thread: str, client: StateClient) -> None:
    writer = Writer(fresh().fenced(own(client, thread, 1)), thread)
    writer.put({"value": 1})
    fresh().delete_thread(thread)
    with pytest.raises(FencedError):
        writer.put({"value": 2})
    assert fresh().get_tuple(_config(thread)) is None


def test_a_fence_that_was_never_given(fresh: Fresh, thread: str) -> None:
    with pytest.raises(FencedError):
        Writer(fresh().fenced(Fence(7, "nobody")), thread).put({"value": 1})
    assert fresh().get_tuple(_config(thread)) is None


# --- several writers


def test_many_threads_and_processes_write_to_one_checkpoint(fresh: Fresh, thread: str) -> None:
    first = Writer(fresh(), thread)
    first.put({"value": 1})
    savers = [fresh() for _ in range(3)]
    tasks = [f"task-{number}" for number in range(60)]

    def write(number: int) -> None:
        savers[number % 3].put_writes(first.config, [("value", number), ("other", [number])], tasks[number])

    with futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(write, range(60)))
    found = fresh().get_tuple(_config(thread))
    assert found is not None
    assert found.pending_writes is not None
    expected = {(task, channel) for task in tasks for channel in ("value", "other")}
    assert len(found.pending_writes) == 120
    assert {(task, channel) for task, channel, _ in found.pending_writes} == expected


def test_a_checkpoint_never_shows_before_writes_that_were_asked_for_earlier(fresh: Fresh, thread: str) -> None:
    """LangGraph issue 8039: LangGraph does not wait for `put_writes`, so the order of commits must."""
    saver = fresh()
    writer = Writer(saver, thread)
    for number in range(20):
        writer.put({"value": number})
        writing = threading.Thread(target=writer.writes, args=(f"task-{number}", ("value", number)))
        before = writer.config
        writing.start()
        writing.join(0.0005)
        writer.put({"value": -number})
        found = fresh().get_tuple(before)
        writing.join()
        assert found is not None


# --- a store whose answers are lost


class _Lossy:
    """Carries operations out, and loses some answers: the caller is told that a write may not have gone through."""

    def __init__(self, client: StateClient, lose: Callable[[Any, int], bool]) -> None:
        self._perform = client._perform
        self._lose = lose
        self._count = 0
        client._perform = self  # type: ignore[method-assign, assignment]

    def __call__(self, operation: Any) -> Any:
        result = self._perform(operation)
        if isinstance(operation, (Swap, Create)):
            self._count += 1
            if self._lose(operation, self._count):
                return False
        return result


def test_a_commit_whose_answer_is_lost_is_made_once(address: Address, fresh: Fresh, thread: str) -> None:
    client = StateClient("statestore", address)
    saver = DaprSaver(client=client)
    _Lossy(client, lambda _, count: count % 2 == 0)
    writer = Writer(saver, thread)
    items: list[int] = []
    for number in range(40):
        items = [*items, number]
        writer.put({"items": items})
        writer.writes(f"task-{number}", ("value", number))
    writer.check(fresh)
    for found in fresh().list(_config(thread)):
        assert found.pending_writes is not None
        assert len(found.pending_writes) == 1


def test_a_commit_that_fails_in_the_middle_leaves_nothing(address: Address, fresh: Fresh, thread: str) -> None:
    class Down(Exception):
        pass

    for failing in range(12):
        client = StateClient("statestore", address)
        perform = client._perform
        left = [failing]

        def performed(operation: Any, perform: Any = perform, left: Any = left) -> Any:
            if isinstance(operation, (Save, Swap, Create, Get)):
                left[0] -= 1
                if left[0] < 0:
                    raise Down
            return perform(operation)

        name = f"{thread}-{failing}"
        writer = Writer(DaprSaver(client=client), name)
        client._perform = performed  # type: ignore[method-assign]
        try:
            for number in range(3):
                writer.put({"value": number})
        except Down:
            # The last one asked for did not succeed, so it may be there or not; those before it are.
            known = list(writer.expected)
            seen = [found.checkpoint["id"] for found in fresh().list(_config(name))][::-1]
            assert seen in (known, known[:-1])
        # The same saver goes on when the store is back.
        client._perform = perform  # type: ignore[method-assign]
        last = writer.put({"value": "back"})
        found = fresh().get_tuple(_config(name))
        assert found is not None
        assert found.checkpoint["id"] == last
        assert found.checkpoint["channel_values"] == {"value": "back"}


# --- deleting


def _tracked(address: Address) -> tuple[StateClient, set[str]]:
    """A client, and the keys of all records it ever writes."""
    client = StateClient("statestore", address)
    written: set[str] = set()
    perform = client._perform

    def performed(operation: Any) -> Any:
        if isinstance(operation, (Save, Swap)):
            written.update(key for key, _ in operation.records)
        return perform(operation)

    client._perform = performed  # type: ignore[method-assign]
    return client, written


def test_a_deletion_cut_short_anywhere_is_completed_by_the_next(address: Address, fresh: Fresh, thread: str) -> None:
    cut, ended = 0, False
    while not ended:
        name = f"{thread}-{cut}"
        client, written = _tracked(address)
        writer = Writer(DaprSaver(client=client), name)
        for number in range(70):
            writer.put({"items": [number] * (number % 5), "large": "x" * (40_000 if number % 10 == 0 else 1)})
            writer.writes("task", ("items", number))
        records = {key for key in written if key.startswith(keys.thread_key(name))}
        assert len(records) > 140
        ended = _delete_until(address, name, cut)
        assert fresh().get_tuple(_config(name)) is None, cut
        assert list(fresh().list(_config(name))) == []
        fresh().delete_thread(name)
        found = client.run(_get(sorted(records)))
        assert [key for key, item in found.items() if item.data] == [], cut
        # The name can be used again, and nothing of the old thread shines through.
        again = Writer(fresh(), name)
        again.put({"value": "new"})
        again.check(fresh)
        cut += 1
    assert cut >= 4


def _get(names: list[str]) -> Any:
    return (yield Get(names))


def _delete_until(address: Address, thread: str, cut: int) -> bool:
    """Delete a thread with a client that dies before its write number `cut`; returns whether it got through."""
    client = StateClient("statestore", address)
    perform = client._perform
    left = [cut]

    class Died(BaseException):
        pass

    def performed(operation: Any) -> Any:
        if isinstance(operation, (Save, Swap, Create, Delete)):
            left[0] -= 1
            if left[0] < 0:
                raise Died
        return perform(operation)

    client._perform = performed  # type: ignore[method-assign]
    try:
        DaprSaver(client=client).delete_thread(thread)
    except Died:
        # Before the first write the thread is whole, and its deletion has not begun.
        if cut == 0:
            DaprSaver(client=StateClient("statestore", address)).delete_thread(thread)
        return False
    return True


def test_deleting_what_is_not_there_is_no_error(fresh: Fresh, thread: str) -> None:
    fresh().delete_thread(thread)
    assert fresh().get_tuple(_config(thread)) is None


# --- serialisers and values


def test_an_encrypting_serialiser(address: Address, thread: str) -> None:
    pytest.importorskip("Crypto")
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")
    writer = Writer(DaprSaver(client=StateClient("statestore", address), serde=serde), thread)
    for number in range(5):
        writer.put({"items": [f"secret {each}" for each in range(number)], "value": "secret"})
    writer.check(lambda: DaprSaver(client=StateClient("statestore", address), serde=serde))


class _Reversing(JsonPlusSerializer):
    """A serialiser whose bytes nobody else can read."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = super().dumps_typed(obj)
        return f"reversed+{kind}", data[::-1]

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        return super().loads_typed((data[0].removeprefix("reversed+"), data[1][::-1]))


def test_a_users_own_serialiser(address: Address, thread: str) -> None:
    def make() -> DaprSaver:
        return DaprSaver(client=StateClient("statestore", address), serde=_Reversing())

    writer = Writer(make(), thread)
    for number in range(80):
        writer.put({"items": list(range(number)), "value": {"n": number}})
    writer.check(make)


def test_a_value_that_cannot_be_stored_names_the_mend_and_writes_nothing(fresh: Fresh, thread: str) -> None:
    writer = Writer(fresh(), thread)
    good = writer.put({"value": 1})
    later = {**_checkpoint(fresh, thread), "id": "1ffffffe-0000-6000-8000-000000000000"}
    for bad in (threading.Lock(), [threading.Lock()], 2**80):
        with pytest.raises(SerializationError, match="serde"):
            writer.saver.put(writer.config, {**later, "channel_values": {"v": bad}}, {}, {"v": 1})
        with pytest.raises(SerializationError, match="serde"):
            writer.writes("task", ("fine", 1), ("value", bad))
    found = fresh().get_tuple(_config(thread))
    assert found is not None
    assert found.checkpoint["id"] == good
    assert found.pending_writes == []


def _checkpoint(fresh: Fresh, thread: str) -> Any:
    found = fresh().get_tuple(_config(thread))
    assert found is not None
    return found.checkpoint


@pytest.mark.parametrize("name", ["", "a/b", "x" * 5000, "Übung – 練習", "a b\n", "..", "thread||1"])
def test_any_thread_id(fresh: Fresh, thread: str, name: str) -> None:
    whole = f"{name}{thread}"
    writer = Writer(fresh(), whole)
    writer.put({"value": name.encode("utf-8", "replace")})
    writer.check(fresh)


def test_any_namespace_and_channel_name(fresh: Fresh, thread: str) -> None:
    for ns in ("", "sub:1|inner:2", "Ü/ |"):
        writer = Writer(fresh(), thread, ns)
        writer.put({"ch/ä": 1, "": 2, "x" * 300: 3})
        writer.check(fresh)


# --- bad configuration


def test_an_unknown_store_names_those_there_are(address: Address, thread: str) -> None:
    def saver() -> DaprSaver:
        return DaprSaver(client=StateClient("nosuchstore", address))

    with pytest.raises(StoreNotFoundError, match=r"no state store 'nosuchstore'; it has 'statestore'"):
        saver().get_tuple(_config(thread))
    with pytest.raises(StoreNotFoundError, match="nosuchstore"):
        Writer(saver(), thread).put({"value": 1})
    with pytest.raises(StoreNotFoundError, match="nosuchstore"):
        saver().delete_thread(thread)


class _Sidecar(api_service_v1.DaprServicer):
    """Says what components it has, and nothing else."""

    def __init__(self, *components: tuple[str, str, list[str]]) -> None:
        self._components = components

    def GetMetadata(self, request: Any, context: Any) -> Any:
        components = [
            api_v1.metadata_pb2.RegisteredComponents(name=name, type=kind, version="v1", capabilities=capabilities)
            for name, kind, capabilities in self._components
        ]
        return api_v1.metadata_pb2.GetMetadataResponse(registered_components=components)


@pytest.fixture
def says() -> Iterator[Callable[..., Address]]:
    """Starts sidecars that report the given components."""
    servers = []

    def start(*components: tuple[str, str, list[str]]) -> Address:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        api_service_v1.add_DaprServicer_to_server(_Sidecar(*components), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return Address("127.0.0.1", port)

    yield start
    for server in servers:
        server.stop(None)


@pytest.mark.parametrize(
    ("kind", "capabilities", "why"),
    [
        ("state.memcached", ["TTL"], "it has no ETags"),
        ("state.jetstream", [], "it has no ETags"),
        ("state.etcd", ["ETAG", "TRANSACTIONAL", "TTL"], "acknowledges writes that a race has lost"),
    ],
)
def test_a_store_that_cannot_compare_and_swap_is_refused(
    says: Callable[..., Address], thread: str, kind: str, capabilities: list[str], why: str
) -> None:
    address = says(("mine", kind, capabilities), ("secrets", "secretstores.local.env", []))
    saver = DaprSaver(client=StateClient("mine", address))
    for attempt in (lambda: saver.get_tuple(_config(thread)), lambda: Writer(saver, thread).put({"value": 1})):
        with pytest.raises(UnsupportedStoreError, match=rf"'mine' \({kind}\).*{why}.*state\.postgresql"):
            attempt()


def test_a_sidecar_without_stores(says: Callable[..., Address], thread: str) -> None:
    saver = DaprSaver(client=StateClient("statestore", says(("secrets", "secretstores.local.env", []))))
    with pytest.raises(StoreNotFoundError, match="it has none"):
        saver.get_tuple(_config(thread))


class _State(TypedDict, total=False):
    value: int


def test_a_store_that_is_refused_begins_no_run(says: Callable[..., Address], thread: str) -> None:
    runtime = Runtime("mine", says(("mine", "state.memcached", [])))
    graph = StateGraph(_State).add_node("node", lambda _: {"value": 1}).add_edge(START, "node").compile()
    agent = durable(graph, name=thread, runtime=runtime)
    with pytest.raises(UnsupportedStoreError):
        agent.invoke({"value": 0}, {"configurable": {"thread_id": thread}})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for a sidecar to come back."""
    for patience in ("_OUTAGE", "_FIRST_CONTACT"):
        monkeypatch.setattr(client_module, patience, 0.2)


@pytest.mark.usefixtures("impatient")
async def test_a_sidecar_that_is_down_names_the_mend(thread: str) -> None:
    address = Address("127.0.0.1", free_ports(1)[0])
    saver = DaprSaver(client=StateClient("statestore", address))
    with pytest.raises(SidecarUnavailableError, match=r"no answer from the Dapr sidecar at 127\.0\.0\.1.*Start it"):
        await asyncio.to_thread(saver.get_tuple, _config(thread))
    with pytest.raises(SidecarUnavailableError, match="Start it"):
        await saver.aget_tuple(_config(thread))
    with pytest.raises(SidecarUnavailableError, match="Start it"):
        await asyncio.to_thread(Writer(saver, thread).put, {"value": 1})
    runtime = Runtime("statestore", address)
    graph = StateGraph(_State).add_node("node", lambda _: {"value": 1}).add_edge(START, "node").compile()
    agent = durable(graph, name=thread, runtime=runtime)
    with pytest.raises(SidecarUnavailableError, match="Start it"):
        await asyncio.to_thread(agent.invoke, {"value": 0}, {"configurable": {"thread_id": thread}})


# --- forks

FORKS = """
import os, sys
from outlast.checkpointer import keys
from outlast.checkpointer.thread import ThreadLog

names, log = keys.RecordNames(), ThreadLog("any")
sys.stdout.flush()
os.fork()
os.write(1, f"{names.next()} {log.names.next()}\\n".encode())
"""


def test_a_forked_child_does_not_draw_the_names_of_its_parent() -> None:
    """Two processes that produce the same record names would overwrite each other's records."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], env=clean_env({}), cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    drawn = done.stdout.split()
    assert len(drawn) == 4, done.stderr
    assert len(set(drawn)) == 4
