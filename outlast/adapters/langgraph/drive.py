"""One attempt of a LangGraph run: where it stands is read from the saved state, and LangGraph goes on from there.

The rules are a generator that yields calls of the graph, so that sync and async runs share them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar, cast

from langchain_core.runnables import RunnableConfig
from langgraph._internal._config import DEFAULT_RECURSION_LIMIT
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.errors import ErrorCode, GraphDrained, GraphRecursionError, create_error_message
from langgraph.pregel import Pregel
from langgraph.runtime import RunControl
from langgraph.types import Command, Interrupt, StateSnapshot

from outlast.adapters.langgraph.place import RunSaver
from outlast.checkpointer.head import Entry
from outlast.checkpointer.saver import DaprSaver
from outlast.errors import FencedError
from outlast.recovery.attempt import Attempt, Outcome
from outlast.recovery.ending import stopped
from outlast.recovery.failures import away, describe
from outlast.recovery.runs import RunHead, Typed, spent

_NULL_TASK: Final = "00000000-0000-0000-0000-000000000000"
_INTERRUPT: Final = "__interrupt__"
_RESUME: Final = "__resume__"

T = TypeVar("T")
Position = Literal["absent", "finished", "failed", "interrupted", "breakpoint", "runnable"]


@dataclass(frozen=True)
class Stretch:
    """Let LangGraph run; the result is what `invoke` returns.

    Attributes:
        published: Whether callers may follow it as a stream.
        repeats: Whether LangGraph will first show a state that the caller's own call would not show again.
    """

    input: Any
    config: RunnableConfig
    control: RunControl
    published: bool = True
    repeats: bool = False


@dataclass(frozen=True)
class Saved:
    """Read the latest, or the given, checkpoint of the root graph; the result is a CheckpointTuple or None."""

    checkpoint_id: str | None = None


@dataclass(frozen=True)
class State:
    """Read the state of the root graph; the result is a StateSnapshot."""

    config: RunnableConfig | None = None


@dataclass(frozen=True)
class Note:
    """Write down what is about to happen to the run; the result is its new head."""

    change: Callable[[RunHead], RunHead | None]


Call = Stretch | Saved | State | Note
Steps = Generator[Call, Any, T]


class Drive:
    """Carries one attempt on.

    Args:
        graph: The user's graph; a copy of it runs.
        attempt: The attempt.
        submitted: What `payload.decode` returned.
        config: The config for LangGraph, with thread and run id.
        dumps: Serialises a result.
        answer: The oldest signal of the run, decoded, if it has any.
    """

    def __init__(
        self,
        graph: Pregel[Any, Any, Any, Any],
        attempt: Attempt,
        submitted: Mapping[str, Any],
        config: RunnableConfig,
        saver: DaprSaver,
        dumps: Callable[[Any], Typed],
        answer: Mapping[str, Any] | None,
    ) -> None:
        self.attempt = attempt
        self.submitted = submitted
        self.options = {key: value for key, value in submitted["options"].items() if value is not None}
        self._dumps = dumps
        self._config = config
        self._control = RunControl()
        self._answer_given = answer
        self._first_step = -2
        self._left: int | None = None
        self.saver = RunSaver(saver, attempt, self._committed)
        self.graph = graph.copy({"checkpointer": self.saver})

    def _committed(self, entries: Sequence[Entry]) -> None:
        # Only at a checkpoint of the root graph: a drain in between would skip work of subgraphs without checkpointer.
        roots = sum(1 for entry in entries if entry.pack and not entry.ns)
        if self._left is not None:
            self._left -= roots
        if roots and (self.attempt.draining or self._left == 0):
            self._control.request_drain("outlast")

    @property
    def thread(self) -> RunnableConfig:
        """Addresses the latest state of the thread."""
        return {"configurable": {"thread_id": self.attempt.thread_id}}

    def steps(self) -> Steps[Outcome]:
        """Carry the run on until it ends, waits, sleeps or drains."""
        try:
            outcome = yield from self._ended()
        except BaseException:
            # What user code made of the unwinding does not matter.
            if not self.attempt.stopped:
                raise
        else:
            if not self.attempt.stopped:
                return outcome
        return (yield from self._stopped())

    def catches(self, error: BaseException) -> bool:
        """Whether an exception of a graph call is for `steps` to see.

        An attempt that is unwound may end with anything: a TaskGroup makes a BaseExceptionGroup of AttemptStopped.
        """
        return isinstance(error, Exception) or self.attempt.stopped

    def _stopped(self) -> Steps[Outcome]:
        """The attempt was stopped in the middle of a step."""
        stop = self.attempt.stop
        if stop is None or stop.question is None:
            return stopped(self.attempt, None)
        state = yield State()
        values = state.values if isinstance(state.values, dict) else {}
        asked = Interrupt(value=vars(stop.question), id=stop.question.id)
        return stopped(self.attempt, self._dumps({**values, _INTERRUPT: [asked]}))

    def _ended(self) -> Steps[Outcome]:
        try:
            return (yield from self._steps())
        except GraphDrained:
            if self._left == 0:
                error: Exception = self._limit_reached()
                return Outcome("failed", error=describe(error), exception=error)
            return Outcome("yielded")
        except GraphRecursionError:
            error = self._limit_reached()
            return Outcome("failed", error=describe(error), exception=error)
        except Exception as error:
            if isinstance(error, FencedError) or away(error):
                raise
            return Outcome("failed", error=describe(error), exception=error)

    def _steps(self) -> Steps[Outcome]:
        saved: CheckpointTuple | None = yield Saved()
        started = yield from self._started(saved)
        base: CheckpointTuple | None = saved
        if started:
            base = (yield Saved(self.attempt.head.base)) if self.attempt.head.base else None
        self._first_step = _step(base)
        given: Any = None
        self._repeats = not isinstance(self.submitted["input"], Command | None)
        if not started:
            given = self.submitted["input"]
            if given is not None or "checkpoint_id" in self._config["configurable"]:
                yield from self._accept(given, saved)
                saved = yield Saved()
                given = None
        elif saved is not None:
            state = yield State()
            position = yield from self._position(state, saved)
            if position == "finished":
                return (yield from self._finished(saved))
            if position in ("interrupted", "breakpoint"):
                given, waits = yield from self._answer(state, saved, position)
                if waits:
                    return self._waiting(_output(state))
            elif self.attempt.head.signals:
                # The thread was moved on by hand since the run began to wait: going on is all there is to do.
                name = self.attempt.head.signals[0]
                self.attempt.head = yield Note(lambda now: _spent(now, name))
        return (yield from self._run(given, saved))

    # --- starting

    def _started(self, saved: CheckpointTuple | None) -> Steps[bool]:
        """Whether something of this run is committed: a checkpoint newer than the thread had when the run began."""
        yield from ()
        if self.attempt.head.attempts <= 1 and not self.attempt.head.result:
            return False
        latest = saved.config["configurable"]["checkpoint_id"] if saved else ""
        if latest == (self.attempt.head.base or ""):
            return False
        if saved and saved.metadata.get("run_id") == self.attempt.run_id:
            return True
        state: StateSnapshot | None = yield State()
        # Somebody may have edited the thread by hand since: look for the run further back.
        while state and state.config["configurable"].get("checkpoint_id") != self.attempt.head.base:
            if (state.metadata or {}).get("run_id") == self.attempt.run_id:
                return True
            state = (yield State(state.parent_config)) if state.parent_config else None
        return False

    def _accept(self, given: Any, saved: CheckpointTuple | None) -> Steps[None]:
        """Commit the input before anything runs on it: an @entrypoint would start its body first, even in sync mode."""
        if isinstance(given, Command) and is_answer_by_id(given.resume):
            # Answers by interrupt id are not saved by LangGraph: they are given when the graph runs.
            return
        control = RunControl()
        control.request_drain("outlast")
        try:
            yield Stretch(given, self._limited(saved, self._config), control, published=False)
        except GraphDrained:
            return

    # --- running

    def _run(self, given: Any, saved: CheckpointTuple | None) -> Steps[Outcome]:
        first = self.submitted["input"]
        if given is None and isinstance(first, Command) and is_answer_by_id(first.resume):
            state = yield State()
            if {item.id for item in state.interrupts} & set(cast(dict[str, Any], first.resume)):
                given = first
        configurable = {key: value for key, value in self._config["configurable"].items() if key != "checkpoint_id"}
        config = {**self._config, "configurable": configurable}
        if self.attempt.draining:
            self._control.request_drain("outlast")
        limited = self._limited(saved, cast(RunnableConfig, config))
        out = yield Stretch(given, limited, self._control, repeats=self._repeats)
        state = yield State()
        # A normal return with tasks left is an interrupt, or a static breakpoint.
        return self._waiting(out) if state.tasks else Outcome("done", result=self._dumps(out))

    def _waiting(self, out: Any) -> Outcome:
        return Outcome("waiting", result=self._dumps(out))

    def _finished(self, saved: CheckpointTuple) -> Steps[Outcome]:
        """The last attempt ended after its last commit, before it could say so."""
        out = yield Stretch(None, self._limited(saved, self._config), self._control, published=False)
        return Outcome("done", result=self._dumps(out))

    def _limited(self, saved: CheckpointTuple | None, config: RunnableConfig) -> RunnableConfig:
        """Carry the recursion limit over: LangGraph counts anew in each stretch, and a loop would never end."""
        limit = self._limit
        now = _step(saved)
        last = self._first_step + limit + 2
        if saved is None or now <= self._first_step:
            return {**config, "recursion_limit": limit}
        if now + 1 > last:
            raise self._limit_reached()
        if last - now < 3:
            # LangGraph takes no limit below 1, which would let it run further than the first stretch would have.
            self._left = last - now
        return {**config, "recursion_limit": max(1, last - now - 2)}

    @property
    def _limit(self) -> int:
        own = (self.graph.config or {}).get("recursion_limit")
        return int(self._config.get("recursion_limit") or own or DEFAULT_RECURSION_LIMIT)

    def _limit_reached(self) -> GraphRecursionError:
        return GraphRecursionError(
            create_error_message(
                message=f"Recursion limit of {self._limit} reached without hitting a stop condition. You can increase "
                "the limit by setting the `recursion_limit` config key.",
                error_code=ErrorCode.GRAPH_RECURSION_LIMIT,
            )
        )

    # --- waiting

    def _position(self, state: StateSnapshot, saved: CheckpointTuple) -> Steps[Position]:
        """Classify the saved state."""
        yield from ()
        if not state.tasks:
            return "finished"
        if any(task.error for task in state.tasks):
            return "failed"
        if state.interrupts:
            return "interrupted"
        if (yield from self._at_breakpoint(state, saved)):
            return "breakpoint"
        return "runnable"

    def _at_breakpoint(self, state: StateSnapshot, saved: CheckpointTuple) -> Steps[bool]:
        """Whether the thread stands at a static breakpoint that nobody has approved (see `should_interrupt`)."""
        before = self.options.get("interrupt_before", self.graph.interrupt_before_nodes)
        after = self.options.get("interrupt_after", self.graph.interrupt_after_nodes)
        seen = saved.checkpoint["versions_seen"].get(_INTERRUPT, {})
        versions = saved.checkpoint["channel_versions"]
        if not (before or after) or not any(
            name not in seen or cast(Any, version) > seen[name] for name, version in versions.items()
        ):
            return False
        if _any_in(before, (task.name for task in state.tasks)):
            return True
        if not after or not state.parent_config:
            return False
        parent: StateSnapshot = yield State(state.parent_config)
        return _any_in(after, (task.name for task in parent.tasks))

    def _answer(self, state: StateSnapshot, saved: CheckpointTuple, position: str) -> Steps[tuple[Any, bool]]:
        """Return what to run the waiting graph with, and whether it has to wait on instead."""
        head = self.attempt.head
        if not head.signals:
            return None, True
        name = head.signals[0]
        checkpoint = saved.config["configurable"]["checkpoint_id"]
        answers = _answers(saved)
        noted = head.taken if head.taken and head.taken["signal"] == name else None
        if noted and (noted["checkpoint"] != checkpoint or noted["answers"] != answers):
            # The graph took this answer before the last attempt ended, and waits for another one by now.
            self.attempt.head = yield Note(lambda now: _spent(now, name))
            # Another signal comes with options of its own: let the next attempt take it.
            return None, True
        assert self._answer_given is not None
        value = self._answer_given["input"]
        if not noted:
            call = "config" in self._answer_given
            taken = {"signal": name, "checkpoint": checkpoint, "answers": answers, "call": call}
            self.attempt.head = yield Note(lambda now: replace(now, taken=taken))
        repeated = noted is not None and any(task_id == _NULL_TASK for task_id, _, _ in saved.pending_writes or ())
        self._repeats = False
        return _as_input(value, state, repeated), False


def _step(saved: CheckpointTuple | None) -> int:
    """Return the superstep of a checkpoint; -2 for a thread that has none, as LangGraph counts."""
    return int(saved.metadata.get("step", -2)) if saved else -2


def _answers(saved: CheckpointTuple) -> int:
    """Return how many answers the tasks of a checkpoint have taken; LangGraph saves them with the next interrupt."""
    return sum(
        len(value) if isinstance(value, list) else 1
        for task_id, channel, value in saved.pending_writes or ()
        if channel == _RESUME and task_id != _NULL_TASK
    )


def _as_input(value: Any, state: StateSnapshot, repeated: bool) -> Any:
    """Return the graph input that gives `value` to the waiting tasks, the same however often it is given."""
    command = value if isinstance(value, Command) else None
    resume = command.resume if command else value
    if resume is None and not (command and (command.update or command.goto)):
        return None
    if resume is not None and not is_answer_by_id(resume) and len(state.interrupts) == 1:
        # By id LangGraph gives it to this interrupt only; a bare value would also answer the task's next one.
        resume = {state.interrupts[0].id: resume}
    if command is None:
        return Command(resume=resume)
    return Command(resume=resume) if repeated else replace(command, resume=resume)


def _spent(now: RunHead, name: str) -> RunHead | None:
    if name not in now.signals:
        return None
    return spent(now, name)


def is_answer_by_id(resume: Any) -> bool:
    return isinstance(resume, dict) and bool(resume) and all(_is_interrupt_id(key) for key in resume)


def _is_interrupt_id(key: Any) -> bool:
    return isinstance(key, str) and len(key) == 32 and all(c in "0123456789abcdef" for c in key)


def _any_in(nodes: str | Sequence[str] | None, names: Iterable[str]) -> bool:
    return bool(nodes) and (nodes == "*" or any(name in (nodes or ()) for name in names))


def _output(state: StateSnapshot) -> Any:
    """Return what `invoke` would have returned at this waiting state."""
    values = state.values if isinstance(state.values, dict) else {}
    return {**values, _INTERRUPT: list(state.interrupts)} if state.interrupts else state.values
