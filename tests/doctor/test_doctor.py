"""`outlast doctor` on sidecars that are well, and on those that are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointer import quirks, wire
from outlast.checkpointer.client import Get, StateClient
from outlast.checkpointer.registry import THREADS
from outlast.doctor import examine
from tests.harness.procs import clean_env


def doctor(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outlast.cli", "doctor", *arguments],
        env=clean_env({**env, "COLUMNS": "200"}),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
    )


@pytest.mark.acceptance
def test_a_store_that_is_well(tmp_path: Path, sidecar_env: dict[str, str], sidecar: str) -> None:
    done = doctor(tmp_path, sidecar_env, "--json", "--workflow")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["guarantee"] == "exactly-once"
    assert found["good"] is True
    assert found["sidecar"]["kind"] == ("embedded" if sidecar == "embedded" else "dapr")
    assert found["store"]["type"] == "state.sqlite"
    assert found["versions"]["dapr"]
    checks = {check["name"]: check["status"] for check in found["checks"]}
    assert checks["workflow"] == checks["workflow engine"] == checks["creation race"] == "ok"
    assert set(checks.values()) == {"ok"}
    assert StateClient("statestore").run(THREADS.names()) == [], "it leaves nothing behind"


@pytest.mark.acceptance
def test_for_people(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    done = doctor(tmp_path, sidecar_env)
    assert done.returncode == 0, done.stderr
    assert "guarantee: exactly-once" in done.stdout
    assert "langgraph" in done.stderr


@pytest.mark.acceptance
def test_a_store_that_is_not_there(tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    done = doctor(tmp_path, sidecar_env, "--store", "nosuch", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["guarantee"] == "none"
    assert found["checks"][-1]["mend"] == "--store statestore"


def test_a_sidecar_that_is_not_there(tmp_path: Path) -> None:
    done = doctor(tmp_path, {"DAPR_GRPC_PORT": "1"}, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["checks"][0]["status"] == "failed"


def test_nothing_is_created_to_be_repaired(tmp_path: Path) -> None:
    done = doctor(tmp_path, {}, "--repair")
    assert done.returncode == 1
    assert "nothing to repair" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_component_known_to_lose_updates(sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    unsound = quirks.Quirks(sound_cas=False, why="it loses updates")
    monkeypatch.setattr(quirks, "TABLE", {"state.sqlite": unsound})
    found = examine("statestore")
    assert found.guarantee == "at-least-once"
    (check,) = [check for check in found.failed if check.name == "component"]
    assert "loses updates" in check.detail
    assert "state.postgresql" in check.mend


def test_a_component_that_ignores_etags(sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It claims to have them, and no table knows better."""
    monkeypatch.setattr(wire, "_conditional", lambda key, value, etag: wire._plain(key, value))
    monkeypatch.setattr(wire, "_FIRST_WRITE", None)
    found = examine("statestore")
    failed = {check.name for check in found.failed}
    assert failed >= {"stale ETag", "compare-and-swap race", "creation race"}
    assert found.guarantee == "at-least-once"


def test_a_component_that_changes_bytes(sidecar_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    perform = StateClient._perform

    def lossy(self: StateClient, operation: Any) -> Any:
        result = perform(self, operation)
        if isinstance(operation, Get):
            return {
                key: type(item)(item.data.decode("utf-8", "replace").encode(), item.etag)
                if not item.data.startswith(b"OL")
                else item
                for key, item in result.items()
            }
        return result

    monkeypatch.setattr(StateClient, "_perform", lossy)
    found = examine("statestore")
    assert "bytes" in {check.name for check in found.failed}
    assert found.guarantee == "none"
