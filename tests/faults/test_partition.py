"""One of two replicas, in a network namespace of its own, is cut off from everything for 30 seconds, and healed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from outlast.checkpointer.sidecar import Address
from tests.faults import servers
from tests.faults.stage import LOOPBACK, User, World, play, start_worker
from tests.harness.daprd import DaprCluster
from tests.harness.procs import Child, clean_env, wait_for
from tests.stores.starting import CannotStart, checked, namespace

pytestmark = [pytest.mark.kill, pytest.mark.timeout(300)]
CUT = 30.0


@dataclass
class Place:
    """A network namespace that sees servers on this host's loopback as its own, and can be cut off."""

    address: str
    gateway: str
    inside: list[str]

    def _drop_all(self, drop: bool) -> None:
        token = self.inside[-1].removeprefix("ol-")
        for prefix, device in (([], f"ol{token}o"), (self.inside, f"ol{token}i")):
            # A queue that takes nothing: what is sent is lost, and nobody is told.
            what = ["replace", "dev", device, "root", "pfifo", "limit", "0"] if drop else ["del", "dev", device, "root"]
            checked([*prefix, "tc", "qdisc", *what], Path("/"))

    def cut_off(self) -> None:
        self._drop_all(True)

    def heal(self) -> None:
        self._drop_all(False)

    @contextmanager
    def forwarding(self, ports: list[int], folder: Path) -> Iterator[None]:
        """Let these ports of this host's loopback be reached from inside, under the same address."""
        program = [sys.executable, Path(__file__).with_name("forward.py")]
        numbers = [str(port) for port in ports]
        sides = {
            "outer": [*program, self.gateway, LOOPBACK, *numbers],
            "inner": [*self.inside, *program, LOOPBACK, self.gateway, *numbers],
        }
        with ExitStack() as stack:
            for name, command in sides.items():
                side = stack.enter_context(Child(command, log=folder / f"{name}.log", env=clean_env({})))
                side.wait_for_line("forwarding")
            yield


@pytest.fixture
def place() -> Iterator[Place]:
    try:
        with namespace() as (address, inside):
            yield Place(address, f"{address.rpartition('.')[0]}.1", inside)
    except CannotStart as error:
        pytest.skip(str(error))


def test_a_replica_is_cut_off_and_healed(place: Place, world: World, folder: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        store = stack.enter_context(servers.redis(tmp_path))
        cluster = stack.enter_context(DaprCluster(tmp_path / "dapr", {"statestore.yaml": store.component}))
        world_ports = [urlsplit(url).port or 0 for url in (world.model.url, world.ledger.url)]
        stack.enter_context(place.forwarding([*cluster.control_ports, store.port, *world_ports], tmp_path))
        here = cluster.new_daprd("cut")
        there = cluster.new_daprd("cut")
        workers = []
        for name, daprd, address, inside in (
            ("here", here, place.gateway, []),
            ("there", there, place.address, place.inside),
        ):
            daprd.at(address, inside)
            daprd.start()
            stack.callback(daprd.kill)
            worker = start_worker(folder, name, {**world.env, **daprd.env}, inside)
            workers.append(stack.enter_context(worker))
        user = User(Address(LOOPBACK, here.grpc_port), world)
        stack.callback(user.close)

        def fault() -> None:
            assert "attempt" in workers[1].output(), "the replica that is to be cut off has no run"
            place.cut_off()
            time.sleep(CUT)
            place.heal()

        def stale_worker_knows() -> None:
            def given_up() -> bool:
                said = workers[1].output()
                held = len(re.findall(r"run \S+: attempt 1,", said))
                return len(re.findall(r"run \S+: FencedError|Activity execution failed", said)) >= held

            wait_for(given_up, 90, lambda: f"the replica to learn what it lost\n{workers[1].tail(6000)}", every=0.2)

        # Its client tries a call three times; what is sent into the cut arrives when it is healed.
        play("partition-redis", world, user, workers, fault, stale=3, afterwards=stale_worker_knows)
