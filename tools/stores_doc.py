"""Write docs/stores.md from the quirks table and the results of tests/stores; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from outlast.checkpointer import quirks  # noqa: E402

RESULTS = ROOT / "tests" / "stores" / "results.json"
TARGET = ROOT / "docs" / "stores.md"


@dataclass(frozen=True)
class Kind:
    """A state store component of Dapr.

    Attributes:
        test: Its name in the results of tests/stores; empty if it has no fixture.
        claims: Whether it reports ETags.
        settings: Its metadata, for the ready YAML; without any there is no component to write.
        notes: What to set and to know.
    """

    title: str
    type: str
    version: str = "v1"
    test: str = ""
    claims: bool = True
    settings: tuple[tuple[str, str], ...] = ()
    notes: str = ""


SHARED = ("keyPrefix", "name")
ACTORS = ("actorStateStore", "true")
PG = "host=localhost user=postgres password=secret database=dapr"

KINDS = (
    Kind("Embedded sidecar", "state.sqlite", test="embedded"),
    Kind("In-memory", "state.in-memory", test="in-memory", settings=(ACTORS,), notes="Gone with daprd: for tests."),
    Kind(
        "SQLite",
        "state.sqlite",
        test="sqlite",
        settings=(("connectionString", "data/dapr.db"), ACTORS),
        notes="One host. What the embedded sidecar uses, too.",
    ),
    Kind("PostgreSQL v1", "state.postgresql", test="postgresql-v1", settings=(("connectionString", PG), ACTORS)),
    Kind(
        "PostgreSQL v2",
        "state.postgresql",
        "v2",
        "postgresql-v2",
        settings=(("connectionString", PG), ACTORS),
        notes="Recommended. Its tables are not those of v1: the version cannot be changed later.",
    ),
    Kind("CockroachDB v2", "state.cockroachdb", "v2", "cockroachdb-v2", settings=(("connectionString", PG), ACTORS)),
    Kind("YugabyteDB", "state.yugabytedb", "v2", "yugabytedb", settings=(("connectionString", PG), ACTORS)),
    Kind(
        "MySQL, MariaDB",
        "state.mysql",
        test="mysql",
        settings=(("connectionString", "dapr:secret@tcp(localhost:3306)/?tls=false"), ACTORS),
        notes="`max_allowed_packet` of at least 8 MB.",
    ),
    Kind(
        "Redis, Valkey",
        "state.redis",
        test="redis",
        settings=(("redisHost", "localhost:6379"), ("redisPassword", ""), ACTORS),
        notes="Set `appendonly yes`: without it Redis loses acknowledged writes when it crashes. No eviction.",
    ),
    Kind(
        "MongoDB",
        "state.mongodb",
        test="mongodb",
        settings=(("host", "localhost:27017"), ("databaseName", "dapr"), ACTORS),
        notes="`writeConcern: majority`, `readConcern: majority`. As store of workflows it must be a replica set.",
    ),
    Kind(
        "DynamoDB",
        "state.aws.dynamodb",
        test="dynamodb",
        settings=(("table", "outlast"), ("region", "us-east-1"), ("partitionKey", "key")),
        notes="Keep workflows elsewhere: a fan-out of 120 fails on it.",
    ),
    Kind(
        "Azure Cosmos DB",
        "state.azure.cosmosdb",
        test="azure-cosmosdb",
        settings=(
            ("url", "https://ACCOUNT.documents.azure.com:443/"),
            ("masterKey", "KEY"),
            ("database", "dapr"),
            ("collection", "outlast"),
        ),
        notes="Partition key `/partitionKey`. Strong, bounded or session consistency. Keep workflows elsewhere.",
    ),
    Kind(
        "Azure Blob Storage",
        "state.azure.blobstorage",
        "v2",
        "azure-blobstorage",
        settings=(("accountName", "ACCOUNT"), ("accountKey", "KEY"), ("containerName", "outlast")),
        notes="Use v2: v1 drops the prefix of keys. No workflows: it has no transactions.",
    ),
    Kind(
        "Azure Table Storage",
        "state.azure.tablestorage",
        test="azure-tablestorage",
        settings=(("accountName", "ACCOUNT"), ("accountKey", "KEY"), ("tableName", "outlast")),
        notes="Slow for large values: 23 KB a record. A head has to fit one: few parallel writes a step.",
    ),
    Kind(
        "ZooKeeper",
        "state.zookeeper",
        test="zookeeper",
        settings=(("servers", "localhost:2181"), ("sessionTimeout", "10s"), ("keyPrefixPath", "/")),
        notes="`keyPrefixPath` must begin with `/` and exist. Made for little data. No workflows.",
    ),
    Kind(
        "Couchbase",
        "state.couchbase",
        test="couchbase",
        settings=(
            ("couchbaseURL", "couchbase://localhost"),
            ("username", "dapr"),
            ("password", "secret"),
            ("bucketName", "outlast"),
        ),
        notes="Let one process create each thread. No workflows.",
    ),
    Kind(
        "RavenDB",
        "state.ravendb",
        test="ravendb",
        settings=(("serverUrl", "http://localhost:8080"), ("databaseName", "dapr")),
        notes="Let one process create each thread. Keep workflows elsewhere: a fan-out of 120 fails on it.",
    ),
    Kind("SQL Server", "state.sqlserver", "v2", settings=(("connectionString", "Server=localhost;…"), ACTORS)),
    Kind("Oracle Database", "state.oracledatabase", settings=(("connectionString", "oracle://…"), ACTORS)),
    Kind("Aerospike", "state.aerospike", settings=(("hosts", "localhost:3000"), ("namespace", "dapr"))),
    Kind("Alibaba Tablestore", "state.alicloud.tablestore", settings=(("endpoint", "…"), ("tableName", "outlast"))),
    Kind(
        "OCI Object Storage",
        "state.oci.objectstorage",
        settings=(("bucketName", "outlast"),),
        notes="It refuses a first-write without ETag: run the checks of `outlast doctor` before you rely on it.",
    ),
    Kind("etcd", "state.etcd", "v2", "etcd", settings=(("endpoints", "localhost:2379"), ("keyPrefixPath", "outlast"))),
    Kind("Cassandra", "state.cassandra", test="cassandra", claims=False, settings=(("hosts", "localhost"),)),
    Kind(
        "Coherence", "state.coherence", test="coherence", claims=False, settings=(("serverAddress", "localhost:1408"),)
    ),
    Kind("memcached", "state.memcached", test="memcached", claims=False, settings=(("hosts", "localhost:11211"),)),
    Kind(
        "NATS JetStream",
        "state.jetstream",
        test="jetstream",
        claims=False,
        settings=(("natsURL", "nats://localhost:4222"), ("bucket", "outlast")),
        notes="The bucket must exist.",
    ),
    Kind("Consul", "state.consul", test="consul", claims=False, settings=(("httpAddr", "localhost:8500"),)),
    Kind(
        "Cloudflare Workers KV",
        "state.cloudflare.workerskv",
        test="cloudflare-workerskv",
        claims=False,
        settings=(("workerName", "outlast"), ("kvNamespaceID", "ID")),
    ),
    Kind("Firestore", "state.gcp.firestore", claims=False, settings=(("project_id", "PROJECT"), ("noIndex", "true"))),
    Kind("Hazelcast", "state.hazelcast", claims=False, settings=(("hazelcastServers", "localhost:5701"),)),
    Kind("RethinkDB", "state.rethinkdb", claims=False, settings=(("address", "localhost:28015"),)),
)


def guarantee(kind: Kind) -> str:
    """What outlast promises on it."""
    known = quirks.of(kind.type, kind.version)
    if not (kind.claims and known.sound_cas):
        return "at-least-once, if asked for"
    if not known.measured:
        return "exactly-once, if its ETags are sound"
    return "exactly-once; creation by time" if known.create == "settle" else "exactly-once"


def tested(kind: Kind, results: dict[str, Any]) -> str:
    """What the tests say."""
    result = results.get(kind.test)
    if not result:
        seen = quirks.of(kind.type, kind.version).measured
        return "not here; its quirks were measured once, by hand" if seen else "never: cannot be run here"
    if "skipped" in result:
        return f"not here: {result['skipped']}"
    failed = [name for name, outcome in result["tests"].items() if outcome == "failed"]
    passed = sum(outcome == "passed" for outcome in result["tests"].values())
    if failed:
        return f"**{len(failed)} of {len(failed) + passed} failed**: {', '.join(sorted(failed))}"
    conformance = result["measured"].get("conformance", 0)
    return f"{result['server']}, {result['date']}: {passed} passed, conformance {conformance} async and sync"


def size(count: int) -> str:
    return f"{count // 1000} KB" if count < 1_000_000 else f"{count / 1_000_000:g} MB"


INTRODUCTION = f"""\
# State stores

