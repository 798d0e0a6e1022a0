"""The sidecar as a whole: start, stop, and one per file in a process."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ipaddress
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import dapr.ext.workflow._durabletask.internal.orchestrator_service_pb2_grpc as workflow_grpc
import grpc
from dapr.proto import api_service_v1

from outlast.embedded.database import Database
from outlast.embedded.dispatch import Dispatcher
from outlast.embedded.errors import EmbeddedStoreError
from outlast.embedded.health import HealthServer
from outlast.embedded.services import StateService, WorkflowService

logger = logging.getLogger("outlast.embedded")

PATH_VARIABLE = "OUTLAST_EMBEDDED_PATH"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAX_THREADS = 4096  # each open work-item stream and each waiting client holds one
_IDLE_SECONDS = 10.0
_STOP_SECONDS = 1.0


def default_path() -> Path:
    """The database file: ``$OUTLAST_EMBEDDED_PATH``, or ``.outlast/outlast.db`` in the working directory."""
    return Path(os.environ.get(PATH_VARIABLE) or Path(".outlast") / "outlast.db").absolute()


class _Threads(concurrent.futures.Executor):
    """A pool of daemon threads that grows on demand: the standard one would hold the interpreter's exit up."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._count = 0
        self._free = 0  # threads not at work, less the calls queued for them

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._mutex:
            spawn = self._free <= 0 and self._count < _MAX_THREADS
            if spawn:
                self._count += 1
            else:
                self._free -= 1
        self._queue.put((future, lambda: fn(*args, **kwargs)))
        if spawn:
            threading.Thread(target=self._run, name="outlast-grpc", daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            try:
                future, work = self._queue.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._mutex:
                    if self._free > 0:
                        self._free -= 1
                        self._count -= 1
                        return
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work
            with self._mutex:
                self._free += 1


class EmbeddedSidecar:
    """Dapr's gRPC API for state and workflows over one SQLite file.

    Any number of processes on a machine may each run one over the same file; their workers share the work.

    Args:
        path: The database file; `default_path()` if None. Created with its folder, readable by its owner alone.
        app_id: Dapr's app id: state and work of different app ids never meet.
        stores: The names of the state stores to offer.
        host: An IPv4 loopback address.
        grpc_port: 0 takes a free one.
        http_port: 0 takes a free one.

    Raises:
        ValueError: The host is not an IPv4 loopback address.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        app_id: str = "outlast",
        stores: Sequence[str] = ("statestore",),
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
    ) -> None:
        _require_loopback(host)
        # Resolved, for the lock folder beside it must be the same for all who reach the file by different links.
        self.path = Path(os.path.realpath(path if path is not None else default_path()))
        self.app_id = app_id
        self.stores = tuple(stores)
        self.host = host
        self.grpc_port = grpc_port
        self.http_port = http_port
        self._running = False
        self._mutex = threading.RLock()
        self._pid = 0

    @property
    def grpc_address(self) -> str:
        """``host:port`` of the gRPC API."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def running(self) -> bool:
        """Whether this process has started it and not stopped it; false in a forked child."""
        return self._running and self._pid == os.getpid()

    def start(self) -> EmbeddedSidecar:
        """Open the file, bind the ports and serve. Starting twice does nothing.

        Raises:
            EmbeddedStoreError: The file cannot be used.
            OSError: A port is taken.
        """
        with self._mutex:
            if self.running:
                return self
            with contextlib.ExitStack() as undo:
                self._database = Database(self.path)
                undo.callback(self._database.close)
                try:
                    self._dispatcher = Dispatcher(self._database, self.app_id, Path(f"{self.path}-locks"))
                except OSError as error:
                    raise EmbeddedStoreError(f"cannot use the folder {self.path}-locks: {error}") from error
                undo.callback(self._dispatcher.stop)
                self._server = self._bind()
                undo.callback(self._server.stop, None)
                self._health = HealthServer(self.host, self.http_port)
                self.http_port = self._health.port
                undo.callback(self._health.stop)
                self._dispatcher.start()
                self._server.start()
                undo.pop_all()
            self._pid = os.getpid()
            self._running = True
            atexit.register(self.stop)
            logger.info("embedded sidecar for %s at %s", self.path, self.grpc_address)
            return self

    def _bind(self) -> grpc.Server:
        server = grpc.server(
            _Threads(),  # type: ignore[arg-type]
            options=[
                ("grpc.so_reuseport", 0),  # else a second sidecar could silently share a fixed port
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # Dapr's workers ping an idle connection every 30 s, which the default takes for an attack.
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        state = StateService(
            self._database,
            self.app_id,
            self.stores,
            connected_workers=lambda: self._dispatcher.connected_workers,
            shutdown=self._stop_soon,
        )
        api_service_v1.add_DaprServicer_to_server(state, server)
        workflow_grpc.add_TaskHubSidecarServiceServicer_to_server(
            WorkflowService(self._database, self._dispatcher, self.app_id), server
        )
        try:
            port = server.add_insecure_port(self.grpc_address)
        except RuntimeError as error:
            raise OSError(f"cannot bind {self.grpc_address}: {error}") from error
        if port == 0:
            raise OSError(f"cannot bind {self.grpc_address}: the port is taken")
        self.grpc_port = port
        return server

    def _stop_soon(self) -> None:
        # The caller is a gRPC handler, whose answer must go out first.
        timer = threading.Timer(0.1, self.stop)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """End all calls, give the work back to others, close the file. Idempotent and quick."""
        with self._mutex:
            if not self.running:
                return
            self._running = False
            atexit.unregister(self.stop)
            self._health.stop()
            # With grace, in which the dispatcher ends the long calls: gRPC writes to stderr about those it cuts off.
            stopped = self._server.stop(grace=_STOP_SECONDS)
            self._dispatcher.stop()
            stopped.wait(timeout=2 * _STOP_SECONDS)
            self._database.close()

    def __enter__(self) -> EmbeddedSidecar:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


_started: dict[tuple[Path, str], EmbeddedSidecar] = {}
_started_mutex = threading.Lock()


def ensure_started(
    path: str | os.PathLike[str] | None = None, *, app_id: str = "outlast", stores: Sequence[str] = ("statestore",)
) -> EmbeddedSidecar:
    """The sidecar of this process for a file, started if it is not.

    Raises:
        EmbeddedStoreError: The file cannot be used.
        ValueError: It runs already, without one of these stores.
    """
    real = Path(os.path.realpath(path if path is not None else default_path()))
    with _started_mutex:
        sidecar = _started.get((real, app_id))
        if sidecar is None or not sidecar.running:
            sidecar = EmbeddedSidecar(real, app_id=app_id, stores=stores).start()
            _started[real, app_id] = sidecar
        missing = set(stores) - set(sidecar.stores)
    if missing:
        raise ValueError(f"the embedded sidecar of {real} runs already, without the stores {sorted(missing)}")
    return sidecar


def _forget_in_child() -> None:
    """A forked child has none of its parent's threads, and must start a sidecar of its own."""
    global _started_mutex
    _started_mutex = threading.Lock()
    _started.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _require_loopback(host: str) -> None:
    if host == "localhost":
        return
    try:
        loopback = ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(
            f"the embedded sidecar has no authentication and binds IPv4 loopback addresses only, not {host!r}; "
            "run a real daprd to serve other machines"
        )
