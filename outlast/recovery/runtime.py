"""A runtime: one state store, the agents of this process on it, its worker, and the callers that wait for runs."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import grpc
from dapr.ext.workflow import DaprWorkflowClient

from outlast.checkpointer import keys, records
from outlast.checkpointer.client import Guarantee, Save, StateClient, Steps, load
from outlast.checkpointer.registry import RUNS
from outlast.checkpointer.sidecar import Address, configured
from outlast.errors import AgentNotFoundError, DuplicateAgentError, SidecarUnavailableError, StoreError
from outlast.recovery import runs, turns
from outlast.recovery.attempt import Agent, Attachment, Publish
from outlast.recovery.policy import Breakers
from outlast.recovery.runs import RunHead, RunInput, Typed
from outlast.recovery.worker import Worker, sdk_logging
from outlast.recovery.workflow import RUN, WAKE

logger = logging.getLogger("outlast.runtime")

WORKER: Final = "OUTLAST_WORKER"
"""Environment variable: `off` keeps a process from working on runs by itself; it then only submits."""
_CHUNK_TTL: Final = 3600
_UNSERVED: Final = 3.0
"""Seconds to wait for the sidecar's answer to a workflow call where this process has no worker."""


class Runtime:
    """Everything outlast has in a process for one state store. Threads may share it.

    Args:
        store: Name of the state store component.
        address: The sidecar; found in the environment, or started embedded on first use, if not given.
        guarantee: See StateClient.
        works: Whether it carries runs on; else it only submits and reads.
    """

    def __init__(
        self,
        store: str = "statestore",
        address: Address | None = None,
        *,
        guarantee: Guarantee = "exactly-once",
        works: bool = True,
    ) -> None:
        self.store = store
        self.guarantee: Guarantee = guarantee
        self.agents: dict[str, Agent] = {}
        self.breakers = Breakers()
        self._works = works
        self._stops = 0
        self._address = address
        self._lock = threading.RLock()
        self._client: StateClient | None = None
        self._workflows: DaprWorkflowClient | None = None
        self._worker: Worker | None = None
        self._exit_watched = False
        self._closed = False
        self._attachments: dict[str, list[Attachment]] = {}

    @property
    def client(self) -> StateClient:
        """The state store."""
        with self._lock:
            if self._client is None:
                self._client = StateClient(self.store, self._address, guarantee=self.guarantee)
            return self._client

    @property
    def workflows(self) -> DaprWorkflowClient:
        """The sidecar's workflow client."""
        with self._lock:
            if self._workflows is None:
                address = self.client.address
                self._workflows = DaprWorkflowClient(
                    host=address.host, port=str(address.port), logger_options=sdk_logging()
                )
            return self._workflows

    # --- agents and the worker

    def register(self, agent: Agent, same: Callable[[object], bool]) -> None:
        """Make an agent known by its name; starts the worker where unfinished runs may wait for it.

        Args:
            same: Tells whether an agent already known by this name is the same one, made again.

        Raises:
            DuplicateAgentError: If another agent has the name.
        """
        with self._lock:
            other = self.agents.get(agent.name)
            if other is not None and not same(other):
                raise DuplicateAgentError(
                    f"another agent of this process is named {agent.name!r}: give one of them another name, "
                    "durable(graph, name=...); the name finds the runs again after a restart"
                )
            self.agents[agent.name] = agent
        if self._worker is None and self._may_have_runs():
            starts = functools.partial(self._start_quietly, self._stops)
            threading.Thread(target=starts, name="outlast-start", daemon=True).start()

    def _may_work(self) -> bool:
        return self._works and os.environ.get(WORKER, "").lower() != "off"

    def _may_have_runs(self) -> bool:
        if not self._may_work():
            return False
        if configured() or self._address:
            return True
        from outlast.embedded import default_path

        return default_path().exists()

    def _start_quietly(self, stops: int) -> None:
        # A moment for the module to register its other agents.
        time.sleep(0.1)
        if self._stops != stops:
            return  # stopped meanwhile
        try:
            self.start_worker()
        except Exception as error:
            logger.warning("the worker could not start; it will on first use: %s", error)

    def start_worker(self) -> Worker | None:
        """Start the worker of this process, unless it runs already or OUTLAST_WORKER is `off`.

        Raises:
            SidecarUnavailableError: If no sidecar answers.
        """
        if not self._may_work():
            return None
        with self._lock:
            if self._worker is None and not self._closed:
                if not self._exit_watched:
                    # First, so that a program that ends meanwhile is not kept alive by a worker nobody stops.
                    self._exit_watched = _before_exit(self.close)
                if self._exit_watched:
                    worker = Worker(self)
                    worker.start()
                    self._worker = worker
            return self._worker

    def stop(self, grace: float = 5.0) -> None:
        """Stop the worker: attempts end at their next boundary, and are left to others after `grace` seconds."""
        with self._lock:
            self._stops += 1
            worker, self._worker = self._worker, None
        if worker:
            worker.stop(grace)

    def close(self) -> None:
        """Stop the worker and close the connections; the runtime cannot be used any more."""
        with self._lock:
            self._closed = True
        self.stop()
        with self._lock:
            if self._workflows:
                self._workflows.close()
            if self._client:
                self._client.close()

    def agent(self, name: str) -> Agent:
        """Return an agent of this process by name.

        Raises:
            AgentNotFoundError: If there is none.
        """
        agent = self.agents.get(name)
        if agent is None:
            known = ", ".join(map(repr, sorted(self.agents))) or "none"
            raise AgentNotFoundError(
                f"no agent named {name!r} in this process (it has {known}); import the module that makes it durable, "
                "or start `outlast worker module:attr` where it is"
            )
        return agent

    # --- runs

    def submit(self, run_id: str, submitted: RunInput, *, queue: bool = True, attach: Attachment | None = None) -> bool:
        """Accept a run and schedule its workflow. Returns whether this call made the run.

        Raises:
            RunConflictError, ThreadBusyError: See `turns.accept`.
            SidecarUnavailableError: If no sidecar answers.
        """
        self.start_worker()
        if attach:
            self.attach(run_id, attach)
        limit = self.client.capabilities.quirks.max_value
        head, mine = self.client.run(turns.accept(run_id, submitted, limit, queue))
        if not head.ended and head.status == "accepted":
            self.schedule(head)
        return mine

    def schedule(self, head: RunHead) -> None:
        """Start the workflow of a run unless it is active already."""
        ref = {"run": head.run_id, "turn": 0, "failures": 0}
        try:
            self._bounded(
                functools.partial(self.workflows.schedule_new_workflow, RUN, input=ref, instance_id=head.instance)
            )
        except (TimeoutError, grpc.RpcError) as error:
            if isinstance(error, grpc.RpcError) and _already_there(error):
                return
            if isinstance(error, grpc.RpcError) and not _nobody_there(error):
                self._raise(error)
            # The run is accepted: the worker that comes schedules it.
            logger.warning("run %s waits for a worker: none is connected to the %s", head.run_id, self.client.address)

    def _bounded(self, call: Callable[[], Any]) -> None:
        """Make a workflow call that daprd would hold for as long as no worker is connected to it.

        Raises:
            TimeoutError: If it is not answered in time. Nothing is lost: the worker that comes finds the run.
        """
        if self._worker is not None:
            call()
            return
        outcome: list[BaseException | None] = []

        def make() -> None:
            try:
                call()
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=make, name="outlast-call", daemon=True)
        thread.start()
        thread.join(_UNSERVED)
        if not outcome:
            raise TimeoutError
        if outcome[0] is not None:
            raise outcome[0]

    def wake(self, run_id: str) -> None:
        """End the wait of a run's workflow, if it waits."""
        head = self.client.run(runs.read(run_id))
        try:
            self._bounded(functools.partial(self.workflows.raise_workflow_event, head.instance, WAKE))
        except (grpc.RpcError, TimeoutError) as error:
            # The workflow is not there yet; its worker finds what has come when it is.
            logger.debug("run %s could not be woken: %s", run_id, error)

    def signal(self, run_id: str, value: Typed, addressed: bool = False) -> None:
        """Hand a run a signal and wake it. Arguments and errors as of `runs.signal`."""
        self.start_worker()
        self.client.run(runs.signal(run_id, value, self.client.capabilities.quirks.max_value, addressed))
        self.wake(run_id)

    def answer(self, run_id: str, question_id: str, value: Typed) -> None:
        """Answer what outlast asks of a waiting run, and wake it. Errors as of `runs.answer`."""
        self.start_worker()
        self.client.run(runs.answer(run_id, question_id, value, self.client.capabilities.quirks.max_value))
        self.wake(run_id)

    def retry(self, run_id: str) -> RunHead:
        """Let a failed run go on from where it failed. Errors as of `turns.retry`."""
        self.start_worker()
        head = self.client.run(turns.retry(run_id))
        self.schedule(head)
        return head

    def cancel(self, run_id: str, compensate: bool = False) -> RunHead:
        """Ask a run to end: at once where it waits, else at its next boundary.

        Args:
            compensate: Whether its finished steps are undone first, by what they gave as `compensate`.
        """
        self.start_worker()
        head = self.client.run(
            runs.change(
                run_id,
                lambda now: None if now.ended or now.cancel else replace(now, cancel=True, compensate=compensate),
            )
        )
        self.wake(run_id)
        return head

    def supersede(self, run_id: str) -> None:
        """End a run that waits for an answer, in favour of a new one on its thread."""
        successor = self.client.run(turns.supersede(run_id))
        for other in filter(None, (run_id, successor)):
            self.wake(other)

    def run_ids(self) -> list[str]:
        """Return the ids of all runs ever accepted in this store."""
        return self.client.run(RUNS.names())

    def _raise(self, error: grpc.RpcError) -> None:
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            raise SidecarUnavailableError(f"no answer from the {self.client.address}: {error.details()}") from error
        raise StoreError(f"workflow call to the {self.client.address} failed: {error.details()}") from error

    # --- callers in this process

    def attachment(self, run_id: str) -> Attachment | None:
        """Return the caller that waits for a run in this process, the last to come if there are several."""
        with self._lock:
            waiting = self._attachments.get(run_id)
            return waiting[-1] if waiting else None

    def attach(self, run_id: str, attachment: Attachment) -> None:
        """Enter a caller that waits for a run."""
        with self._lock:
            self._attachments.setdefault(run_id, []).append(attachment)

    def detach(self, run_id: str, attachment: Attachment) -> None:
        """Remove a caller."""
        with self._lock:
            waiting = self._attachments.get(run_id, [])
            if attachment in waiting:
                waiting.remove(attachment)
            if not waiting:
                self._attachments.pop(run_id, None)

    def failing(self, run_id: str, error: BaseException) -> None:
        """Give the callers in this process the exception that a run is about to fail with."""
        with self._lock:
            for attachment in self._attachments.get(run_id, ()):
                attachment.failure = error

    def settled(self, head: RunHead) -> None:
        """Tell the callers in this process that a run has ended or waits."""
        with self._lock:
            waiting = list(self._attachments.get(head.run_id, ()))
        for attachment in waiting:
            attachment.settle()

    # --- stream chunks

    def publisher(self, head: RunHead) -> Publish:
        """Return what hands an attempt's stream chunks to callers here, and to those elsewhere through the store."""
        assert head.running is not None
        epoch, numbers = head.running.epoch, iter(range(1 << 62))

        def publish(chunk: Any, dumps: Callable[[Any], Typed]) -> None:
            with self._lock:
                waiting = [found for found in self._attachments.get(head.run_id, ()) if found.chunks is not None]
            for attachment in waiting:
                assert attachment.chunks is not None
                attachment.chunks.put(chunk)
            if not waiting:
                self.client.run(_save_chunk(head.run_id, epoch, next(numbers), dumps(chunk)))

        return publish

    def chunks(self, run_id: str, epoch: int, start: int) -> list[Typed]:
        """Return the stream chunks an attempt elsewhere has published, from number `start` on."""
        return self.client.run(_load_chunks(run_id, epoch, start))