<!-- Written by tools/stores_doc.py from the quirks table and tests/stores/results.json: do not edit. -->

outlast works on any Dapr state store that can compare-and-swap. What a component reports is not believed:
`outlast/checkpointer/quirks.py` has what each really does, and `make test-stores` measures it again on real
servers, through a real daprd.

- **exactly-once**: two processes may write to one thread at any time; nothing acknowledged is lost.
- **exactly-once; creation by time**: the component cannot create a key only if it is absent. outlast looks,
  writes, waits {quirks.SETTLE} s and looks again; two processes that create one thread at the same instant
  are told apart while neither is held up for longer than that. Once a thread exists it is exactly-once.
- **at-least-once, if asked for**: refused, unless you pass `guarantee="at-least-once"` to `durable`,
  `DaprSaver` or `Runtime`. Where there are no ETags, a head is compared and then written, in two requests:
  right as long as one process at a time writes to a thread. Two at once may lose what one of them wrote.

Values larger than the limit are cut into chunks. Keys are `[a-z0-9-]`, under 100 characters, on every store.
"""

SETTINGS = """
## Settings for every component

- `keyPrefix: name` when several Dapr app ids share threads: by default each app id has keys of its own.
- `actorStateStore: "true"` on exactly one component: Dapr keeps workflows there. It needs transactions, so
  where the table says that it cannot, let one component keep the workflows and another one the threads.
