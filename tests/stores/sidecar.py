"""A daprd for one state store component: no placement, no scheduler, nothing but the state API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outlast.embedded import EmbeddedSidecar
from tests.harness.daprd import STATE_STORE, Daprd, http_ok
from tests.harness.procs import free_ports
from tools.get_dapr import find

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Component:
    """What is set in the YAML of a component."""

    kind: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    version: str = "v1"

    def yaml(self, name: str = STATE_STORE) -> str:
        """The component's YAML. JSON strings are YAML strings, so nothing needs escaping by hand."""
        entries = "".join(
            f"    - name: {key}\n      value: {json.dumps(value)}\n" for key, value in self.metadata.items()
        )
        entries = f"\n{entries}" if entries else " []\n"
        return (
            f"apiVersion: dapr.io/v1alpha1\nkind: Component\nmetadata:\n  name: {name}\n"
            f"spec:\n  type: {self.kind}\n  version: {self.version}\n  metadata:{entries}"
        )


class StateSidecar(Daprd):
    """Ready as soon as its component is: without actors there is no placement to wait for."""

    def _ready(self) -> bool:
        assert self.child.alive, f"daprd ended; it said:\n{self.child.tail()}"
        # It says that it is healthy before it has failed to start a component.
        return http_ok(f"{self.http_url}/v1.0/healthz/outbound") and STATE_STORE in str(
            self.metadata().get("components")
        )


class Embedded:
    """The embedded sidecar in this process, on the file that the component names; children start their own on it."""

    def __init__(self, component: Component) -> None:
        path = component.metadata["connectionString"]
        self.env = {"OUTLAST_EMBEDDED_PATH": path}
        self._sidecar = EmbeddedSidecar(path)
        self._sidecar.start()
        self.grpc_port = self._sidecar.grpc_port

    def kill(self) -> None:
        self._sidecar.stop()


def start(home: Path, component: Component) -> StateSidecar:
    """Start a daprd with this one component."""
    grpc, http, internal, metrics = free_ports(4)
    resources = home / "resources"
    resources.mkdir(parents=True, exist_ok=True)
    (resources / "statestore.yaml").write_text(component.yaml())
    flags = {
        "app-id": "stores",
        "resources-path": resources,
        "dapr-grpc-port": grpc,
        "dapr-http-port": http,
        "dapr-listen-addresses": _LOOPBACK,
        "dapr-internal-grpc-port": internal,
        "dapr-internal-grpc-listen-address": _LOOPBACK,
        "metrics-port": metrics,
        "metrics-listen-address": _LOOPBACK,
        "placement-host-address": "",
        "scheduler-host-address": "",
    }
    command = [find() / "daprd", *(f"--{name}={value}" for name, value in flags.items())]
    sidecar = StateSidecar("stores", grpc, http, command, home / "daprd.log")
    sidecar.start()
    return sidecar
