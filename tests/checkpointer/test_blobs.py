"""Lists are stored by segment: whatever is done to a list, every version is read back as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage
from langgraph.graph.message import add_messages

from outlast.checkpointer import DaprSaver
from outlast.checkpointer.client import StateClient
from tests.checkpointer.writing import Writer, own

Fresh = Callable[[], DaprSaver]


def _message(chance: random.Random, number: int) -> Any:
    text = "x" * chance.choice([1, 10, 400, 30_000 if chance.random() < 0.05 else 5])
    return chance.choice([HumanMessage, AIMessage])(f"{number} {text}", id=f"m{number}")


def _edit_messages(chance: random.Random, messages: list[Any], number: int) -> list[Any]:
    """One change as reducers and careless nodes make it; some change messages in place."""
    match chance.choice(["append"] * 8 + ["several", "replace", "remove", "shrink", "clear", "in place", "metadata"]):
        case "append":
            return add_messages(messages, [_message(chance, number)])
        case "several":
            return add_messages(
                messages, [_message(chance, number * 1000 + each) for each in range(chance.randint(2, 40))]
            )
        case "replace" if messages:
            old = chance.choice(messages)
            return add_messages(messages, [HumanMessage(f"edited {number}", id=old.id)])
        case "remove" if messages:
            return add_messages(messages, [RemoveMessage(chance.choice(messages).id)])
        case "shrink" if messages:
            return messages[: chance.randrange(len(messages))]
        case "clear" if chance.random() < 0.3:
            return []
        case "in place" if messages:
            chance.choice(messages).content = f"changed in place {number}"
        case "metadata" if messages:
            chance.choice(messages).additional_kwargs["seen"] = number
    return messages


def _edit_plain(chance: random.Random, items: list[Any], number: int) -> list[Any]:
    """One change of a list of plain data, nested and changed in place."""
    match chance.choice(["append"] * 6 + ["insert", "set", "delete", "nested", "same list", "reverse"]):
        case "append":
            return [*items, chance.choice([number, str(number), {"n": [number]}, None, True, 1.5, b"bytes"])]
        case "insert":
            position = chance.randint(0, len(items))
            return [*items[:position], {"inserted": number}, *items[position:]]
        case "set" if items:
            copied = list(items)
            copied[chance.randrange(len(copied))] = {"set": number}
            return copied
        case "delete" if items:
            position = chance.randrange(len(items))
            return items[:position] + items[position + 1 :]
        case "nested":
            dicts = [item for item in items if isinstance(item, dict)]
            if dicts:
                chance.choice(dicts)["nested"] = number
        case "same list":
            items.append({"same": number})
        case "reverse" if chance.random() < 0.3:
            return items[::-1]
    return items


@pytest.mark.parametrize("edit", [_edit_messages, _edit_plain], ids=["messages", "plain"])
@pytest.mark.parametrize("seed", range(6))
def test_every_version_of_a_list_is_read_back(edit: Any, seed: int, fresh: Fresh, thread: str) -> None:
    chance = random.Random(seed)
    writer = Writer(fresh(), thread)
    items: list[Any] = []
    for number in range(120):
        items = edit(chance, items, number)
        writer.put({"items": items, **({"other": number} if chance.random() < 0.5 else {})})
    writer.check(fresh)


@pytest.mark.parametrize("edit", [_edit_messages, _edit_plain], ids=["messages", "plain"])
@pytest.mark.parametrize("seed", range(6, 9))
def test_a_run_that_moves_from_attempt_to_attempt(
    edit: Any, seed: int, fresh: Fresh, thread: str, client: StateClient
) -> None:
    """Each attempt goes on from what it reads, and shares the segments of the one before."""
    chance = random.Random(seed)
    writer = Writer(fresh().fenced(own(client, thread, 1)), thread)
    epoch = 1
    for number in range(120):
        if number and chance.random() < 0.1:
            epoch += 1
            writer.restart(fresh().fenced(own(client, thread, epoch)))
        writer.put({"items": edit(chance, writer.values.get("items", []), number)})
    writer.check(fresh)


def test_a_long_list_of_messages(fresh: Fresh, thread: str) -> None:
    writer = Writer(fresh(), thread)
    messages: list[Any] = []
    for number in range(700):
        messages = add_messages(messages, [HumanMessage(f"{number} {'x' * 200}", id=f"m{number}")])
        writer.put({"messages": messages})
    found = fresh().get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
    assert found is not None
    assert found.checkpoint["channel_values"]["messages"] == messages
    first, middle, last = (list(writer.expected)[at] for at in (0, 350, -1))
    for checkpoint_id in (first, middle, last):
        config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": checkpoint_id}}
        found = fresh().get_tuple(config)
        assert found is not None
        assert found.checkpoint["channel_values"] == writer.expected[checkpoint_id]


@pytest.mark.parametrize("size", [1, 16_384, 1_000_000, 3_000_000, 9_000_000])
def test_values_of_any_size(size: int, fresh: Fresh, thread: str) -> None:
    writer = Writer(fresh(), thread)
    writer.put({"text": "x" * size, "items": ["y" * size], "small": 1})
    writer.put({"small": 2})
    writer.put({"items": ["y" * size, "z" * size]})
    writer.check(fresh)


def test_parallel_branches_share_what_they_have_in_common(fresh: Fresh, thread: str) -> None:
    """Time travel: two futures of one checkpoint, each with its own list."""
    writer = Writer(fresh(), thread)
    past: list[Any] = []
    for number in range(40):
        past = [*past, number]
        writer.put({"items": past})
    here = writer.config
    for branch in ("left", "right"):
        writer.config = here
        items = list(past)
        for number in range(40):
            items = [*items, f"{branch} {number}"]
            writer.put({"items": items})
    writer.check(fresh)