def _chunk_key(run_id: str, epoch: int, number: int) -> str:
    return f"{keys.run_key(run_id)}-s{epoch}-{number}"


def _save_chunk(run_id: str, epoch: int, number: int, chunk: Typed) -> Steps[None]:
    # For display only, so no head names it; it goes with its time to live.
    key = _chunk_key(run_id, epoch, number)
    yield Save([(key, records.encode(records.STREAM, list(chunk)))], ttl=_CHUNK_TTL)


def _load_chunks(run_id: str, epoch: int, start: int) -> Steps[list[Typed]]:
    names = [_chunk_key(run_id, epoch, number) for number in range(start, start + 50)]
    found = yield from load(names)
    chunks: list[Typed] = []
    for name in names:
        if name not in found:
            break
        kind, data = records.decode(name, records.STREAM, found[name])
        chunks.append((kind, data))
    return chunks


def _already_there(error: grpc.RpcError) -> bool:
    return error.code() == grpc.StatusCode.ALREADY_EXISTS or "already" in (error.details() or "")


def _nobody_there(error: grpc.RpcError) -> bool:
    """Whether daprd has lost its last worker just now: it does not host the workflow's actors without one."""
    details = error.details() or ""
    return "not registered" in details or "did not find address for actor" in details


def _before_exit(stop: Callable[[], None]) -> bool:
    """Call `stop` when the program's own thread has ended, before the interpreter waits for the SDK's threads.

    `atexit` would be too late: those threads would keep the interpreter from getting there.
    Returns False if the program is ending already.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(stop)
        except RuntimeError:
            return False
        return True

    def watch() -> None:
        threading.main_thread().join()
        stop()

    threading.Thread(target=watch, name="outlast-exit", daemon=True).start()
    return True


_RUNTIMES: dict[tuple[str | None, ...], Runtime] = {}
_RUNTIMES_LOCK = threading.Lock()
_WHERE: Final = ("DAPR_GRPC_ENDPOINT", "DAPR_GRPC_PORT", "OUTLAST_EMBEDDED_PATH")


def default_runtime(store: str = "statestore", guarantee: Guarantee | None = None) -> Runtime:
    """Return the process's runtime for a state store of the sidecar that the environment names now.

    Args:
        guarantee: See StateClient; the one it was made with, or `exactly-once`, if not given.

    Raises:
        ValueError: If the runtime was made with another guarantee.
    """
    # Another sidecar named by the environment is another place: tests and notebooks change it within a process.
    key = (store, *(os.environ.get(name) for name in _WHERE))
    with _RUNTIMES_LOCK:
        runtime = _RUNTIMES.get(key)
        if runtime is None:
            runtime = _RUNTIMES[key] = Runtime(store, guarantee=guarantee or "exactly-once")
        elif guarantee not in (None, runtime.guarantee):
            raise ValueError(f"store {store!r} is in use with guarantee={runtime.guarantee!r}: use one for all agents")
        return runtime
