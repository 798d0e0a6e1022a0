"""Starting, stopping, sharing and refusing."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import dapr.ext.workflow._durabletask.internal.protos as pb
import grpc
import pytest
from dapr.proto import api_service_v1, api_v1, common_v1

from outlast.embedded import EmbeddedSidecar, EmbeddedStoreError, default_path, ensure_started
from tests.embedded.raw import RawWorker
from tests.harness.procs import Child, clean_env, wait_for


def save(sidecar: EmbeddedSidecar, key: str, value: bytes) -> None:
    with grpc.insecure_channel(sidecar.grpc_address) as channel:
        item = common_v1.StateItem(key=key, value=value)
        api_service_v1.DaprStub(channel).SaveState(api_v1.SaveStateRequest(store_name="statestore", states=[item]))


def get(sidecar: EmbeddedSidecar, key: str) -> bytes:
    with grpc.insecure_channel(sidecar.grpc_address) as channel:
        request = api_v1.GetStateRequest(store_name="statestore", key=key)
        return bytes(api_service_v1.DaprStub(channel).GetState(request).data)


def test_state_outlives_the_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "new" / "outlast.db"
    with EmbeddedSidecar(path) as sidecar:
        save(sidecar, "k", b"v")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert sidecar.grpc_address == f"127.0.0.1:{sidecar.grpc_port}"
    with EmbeddedSidecar(path) as sidecar:
        assert get(sidecar, "k") == b"v"


def test_it_may_be_started_again_and_stopped_twice(tmp_path: Path) -> None:
    sidecar = EmbeddedSidecar(tmp_path / "outlast.db")
    for number in range(2):
        assert sidecar.start() is sidecar.start()
        save(sidecar, str(number), b"v")
        sidecar.stop()
        sidecar.stop()


def test_the_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OUTLAST_EMBEDDED_PATH", raising=False)
    assert default_path() == tmp_path / ".outlast" / "outlast.db"
    monkeypatch.setenv("OUTLAST_EMBEDDED_PATH", str(tmp_path / "x.db"))
    assert EmbeddedSidecar().path == tmp_path / "x.db"


def test_one_per_file_in_a_process(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first = ensure_started(tmp_path / "outlast.db")
    try:
        assert ensure_started(tmp_path / "link" / "outlast.db") is first
        assert ensure_started(tmp_path / "other.db") is not first
        with pytest.raises(ValueError, match="without the stores"):
            ensure_started(tmp_path / "outlast.db", stores=("another",))
        ensure_started(tmp_path / "other.db").stop()
        assert ensure_started(tmp_path / "other.db").running
    finally:
        first.stop()
        ensure_started(tmp_path / "other.db").stop()


def test_links_to_a_file_are_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "outlast.db")
    with EmbeddedSidecar(tmp_path / "outlast.db") as one, EmbeddedSidecar(tmp_path / "link.db") as two:
        save(one, "k", b"v")
        assert get(two, "k") == b"v"
        wait_for(lambda: one._dispatcher._presence.has_peers and two._dispatcher._presence.has_peers, 1)


def test_app_ids_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "outlast.db"
    with EmbeddedSidecar(path, app_id="a") as a, EmbeddedSidecar(path, app_id="b") as b:
        save(a, "k", b"a's")
        assert get(b, "k") == b""
        with RawWorker(a.grpc_address) as one, RawWorker(b.grpc_address) as two:
            one.start("wf")
            assert one.next().workflowRequest.instanceId == "wf"
            assert two.nothing()
            assert not two.stub.GetInstance(pb.GetInstanceRequest(instanceId="wf")).exists


def test_two_sidecars_of_one_process_share_work(tmp_path: Path) -> None:
    path = tmp_path / "outlast.db"
    first = EmbeddedSidecar(path).start()
    with (
        EmbeddedSidecar(path) as second,
        RawWorker(first.grpc_address) as worker,
        RawWorker(second.grpc_address, listen=False) as client,
    ):
        client.start("wf")
        worker.next()
        with RawWorker(second.grpc_address) as heir:
            before = time.monotonic()
            first.stop()
            assert heir.next().workflowRequest.instanceId == "wf"
            assert time.monotonic() - before < 1


@pytest.mark.parametrize("content", [b"this is no database, but text of some length", b"\x00" * 5000])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(EmbeddedStoreError, match=r"notes\.txt"):
        EmbeddedSidecar(path).start()
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(EmbeddedStoreError, match="another program"):
        EmbeddedSidecar(path).start()


def test_a_newer_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "outlast.db"
    EmbeddedSidecar(path).start().stop()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(EmbeddedStoreError, match=r"newer outlast.*Upgrade"):
        EmbeddedSidecar(path).start()


def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EmbeddedStoreError, match="OUTLAST_EMBEDDED_PATH"):
        EmbeddedSidecar(tmp_path / "file" / "outlast.db").start()
    with pytest.raises(EmbeddedStoreError):
        EmbeddedSidecar(tmp_path).start()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "example.com", "::1", ""])
def test_only_loopback(host: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        EmbeddedSidecar(host=host)


def test_a_taken_port_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="bind"):
            EmbeddedSidecar(tmp_path / "a.db", grpc_port=port).start()
        with pytest.raises(OSError, match="in use"):
            EmbeddedSidecar(tmp_path / "b.db", http_port=port).start()
    with EmbeddedSidecar(tmp_path / "a.db") as first, pytest.raises(OSError, match="bind"):
        EmbeddedSidecar(tmp_path / "c.db", grpc_port=first.grpc_port).start()


def test_health(tmp_path: Path) -> None:
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        base = f"http://127.0.0.1:{sidecar.http_port}"
        for path in ("/v1.0/healthz", "/v1.0/healthz/outbound"):
            assert urllib.request.urlopen(base + path, timeout=5).status == 204
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/v1.0/state/statestore/k", timeout=5)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{base}/v1.0/healthz", timeout=5)


def test_stopping_ends_waits_and_streams_quickly(tmp_path: Path) -> None:
    sidecar = EmbeddedSidecar(tmp_path / "outlast.db").start()
    worker = RawWorker(sidecar.grpc_address)
    worker.start("wf")
    worker.next()
    codes: list[grpc.StatusCode] = []

    def wait() -> None:
        try:
            worker.stub.WaitForInstanceCompletion(pb.GetInstanceRequest(instanceId="wf"))
        except grpc.RpcError as error:
            codes.append(error.code())

    waiters = [threading.Thread(target=wait) for _ in range(50)]
    for waiter in waiters:
        waiter.start()
    wait_for(lambda: len(sidecar._dispatcher.waiters._waiting.get(("outlast", "wf"), ())) == 50)
    before = time.monotonic()
    sidecar.stop()
    assert time.monotonic() - before < 1
    for waiter in waiters:
        waiter.join(5)
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
    worker.close()


def test_shutdown_over_the_api(tmp_path: Path) -> None:
    sidecar = EmbeddedSidecar(tmp_path / "outlast.db").start()
    with grpc.insecure_channel(sidecar.grpc_address) as channel:
        api_service_v1.DaprStub(channel).Shutdown(api_v1.ShutdownRequest())
    wait_for(lambda: not sidecar.running, 5)


EXIT = """
import sys, threading, time
from outlast.embedded import ensure_started
from tests.embedded.raw import RawWorker
import dapr.ext.workflow._durabletask.internal.protos as pb
sidecar = ensure_started(sys.argv[1])
worker = RawWorker(sidecar.grpc_address)
worker.start("wf")
worker.next()
wait = lambda: worker.stub.WaitForInstanceCompletion(pb.GetInstanceRequest(instanceId="nobody"))
threading.Thread(target=lambda: [wait()], daemon=True).start() if "waiter" in sys.argv else None
print("ready", flush=True)
if "sleep" in sys.argv:
    # In pieces: a signal that comes between two instructions does not end a sleep that begins after it.
    for _ in range(600):
        time.sleep(0.1)
