"""What is in the values: classes that are nowhere, older forms, ciphers."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from outlast.checkpointer import DaprSaver
from outlast.migrate import migrate, opened
from outlast.migrate.sides import Side, same
from outlast.migrate.verbatim import Verbatim
from tests.migrate.graphs import Spot, Ticket, config, fill, seen

VALUES = [
    None,
    b"bytes",
    "text",
    0,
    2**63,
    1.5,
    True,
    [1, "two", [3]],
    {"a": {1: Spot(1)}, "b": [Ticket(title="t"), {1, 2}]},
    (1, 2),
    {"größe": "❄"},
    [],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_are_carried_over_byte_for_byte(value: Any) -> None:
    stored = JsonPlusSerializer().dumps_typed(value)
    verbatim = Verbatim()
    assert verbatim.dumps_typed(verbatim.loads_typed(stored)) == stored


@pytest.mark.parametrize("kind", ["json", "pickle", "msgpack+aes"])
def test_other_forms_are_not_opened(kind: str) -> None:
    verbatim = Verbatim()
    assert verbatim.dumps_typed(verbatim.loads_typed((kind, b'"x"'))) == (kind, b'"x"')


def test_same() -> None:
    assert same({"a": [1, {"b": float("nan")}]}, {"a": (1.0, {"b": float("nan")})})
    for one, other in ((1, True), (1, 2), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (None, 0)):
        assert not same(one, other)


def put(saver: BaseCheckpointSaver[Any], value: Any) -> None:
    checkpoint = {**empty_checkpoint(), "channel_values": {"value": value}, "channel_versions": {"value": "1.0"}}
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    saver.put(config, checkpoint, {"source": "loop", "step": 0}, {"value": "1.0"})  # type: ignore[arg-type]


def value_of(saver: BaseCheckpointSaver[Any]) -> Any:
    found = saver.get_tuple(config("t"))
    assert found is not None
    return found.checkpoint["channel_values"]["value"]


def copy(source: str, target: str, **options: Any) -> list[str]:
    with opened(source, **options) as origin, opened(target, target=True, **options) as destination:
        return [report.problem for report in migrate(origin, destination)]


def test_classes_that_cannot_be_imported(
    tmp_path: Path, sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = types.ModuleType("only_in_the_program")
    kind = dataclasses.make_dataclass("Order", ["number"])
    kind.__module__ = home.__name__
    home.Order = kind  # type: ignore[attr-defined]
    with monkeypatch.context() as there:
        there.setitem(sys.modules, home.__name__, home)
        with SqliteSaver.from_conn_string(str(tmp_path / "a.sqlite")) as old:
            put(old, [kind(7), {"deep": kind(8)}])
    assert copy(f"sqlite:{tmp_path / 'a.sqlite'}", "statestore") == [""]
    assert copy("statestore", f"sqlite:{tmp_path / 'b.sqlite'}") == [""]
    monkeypatch.setitem(sys.modules, home.__name__, home)
    expected = [kind(7), {"deep": kind(8)}]
    assert value_of(DaprSaver()) == expected
    with SqliteSaver.from_conn_string(str(tmp_path / "b.sqlite")) as back:
        assert value_of(back) == expected


def test_checkpoints_from_when_langgraph_wrote_json(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    path = tmp_path / "a.sqlite"
    message = {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "messages", "HumanMessage"],
        "kwargs": {"content": "old"},
    }
    with SqliteSaver.from_conn_string(str(path)) as old:
        put(old, "x")
        checkpoint = {**empty_checkpoint(), "channel_values": {"value": [message]}, "channel_versions": {"value": 1}}
        old.conn.execute(
            "UPDATE checkpoints SET type = 'json', checkpoint_id = ?, checkpoint = ?",
            (checkpoint["id"], json.dumps(checkpoint).encode()),
        )
        old.conn.commit()
        expected = value_of(old)
    assert copy(f"sqlite:{path}", "statestore") == [""]
    assert value_of(DaprSaver()) == expected
    assert repr(expected).startswith("[HumanMessage(")


def test_encrypted(tmp_path: Path, sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("Crypto")
    monkeypatch.setenv("LANGGRAPH_AES_KEY", "0123456789abcdef")
    serde = EncryptedSerializer.from_pycryptodome_aes()
    path = tmp_path / "a.sqlite"
    old = SqliteSaver(sqlite3.connect(path, check_same_thread=False), serde=serde)
    threads = fill(old)
    (problem, *_) = copy(f"sqlite:{path}", "statestore")
    assert "--encrypted" in problem
    assert not any(copy(f"sqlite:{path}", "statestore", encrypted=True))
    new = DaprSaver(serde=serde)
    for thread in threads:
        assert seen(new, thread) == seen(old, thread)
    with pytest.raises(Exception, match="msgpack\\+aes"):
        seen(DaprSaver(), "plain")


def test_a_saver_of_which_nothing_more_is_known(sidecar_env: dict[str, str]) -> None:
    memory, dapr = InMemorySaver(), DaprSaver()
    threads = fill(memory)
    source = Side(memory)
    assert not any(report.problem for report in migrate(source, dapr))
    assert all(report.present == report.checkpoints for report in migrate(source, dapr))
    for thread in threads:
        assert seen(dapr, thread) == seen(memory, thread)
