"""DaprStore: LangGraph's long-term memory on any Dapr state store that can compare-and-swap."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import (
    BaseStore,
    GetOp,
    IndexConfig,
    ListNamespacesOp,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    ensure_embeddings,
    get_text_at_path,
    tokenize_path,
)

from outlast.checkpointer import store_match, sweeper
from outlast.checkpointer.client import StateClient, Steps
from outlast.checkpointer.store_cells import VALUE, VECTORS, Draft, Stored, item_key
from outlast.checkpointer.store_index import PAGE, Index, Namespace
from outlast.checkpointer.store_items import Items
from outlast.checkpointer.store_scan import Scan, first_seen
from outlast.checkpointer.store_vectors import Vector, cosine
from outlast.checkpointer.sweeper import Sweeper
from outlast.errors import StoreError

logger = logging.getLogger("outlast.store")

_TIDY: Final = 20
"""Expired items that one search deletes at most."""
_Ref = tuple[Namespace, str]


class DaprStore(BaseStore):
    """A LangGraph store that keeps items in a Dapr state store, for graphs, processes and machines to share.

    It behaves as LangGraph's `InMemoryStore`, and nothing is lost when many write at once or one of them is killed.
    Both faces, sync and async, may be used at once, from any thread and any event loop; every method returns when what
    it wrote is durable. A put, a get and a delete cost the same however many items there are. A search reads the items
    under its prefix until it has enough: up to `offset + limit`, with a `filter` those that do not meet it, too, and
    with a `query` all of them.

    Args:
        store: Name of the state store component.
        index: Turns on search by meaning: `{"dims": …, "embed": …, "fields": […]}` as for `InMemoryStore`. The vectors
            are kept in the store and each search reads all of those under its prefix and compares exactly: for
            thousands of items under a prefix, not for millions. NumPy, where installed, makes comparing faster, not
            reading.
        ttl: Time to live: `default_ttl` in minutes, `refresh_on_read`, `sweep_interval_minutes`. Expired items are
            never returned; searches that meet some delete them, and so do `sweep_ttl` and `start_ttl_sweeper`.
        serde: Serialises values and vectors; LangGraph's msgpack serialiser if not given. With `EncryptedSerializer`
            namespaces, keys and times remain readable in the store.
        client: The store to use instead of the one named `store`.

    Raises:
        SidecarUnavailableError: If the configured sidecar's address is not valid.
        StoreNotFoundError, UnsupportedStoreError: On first use, if the store is unknown or cannot compare-and-swap.
    """

    supports_ttl = True

    def __init__(
        self,
        store: str = "statestore",
        *,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        serde: SerializerProtocol | None = None,
        client: StateClient | None = None,
    ) -> None:
        self.ttl_config = ttl
        self.index_config = index
        self.embeddings = ensure_embeddings(index["embed"]) if index else None
        fields = (index.get("fields") if index else None) or ["$"]
        self._fields = [path if path == "$" else tokenize_path(path) for path in fields]
        self._client = client or StateClient(store)
        self._index = Index()
        self._clock = time.time
        self._items = Items(self._client, serde or JsonPlusSerializer(), self._index, lambda: self._clock())
        self._sweeper = Sweeper(self.sweep_ttl, "outlast-store-sweeper")

    # --- LangGraph's interface: everything else of BaseStore ends here

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Carry out operations: reads see what was there before the batch; of several puts of an item the last counts.

        Raises:
            SerializationError: If a value cannot be serialised; nothing is written then.
        """
        plan = self._plan(ops)
        if self.embeddings and plan.queries:
            with ThreadPoolExecutor() as pool:
                plan.take_queries(list(pool.map(self.embeddings.embed_query, plan.queries)))
        if self.embeddings and plan.texts:
            plan.take_texts(self.embeddings.embed_documents(list(plan.texts)))
        return self._client.run(self._carry_out(plan, self._drafts(plan)))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Carry out operations. Async face of `batch`."""
        plan = self._plan(ops)
        if self.embeddings and plan.queries:
            plan.take_queries(await asyncio.gather(*map(self.embeddings.aembed_query, plan.queries)))
        if self.embeddings and plan.texts:
            plan.take_texts(await self.embeddings.aembed_documents(list(plan.texts)))
        return await self._client.arun(self._carry_out(plan, self._drafts(plan)))

    def sweep_ttl(self) -> int:
        """Delete all items that have expired. Returns how many there were."""
        return self._client.run(self._sweep())

    async def asweep_ttl(self) -> int:
        """Delete all items that have expired. Async face of `sweep_ttl`."""
        return await self._client.arun(self._sweep())

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> Future[None]:
        """Call `sweep_ttl` regularly, on a thread. Cancelling the future that is returned stops that."""
        if not self.ttl_config:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._sweeper.start(
            sweep_interval_minutes or self.ttl_config.get("sweep_interval_minutes") or sweeper.MINUTES
        )

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """Stop the sweeper. Returns False if it has not ended within `timeout` seconds."""
        return self._sweeper.stop(timeout)

    # --- preparing a batch: pure

    def _plan(self, ops: Iterable[Op]) -> _Plan:
        plan = _Plan()
        for op in ops:
            plan.ops.append(op)
            if isinstance(op, PutOp):
                plan.puts[tuple(op.namespace), op.key] = op
            elif isinstance(op, SearchOp):
                if op.query and self.embeddings:
                    plan.queries.setdefault(op.query, [])
            elif not isinstance(op, GetOp | ListNamespacesOp):
                raise ValueError(f"unknown operation: {type(op).__qualname__}")
        if self.embeddings:
            for ref, op in plan.puts.items():
                for text in self._texts(op):
                    plan.texts.setdefault(text, [])
                    plan.texts_of.setdefault(ref, []).append(text)
        return plan

    def _texts(self, op: PutOp) -> list[str]:
        if op.value is None or op.index is False:
            return []
        fields = self._fields if op.index is None else [tokenize_path(path) for path in op.index]
        return [text for path in fields for text in get_text_at_path(op.value, path)]

    def _drafts(self, plan: _Plan) -> list[Draft]:
        dims = (self.index_config or {}).get("dims")
        for vector in (*plan.queries.values(), *plan.texts.values()):
            if dims and len(vector) != dims:
                raise ValueError(f"the index has dims={dims}, but its `embed` returned a vector of {len(vector)}")
        drafts = []
        for (namespace, key), op in plan.puts.items():
            vectors = [plan.texts[text] for text in plan.texts_of.get((namespace, key), ())]
            drafts.append(self._items.draft(namespace, key, op.value, vectors, op.ttl))
        return drafts

    # --- carrying it out: sans I/O

    def _carry_out(self, plan: _Plan, drafts: Sequence[Draft]) -> Steps[list[Result]]:
        results: list[Result] = [None] * len(plan.ops)
        gets = {position: op for position, op in enumerate(plan.ops) if isinstance(op, GetOp)}
        if gets:
            yield from self._get(gets, results)
        for position, op in enumerate(plan.ops):
            if isinstance(op, SearchOp):
                results[position] = yield from self._search(op, plan.queries.get(op.query or ""))
            elif isinstance(op, ListNamespacesOp):
                results[position] = yield from self._namespaces(op)
        if drafts:
            yield from self._items.write(drafts)
        return results

    def _get(self, gets: dict[int, GetOp], results: list[Result]) -> Steps[None]:
        cells = {position: item_key(tuple(op.namespace), op.key) for position, op in gets.items()}
        rows = yield from self._items.read(cells.values())
        now = self._clock()
        found = yield from self._items.contents([row for row in rows.values() if row.live(now)], VALUE)
        for position, cell in cells.items():
            if cell in found:
                row, value = found[cell]
                results[position] = row.item(value)
        touched = {cells[position] for position, op in gets.items() if op.refresh_ttl}
        yield from self._items.refresh(row for cell, (row, _) in found.items() if cell in touched)

    def _search(self, op: SearchOp, query: Vector | None) -> Steps[list[SearchItem]]:
        nodes = yield from self._index.nodes(tuple(op.namespace_prefix))
        scan = Scan(self._items, nodes, self._clock())
        end = op.offset + op.limit
        rows = yield from scan.collect(end if query is None and min(op.offset, op.limit) >= 0 else None, op.filter)
        ranked: list[tuple[float | None, Stored]] = (
            [(None, row) for row in rows] if query is None else (yield from self._ranked(query, rows))
        )
        chosen = ranked[op.offset : end]
        found = yield from self._items.contents([row for _, row in chosen], VALUE)
        if op.refresh_ttl:
            yield from self._items.refresh(row for row, _ in found.values())
        yield from _tidy(scan)
        return [_search_item(*found[row.cell], score) for score, row in chosen if row.cell in found]

    def _ranked(self, query: Vector, rows: Sequence[Stored]) -> Steps[list[tuple[float | None, Stored]]]:
        """Return `rows`, the most alike first; those that cannot be compared last."""
        best: dict[str, float] = {}
        for start in range(0, len(rows), PAGE):
            found = yield from self._items.contents(rows[start : start + PAGE], VECTORS)
            vectors = [(cell, vector) for cell, (_, several) in found.items() for vector in several]
            # Vectors of another length were made by another model.
            vectors = [(cell, vector) for cell, vector in vectors if len(vector) == len(query)]
            scores = cosine(query, [vector for _, vector in vectors])
            for (cell, _), score in zip(vectors, scores, strict=True):
                best[cell] = max(score, best.get(cell, score))
        scored = sorted((row for row in rows if row.cell in best), key=lambda row: best[row.cell], reverse=True)
        rest = [row for row in rows if row.cell not in best]
        return [*((best[row.cell], row) for row in scored), *((None, row) for row in rest)]

    def _namespaces(self, op: ListNamespacesOp) -> Steps[list[Namespace]]:
        conditions = op.match_conditions or ()
        nodes = yield from self._index.nodes(store_match.stem(conditions))
        nodes = [node for node in nodes if all(store_match.matches(part, node.namespace) for part in conditions)]
        inhabited = yield from first_seen(self._items, nodes, self._clock())
        for node in nodes:
            if node.first not in inhabited:
                scan = Scan(self._items, [node], self._clock())
                if (yield from scan.collect(1, None)):
                    inhabited.add(node.first)
                yield from _tidy(scan)
        found = {node.namespace[: op.max_depth] for node in nodes if node.first in inhabited}
        return sorted(found)[op.offset : op.offset + op.limit]

    def _sweep(self) -> Steps[int]:
        count = 0
        for node in (yield from self._index.nodes(())):
            scan = Scan(self._items, [node], self._clock())
            yield from scan.collect(None, None)
            count += yield from scan.tidy()
        return count


@dataclass
class _Plan:
    """A batch: its operations, its puts without those that a later one replaces, and what is to be embedded."""

    ops: list[Op] = field(default_factory=list)
    puts: dict[_Ref, PutOp] = field(default_factory=dict)
    queries: dict[str, Vector] = field(default_factory=dict)
    texts: dict[str, Vector] = field(default_factory=dict)
    texts_of: dict[_Ref, list[str]] = field(default_factory=dict)

    def take_queries(self, vectors: Sequence[Vector]) -> None:
        self.queries = dict(zip(self.queries, map(_floats, vectors), strict=True))

    def take_texts(self, vectors: Sequence[Vector]) -> None:
        self.texts = dict(zip(self.texts, map(_floats, vectors), strict=True))


def _floats(vector: Vector) -> Vector:
    return tuple(float(number) for number in vector)


def _tidy(scan: Scan) -> Steps[None]:
    try:
        yield from scan.tidy(_TIDY)
    except StoreError:
        # The answer is there; the next search tries again.
        logger.debug("leftovers of the long-term store could not be cleared away", exc_info=True)


def _search_item(row: Stored, value: dict[str, Any], score: float | None) -> SearchItem:
    namespace, key = row.ref
    return SearchItem(namespace=namespace, key=key, value=value, score=score, **row.times())