"""


def test_a_process_that_just_ends_is_quiet_and_quick(tmp_path: Path) -> None:
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", EXIT, tmp_path / "outlast.db"],
        capture_output=True,
        text=True,
        timeout=30,
        env=clean_env({}),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
    assert time.monotonic() - before < 10
    assert list((tmp_path / "outlast.db-locks").iterdir()) == []


def test_an_interrupted_process_is_quiet(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", EXIT, tmp_path / "outlast.db", "sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_env({}),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=10)
    assert child.returncode in (1, 130, -signal.SIGINT)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1


FORK = """
import os, sys, time
from outlast.embedded import ensure_started
from tests.embedded.raw import RawWorker
sidecar = ensure_started(sys.argv[1])
worker = RawWorker(sidecar.grpc_address)
worker.start("wf")
worker.next()
child = os.fork()
if not child:
    assert not sidecar.running
    time.sleep(30)
    os._exit(0)
print(f"forked {child}", flush=True)
time.sleep(60)
"""


@pytest.mark.kill
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_dead_parents_work(tmp_path: Path) -> None:
    path = tmp_path / "outlast.db"
    with (
        EmbeddedSidecar(path) as sidecar,
        RawWorker(sidecar.grpc_address) as heir,
        # gRPC's own fork handlers can crash a process that serves; they are not what is tested.
        Child.python("-c", FORK, path, log=tmp_path / "log", env={"GRPC_ENABLE_FORK_SUPPORT": "0"}) as parent,
    ):
        pid = int(parent.wait_for_line(r"^forked (\d+)").group(1))
        try:
            parent.kill()
            assert heir.next(3).workflowRequest.instanceId == "wf"
        finally:
            os.kill(pid, signal.SIGKILL)


def test_an_idle_sidecar_costs_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "outlast.db"
    with EmbeddedSidecar(path) as sidecar, EmbeddedSidecar(path), RawWorker(sidecar.grpc_address):
        time.sleep(0.3)
        before = time.process_time()
        time.sleep(2)
        assert time.process_time() - before < 0.1