- A store, or a `keyPrefix`, of outlast's own: it never lists or deletes what it did not write.
- Do not expire, evict or edit its keys by other means.
- Large state: start daprd with a larger `--max-body-size` only if you see `RecordTooLargeError`.
"""

CONTEST = """
## Eight processes on one thread, killed at random

`PUTS=1000 make test-stores STORE=redis ARGS="-k killed_at_random"`: eight processes commit checkpoints to one thread
while random ones are killed with SIGKILL and started again. Every acknowledged checkpoint is there with its value; the
swaps of the head are one chain, so each head had one winner; and no record is left that the head does not reach, once
`outlast doctor --repair` was there (looked for past Dapr, in the store itself).

| store | acknowledged | kills | lost | orphans before repair | after | seconds |
|---|---|---|---|---|---|---|
"""


def table(results: dict[str, Any]) -> str:
    """A row per component."""
    lines = [
        "| store | component | guarantee | record limit | stored as | transactions | tested on |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        known = quirks.of(kind.type, kind.version)
        measured = results.get(kind.test, {}).get("measured", {})
        whole = measured.get("transaction_whole")
        transactions = {True: "whole", False: "not whole (not relied on)", None: "not used"}[whole]
        form = "base64" if known.text else "bytes"
        row = (kind.title, component(kind), guarantee(kind), size(known.max_value), form, transactions)
        lines.append(f"| {' | '.join(row)} | {tested(kind, results)} |")
    return "\n".join(lines) + "\n"


def component(kind: Kind) -> str:
    return f"`{kind.type}` {kind.version}" if kind.settings else "none needed"


def contests(results: dict[str, Any]) -> str:
    """What came out of `tests/stores/test_contention.py` where its records could be counted."""
    rows = []
    for kind in KINDS:
        result = results.get(kind.test, {})
        seen = result.get("measured", {}).get("contest", {})
        if result.get("tests", {}).get("eight_processes_killed_at_random") == "passed" and "orphans" in seen:
            row = (kind.title, f"{seen['puts']:,}", seen["kills"], 0, seen["orphans"], 0, seen["seconds"])
            rows.append(f"| {' | '.join(map(str, row))} |\n")
    return CONTEST + "".join(rows) if rows else ""


def section(kind: Kind) -> str:
    """What to set and to know of one component, and its YAML."""
    why = quirks.of(kind.type, kind.version).why
    notes = " ".join(part for part in (kind.notes, why and f"{why[0].upper()}{why[1:]}.") if part)
    lines = ["", f"## {kind.title}", "", *([notes, ""] if notes else []), "```yaml"]
    lines += ["apiVersion: dapr.io/v1alpha1", "kind: Component", "metadata:", "  name: statestore", "spec:"]
    lines += [f"  type: {kind.type}", f"  version: {kind.version}", "  metadata:"]
    for name, value in (*kind.settings, SHARED):
        lines += [f"    - name: {name}", f"      value: {json.dumps(value, ensure_ascii=False)}"]
    return "\n".join([*lines, "```"]) + "\n"


def page() -> str:
    """Return docs/stores.md."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    parts = [INTRODUCTION, "\n", table(results), contests(results), SETTINGS]
    return "".join([*parts, *(section(kind) for kind in KINDS if kind.settings)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if docs/stores.md is not what would be written")
    if parser.parse_args().check:
        if TARGET.read_text() == page():
            return 0
        print("docs/stores.md is out of date: run tools/stores_doc.py", file=sys.stderr)
        return 1
    TARGET.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
