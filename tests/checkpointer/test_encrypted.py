"""With a serialiser that encrypts nothing of what a user has put into a thread is readable in the store."""

from __future__ import annotations

import operator
import re
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from typing_extensions import TypedDict

from outlast.checkpointer import DaprSaver, records
from outlast.checkpointer.client import StateClient
from outlast.checkpointer.sidecar import Address
from outlast.doctor import repair
from outlast.embedded import EmbeddedSidecar


class Inner(TypedDict):
    quokkainnerchannel: Annotated[list[str], operator.add]


class State(TypedDict):
    quokkamessages: Annotated[list[Any], add_messages]
    quokkachannel: Annotated[list[str], operator.add]
    quokkaplain: dict[str, str]


def build(saver: Any) -> Any:
    inner = StateGraph(Inner)
    inner.add_node("quokkainnernode", lambda state: {"quokkainnerchannel": ["quokkainnervalue"]})
    inner.add_edge(START, "quokkainnernode")
    compiled = inner.compile(checkpointer=True)

    def ask(state: State) -> Any:
        answer = interrupt({"quokkaquestion": "quokkaquestionvalue"})
        return Command(goto=[Send("quokkasent", {"quokkaargument": answer})], update={"quokkachannel": [answer]})

    def outer(state: State) -> Any:
        compiled.invoke({"quokkainnerchannel": ["quokkainput"]})
        return {"quokkaplain": {"quokkakey": "quokkavalue" * 4000}, "quokkachannel": ["quokkaitem"]}

    builder = StateGraph(State)
    builder.add_node("quokkaouter", outer)
    builder.add_node("quokkaask", ask)
    builder.add_node("quokkasent", lambda state: {"quokkachannel": [f"quokkasent {state['quokkaargument']}"]})
    builder.add_node("quokkafails", fails)
    builder.add_edge(START, "quokkaouter")
    builder.add_edge("quokkaouter", "quokkaask")
    builder.add_edge("quokkasent", "quokkafails")
    return builder.compile(checkpointer=saver)


def fails(state: State) -> Any:
    raise ValueError("quokkaerror")


def drive(graph: Any, thread: str) -> None:
    config: Any = {
        "configurable": {"thread_id": thread, "quokkaconfigurable": "quokkaconfigurablevalue"},
        "metadata": {"quokkametadata": "quokkametadatavalue"},
        "tags": ["quokkatag"],
        "run_name": "quokkarunname",
    }
    messages = [HumanMessage("quokkacontent " * 20, id=f"quokka{number}", name="quokkaname") for number in range(30)]
    graph.invoke({"quokkamessages": messages, "quokkachannel": ["quokkafirst"]}, config)
    with pytest.raises(ValueError, match="quokkaerror"):
        graph.invoke(Command(resume="quokkaanswer"), config)
    graph.update_state(config, {"quokkachannel": ["quokkaupdated"]}, as_node="quokkaask")


def everything(path: Path) -> Iterator[tuple[str, bytes]]:
    """All cells of the store's tables: as they are, and what is compressed in them."""
    with sqlite3.connect(path) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for row in database.execute(f"SELECT * FROM {table}"):
                for cell in row:
                    data = cell if isinstance(cell, bytes) else str(cell).encode()
                    yield table, data
                    if data[:2] == b"OL" and chr(data[3]).islower():
                        yield table, zlib.decompressobj(wbits=-15, zdict=records._DICTIONARY).decompress(data[8:])


def leaks(path: Path) -> set[str]:
    found = set()
    for _, data in everything(path):
        found |= {match.decode("latin-1") for match in re.findall(rb"quokka\w*", data)}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, Address]]:
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        yield tmp_path / "outlast.db", Address("127.0.0.1", sidecar.grpc_port)


def serde() -> EncryptedSerializer:
    return EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")


def saver_on(address: Address, serde: Any = None) -> DaprSaver:
    return DaprSaver(client=StateClient("statestore", address), serde=serde)


def test_the_marks_are_found_where_nothing_is_encrypted(folder: tuple[Path, Address]) -> None:
    path, address = folder
    drive(build(saver_on(address)), "quokkathread")
    assert leaks(path) >= {
        "quokkathread",
        "quokkamessages",
        "quokkacontent",
        "quokkaerror",
        "quokkametadatavalue",
        "quokkaconfigurablevalue",
        "quokkainnernode",
        "quokkaquestionvalue",
        "quokkasent",
    }


def test_nothing_but_the_threads_id_is_readable(folder: tuple[Path, Address]) -> None:
    path, address = folder
    saver = saver_on(address, serde())
    drive(build(saver), "quokkathread")
    saver.copy_thread("quokkathread", "quokkathread2")
    assert leaks(path) == {"quokkathread", "quokkathread2"}
    saver.prune(["quokkathread"])
    assert not repair(StateClient("statestore", address), grace=0).left
    assert leaks(path) == {"quokkathread", "quokkathread2"}


def told(saver: Any, thread: str) -> list[Any]:
    """What a thread's history says, but for what is random."""
    found = []
    for item in saver.list({"configurable": {"thread_id": thread}}):
        ns = re.sub(r":[0-9a-f-]{36}", "", item.config["configurable"]["checkpoint_ns"])
        writes = sorted(
            (channel, repr(value)) for _, channel, value in item.pending_writes if channel != "__interrupt__"
        )
        found.append((ns, item.metadata["step"], sorted(item.checkpoint["channel_values"]), writes))
    return sorted(found, key=repr)


def test_what_is_hidden_is_read_back(folder: tuple[Path, Address]) -> None:
    _, address = folder
    hidden, plain = saver_on(address, serde()), InMemorySaver()
    drive(build(hidden), "t")
    drive(build(plain), "t")
    assert told(saver_on(address, serde()), "t") == told(plain, "t")
    inner = [item for item in told(plain, "t") if item[0]]
    assert inner, "there are checkpoints in other namespaces"
    for item in hidden.list({"configurable": {"thread_id": "t"}}):
        again = saver_on(address, serde()).get_tuple(item.config)
        assert again is not None
        assert (again.config, again.parent_config) == (item.config, item.parent_config)
        assert again.checkpoint == item.checkpoint
        ns = item.config["configurable"]["checkpoint_ns"]
        found = hidden.list({"configurable": {"thread_id": "t", "checkpoint_ns": ns}})
        assert again.checkpoint["id"] in {each.checkpoint["id"] for each in found}
    hidden.prune(["t"])
    assert hidden.get_tuple({"configurable": {"thread_id": "t"}}) is not None
