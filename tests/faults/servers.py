"""State stores that can be killed and started again with what they had written to disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.harness.daprd import STATE_STORE, component
from tests.harness.procs import Child, clean_env, free_ports, wait_for
from tests.migrate.postgres import binaries

LOOPBACK = "127.0.0.1"


class Server(Protocol):
    """A server that can be killed and started again."""

    def start(self) -> None: ...

    def kill(self) -> None: ...


class Redis:
    """A Redis that has every write on disk before it answers."""

    def __init__(self, home: Path) -> None:
        program = shutil.which("redis-server")
        if not program:
            pytest.skip("redis-server is not installed (apt install redis-server)")
        home.mkdir(parents=True)
        (self.port,) = free_ports(1)
        self._home = home
        self._command = [program, "--port", str(self.port), "--bind", LOOPBACK, "--dir", str(home), "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self._child: Child | None = None

    @property
    def component(self) -> str:
        settings = {"redisHost": f"{LOOPBACK}:{self.port}", "redisPassword": "", "actorStateStore": "true"}
        return component(STATE_STORE, "state.redis", settings)

    def start(self) -> None:
        self._child = child = Child(self._command, log=self._home / "redis.log", env=clean_env({}), cwd=self._home)
        child.wait_for_line("Ready to accept connections")

    def kill(self) -> None:
        if self._child:
            self._child.kill()


class Postgres:
    """A PostgreSQL with synchronous commits."""

    def __init__(self, home: Path) -> None:
        folder = binaries()
        if folder is None:
            pytest.skip("PostgreSQL is not installed (apt install postgresql)")
        (self.port,) = free_ports(1)
        self._home = home
        self._user: list[str] = []
        if os.geteuid() == 0:
            # It does not run as root; it becomes the server itself, which then ends with us.
            shutil.chown(home, "nobody")
            self._user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL"]
        data = home / "data"
        initdb = [str(folder / "initdb"), "-D", str(data), "-U", "outlast", "-A", "trust", "-E", "UTF8", "--locale=C"]
        subprocess.run([*self._user, *initdb, "--no-sync"], check=True, capture_output=True, cwd="/")
        self._ready = [str(folder / "pg_isready"), "-q", "-h", LOOPBACK, "-p", str(self.port)]
        self._command = [*self._user, str(folder / "postgres"), "-D", str(data), "-h", LOOPBACK]
        self._command += ["-p", str(self.port), "-k", str(home)]
        self._child: Child | None = None

    @property
    def component(self) -> str:
        url = f"postgres://outlast@{LOOPBACK}:{self.port}/postgres"
        return component(STATE_STORE, "state.postgresql", {"connectionString": url, "actorStateStore": "true"}, "v2")

    def start(self) -> None:
        def up() -> bool:
            # The children of one that was killed hold its shared memory for a moment.
            if self._child is None or not self._child.alive:
                self._child = Child(self._command, log=self._home / "log", env=clean_env({}), cwd=Path("/"))
            return subprocess.run(self._ready, check=False).returncode == 0

        wait_for(up, 30, "PostgreSQL", every=0.1)

    def kill(self) -> None:
        if self._child:
            self._child.kill()

    def stop(self) -> None:
        """End it with its shared memory, which SIGKILL would leave behind."""
        if self._child and self._child.alive:
            os.kill(self._child.pid, signal.SIGINT)
            self._child.wait(30)


@contextmanager
def redis(home: Path) -> Iterator[Redis]:
    """A running Redis."""
    server = Redis(home / "redis")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL."""
    # Not in pytest's folders, which only we see into.
    home = Path(tempfile.mkdtemp(prefix="outlast-pg-"))
    try:
        server = Postgres(home)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)
