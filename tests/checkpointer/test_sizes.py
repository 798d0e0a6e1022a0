"""What is many or long: pending writes by the ten thousand, thread ids of 300 characters of any kind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from outlast.checkpointer import DaprSaver, keys
from outlast.checkpointer.client import Get, StateClient
from outlast.checkpointer.quirks import TABLE
from outlast.checkpointer.registry import Registry
from tests.checkpointer.writing import Writer

pytestmark = pytest.mark.timeout(180)

Fresh = Callable[[], DaprSaver]


async def test_ten_thousand_pending_writes(fresh: Fresh, client: StateClient, thread: str) -> None:
    saver = fresh()
    writer = Writer(saver, thread)
    writer.put({"value": 0})
    config = writer.config
    calls = [saver.aput_writes(config, [("value", number)], f"task-{number:05}") for number in range(9_000)]
    calls.append(saver.aput_writes(config, [("value", number) for number in range(1_000)], "task-many"))
    await asyncio.gather(*calls)
    found = await fresh().aget_tuple(config)
    assert found is not None
    assert found.pending_writes is not None
    assert len(found.pending_writes) == 10_000
    assert {(task, value) for task, _, value in found.pending_writes} == {
        *((f"task-{number:05}", number) for number in range(9_000)),
        *(("task-many", number) for number in range(1_000)),
    }
    head = client._perform(Get((keys.thread_key(thread),)))[keys.thread_key(thread)]
    assert len(head.data) < 10_000
    writer.put({"value": 1})
    writer.check(fresh)
    fresh().delete_thread(thread)
    assert fresh().get_tuple(config) is None


def test_a_registry_of_long_names_fits_every_store(client: StateClient, thread: str) -> None:
    """A cell of names that do not compress is no larger than what Azure Table takes in the end, as text."""
    chance = random.Random(7)
    registry = Registry(thread, shards=1)
    kinds = ((0x20, 0x7E), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0xF8FF))
    names = ["".join(chr(chance.randint(*chance.choice(kinds))) for _ in range(300)) for _ in range(100)]
    names.append("\ud800 alone".encode("utf-8", "replace").decode())
    for name in names:
        client.run(registry.add(name))
        client.run(registry.add(name))
    assert sorted(client.run(registry.names())) == sorted(names)
    stored = client._perform(Get(client.run(registry.keys())))
    assert max(len(item.data) for item in stored.values()) <= TABLE["state.azure.tablestorage"].max_value
    assert sum(bool(item.data) for item in stored.values()) > 5


def test_a_registry_goes_on_where_a_killed_writer_left_it(client: StateClient, thread: str) -> None:
    """The page is created, the cell not yet swapped; and two who seal at the same time see different cells."""
    registry = Registry(thread, shards=1)
    for number in range(64):
        client.run(registry.add(f"name {number}"))
    sealing = registry.add("name 64")
    operation = next(sealing)
    for _ in range(2):
        operation = sealing.send(client._perform(operation))  # reads the cell, creates the page …
    sealing.close()
    assert len(client.run(registry.names())) == 64
    for number in range(64, 200):
        client.run(registry.add(f"name {number}"))
        assert len(client.run(registry.names())) == number + 1
