"""Cheap real processes: a server that has imported the libraries, and forks a child for every request.

A child is a process like any other: own pid, own connections, killed by SIGKILL. It only skips the second that
importing LangGraph takes. The server itself never opens a connection or starts a thread, and does not import outlast.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.harness.procs import REPOSITORY, Child, clean_env

_PR_SET_PDEATHSIG = 1


class Zygote:
    """The server, as seen by the tests. Start it in the main thread: it dies with the thread that started it.

    Args:
        folder: For its log.
        preload: What it imports; by default what LangGraph agents need.
    """

    def __init__(self, folder: Path, preload: Sequence[str] = ()) -> None:
        self._log = folder / "zygote.log"
        command = [sys.executable, "-u", "-m", "tests.acceptance.zygote", *preload]
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean_env({}),
                cwd=REPOSITORY,
                preexec_fn=_die_with_parent,
            )
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._started: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        self._count = 0
        threading.Thread(target=self._read, daemon=True).start()

    def fork(self, function: str, log: Path, env: Mapping[str, str], **arguments: Any) -> Forked:
        """Start a process that calls a function, e.g. `roles.serve`, of a module of `tests.acceptance`.

        A module elsewhere is named in full: `tests.openai_agents.roles.submit`.
        """
        return Forked(self, function, log, env, arguments)

    def close(self) -> None:
        """End the server and every child that is left."""
        self._server.kill()
        self._server.wait()

    def start(self, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        with self._lock:
            self._count += 1
            number = self._count
            self._server.stdin.write(json.dumps({**request, "number": number}).encode() + b"\n")
            self._server.stdin.flush()
        with self._changed:
            there = self._changed.wait_for(lambda: number in self._started, 30)
        assert there, f"the zygote does not fork; it said:\n{self._log.read_text()}"
        return self._started[number]

    def ended(self, pid: int, timeout: float = 0) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: pid in self._ended, timeout)
            return self._ended.get(pid)

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            message = json.loads(line)
            with self._changed:
                if "number" in message:
                    self._ended.pop(message["pid"], None)
                    self._started[message["number"]] = message["pid"]
                else:
                    self._ended[message["pid"]] = message["status"]
                self._changed.notify_all()


class _Process:
    """What `Child` needs of a `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self._zygote = zygote

    def poll(self) -> int | None:
        return self._zygote.ended(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        status = self._zygote.ended(self.pid, 60 if timeout is None else timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 60)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Forked(Child):
    """A child of the zygote, with the methods of any other child."""

    def __init__(
        self, zygote: Zygote, function: str, log: Path, env: Mapping[str, str], arguments: Mapping[str, Any]
    ) -> None:
        self.command = [function]
        self.log = log
        log.touch()
        self._seen = log.stat().st_size
        request = {"function": function, "arguments": arguments, "env": dict(env), "log": str(log)}
        self._process: Any = _Process(zygote, zygote.start(request))


# --- the server's side


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PRELOAD = (
    "dapr.clients",
    "dapr.ext.workflow",
    "dapr.proto",
    "grpc.aio",
    "httpx",
    "langchain.agents",
    "langchain_core.messages",
    "langchain_core.tools",
    "langchain_openai",
    "langgraph.checkpoint.memory",
    "langgraph.func",
    "langgraph.graph",
    "langgraph.prebuilt",
    "ormsgpack",
    "sqlite3",
)


def _preload() -> None:
    for name in sys.argv[1:] or _PRELOAD:
        importlib.import_module(name)
    assert not [name for name in sys.modules if name == "outlast" or name.startswith("outlast.")]
    assert threading.active_count() == 1


def _serve() -> None:
    _preload()
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(awake, selectors.EVENT_READ)
    pending = b""
    while True:
        for key, _ in selector.select():
            if key.fd == awake:
                os.read(awake, 4096)
                _reap()
                continue
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _fork(json.loads(line), (awake, wake))


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say({"pid": pid, "status": os.waitstatus_to_exitcode(status)})


def _fork(request: dict[str, Any], pipes: tuple[int, int]) -> None:
    pid = os.fork()
    if pid:
        _say({"pid": pid, "number": request["number"]})
        return
    status = 1
    try:
        _die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pipe in pipes:
            os.close(pipe)
        out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(request["env"])
        module, _, function = request["function"].rpartition(".")
        module = module if "." in module else f"tests.acceptance.{module or 'roles'}"
        roles = importlib.import_module(module)
        getattr(roles, function)(**request["arguments"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    _serve()
