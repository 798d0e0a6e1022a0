"""A real Dapr runtime on loopback: placement, scheduler, and as many daprd as a test asks for."""

from __future__ import annotations

import atexit
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.harness.procs import Child, clean_env, free_ports, wait_for
from tools.get_dapr import find

STATE_STORE = "statestore"
_LOOPBACK = "127.0.0.1"
_ATTEMPTS = 3  # somebody else may take a port between our choosing it and the server's binding it
_READY_SECONDS = 60
_CONTROL = ("placement", "scheduler")


def component(name: str, kind: str, metadata: Mapping[str, str], version: str = "v1") -> str:
    """The YAML of a component. JSON strings are YAML strings, so nothing needs escaping by hand."""
    entries = "".join(
        f"    - {{name: {json.dumps(key)}, value: {json.dumps(value)}}}\n" for key, value in metadata.items()
    )
    return (
        "apiVersion: dapr.io/v1alpha1\nkind: Component\n"
        f"metadata: {{name: {json.dumps(name)}}}\n"
        f"spec:\n  type: {kind}\n  version: {version}\n  metadata:\n{entries or '    []'}"
    )


def sqlite_store(path: Path, *, actors: bool = True) -> str:
    settings = {"connectionString": str(path), "actorStateStore": "true" if actors else "false"}
    return component(STATE_STORE, "state.sqlite", settings)


@dataclass
class Daprd:
    """One sidecar. Its ports stay the same when it is restarted."""

    app_id: str
    grpc_port: int
    http_port: int
    _command: Sequence[str | Path] = field(repr=False)
    _log: Path = field(repr=False)
    _child: Child | None = field(default=None, repr=False)
    _host: str = _LOOPBACK

    @classmethod
    def make(cls, app_id: str, home: Path, files: Mapping[str, str], placement: str = "", scheduler: str = "") -> Self:
        """One that is not started yet, with these resources (file name → YAML)."""
        grpc, http, internal, metrics = free_ports(4)
        resources = home / "resources"
        resources.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (resources / name).write_text(text)
        flags = {
            "app-id": app_id,
            "resources-path": resources,
            "dapr-grpc-port": grpc,
            "dapr-http-port": http,
            "dapr-listen-addresses": _LOOPBACK,
            "dapr-internal-grpc-port": internal,
            "dapr-internal-grpc-listen-address": _LOOPBACK,
            "metrics-port": metrics,
            "metrics-listen-address": _LOOPBACK,
            "placement-host-address": placement,
            "scheduler-host-address": scheduler,
        }
        return cls(app_id, grpc, http, [find() / "daprd", *_arguments(flags)], home / f"daprd-{grpc}.log")

    def at(self, address: str, inside: Sequence[str] = ()) -> None:
        """Before its start: let this address reach it, too, from other daprd and from here. `inside` starts it."""
        listen = {
            f"--dapr-listen-addresses={_LOOPBACK}": f"--dapr-listen-addresses={_LOOPBACK},{address}",
            f"--dapr-internal-grpc-listen-address={_LOOPBACK}": f"--dapr-internal-grpc-listen-address={address}",
        }
        self._command = [*inside, *(listen.get(str(part), part) for part in self._command)]
        self._host = address

    @property
    def child(self) -> Child:
        assert self._child is not None, "this daprd was never started"
        return self._child

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def env(self) -> dict[str, str]:
        """What points the Dapr SDK and outlast to this sidecar."""
        return {"DAPR_GRPC_PORT": str(self.grpc_port), "DAPR_HTTP_PORT": str(self.http_port)}

    @property
    def http_url(self) -> str:
        return f"http://{self._host}:{self.http_port}"

    def start(self) -> None:
        env = clean_env({} if self._host == _LOOPBACK else {"DAPR_HOST_IP": self._host})
        self._child = Child(self._command, log=self._log, env=env)
        wait_for(self._ready, _READY_SECONDS, lambda: f"daprd of {self.app_id}; it said:\n{self.child.tail()}")

    def kill(self) -> None:
        """SIGKILL."""
        if self._child is not None:
            self._child.kill()

    def restart(self) -> None:
        """SIGKILL, and start again with the same ports and the same state."""
        self.kill()
        self.start()

    def metadata(self) -> dict[str, object]:
        with urllib.request.urlopen(f"{self.http_url}/v1.0/metadata", timeout=5) as response:
            answer: dict[str, object] = json.load(response)
            return answer

    def _ready(self) -> bool:
        assert self.child.alive, f"daprd of {self.app_id} ended; it said:\n{self.child.tail()}"
        if not http_ok(f"{self.http_url}/v1.0/healthz/outbound"):
            return False
        # Workflows are actors: they work once placement has told this daprd about the others.
        actors = self.metadata().get("actorRuntime")
        return isinstance(actors, dict) and actors.get("placement") == "placement: connected"


