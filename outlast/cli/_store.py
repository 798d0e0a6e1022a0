"""The state store as the reading commands see it. They never start a worker and never create a store."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from outlast.checkpointer.sidecar import configured, locate
from outlast.cli._console import CommandError
from outlast.embedded import default_path
from outlast.errors import SidecarUnavailableError
from outlast.recovery.runtime import Runtime


@contextmanager
def opened(store: str) -> Iterator[Runtime]:
    """Open the state store that programs started here would use.

    Raises:
        CommandError: If that is the embedded one and its file does not exist.
        SidecarUnavailableError: If the configured sidecar does not answer; at once, unlike where runs are carried on.
    """
    if not configured():
        path = default_path()
        if not path.exists():
            raise CommandError(
                f"there are no runs here: the embedded store {path} does not exist. Go to the folder your program runs "
                "in, or name its file with OUTLAST_EMBEDDED_PATH, or a Dapr sidecar with DAPR_GRPC_PORT"
            )
    address = locate()
    try:
        socket.create_connection((address.host, address.port), timeout=5).close()
    except OSError as error:
        raise SidecarUnavailableError(
            f"no answer from the {address}: {error}. Start it (`dapr run …`, `outlast sidecar`), or unset "
            "DAPR_GRPC_PORT and DAPR_GRPC_ENDPOINT to use the embedded one"
        ) from error
    runtime = Runtime(store, address, works=False)
    try:
        yield runtime
    finally:
        runtime.close()
