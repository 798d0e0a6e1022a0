"""The world outside of a scenario's processes: a model and a ledger that count what they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from outlast.testing import LedgerServer, Reply, ScriptedModelServer, ToolCall
from tests.acceptance.points import claimed
from tests.acceptance.scenario import Scenario

MODEL_URL = "WORLD_MODEL_URL"
LEDGER_URL = "WORLD_LEDGER_URL"


def asked(request: Mapping[str, Any]) -> str:
    """What a model is asked for: what the user said first and, where that is not all, what came last."""
    said = next(str(message["content"]) for message in request["messages"] if message["role"] == "user")
    last = request["messages"][-1]["role"]
    return said if last == "user" else f"{said} after {last}"


def answer(request: Mapping[str, Any], _answered: int) -> Reply:
    """The model's answer: the same to the same request, and from it one can tell the request."""
    label = asked(request)
    calls = [ToolCall(name, {"city": "Rome"}) for name in ("search", "price", "book")] if label.endswith("trip") else []
    return Reply(f"{label}!", calls)


class World:
    """A model and a ledger. While a call is there and not answered yet, its process may be killed (`kill_at`)."""

    def __init__(self, scenario: Scenario, script: Callable[[Mapping[str, Any], int], Reply] = answer) -> None:
        self._scenario = scenario
        self.model = ScriptedModelServer(script, on_call=self._asked)
        self.ledger = LedgerServer(on_call=self._booked)
        scenario.env |= {MODEL_URL: self.model.base_url, LEDGER_URL: self.ledger.url}

    def _asked(self, call: dict[str, Any]) -> None:
        self._reached(f"model {asked(call['request'])} during")

    def _booked(self, call: dict[str, Any]) -> None:
        self._reached(f"tool {call['request']['tool']} during")

    def _reached(self, point: str) -> None:
        self._scenario.note(point)
        if claimed(self._scenario.folder, "kill_at", point):
            self._scenario.processes[-1].kill()

    @property
    def model_calls(self) -> Counter[str]:
        """How often the model was asked for what."""
        return Counter(asked(call["request"]) for call in self.model.requests())

    @property
    def tool_calls(self) -> Counter[str]:
        """How often the ledger was asked under which key."""
        return Counter(call["key"] for call in self.ledger.calls())

    def keys_of(self, tool: str) -> list[str]:
        """The keys that the ledger was asked under for a tool, in order."""
        return [call["key"] for call in self.ledger.calls() if call["request"]["tool"] == tool]

    def tool_of(self, key: str) -> str:
        """The tool that the ledger was asked by under a key."""
        tools = {call["request"]["tool"] for call in self.ledger.calls() if call["key"] == key}
        assert len(tools) == 1, f"{key} is the key of {tools}"
        return str(tools.pop())

    @property
    def booked(self) -> Counter[str]:
        """What is in the ledger, by tool."""
        return Counter(call["request"]["tool"] for call in self.ledger.bookings())


@contextmanager
def around(scenario: Scenario, script: Callable[[Mapping[str, Any], int], Reply] = answer) -> Iterator[World]:
    """A world for a scenario."""
    world = World(scenario, script)
    with world.model, world.ledger:
        yield world
