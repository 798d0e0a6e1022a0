"""Events of a streamed run: from the attempt, wherever it is, to readers; each reader gets each run item once.

An attempt that takes over tells all events again, from the journal. So every event has a name that is the same in
each attempt, and a reader drops what it knows. What a reader has missed it takes from the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from agents import Agent, RunState
from agents._run_state_agent_identity import _build_agent_map
from agents.items import RunItem
from agents.run_context import RunContextWrapper
from agents.run_internal.streaming import stream_step_items_to_queue
from agents.run_state import _deserialize_items
from agents.stream_events import AgentUpdatedStreamEvent, RawResponsesStreamEvent, RunItemStreamEvent, StreamEvent

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.recovery.runs import Typed

_CODEC: Final = AgentsCodec()


@dataclass(frozen=True)
class Chunk:
    """An event with its name.

    Attributes:
        name: Of run items and agents: which; equal ones are numbered. Of raw events: the number of the answer.
        number: See there.
        event: The event.
    """

    name: str
    number: int
    event: StreamEvent

    @property
    def is_item(self) -> bool:
        """Whether it tells of a run item."""
        return isinstance(self.event, RunItemStreamEvent)


class Names:
    """Gives the events of an attempt their names."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._answers = 0

    def chunk(self, event: StreamEvent) -> Chunk:
        """Return an event with its name."""
        if isinstance(event, RawResponsesStreamEvent):
            number = self._answers
            self._answers += event.data.type == "response.completed"
            return Chunk("", number, event)
        name = _name(event)
        self._counts[name] += 1
        return Chunk(name, self._counts[name], event)

    def skip_answers(self, count: int) -> None:
        """The attempt begins after so many answers."""
        self._answers = count


def _name(event: RunItemStreamEvent | AgentUpdatedStreamEvent) -> str:
    if isinstance(event, AgentUpdatedStreamEvent):
        return f"agent {event.new_agent.name}"
    raw: Any = event.item.raw_item
    return f"{event.name} {field_of(raw, 'call_id') or field_of(raw, 'id') or ''}"


def field_of(raw: Any, name: str) -> Any:
    """Return a field of a raw item, which the SDK has as a model or as a dict."""
    return raw.get(name) if isinstance(raw, dict) else getattr(raw, name, None)


class Seen:
    """What a reader has been given."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._answers = 0

    def takes(self, chunk: Chunk) -> bool:
        """Tell whether an event is new to the reader, and note it."""
        if not chunk.name:
            if chunk.number < self._answers:
                return False
            assert isinstance(chunk.event, RawResponsesStreamEvent)
            if chunk.event.data.type == "response.completed":
                self._answers = chunk.number + 1
            return True
        if chunk.number <= self._counts[chunk.name]:
            return False
        self._counts[chunk.name] = chunk.number
        return True


class _Collecting:
    """A queue for the SDK's function that makes events of items."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put_nowait(self, event: Any) -> None:
        self.events.append(event)


def of_items(items: Iterable[RunItem]) -> Iterator[StreamEvent]:
    """Return the events that tell of run items."""
    collecting: Any = _Collecting()
    stream_step_items_to_queue([item for item in items if item.type != "input_item"], collecting)
    yield from collecting.events


class Wire:
    """Turns chunks into what the store keeps for a reader elsewhere, and back.

    Args:
        agent: The agent that the run begins with.
    """

    def __init__(self, agent: Agent[Any]) -> None:
        self._agent = agent
        self._state: RunState[Any] = RunState(
            context=RunContextWrapper(context=None), original_input="", starting_agent=agent
        )

    def dumps(self, chunk: Chunk) -> Typed:
        """Serialise a chunk."""
        event = chunk.event
        body: dict[str, Any] = {"name": chunk.name, "number": chunk.number}
        if isinstance(event, RawResponsesStreamEvent):
            body["raw"] = event.data
        elif isinstance(event, AgentUpdatedStreamEvent):
            body["agent"] = event.new_agent.name
        else:
            body["event"] = event.name
            body["item"] = self._state._serialize_item(event.item)
        return _CODEC.dumps_typed(body)

    def loads(self, typed: Typed) -> Chunk | None:
        """Return the chunk that `dumps` was given; None if it is of an agent that this process has not."""
        body = _CODEC.loads_typed(typed)
        known = _build_agent_map(self._agent)
        event: StreamEvent
        if "raw" in body:
            event = RawResponsesStreamEvent(data=body["raw"])
        elif "agent" in body:
            agent = known.get(body["agent"])
            if agent is None:
                return None
            event = AgentUpdatedStreamEvent(new_agent=agent)
        else:
            items = _deserialize_items([body["item"]], known)
            if not items:
                return None
            event = RunItemStreamEvent(name=body["event"], item=items[0])
        return Chunk(body["name"], body["number"], event)
