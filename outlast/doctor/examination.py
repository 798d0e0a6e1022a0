"""Looks at the sidecar and tries out on a scratch thread what outlast relies on. Leaves nothing behind."""

from __future__ import annotations

import secrets
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Final, Literal

import grpc
from dapr.conf import settings
from dapr.proto import api_service_v1, api_v1

from outlast.checkpointer import cells, keys, records
from outlast.checkpointer.blobs import PackReader, PackWriter
from outlast.checkpointer.client import Create, Delete, Get, Item, Save, StateClient, Swap
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.sidecar import Address, locate
from outlast.checkpointer.thread import ThreadLog
from outlast.embedded.services import MARKER
from outlast.errors import OutlastError, SidecarUnavailableError, StoreError, StoreNotFoundError

Status = Literal["ok", "warning", "failed"]

_PACKAGES: Final = ("outlast", "dapr", "grpcio", "langgraph", "langgraph-checkpoint", "langchain-core", "openai-agents")
_WRITERS: Final = 4
_CREATORS: Final = 8


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What was looked at.
        status: How it is.
        detail: What was seen.
        mend: What to change; empty if nothing.
    """

    name: str
    status: Status
    detail: str
    mend: str = ""


@dataclass
class Examination:
    """What was found.

    Attributes:
        sidecar: The address; `embedded` or `dapr`; its version.
        versions: Versions of the packages involved.
        store: Component, version, reported capabilities.
        quirks: What is known of the component beyond what it reports.
        checks: All checks, in order.
        guarantee: `exactly-once`, `at-least-once`, or `none` where nothing can be kept.
    """

    sidecar: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    quirks: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    guarantee: str = "none"

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]


def examine(
    store: str,
    address: Address | None = None,
    *,
    workflow: bool = False,
    on_check: Callable[[Check], None] | None = None,
) -> Examination:
    """Examine a state store and the sidecar it is behind.

    Args:
        store: Name of the state store component.
        address: The sidecar; found as everywhere else if not given.
        workflow: Also run a workflow.
        on_check: Called with each check as it is done.
    """
    return _Examiner(store, address or locate(), on_check).run(workflow)


class _Examiner:
    def __init__(self, store: str, address: Address, on_check: Callable[[Check], None] | None) -> None:
        self._store = store
        self._address = address
        self._tell = on_check
        self._client = StateClient(store, address, guarantee="at-least-once")
        self._found = Examination()
        self._prefix = f"x-{secrets.token_hex(8)}"
        self._litter: set[str] = set()

    def run(self, workflow: bool) -> Examination:
        found = self._found
        found.versions = {name: version for name in _PACKAGES if (version := _version(name))}
        try:
            sidecar = self._sidecar()
            if sidecar is None or not self._component(sidecar):
                return found
            checks = (
                ("read and write", self._read_and_write),
                ("bytes", self._bytes),
                ("large value", self._large),
                ("stale ETag", self._stale),
                ("compare-and-swap race", self._race),
                ("creation race", self._creation),
                ("scratch thread", self._thread),
            )
            for name, check in checks:
                try:
                    check()
                except OutlastError as error:
                    self._note(name, "failed", str(error), "see the sidecar's log; the store must be writable")
            self._judge()
            self._workflows(sidecar)
            if workflow:
                self._workflow()
            return found
        finally:
            self._clean()
            self._client.close()

    def _note(self, name: str, status: Status, detail: str, mend: str = "") -> None:
        check = Check(name, status, detail, mend)
        self._found.checks.append(check)
        if self._tell:
            self._tell(check)

    def _key(self, name: str) -> str:
        key = f"{self._prefix}-{name}"
        self._litter.add(key)
        return key

    def _get(self, key: str) -> Item:
        item: Item = self._client._perform(Get((key,)))[key]
        return item

    # --- the sidecar

    def _sidecar(self) -> Any:
        try:
            # The client waits for a sidecar that may be restarting, and asks for what it needs.
            reply = self._metadata()
        except SidecarUnavailableError as error:
            self._note("sidecar", "failed", str(error), "start the sidecar, or unset DAPR_GRPC_PORT")
            return None
        kind = "embedded" if self._address.embedded or MARKER in reply.extended_metadata else "dapr"
        self._found.sidecar = {
            "address": self._address.target,
            "kind": kind,
            "version": reply.runtime_version,
            "app_id": reply.id,
        }
        self._note("sidecar", "ok", f"{self._address}, version {reply.runtime_version or '?'}, app id {reply.id!r}")
        return reply

    def _metadata(self) -> Any:
        address = self._address
        options = grpc.ssl_channel_credentials() if address.tls else None
        channel = grpc.secure_channel(address.target, options) if options else grpc.insecure_channel(address.target)
        token = (("dapr-api-token", settings.DAPR_API_TOKEN),) if settings.DAPR_API_TOKEN else ()
        with channel:
            try:
                return api_service_v1.DaprStub(channel).GetMetadata(
                    api_v1.metadata_pb2.GetMetadataRequest(), metadata=token, timeout=10
                )
            except grpc.RpcError as error:
                raise SidecarUnavailableError(
                    f"no answer from the {address}: {error.details() or error.code().name}"
                ) from error

    def _component(self, sidecar: Any) -> bool:
        stores = {c.name: c for c in sidecar.registered_components if c.type.startswith("state.")}
        component = stores.get(self._store)
        if component is not None:
            self._found.store = {
                "name": component.name,
                "type": component.type,
                "version": component.version,
                "capabilities": sorted(component.capabilities),
            }
        try:
            capabilities = self._client.capabilities
        except StoreNotFoundError as error:
            self._note("state store", "failed", str(error), f"--store {next(iter(sorted(stores)), 'NAME')}")
            return False
        known = capabilities.quirks
        self._found.quirks = {
            name: getattr(known, name)
            for name in (
                "sound_cas",
                "create",
                "text",
                "transactions",
                "max_value",
                "max_operations",
                "ttl",
                "measured",
            )
            if hasattr(known, name)
        }
        detail = (
            f"{capabilities.component_type}/{capabilities.version}: "
            f"{', '.join(self._found.store['capabilities']) or 'reports nothing'}"
        )
        if not getattr(known, "measured", True):
            self._note("state store", "warning", f"{detail}; never measured by outlast", "see docs/stores.md")
        else:
            self._note("state store", "ok", detail)
        return True

    # --- the store, by trying

    def _read_and_write(self) -> None:
        key, times = self._key("rw"), []
        for number in range(20):
            data = records.encode(records.RESULT, ["doctor", number, "x" * 1000])
            started = time.perf_counter()
            self._client._perform(Save([(key, data)]))
            times.append(time.perf_counter() - started)
            if self._get(key).data != data:
                raise StoreError("a value just written is not read back: the store is not consistent")
        self._client._perform(Delete([key]))
        if self._get(key).data:
            raise StoreError("a deleted value is still there")
        self._note("read and write", "ok", f"1 KB in {statistics.median(times) * 1000:.1f} ms (median of 20)")

    def _bytes(self) -> None:
        samples = [
            bytes(range(256)) * 4,
            b"\x00",
            b'{"a": 1.0, "b": [ ]}',
            b"$name",
            b" text \n",
            b"12345678901234567890",
        ]
        pairs = [(self._key(f"b{number}"), data) for number, data in enumerate(samples)]
        self._client._perform(Save(pairs))
        wrong = [data for key, data in pairs if self._get(key).data != data]
        together = self._client._perform(Get([key for key, _ in pairs]))
        wrong += [data for key, data in pairs if together[key].data != data]
        if wrong:
            mend = "report this with the component's type and version: it needs a row with text=True in quirks.py"
            self._note("bytes", "failed", f"{wrong[0][:20]!r} comes back changed", mend)
        else:
            self._note("bytes", "ok", "come back as they went in")

    def _large(self) -> None:
        limit = self._client.capabilities.quirks.max_value
        key, data = self._key("large"), secrets.token_bytes(limit)
        self._client._perform(Save([(key, data)]))
        if self._get(key).data != data:
            mend = "raise the store's limit (see docs/stores.md)"
            self._note("large value", "failed", f"{limit:,} bytes come back changed", mend)
        else:
            self._note("large value", "ok", f"{limit:,} bytes; what is larger is cut into pieces")

    def _stale(self) -> None:
        key = self._key("stale")
        self._client._perform(Create(key, _cell(0)))
        old = self._get(key).etag
        self._client._perform(Swap(key, _cell(1), old))
        self._client._perform(Swap(key, _cell(2), old))
        if self._get(key).data == _cell(1):
            self._note("stale ETag", "ok", "refused")
        else:
            self._note("stale ETag", "failed", "a write with a stale ETag goes through", _CHOOSE)

    def _race(self) -> None:
        """Several connections count up one cell; every acknowledged step must be in it."""
        key, each = self._key("race"), 10
        self._client._perform(Create(key, records.encode(records.REGISTRY, [])))
        lost = threading.Event()

        def count(writer: int) -> None:
            client = StateClient(self._store, self._address, guarantee="at-least-once")
            try:
                for number in range(each):
                    client.run(cells.update(key, records.REGISTRY, _marking(f"{writer}-{number}")))
            except OutlastError:
                lost.set()
            finally:
                client.close()

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(count, range(_WRITERS)))
        kept = len(self._client.run(cells.read(key, records.REGISTRY))[0])
        asked = _WRITERS * each
        if kept == asked and not lost.is_set():
            self._note("compare-and-swap race", "ok", f"{_WRITERS} writers, {asked} changes of one record, none lost")
        else:
            self._note("compare-and-swap race", "failed", f"of {asked} acknowledged changes {kept} were kept", _CHOOSE)

    def _creation(self) -> None:
        winners: list[int] = []
        clients = [StateClient(self._store, self._address, guarantee="at-least-once") for _ in range(_CREATORS)]
        for client in clients:
            _ = client.capabilities
        try:
            for number in range(3):
                key, start = self._key(f"create{number}"), threading.Barrier(_CREATORS)

                def create(writer: int, key: str = key, start: threading.Barrier = start) -> bool:
                    start.wait(10)
                    won: bool = clients[writer]._perform(Create(key, _cell(writer)))
                    return won

                with ThreadPoolExecutor(_CREATORS) as pool:
                    winners.append(sum(pool.map(create, range(_CREATORS))))
        finally:
            for client in clients:
                client.close()
        if max(winners) <= 1:
            how = getattr(self._client.capabilities.quirks, "create", "first-write")
            if how == "settle":
                detail = "one winner, by waiting: a creator held up for longer than that would not be noticed"
                self._note("creation race", "warning", detail, "create threads from one process, or use another store")
            else:
                self._note("creation race", "ok", f"{_CREATORS} creators of one record, one winner")
        else:
            detail = f"of {_CREATORS} creators of one record {max(winners)} were told that they won"
            self._note("creation race", "failed", detail, _CHOOSE)

    def _thread(self) -> None:
        """Several writers commit to one thread; its index must have all of it. Then the thread is deleted."""
        thread_id = f"outlast doctor {self._prefix}"
        # Created here, so that the registry of threads, which only grows, does not get its name.
        self._client._perform(Create(keys.thread_key(thread_id), Head(thread_id).encode()))
        self._litter.add(keys.thread_key(thread_id))
        each = 12

        def commit(writer: int) -> None:
            client = StateClient(self._store, self._address, guarantee="at-least-once")
            log = ThreadLog(thread_id)
            try:
                for number in range(each):
                    pack = PackWriter(log.key, log.names.next())
                    name = f"{number:04}-{writer}"
                    pack.add(("bytes", name.encode() * 4000))
                    entry = Entry("", name, pack.name)
                    client.run(log.commit([entry], pack.finish(client.capabilities.quirks.max_value), pack.name))
            finally:
                client.close()

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(commit, range(_WRITERS)))
        log = ThreadLog(thread_id)
        head = self._client.run(log.read())
        if head is None:
            raise StoreError("a thread just written is not there")
        entries = self._client.run(log.index.entries(head))
        reader = PackReader(log.key, lambda value: value)
        self._client.run(reader.packs(entry.pack for entry in entries))
        self._client.run(reader.fetch([[entry.pack, 0] for entry in entries]))
        kept = sum(reader.typed([entry.pack, 0])[1] == entry.checkpoint_id.encode() * 4000 for entry in entries)
        self._client.run(log.delete())
        if kept == _WRITERS * each:
            self._note("scratch thread", "ok", f"{_WRITERS} writers, {kept} commits, all there; deleted again")
        else:
            detail = f"of {_WRITERS * each} acknowledged commits {kept} are there"
            self._note("scratch thread", "failed", detail, _CHOOSE)

    def _clean(self) -> None:
        try:
            self._client._perform(Delete(sorted(self._litter)))
        except OutlastError:
            pass

    def _judge(self) -> None:
        failed = {check.name for check in self._found.failed}
        claimed = self._client.capabilities.guarantee
        if failed & {"read and write", "bytes", "large value"}:
            self._found.guarantee = "none"
        elif failed or claimed != "exactly-once":
            self._found.guarantee = "at-least-once"
        else:
            self._found.guarantee = "exactly-once"
        if claimed != "exactly-once":
            why = self._client.capabilities.quirks.why or "it has no ETags"
            self._note("component", "failed", f"{self._client.capabilities.component_type}: {why}", _CHOOSE)

    # --- workflows

    def _workflows(self, sidecar: Any) -> None:
        if self._found.sidecar["kind"] == "embedded":
            self._note("workflow engine", "ok", "in the embedded sidecar")
            return
        actors = sidecar.actor_runtime
        status = api_v1.metadata_pb2.ActorRuntime.ActorRuntimeStatus.Name(actors.runtime_status)
        detail = f"actors {status.lower()}, {actors.placement or 'no placement'}"
        if status == "RUNNING" and "connected" in actors.placement and "disconnected" not in actors.placement:
            self._note("workflow engine", "ok", detail)
            return
        mend = (
            'workflows need one state store with `actorStateStore: "true"` in its YAML, and daprd must reach the '
            "placement and scheduler services (--placement-host-address, --scheduler-host-address; `dapr init`)"
        )
        self._note("workflow engine", "failed", f"not ready: {detail}", mend)

    def _workflow(self) -> None:
        import dapr.ext.workflow as wf

        started = time.perf_counter()
        name, port = f"outlast.doctor.{secrets.token_hex(4)}", str(self._address.port)
        runtime = wf.WorkflowRuntime(host=self._address.host, port=port)

        def touch(context: Any, number: int) -> int:
            return number + 1

        def workflow(context: Any, number: int) -> Any:
            return (yield context.call_activity(touch, input=number))

        runtime.register_activity(touch, name=f"{name}.touch")
        runtime.register_workflow(workflow, name=name)
        try:
            runtime.start()
            client = wf.DaprWorkflowClient(host=self._address.host, port=port)
            instance = client.schedule_new_workflow(workflow, input=1)
            state = client.wait_for_workflow_completion(instance, timeout_in_seconds=20)
            good = state is not None and state.runtime_status.name == "COMPLETED"
            detail = f"ran in {(time.perf_counter() - started) * 1000:.0f} ms" if good else f"ended as {state}"
            client.purge_workflow(instance)
        except Exception as error:
            good, detail = False, f"{type(error).__name__}: {error}"
        finally:
            runtime.shutdown()
        mend = "" if good else "another worker of this app id may have taken it; else see the sidecar's log"
        self._note("workflow", "ok" if good else "failed", detail, mend)


_CHOOSE: Final = (
    "choose a component with a sound compare-and-swap (state.postgresql, state.redis, state.sqlite, state.mysql, "
    'state.mongodb), or ask for guarantee="at-least-once" and let one process at a time write to a thread'
)


def _marking(mark: str) -> Callable[[Any], Any]:
    return lambda now: None if mark in now else [*now, mark]


def _cell(number: int) -> bytes:
    return records.encode(records.REGISTRY, number)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
