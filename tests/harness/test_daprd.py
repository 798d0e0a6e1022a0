"""The harness itself: a test that rests on it must not find that it lied."""

from __future__ import annotations

import os
import time
import urllib.request
from pathlib import Path

import pytest
from dapr.ext.workflow import DaprWorkflowClient, WorkflowRuntime

from tests.harness.daprd import DaprCluster, Daprd
from tests.harness.procs import Child, wait_for
from tools.get_dapr import find, pinned_version

pytestmark = pytest.mark.dapr


def test_it_is_the_pinned_minor_version(dapr_cluster: DaprCluster) -> None:
    daprd = dapr_cluster.start_daprd()
    minor = pinned_version().rsplit(".", 1)[0]
    assert str(daprd.metadata()["runtimeVersion"]).startswith(f"{minor}.")
    assert all((find() / name).exists() for name in ("daprd", "placement", "scheduler"))


def test_workflows_work_at_once(sidecar_env: dict[str, str]) -> None:
    runtime = WorkflowRuntime()
    runtime.register_activity(lambda _ctx, number: number + 1, name="increment")

    def workflow(ctx, number):  # type: ignore[no-untyped-def]
        return (yield ctx.call_activity("increment", input=number))

    runtime.register_workflow(workflow, name="adds_one")
    runtime.start()
    try:
        client = DaprWorkflowClient()
        instance = client.schedule_new_workflow(workflow, input=41)
        state = client.wait_for_workflow_completion(instance, timeout_in_seconds=20)
        assert state is not None
        assert state.serialized_output == "42"
    finally:
        runtime.shutdown()


def test_state_survives_a_restart_and_is_seen_by_every_replica_and_no_other_app(dapr_cluster: DaprCluster) -> None:
    first = dapr_cluster.start_daprd()
    replica = dapr_cluster.start_daprd(first.app_id)
    other = dapr_cluster.start_daprd()

    def state(daprd: Daprd, body: bytes | None = None) -> bytes:
        url = f"{daprd.http_url}/v1.0/state/statestore" + ("/key" if body is None else "")
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: bytes = response.read()
            return answer

    state(first, b'[{"key": "key", "value": "value"}]')
    first.restart()
    assert [state(each) for each in (first, replica, other)] == [b'"value"', b'"value"', b""]


def test_nothing_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from tests.harness.daprd import DaprCluster\n"
        "cluster = DaprCluster(pathlib.Path(sys.argv[1]))\n"
        "cluster.start()\n"
        "print('pids', *[c.pid for c in cluster._control], cluster.start_daprd().pid)\n"
        "time.sleep(60)\n"
    )
    child = Child.python("-c", script, tmp_path / "cluster", log=tmp_path / "log")
    pids = [int(pid) for pid in child.wait_for_line(r"^pids (.+)$")[1].split()]
    child.kill()
    assert len(pids) == 3
    wait_for(lambda: not any(map(_running, pids)), 10, "the servers to end")


def test_a_fresh_daprd_is_cheap(dapr_cluster: DaprCluster) -> None:
    started = time.monotonic()
    dapr_cluster.stop_daprd(dapr_cluster.start_daprd())
    assert time.monotonic() - started < 10


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
