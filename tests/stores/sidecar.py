"""A daprd for one state store component: no placement, no scheduler, nothing but the state API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outlast.embedded import EmbeddedSidecar
from tests.harness.daprd import STATE_STORE, Daprd, http_ok
from tests.harness.daprd import component as yaml


@dataclass(frozen=True)
class Component:
    """What is set in the YAML of a component."""

    kind: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    version: str = "v1"


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
    text = yaml(STATE_STORE, component.kind, component.metadata, component.version)
    sidecar = StateSidecar.make("stores", home, {"statestore.yaml": text})
    sidecar.start()
    return sidecar
