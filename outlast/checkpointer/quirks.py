"""What state store components do other than what they report. This table is the truth; capabilities are only a claim.

Every row was measured on daprd 1.18.2. `tests/stores/test_quirks.py` measures it again on each component that
`tests/stores/servers.py` can start, and fails when the table promises more than the component keeps; `measured` is
False for the others. `docs/stores.md` is generated from this table and from the results of those tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""Bytes of a gRPC message that a `daprd` takes unless told otherwise."""
SETTLE: Final = 0.25
"""Seconds after which a creation by `settle` looks who has won; longer than any request takes in a healthy store."""

Creation = Literal["first-write", "etag", "settle"]


@dataclass(frozen=True)
class Quirks:
    """How one kind of component deviates from what it reports.

    Attributes:
        sound_cas: Whether a write with an ETag really refuses every other writer.
        create: How a key is created so that one of several creators wins. `first-write`: a first-write without ETag,
            outside a transaction. `etag`: a write with `no_etag`, an ETag that no value ever has: it creates an absent
            key and is refused on any other. `settle`: the component cannot; look, write, wait `SETTLE`, look again.
            That is sound while no writer is slower than `SETTLE` between its look and its write.
        no_etag: See `create`.
        max_stored: Bytes of the largest value as it is stored, that is after `text`.
        text: Whether values must be ASCII text: they are stored as base64 then.
        transactions: Whether records and head go out as one transaction, where the component reports transactions.
        whole: Whether of a transaction that is refused nothing is applied.
        max_operations: Operations of the largest transaction.
        max_transaction: Bytes of the largest transaction.
        ttl: Whether a TTL is kept, where the component reports it.
        min_ttl: The shortest TTL in seconds.
        strong_reads: Whether reads must ask for strong consistency to see what was just written.
        absent: Text in the error by which a read reports an absent key; empty if it does so without an error.
        measured: Whether this row was measured on the component or a stand-in of its server.
        why: What was seen; part of the error when the store is refused.
    """

    sound_cas: bool = True
    create: Creation = "first-write"
    no_etag: str = ""
    max_stored: int = 1_000_000
    text: bool = False
    transactions: bool = True
    whole: bool = True
    max_operations: int = 1000
    max_transaction: int = 3_500_000
    ttl: bool = True
    min_ttl: int = 1
    strong_reads: bool = False
    absent: str = ""
    measured: bool = True
    why: str = ""

    @property
    def max_value(self) -> int:
        """Bytes of the largest value outlast writes at one key, before any encoding."""
        return self.max_stored // 4 * 3 if self.text else self.max_stored


_NO_ETAGS: Final = "it has no ETags, so of two writers the later one silently wins"

UNKNOWN: Final = Quirks(
    text=True, transactions=False, max_stored=300_000, create="settle", measured=False, why="never measured"
)
"""What is taken of a component that is not in the table: nothing that could be wrong, if its ETags are sound."""

TABLE: Final[dict[str, Quirks]] = {
    "state.in-memory": Quirks(why="nothing outlives daprd: for tests"),
    "state.sqlite": Quirks(),
    "state.postgresql": Quirks(),
    "state.postgres": Quirks(),
    "state.cockroachdb": Quirks(),
    # An implementation of its own, older than the one it shares with PostgreSQL.
    "state.cockroachdb/v1": UNKNOWN,
    "state.yugabytedb": Quirks(),
    "state.yugabyte": Quirks(),
    "state.mysql": Quirks(why="keys that differ in case, accents or trailing spaces are one key; outlast's do not"),
    # A refused ETag leaves the other operations of a transaction applied, a put-if-absent inside one protects nothing,
    # and ETags begin again after a delete.
    "state.redis": Quirks(
        whole=False, why="a refused transaction is applied all but its head: such records are never reached"
    ),
    # It reports transactions even where it is no replica set, and then each one fails.
    "state.mongodb": Quirks(transactions=False, why="transactions need a replica set, which it does not report"),
    "state.aws.dynamodb": Quirks(
        max_stored=350_000, max_operations=90, strong_reads=True, why="400 KB an item, 100 items a transaction"
    ),
    # A transaction needs one partition for all of its keys; without one every key is its own partition.
    "state.azure.cosmosdb": Quirks(
        text=True, transactions=False, why="JSON is rewritten, and a transaction stays in one partition"
    ),
    "state.azure.blobstorage": Quirks(),
    "state.azure.tablestorage": Quirks(text=True, max_stored=31_000, why="32 K characters a value, text only"),
    # Set with a version on an absent node creates it, in one atomic step of the server.
    "state.zookeeper": Quirks(
        create="etag", no_etag="2147483647", max_stored=900_000, why="a first-write overwrites what is there"
    ),
    # Without an ETag the component always upserts.
    "state.couchbase": Quirks(create="settle", why="it has no put-if-absent: creations are told apart by time"),
    "state.ravendb": Quirks(
        create="settle", text=True, why="put-if-absent reads, then writes: creations are told apart by time"
    ),
    "state.etcd": Quirks(
        sound_cas=False,
        max_operations=120,
        max_transaction=1_000_000,
        max_stored=950_000,
        why="it acknowledges writes that a race has lost (of 80 acknowledged compare-and-swaps 46 to 57 were kept)",
    ),
    "state.cassandra": Quirks(sound_cas=False, why=_NO_ETAGS),
    "state.coherence": Quirks(sound_cas=False, why=_NO_ETAGS),
    "state.memcached": Quirks(sound_cas=False, max_stored=900_000, why=_NO_ETAGS),
    "state.jetstream": Quirks(sound_cas=False, ttl=False, max_stored=900_000, absent="key not found", why=_NO_ETAGS),
    "state.consul": Quirks(sound_cas=False, ttl=False, max_stored=450_000, why=_NO_ETAGS),
    "state.hashicorp.consul": Quirks(sound_cas=False, ttl=False, max_stored=450_000, why=_NO_ETAGS),
    "state.cloudflare.workerskv": Quirks(sound_cas=False, min_ttl=60, why=_NO_ETAGS),
    "state.gcp.firestore": Quirks(sound_cas=False, text=True, ttl=False, max_stored=900_000, why=_NO_ETAGS),
    "state.hazelcast": Quirks(sound_cas=False, text=True, ttl=False, why=_NO_ETAGS),
    "state.rethinkdb": Quirks(sound_cas=False, text=True, measured=False, why=_NO_ETAGS),
}


def of(component_type: str, version: str = "") -> Quirks:
    """Return the quirks of a component of `component_type`, such as `state.redis`, in the row of its version if any."""
    return TABLE.get(f"{component_type}/{version}") or TABLE.get(component_type, UNKNOWN)
