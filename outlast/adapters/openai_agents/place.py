"""Where in a run of the SDK code is: a name for it that is the same in every attempt.

Ids of traces and spans are others in each attempt, and what runs in parallel ends in another order. The same are: how
many answers a run's model has given, the ids of the tool calls in these answers, and the inputs of nested runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from agents.tracing import custom_span, get_current_trace

from outlast.adapters.openai_agents.codec import AgentsCodec
from outlast.recovery import steps
from outlast.recovery.attempt import Attempt
from outlast.recovery.journal import digest
from outlast.recovery.steps import StepCall

if TYPE_CHECKING:
    from outlast.adapters.openai_agents.context import Contexts

_CODEC = AgentsCodec()
REPLAYED: Final = "outlast.replayed"
"""Name of the span that tells of a step whose outcome came from the journal."""


class Track:
    """What the places of one attempt share.

    Args:
        attempt: The attempt.
        contexts: The context object of the run.

    Attributes:
        models: The journaled form of each model, by its id, with the model.
        drained: Whether the attempt has stopped because it was asked to.
    """

    def __init__(self, attempt: Attempt, contexts: Contexts) -> None:
        self.attempt = attempt
        self.contexts = contexts
        self.models: dict[int, Any] = {}
        self.drained = False
        self._lock = threading.Lock()
        self._left = 0
        self.begin_after(0)

    def begin_after(self, count: int) -> None:
        """The attempt begins after so many records."""
        records = self.attempt.journal.records[count:]
        self._left = sum(record.kind in ("result", "error") for record in records)

    @property
    def replaying(self) -> bool:
        """Whether recorded outcomes are left that this attempt has not come to."""
        return self._left > 0

    def replayed(self, call: StepCall) -> None:
        """A recorded outcome is given back: the trace of the run gets a span that says so."""
        with self._lock:
            self._left -= 1
        if get_current_trace() is not None:
            with custom_span(REPLAYED, {"type": call.type, "name": call.name}):
                pass


class Place:
    """A run of the SDK, a tool that is an agent, or a step.

    Args:
        track: The attempt.
        path: Names the place within the step it is in.
        kind: What it is.

    Attributes:
        answers: How many answers its model has given.
        session: The journaled session of a run, if it has one.
    """

    def __init__(self, track: Track, path: str, kind: Literal["run", "agent_tool", "step"]) -> None:
        self.track = track
        self.path = path
        self.kind = kind
        self.answers = 0
        self.session: Any = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def number(self, name: str) -> int:
        """Return how often this was asked for `name` before."""
        with self._lock:
            self._counts[name] += 1
            return self._counts[name] - 1

    @property
    def counts(self) -> dict[str, Any]:
        """What a later attempt needs to go on counting here."""
        return {"answers": self.answers, "counts": dict(self._counts)}

    def go_on(self, counts: dict[str, Any]) -> None:
        """Go on counting where `counts` was taken."""
        self.answers = counts["answers"]
        self._counts = Counter(counts["counts"])

    def child(self, agent_name: str, input: Any, resumed: bool) -> Place:
        """Return the place of a run that begins here."""
        if self.kind == "agent_tool":
            name = "run"
        elif resumed:
            name = f"{agent_name}:resume"
        else:
            name = f"{agent_name}:{_digest(input)}"
        # A marked function that is replayed does not begin its runs again: those are counted by themselves.
        scope = steps.scope()
        number = self.number(f"{scope.path if scope else ''} {name}")
        return Place(self.track, self.below(f"{name}#{number}"), "run")

    def below(self, name: str) -> str:
        """Return the path of something in this place."""
        return f"{self.path}/{name}" if self.path else name


def _digest(input: Any) -> str:
    try:
        return digest(*_CODEC.dumps_typed(input))[:16]
    except Exception:
        # Told apart by their order, then.
        return type(input).__qualname__


_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar("outlast_openai_agents_place", default=None)


def here() -> Place | None:
    """Return where this code runs, or None outside of durable runs."""
    return _PLACE.get()


@contextlib.contextmanager
def within(place: Place | None) -> Iterator[None]:
    """Be in a place."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def locate() -> tuple[str, int]:
    """Return the place of the code that calls, for the journal."""
    place = _PLACE.get()
    return (place.path if place else ""), 1


def is_replaying() -> bool:
    """Tell whether this code only repeats what happened before a crash.

    For hooks, `on_handoff`, dynamic instructions and whatever else the SDK calls that is no step: they are called again
    when a run is carried on. True while recorded outcomes are left to be given back, so what was called after the last
    one is told False twice. Always False outside of durable runs.
    """
    place = _PLACE.get()
    return place is not None and place.track.replaying
