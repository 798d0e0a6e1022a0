"""Where the sidecar is: a configured Dapr, or the embedded one that this process then starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from dapr.conf import settings
from dapr.conf.helpers import GrpcEndpoint

from outlast.errors import SidecarUnavailableError

EMBEDDED_STORES: Final = "OUTLAST_EMBEDDED_STORES"
"""Environment variable: names of the embedded sidecar's state stores, with commas between. Default `statestore`."""


@dataclass(frozen=True)
class Address:
    """A sidecar's gRPC address.

    Attributes:
        host: Host name or IP address.
        port: TCP port.
        tls: Whether the connection is encrypted.
        embedded: Whether it is the sidecar inside this process.
    """

    host: str
    port: int
    tls: bool = False
    embedded: bool = False

    @property
    def target(self) -> str:
        """The `host:port` that gRPC connects to."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"embedded sidecar at {self.target}" if self.embedded else f"Dapr sidecar at {self.target}"


def configured() -> bool:
    """Return whether the environment names a Dapr sidecar (the variables are Dapr's own)."""
    return bool(os.environ.get("DAPR_GRPC_PORT") or os.environ.get("DAPR_GRPC_ENDPOINT"))


def locate() -> Address:
    """Return the sidecar of this process; starts the embedded one when none is configured.

    Raises:
        SidecarUnavailableError: If the configured endpoint is not a valid address.
    """
    if not configured():
        from outlast.embedded import ensure_started

        names = os.environ.get(EMBEDDED_STORES, "statestore")
        running = ensure_started(stores=[name.strip() for name in names.split(",")])
        return Address("127.0.0.1", running.grpc_port, embedded=True)
    url = settings.DAPR_GRPC_ENDPOINT or f"{settings.DAPR_RUNTIME_HOST}:{settings.DAPR_GRPC_PORT}"
    try:
        endpoint = GrpcEndpoint(url)
    except ValueError as error:
        raise SidecarUnavailableError(
            f"{url!r} is not a Dapr endpoint ({error}); set DAPR_GRPC_PORT or DAPR_GRPC_ENDPOINT to the sidecar's, "
            "or unset both to use the embedded sidecar"
        ) from error
    return Address(endpoint.hostname, endpoint.port_as_int, endpoint.tls)
