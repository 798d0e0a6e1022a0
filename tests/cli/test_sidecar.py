"""`outlast sidecar`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Cli
from tests.harness.procs import wait_for


def test_a_program_pointed_to_it_finds_its_runs_there(empty: Cli, tmp_path: Path) -> None:
    path = tmp_path / "shared" / "outlast.db"
    options = ["--path", str(path), "--grpc-port", "0", "--http-port", "0"]
    with empty.start("sidecar", *options, "--store", "statestore", "--store", "orders", "--json") as sidecar:
        said = json.loads(sidecar.wait_for_line(r"^\{.*\}$")[0])
        assert said == {
            "path": str(path),
            "app_id": "outlast",
            "stores": ["statestore", "orders"],
            "grpc_port": said["grpc_port"],
            "http_port": said["http_port"],
        }
        empty.env |= {"DAPR_GRPC_PORT": str(said["grpc_port"]), "DAPR_HTTP_PORT": str(said["http_port"])}
        empty.submit("sample/r-1/work")

        assert empty.json("show", "r-1")["status"] == "done"
        assert empty.json("runs", "--store", "orders") == []
        sidecar.terminate()
        assert sidecar.wait() == 0
    assert list(empty.cwd.iterdir()) == []


def test_it_says_how_to_point_a_program_to_it(empty: Cli) -> None:
    with empty.start("sidecar", "--grpc-port", "0", "--http-port", "0") as sidecar:
        sidecar.wait_for_line(r"^export DAPR_GRPC_PORT=\d+ DAPR_HTTP_PORT=\d+$")
        assert (empty.cwd / ".outlast" / "outlast.db").exists()
        sidecar.terminate()
        assert sidecar.wait() == 0


def test_a_port_that_is_taken(empty: Cli) -> None:
    with empty.start("sidecar", "--grpc-port", "0", "--http-port", "0") as first:
        port = first.wait_for_line(r"DAPR_GRPC_PORT=(\d+)")[1]
        with empty.start("sidecar", "--grpc-port", port, "--http-port", "0", name="second") as second:
            assert second.wait() == 1
            wait_for(lambda: "error: the sidecar could not start" in second.output())
            assert "--grpc-port 0" in second.output()
