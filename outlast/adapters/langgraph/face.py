"""DurableGraph: a compiled LangGraph graph whose runs survive the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final, Literal, cast

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import merge_configs, var_child_runnable_config
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.pregel import Pregel
from langgraph.types import Command

from outlast.adapters import langchain, loops
from outlast.adapters.langgraph import mends, payload, streams
from outlast.adapters.langgraph.drive import (
    Call,
    Drive,
    Note,
    Saved,
    State,
    Stretch,
    is_answer_by_id,
)
from outlast.checkpointer.saver import DaprSaver
from outlast.checkpointer.thread import ThreadLog
from outlast.errors import RunNotFoundError, RunStateError
from outlast.recovery import runs, steps
from outlast.recovery.answers import Answer, give_answer
from outlast.recovery.attempt import Attachment, Attempt, Outcome
from outlast.recovery.budget import Budget
from outlast.recovery.handle import RunHandle
from outlast.recovery.policy import Policies
from outlast.recovery.runs import RunHead, RunInput, Typed
from outlast.recovery.runtime import Runtime

_TASK: Final = "__pregel_task_id"
IfBusy = Literal["queue", "reject"]


class DurableGraph(Runnable[Any, Any]):
    """Has the methods of a compiled graph; runs that it starts survive `kill -9` and go on by themselves.

    The graph it was made of is not changed. Inside a node of another graph it behaves like that graph. State methods
    (`get_state`, `update_state`, …) work on the threads in the state store.

    Args:
        graph: A compiled graph, `create_agent(...)`, or an `@entrypoint`.
        name: Finds the runs again after a restart.
        runtime: The state store and worker to use.
        serde: Serialises state; LangGraph's if not given.
        if_busy: What a submission does if its thread has an unfinished run: wait for its turn, or raise
            ThreadBusyError. A run that waits for an answer gives way to a new one, as in LangGraph.
        policies: What to do when model calls, tool calls, marked functions and runs fail.
        budget: What a run may spend.

    Raises:
        DuplicateAgentError: If another agent of this process has the name.
    """

    def __init__(
        self,
        graph: Pregel[Any, Any, Any, Any],
        name: str,
        runtime: Runtime,
        *,
        serde: SerializerProtocol | None = None,
        if_busy: IfBusy = "queue",
        policies: Policies | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.name: str = name
        self._graph = graph
        self._runtime = runtime
        self._given_serde = serde
        self._if_busy = if_busy
        self.policies = policies or Policies()
        self.budget = budget or Budget()
        mends.apply()
        langchain.activate()
        runtime.register(self, self._is_same)

    def __repr__(self) -> str:
        return f"DurableGraph({self.name!r})"

    def _is_same(self, other: object) -> bool:
        return isinstance(other, DurableGraph) and set(other._graph.nodes) == set(self._graph.nodes)

    @property
    def runtime(self) -> Runtime:
        """The state store and the worker of this agent."""
        return self._runtime

    @functools.cached_property
    def _saver(self) -> DaprSaver:
        own = self._graph.checkpointer
        ttl = own.ttl_config if isinstance(own, DaprSaver) else None
        return DaprSaver(serde=self._given_serde, client=self._runtime.client, ttl=ttl)

    @functools.cached_property
    def _bound(self) -> Pregel[Any, Any, Any, Any]:
        """The graph on the state store, for everything that is not a run."""
        return self._graph.copy({"checkpointer": self._saver})

    @property
    def codec(self) -> SerializerProtocol:
        """Serialises the results of steps. For the controller."""
        return self._serde

    @property
    def _serde(self) -> SerializerProtocol:
        return self._saver.serde

    def _dumps(self, value: Any) -> Typed:
        return payload.dumps(self._serde, "result", value)

    # Everything else is the graph's own.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._bound, name)

    @property
    def InputType(self) -> Any:
        """The type of the graph's input."""
        return self._graph.InputType

    @property
    def OutputType(self) -> Any:
        """The type of the graph's output."""
        return self._graph.OutputType

    def get_graph(self, config: RunnableConfig | None = None, *, xray: int | bool = False) -> Any:
        """Return a drawable representation of the graph."""
        return self._graph.get_graph(config, xray=xray)

    def get_input_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the schema of the graph's input."""
        return self._graph.get_input_schema(config)

    def get_output_schema(self, config: RunnableConfig | None = None) -> Any:
        """Return the schema of the graph's output."""
        return self._graph.get_output_schema(config)

    def get_input_jsonschema(self, config: RunnableConfig | None = None) -> Any:
        """Return the JSON schema of the graph's input."""
        return self._graph.get_input_jsonschema(config)

    def get_output_jsonschema(self, config: RunnableConfig | None = None) -> Any:
        """Return the JSON schema of the graph's output."""
        return self._graph.get_output_jsonschema(config)

    def config_schema(self, *, include: Sequence[str] | None = None) -> Any:
        """Return the schema of what the graph can be configured with."""
        return self._graph.config_schema(include=include)

    def get_config_jsonschema(self, *, include: Sequence[str] | None = None) -> Any:
        """Return the JSON schema of what the graph can be configured with."""
        return self._graph.get_config_jsonschema(include=include)

    @property
    def config_specs(self) -> Any:
        """What the graph can be configured with."""
        return self._graph.config_specs

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> DurableGraph:
        """Return this agent with other defaults; it keeps its name and its runs."""
        return _configured(self, self._graph.with_config(config, **kwargs))

    # --- running, as LangGraph has it

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the graph durably and return what LangGraph's `invoke` returns; see there for the arguments.

        Returns when the run has ended or waits for an answer (the result then has `__interrupt__`). If the process dies
        meanwhile the run goes on without it; `config["run_id"]` names it, to attach to it again by the same call.

        Raises:
            RunFailedError: If the run failed in another process. In this one the graph's own exception is raised.
            SerializationError: If the input cannot be stored; nothing has begun then.
        """
        if _nested(config):
            return self._graph.invoke(input, config, **kwargs)
        handle = self._begin(input, config, kwargs, "sync")
        try:
            return handle.result()
        finally:
            handle.close()

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Run the graph durably on this event loop. Async face of `invoke`."""
        if _nested(config):
            return await self._graph.ainvoke(input, config, **kwargs)
        handle = await self.astart(input, config, **kwargs)
        try:
            return await handle.aresult()
        finally:
            handle.close()

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Run the graph durably and yield what LangGraph's `stream` yields; see there for the arguments.

        A part of the run that was lost with its worker is streamed again from its last checkpoint.
        """
        if _nested(config):
            yield from self._graph.stream(input, config, **kwargs)
            return
        wanted = streams.wanted(self._graph, kwargs)
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        handle = self._begin(input, config, kwargs, "sync", wanted, chunks)
        try:
            yield from streams.follow(self._runtime, handle, chunks, self._serde)
        finally:
            handle.close()

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Run the graph durably on this event loop and yield chunks. Async face of `stream`."""
        if _nested(config):
            async for chunk in self._graph.astream(input, config, **kwargs):
                yield chunk
            return
        wanted = streams.wanted(self._graph, kwargs)
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = asyncio.get_running_loop()
        begin = functools.partial(self._begin, input, config, kwargs, "async", wanted, chunks, loop=loop)
        handle = await asyncio.to_thread(begin)
        try:
            async for chunk in streams.afollow(self._runtime, handle, chunks, self._serde):
                yield chunk
        finally:
            handle.close()

    # --- runs

    def start(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        run_id: str | None = None,
        if_busy: IfBusy | None = None,
        **kwargs: Any,
    ) -> RunHandle[Any]:
        """Submit a run and return at once; from then on it will be carried out, whatever happens to this process.

        Args:
            input: As for `invoke`; `None` and `Command` go on with what the thread has.
            config: As for `invoke`. Without a `thread_id` the run gets a thread of its own.
            run_id: Names the submission: the same run_id is the same run, however often it is submitted.
            if_busy: Overrides what the agent does if the thread is busy.

        Raises:
            RunConflictError: If `run_id` is another submission.
            ThreadBusyError: If the thread is busy and `if_busy="reject"`.
            SerializationError: If the input cannot be stored.
            SidecarUnavailableError: If no sidecar answers.
        """
        return self._begin(input, config, kwargs, "sync", run_id=run_id, if_busy=if_busy)

    async def astart(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        run_id: str | None = None,
        if_busy: IfBusy | None = None,
        **kwargs: Any,
    ) -> RunHandle[Any]:
        """Submit a run that uses the graph's async methods, on this event loop while it lives; else as `start`."""
        loop = asyncio.get_running_loop()
        begin = functools.partial(
            self._begin, input, config, kwargs, "async", run_id=run_id, if_busy=if_busy, loop=loop
        )
        return await asyncio.to_thread(begin)

    def get_run(self, run_id: str) -> RunHandle[Any]:
        """Return a handle on a run that was submitted before, by any process.

        Raises:
            RunNotFoundError: If there is no such run.
        """
        self._runtime.client.run(runs.read(run_id))
        self._runtime.start_worker()
        return self._handle(run_id)

    def _handle(self, run_id: str, attachment: Attachment | None = None) -> RunHandle[Any]:
        return RunHandle(self._runtime, run_id, self._serde, self._give_answer, attachment)

    def _begin(
        self,
        input: Any,
        config: RunnableConfig | None,
        options: dict[str, Any],
        mode: Literal["sync", "async"],
        stream: dict[str, Any] | None = None,
        chunks: queue.SimpleQueue[Any] | None = None,
        *,
        run_id: str | None = None,
        if_busy: IfBusy | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> RunHandle[Any]:
        options = payload.run_options(options)
        config = merge_configs(self._graph.config, _inherited(), config)
        # What LangGraph itself hands down to nodes is of no use to a run of its own.
        own = {key: value for key, value in config.get("configurable", {}).items() if not key.startswith("__")}
        config["configurable"] = own
        run_id = run_id or payload.run_id_of(config)
        thread_id = str(config.get("configurable", {}).get("thread_id") or run_id)
        attachment = Attachment(loop=loop, extras={"config": config, "options": options}, chunks=chunks)
        if input is None or isinstance(input, Command):
            waiting = self._waiting_run(thread_id)
            if waiting is not None and waiting != run_id:
                handle = self._handle(waiting, attachment)
                self._runtime.attach(waiting, attachment)
                self._give(waiting, input, payload.encode(self._serde, input, config, options, mode, stream))
                return handle
        else:
            waiting = self._waiting_run(thread_id)
            if waiting is not None and waiting != run_id:
                # As in LangGraph, new input on an interrupted thread gives up what was asked there.
                self._runtime.supersede(waiting)
        submitted = RunInput(
            agent=self.name,
            thread_id=thread_id,
            payload=payload.encode(self._serde, input, config, options, mode, stream),
            fingerprint=payload.fingerprint(self._serde, self.name, thread_id, input),
        )
        wait = (if_busy or self._if_busy) == "queue"
        handle = self._handle(run_id, attachment)
        try:
            self._runtime.submit(run_id, submitted, queue=wait, attach=attachment)
        except BaseException:
            handle.close()
            raise
        return handle

    def _waiting_run(self, thread_id: str) -> str | None:
        """Return the run that holds a thread and waits for an answer, if there is one."""
        thread = self._runtime.client.run(ThreadLog(thread_id).read())
        if thread is None or not thread.active:
            return None
        try:
            head = self._runtime.client.run(runs.read(thread.active))
        except RunNotFoundError:
            return None
        return head.run_id if head.status == "waiting" else None

    def _give_answer(self, run_id: str, value: Any) -> None:
        self._give(run_id, value, payload.encode(self._serde, value, None))

    def _give(self, run_id: str, value: Any, record: Typed) -> None:
        resume = value.resume if isinstance(value, Command) else value
        if isinstance(resume, Answer):
            give_answer(self._runtime, self._serde, run_id, resume)
            return
        addressed = is_answer_by_id(resume)
        head = self._runtime.client.run(runs.read(run_id))
        if head.question:
            raise RunStateError(
                f"run {run_id!r} waits for an answer to a question of outlast: give it with "
                "handle.answer(done(...) | again() | fail() | allow(...)), or `outlast answer`"
            )
        if head.status == "waiting" and resume is not None and not addressed:
            asked = self._bound.get_state({"configurable": {"thread_id": head.thread_id}}).interrupts
            if len(asked) > 1:
                raise RunStateError(
                    f"run {run_id!r} waits for {len(asked)} answers: give them by id, "
                    f"resume({{{', '.join(f'{item.id!r}: ...' for item in asked)}}})"
                )
        self._runtime.signal(run_id, record, addressed)

    # --- the controller's side

    def advance(self, attempt: Attempt) -> Outcome:
        """Carry a run on. Called by the controller."""
        submitted, answer = self._in_force(attempt)
        config = self._config(attempt, submitted)
        drive = Drive(self._graph, attempt, submitted, config, self._saver, self._dumps, answer)
        # In this thread's context, which LangGraph and asyncio hand on to all that runs in it.
        steps.enter(attempt, drive.saver.locate)
        if submitted["mode"] == "sync":
            return self._run(drive, drive.steps())
        loop = attempt.loop = loops.choose(attempt.attachment.loop if attempt.attachment else None)
        try:
            return asyncio.run_coroutine_threadsafe(self._arun(drive, drive.steps()), loop).result()
        except (concurrent.futures.CancelledError, asyncio.CancelledError):
            # The caller's loop ended in the middle; the next attempt goes on without it.
            return Outcome("yielded")

    def _in_force(self, attempt: Attempt) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return what was submitted, with the options of the newest call on it, and the answer to apply, if any."""
        submitted = payload.decode(self._serde, attempt.submitted.payload)
        answer: dict[str, Any] | None = None
        for name in dict.fromkeys(filter(None, (attempt.head.call, *attempt.head.signals[:1]))):
            stored = self._runtime.client.run(runs.read_typed(attempt.run_id, name))
            call = payload.decode(self._serde, stored)
            submitted |= {key: value for key, value in call.items() if key != "input"}
            if name in attempt.head.signals:
                answer = call
        return submitted, answer

    def _config(self, attempt: Attempt, submitted: dict[str, Any]) -> RunnableConfig:
        config = {**submitted["config"]}
        if attempt.attachment and "config" in attempt.attachment.extras:
            # The caller is here: its callbacks and live objects are, too.
            given = attempt.attachment.extras["config"]
            config = {**config, **{key: value for key, value in given.items() if key not in config}}
        config["configurable"] = {**config.get("configurable", {}), "thread_id": attempt.thread_id}
        config["metadata"] = {**config.get("metadata", {}), "run_id": attempt.run_id}
        return cast(RunnableConfig, config)

    def _run(self, drive: Drive, todo: Any) -> Outcome:
        """Carry `todo` out with the graph's sync methods."""
        try:
            call: Call = next(todo)
            while True:
                try:
                    result = self._perform(drive, call)
                except BaseException as error:
                    if not drive.catches(error):
                        raise
                    call = todo.throw(error)
                else:
                    call = todo.send(result)
        except StopIteration as stop:
            return cast(Outcome, stop.value)

    def _perform(self, drive: Drive, call: Call) -> Any:
        client = self._runtime.client
        match call:
            case Stretch():
                if call.published and drive.submitted["stream"]:
                    collected = streams.Collector(drive, call, self._dumps)
                    for chunk in drive.graph.stream(call.input, call.config, **collected.arguments()):
                        collected.add(chunk)
                    return collected.result()
                return drive.graph.invoke(call.input, call.config, **_arguments(drive, call))
            case State():
                return drive.graph.get_state(call.config or drive.thread)
            case Saved():
                return drive.saver.get_tuple(_addressed(drive, call))
            case Note():
                return client.run(_noted(drive, call))

    async def _arun(self, drive: Drive, todo: Any) -> Outcome:
        """Carry `todo` out with the graph's async methods."""
        try:
            call: Call = next(todo)
            while True:
                try:
                    result = await self._aperform(drive, call)
                except BaseException as error:
                    if not drive.catches(error):
                        raise
                    call = todo.throw(error)
                else:
                    call = todo.send(result)
        except StopIteration as stop:
            return cast(Outcome, stop.value)

    async def _aperform(self, drive: Drive, call: Call) -> Any:
        client = self._runtime.client
        match call:
            case Stretch():
                if call.published and drive.submitted["stream"]:
                    collected = streams.Collector(drive, call, self._dumps)
                    async for chunk in drive.graph.astream(call.input, call.config, **collected.arguments()):
                        collected.add(chunk)
                    return collected.result()
                return await drive.graph.ainvoke(call.input, call.config, **_arguments(drive, call))
            case State():
                return await drive.graph.aget_state(call.config or drive.thread)
            case Saved():
                return await drive.saver.aget_tuple(_addressed(drive, call))
            case Note():
                return await client.arun(_noted(drive, call))


def _arguments(drive: Drive, call: Stretch) -> dict[str, Any]:
    return {**drive.options, "durability": "sync", "control": call.control}


def _addressed(drive: Drive, call: Saved) -> RunnableConfig:
    configurable = {**drive.thread["configurable"], "checkpoint_ns": ""}
    if call.checkpoint_id:
        configurable["checkpoint_id"] = call.checkpoint_id
    return {"configurable": configurable}


def _noted(drive: Drive, call: Note) -> Any:
    running = drive.attempt.head.running

    def change(now: RunHead) -> RunHead | None:
        return call.change(now) if now.running == running else None

    return runs.change(drive.attempt.run_id, change)


def _nested(config: RunnableConfig | None) -> bool:
    """Whether the call comes from inside a node: then the graph is a subgraph, and the outer run is the durable one."""
    return _TASK in merge_configs(_inherited(), config).get("configurable", {})


def _inherited() -> RunnableConfig | None:
    """Return the config of the runnable this code runs in, which LangChain hands down."""
    return var_child_runnable_config.get()


def _configured(agent: DurableGraph, graph: Pregel[Any, Any, Any, Any]) -> DurableGraph:
    clone = object.__new__(DurableGraph)
    clone.name = agent.name
    clone._graph = graph
    clone._runtime = agent._runtime
    clone._given_serde = agent._given_serde
    clone._if_busy = agent._if_busy
    clone.policies = agent.policies
    clone.budget = agent.budget
    return clone
