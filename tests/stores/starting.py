"""What starting a server takes: how a store is entered in the list of them, programs, namespaces, requests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.procs import Child, clean_env, wait_for
from tests.stores.sidecar import Component

LOOPBACK = "127.0.0.1"


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
        daprd: Whether a daprd stands before it; else what was started is a sidecar itself.
    """

    server: str
    start: Server
    sound: bool = True
    daprd: bool = True


STORES: dict[str, Store] = {}


def store(
    name: str, server: str, sound: bool = True, daprd: bool = True
) -> Callable[[Callable[[Path], Iterator[Component]]], Server]:
    def enter(start: Callable[[Path], Iterator[Component]]) -> Server:
        managed = contextlib.contextmanager(start)
        STORES[name] = Store(server, managed, sound, daprd)
        return managed

    return enter


def program(name: str, package: str) -> str:
    """The path of an installed program."""
    # Where Debian puts what no ordinary user starts.
    hidden = ["/usr/sbin", "/usr/local/sbin", "/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(hidden))
    if not found:
        raise CannotStart(f"{name} is not installed (apt install {package})")
    return found


@contextlib.contextmanager
def running(
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


def checked(command: Sequence[str | Path], home: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=home,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotStart(f"{command[0]} failed: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


@contextlib.contextmanager
def namespace() -> Iterator[tuple[str, list[str]]]:
    """A network namespace for servers that bind every interface: yields its address and what to start them with.

    Nothing but this host reaches it, over a pair of virtual interfaces.
    """
    tool = program("ip", "iproute2")
    if os.geteuid() != 0:
        raise CannotStart("it binds every interface, so it needs a network namespace, and those need root")
    token = secrets.token_hex(2)
    name, outer, inner = f"ol-{token}", f"ol{token}o", f"ol{token}i"
    net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    inside = [tool, "netns", "exec", name]
    checked([tool, "netns", "add", name], Path("/"))
    try:
        checked([tool, "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name], Path("/"))
        checked([tool, "addr", "add", f"{net}.1/30", "dev", outer], Path("/"))
        checked([tool, "link", "set", outer, "up"], Path("/"))
        checked([*inside, tool, "addr", "add", f"{net}.2/30", "dev", inner], Path("/"))
        for device in (inner, "lo"):
            checked([*inside, tool, "link", "set", device, "up"], Path("/"))
        yield f"{net}.2", inside
    finally:
        subprocess.run([tool, "netns", "del", name], check=False)


def post(url: str, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> None:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
    )
    urllib.request.urlopen(request, timeout=30).close()


def text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        text: str = response.read().decode().strip()
    return text


def not_here(name: str, server: str, reason: str, sound: bool = True) -> None:
    def start(home: Path) -> Iterator[Component]:
        raise CannotStart(reason)
        yield

    store(name, server, sound)(start)
