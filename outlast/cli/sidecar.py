"""`outlast sidecar`: the embedded sidecar alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlast.cli._console import AsJson, CommandError, Verbose, print_json, print_line, say
from outlast.cli._serving import UntilStopped
from outlast.embedded import EmbeddedSidecar


def command(
    path: Annotated[
        Path | None,
        typer.Option(help="The file; created if new. Default: $OUTLAST_EMBEDDED_PATH, else .outlast/outlast.db."),
    ] = None,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 50001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="For health checks; 0 takes a free one.")] = 3500,
    app_id: Annotated[str, typer.Option(help="Programs of different app ids share nothing.")] = "outlast",
    store: Annotated[list[str] | None, typer.Option(help="A state store to offer; repeatable. [statestore]")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run the embedded sidecar by itself: Dapr's API for state and workflows over one SQLite file.

    Serves until SIGTERM or SIGINT. With --json it prints one line when it is ready: path, app_id, stores, grpc_port,
    http_port.
    """
    until = UntilStopped()
    sidecar = EmbeddedSidecar(
        path, app_id=app_id, stores=store or ("statestore",), grpc_port=grpc_port, http_port=http_port
    )
    try:
        sidecar.start()
    except OSError as error:
        raise CommandError(
            f"the sidecar could not start: {error}. Choose other ports: --grpc-port 0 --http-port 0 takes free ones"
        ) from error
    try:
        if as_json:
            print_json(
                {
                    "path": str(sidecar.path),
                    "app_id": sidecar.app_id,
                    "stores": list(sidecar.stores),
                    "grpc_port": sidecar.grpc_port,
                    "http_port": sidecar.http_port,
                },
                indent=None,
            )
        else:
            stores = ", ".join(sidecar.stores)
            say(f"sidecar for {sidecar.path} (app id {sidecar.app_id}, state stores: {stores}). Point a program to it:")
            print_line(f"export DAPR_GRPC_PORT={sidecar.grpc_port} DAPR_HTTP_PORT={sidecar.http_port}")
        # It may also be stopped through Dapr's API.
        while sidecar.running and not until.wait(0.5):
            pass
    finally:
        sidecar.stop()
