"""The disk under the embedded sidecar is full for a while."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from outlast.checkpointer.sidecar import Address
from outlast.embedded import EmbeddedSidecar
from tests.faults.stage import LOOPBACK, User, World, play, start_worker

pytestmark = [pytest.mark.kill, pytest.mark.timeout(240)]
FULL = 8.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _fill(place: Path) -> Path:
    """Write until nothing more fits."""
    ballast = place / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    return ballast


def test_the_disk_is_full_and_then_is_not(small_disk: Path, world: World, folder: Path) -> None:
    file = small_disk / "outlast.db"
    with ExitStack() as stack:
        env = {**world.env, "OUTLAST_EMBEDDED_PATH": str(file)}
        workers = [stack.enter_context(start_worker(folder, f"disk-{number}", env)) for number in range(2)]
        sidecar = stack.enter_context(EmbeddedSidecar(file))
        user = User(Address(LOOPBACK, sidecar.grpc_port, embedded=True), world)
        stack.callback(user.close)

        def fault() -> None:
            ballast = _fill(small_disk)
            deadline = time.monotonic() + FULL
            while time.monotonic() < deadline:
                # What SQLite gives back is taken, too.
                with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as more:
                    more.write(b"x" * 4096)
                time.sleep(0.01)
            ballast.unlink()

        play("disk-embedded", world, user, workers, fault)
        assert any("database or disk is full" in worker.output() for worker in workers), "no worker noticed"