class DaprCluster:
    """Placement and scheduler, shared by the daprd of any number of app ids. All files are under `root`.

    Each app id has its own SQLite state store, shared by its replicas. `components` (file name → YAML) are added
    for every app id.
    """

    def __init__(self, root: Path, components: Mapping[str, str] | None = None):
        self.root = root
        self.components = dict(components or {})
        self._binaries = find()
        self._control: list[Child] = []
        self._health: list[int] = []
        self._daprds: list[Daprd] = []
        self._placement_port = self._scheduler_port = 0

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for attempt in range(_ATTEMPTS):
            atexit.register(self.stop)
            try:
                return self._start_control(attempt)
            except AssertionError:
                hopeless = all(child.alive for child in self._control) or attempt == _ATTEMPTS - 1
                self.stop()
                if hopeless:
                    raise

    def start_daprd(self, app_id: str | None = None) -> Daprd:
        """Another sidecar, ready: of a new app, or one more replica of an app that has one already."""
        app_id = app_id or f"app-{secrets.token_hex(4)}"
        for attempt in range(_ATTEMPTS):
            daprd = self.new_daprd(app_id)
            try:
                daprd.start()
            except AssertionError:
                hopeless = daprd.child.alive or attempt == _ATTEMPTS - 1
                daprd.kill()
                if hopeless:
                    raise
            else:
                break
        self._daprds.append(daprd)
        return daprd

    def stop_daprd(self, daprd: Daprd) -> None:
        daprd.kill()
        self._daprds.remove(daprd)

    @property
    def control_ports(self) -> list[int]:
        """Where daprd finds placement and scheduler."""
        return [self._placement_port, self._scheduler_port]

    def kill_control(self, name: str) -> None:
        """SIGKILL for `placement` or `scheduler`."""
        self._control[_CONTROL.index(name)].kill()

    def restart_control(self, name: str) -> None:
        """Start `placement` or `scheduler` again, with the same ports and what it had on disk."""
        number = _CONTROL.index(name)
        self.kill_control(name)
        before = self._control[number]
        self._control[number] = Child(before.command, log=before.log, env=clean_env({}), cwd=self.root)
        self._wait_healthy(self._control[number], self._health[number])

    def stop(self) -> None:
        """End every process this cluster started. It may be called twice."""
        for daprd in self._daprds:
            daprd.kill()
        for child in reversed(self._control):
            child.kill()
        self._daprds.clear()
        self._control.clear()
        atexit.unregister(self.stop)

    def __enter__(self) -> DaprCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_control(self, attempt: int) -> None:
        placement, raft, placement_health, placement_metrics, *rest = free_ports(9)
        scheduler, etcd_client, etcd_peer, scheduler_health, scheduler_metrics = rest
        self._placement_port, self._scheduler_port = placement, scheduler
        local = dict.fromkeys(("listen-address", "healthz-listen-address", "metrics-listen-address"), _LOOPBACK)
        self._control_process(
            "placement",
            {
                **local,
                "port": placement,
                "healthz-port": placement_health,
                "metrics-port": placement_metrics,
                "id": "placement-0",
                "initial-cluster": f"placement-0={_LOOPBACK}:{raft}",
            },
        )
        self._control_process(
            "scheduler",
            {
                **local,
                "port": scheduler,
                "healthz-port": scheduler_health,
                "metrics-port": scheduler_metrics,
                "id": "scheduler-0",
                "override-broadcast-host-port": f"{_LOOPBACK}:{scheduler}",
                "etcd-data-dir": self.root / f"etcd-{attempt}",
                "etcd-client-port": etcd_client,
                "etcd-client-listen-address": _LOOPBACK,
                "etcd-initial-cluster": f"scheduler-0=http://{_LOOPBACK}:{etcd_peer}",
            },
        )
        self._health = [placement_health, scheduler_health]
        for child, port in zip(self._control, self._health, strict=True):
            self._wait_healthy(child, port)

    def _control_process(self, name: str, flags: Mapping[str, object]) -> None:
        command: list[str | Path] = [self._binaries / name, *_arguments(flags)]
        self._control.append(Child(command, log=self.root / f"{name}.log", env=clean_env({}), cwd=self.root))

    def _wait_healthy(self, child: Child, port: int) -> None:
        name = Path(child.command[0]).name

        def healthy() -> bool:
            assert child.alive, f"{name} ended; it said:\n{child.tail()}"
            return http_ok(f"http://{_LOOPBACK}:{port}/healthz")

        wait_for(healthy, _READY_SECONDS, lambda: f"{name}; it said:\n{child.tail()}", every=0.05)

    def new_daprd(self, app_id: str) -> Daprd:
        """One that is not started yet, and that the caller ends."""
        home = self.root / app_id
        files = {"statestore.yaml": sqlite_store(home / "state.sqlite"), **self.components}
        placement, scheduler = (f"{_LOOPBACK}:{port}" for port in (self._placement_port, self._scheduler_port))
        return Daprd.make(app_id, home, files, placement, scheduler)


def _arguments(flags: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def http_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(200 <= response.status < 300)
    except (urllib.error.URLError, OSError):
        return False
