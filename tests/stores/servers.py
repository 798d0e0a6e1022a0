"""Starts the server behind each state store component, as the real product or as the stand-in that is named.

Each entry of `STORES` is a context manager that yields the component to reach its server with. What cannot be started
raises `CannotStart` with the reason, which becomes the reason of the skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.procs import Child, clean_env, free_ports, wait_for
from tests.stores.sidecar import Component

_LOOPBACK = "127.0.0.1"


class CannotStart(Exception):
    """The server cannot be started here; the message says why and what would help."""


Server = Callable[[Path], "contextlib.AbstractContextManager[Component]"]


@dataclass(frozen=True)
class Store:
    """A state store component with its server.

    Attributes:
        server: What answers in these tests, as `docs/stores.md` names it.
        start: Starts it.
        sound: Whether it must pass as exactly-once; else it must be refused, and pass as at-least-once.
    """

    server: str
    start: Server
    sound: bool = True


STORES: dict[str, Store] = {}


def _store(name: str, server: str, sound: bool = True) -> Callable[[Callable[[Path], Iterator[Component]]], Server]:
    def enter(start: Callable[[Path], Iterator[Component]]) -> Server:
        managed = contextlib.contextmanager(start)
        STORES[name] = Store(server, managed, sound)
        return managed

    return enter


def _program(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if not found:
        raise CannotStart(f"{name} is not installed (apt install {package})")
    return found


@contextlib.contextmanager
def _running(
    command: Sequence[str | Path], home: Path, host: str, port: int, env: Mapping[str, str] | None = None
) -> Iterator[Child]:
    """A server that is up when it accepts connections."""
    home.mkdir(parents=True, exist_ok=True)
    with Child(command, log=home / "server.log", env=clean_env(env or {}), cwd=home) as child:

        def accepts() -> bool:
            assert child.alive, f"{command[0]} ended; it said:\n{child.tail()}"
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                return True
            return False

        wait_for(accepts, 120, lambda: f"{command[0]}; it said:\n{child.tail()}", every=0.05)
        yield child


def _checked(command: Sequence[str | Path], home: Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotStart(f"{command[0]} failed: {(done.stderr or done.stdout)[-500:]}")


# --- the stores that can compare-and-swap


@_store("in-memory", "inside daprd")
def _in_memory(home: Path) -> Iterator[Component]:
    yield Component("state.in-memory")


@_store("sqlite", "SQLite file, inside daprd")
def _sqlite(home: Path) -> Iterator[Component]:
    yield Component("state.sqlite", {"connectionString": str(home / "state.sqlite")})


@contextlib.contextmanager
def _postgres(home: Path) -> Iterator[str]:
    initdb, postgres = _program("initdb", "postgresql"), _program("postgres", "postgresql")
    (port,) = free_ports(1)
    home.mkdir(parents=True, exist_ok=True)
    as_user: list[str] = []
    if os.geteuid() == 0:
        # PostgreSQL refuses root, and the test's directory must let another user through.
        _checked(["chown", "nobody", home], home)
        for parent in [home, *home.parents]:
            with contextlib.suppress(OSError):
                parent.chmod(parent.stat().st_mode | 0o011)
        group = "nogroup"
        as_user = ["setpriv", "--reuid=nobody", f"--regid={group}", "--clear-groups", "--pdeathsig=KILL"]
    data = home / "data"
    _checked([*as_user, initdb, "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C"], home)
    command = [*as_user, postgres, "-D", data, "-p", str(port), "-h", _LOOPBACK, "-k", home]
    with _running(command, home, _LOOPBACK, port):
        yield f"host={_LOOPBACK} port={port} user=postgres password=x database=postgres sslmode=disable"


def _on_postgres(kind: str, version: str) -> Callable[[Path], Iterator[Component]]:
    def start(home: Path) -> Iterator[Component]:
        with _postgres(home / "postgres") as connection:
            yield Component(kind, {"connectionString": connection}, version)

    return start


_store("postgresql-v1", "PostgreSQL 15")(_on_postgres("state.postgresql", "v1"))
_store("postgresql-v2", "PostgreSQL 15")(_on_postgres("state.postgresql", "v2"))


@_store("redis", "Redis 7.0")
def _redis(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    server = _program("redis-server", "redis-server")
    with _running([server, "--port", str(port), "--bind", _LOOPBACK, "--save", ""], home / "redis", _LOOPBACK, port):
        yield Component("state.redis", {"redisHost": f"{_LOOPBACK}:{port}", "redisPassword": ""})


@_store("mysql", "MariaDB 10.11")
def _mysql(home: Path) -> Iterator[Component]:
    server = _program("mariadbd", "mariadb-server")
    home = home / "mariadb"
    home.mkdir(parents=True)
    (port,) = free_ports(1)
    user = [f"--user={'root' if os.geteuid() == 0 else os.environ.get('USER', '')}"]
    _checked([_program("mariadb-install-db", "mariadb-server"), *user, f"--datadir={home}/data"], home)
    (home / "init.sql").write_text(
        "CREATE USER 'dapr'@'127.0.0.1' IDENTIFIED BY 'dapr';\nGRANT ALL ON *.* TO 'dapr'@'127.0.0.1';\n"
    )
    command = [server, "--no-defaults", *user, f"--datadir={home}/data", f"--port={port}"]
    command += [
        "--skip-name-resolve",
        f"--bind-address={_LOOPBACK}",
        f"--socket={home}/s",
        f"--init-file={home}/init.sql",
    ]
    with _running(command, home, _LOOPBACK, port):
        yield Component("state.mysql", {"connectionString": f"dapr:dapr@tcp({_LOOPBACK}:{port})/?tls=false"})


_store("cockroachdb-v2", "PostgreSQL 15, whose protocol it speaks")(_on_postgres("state.cockroachdb", "v2"))
_store("yugabytedb", "PostgreSQL 15, whose protocol it speaks")(_on_postgres("state.yugabytedb", "v2"))


# --- the stores that cannot


@_store("etcd", "etcd 3.4", sound=False)
def _etcd(home: Path) -> Iterator[Component]:
    client, peer = (f"http://{_LOOPBACK}:{port}" for port in free_ports(2))
    command = [
        _program("etcd", "etcd-server"),
        f"--data-dir={home}/etcd",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    ]
    address = client.removeprefix("http://")
    with _running(command, home / "etcd-home", _LOOPBACK, int(address.rpartition(":")[2])):
        yield Component("state.etcd", {"endpoints": address, "tlsEnable": "false", "keyPrefixPath": "outlast"}, "v2")


@_store("memcached", "memcached 1.6", sound=False)
def _memcached(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    command = [_program("memcached", "memcached"), "-l", _LOOPBACK, "-p", str(port), "-U", "0", "-m", "512"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with _running(command, home / "memcached", _LOOPBACK, port):
        yield Component("state.memcached", {"hosts": f"{_LOOPBACK}:{port}"})


@_store("jetstream", "nats-server 2.9", sound=False)
def _jetstream(home: Path) -> Iterator[Component]:
    (port,) = free_ports(1)
    command = [_program("nats-server", "nats-server"), "-a", _LOOPBACK, "-p", str(port), "-js", "-sd", home / "js"]
    with _running(command, home / "nats", _LOOPBACK, port):
        _make_bucket(port, "outlast")
        yield Component("state.jetstream", {"natsURL": f"nats://{_LOOPBACK}:{port}", "bucket": "outlast"})


def _make_bucket(port: int, bucket: str) -> None:
    """Create a key-value bucket: a stream of a certain form, asked for in the NATS protocol."""
    stream = {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "max_msgs_per_subject": 1,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "storage": "memory",
        "retention": "limits",
        "num_replicas": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_consumers": -1,
    }
    body = json.dumps(stream)
    with socket.create_connection((_LOOPBACK, port), timeout=10) as connection:
        lines = ['CONNECT {"verbose":false}', "SUB made 1", f"PUB $JS.API.STREAM.CREATE.KV_{bucket} made {len(body)}"]
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, body, "PING"]).encode())
        answer = ""
        while '"config"' not in answer:
            answer += connection.recv(65536).decode()
            assert '"error"' not in answer, answer
