"""DaprStore does what LangGraph's InMemoryStore does, told by doing the same with both."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.serde.base import CipherProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.store.base import (
    BaseStore,
    GetOp,
    IndexConfig,
    Item,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchItem,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore

from outlast.checkpointer import DaprStore, records, store_vectors
from outlast.checkpointer.client import Delete, Get, Save, StateClient
from outlast.checkpointer.sidecar import Address
from outlast.checkpointer.store_cells import item_key
from outlast.embedded import EmbeddedSidecar
from outlast.errors import CorruptRecordError, RecordTooLargeError, SerializationError, UnknownFormatError

DIMS = 6
MakeStore = Callable[..., DaprStore]


def embed(texts: list[str]) -> list[list[float]]:
    """Vectors that depend on the text only, and not all of one length."""
    return [[byte / 7 - 11 for byte in hashlib.sha256(text.encode()).digest()[:DIMS]] for text in texts]


def index(**more: Any) -> IndexConfig:
    return IndexConfig(dims=DIMS, embed=embed, **more)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeStore]:
    """Makes stores on a sidecar of this test alone; a new one remembers nothing, as after a restart."""
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        address = Address("127.0.0.1", sidecar.grpc_port, embedded=True)
        yield lambda **arguments: DaprStore(client=StateClient("statestore", address), **arguments)


class Both:
    """Does everything with two stores and compares what they answer."""

    def __init__(self, ours: DaprStore, theirs: InMemoryStore, by_async: bool) -> None:
        self.ours, self.theirs, self.by_async = ours, theirs, by_async

    async def batch(self, ops: list[Any]) -> list[Any]:
        # InMemoryStore lists namespaces that are empty, and those that were only looked into.
        namespaces = {id(op): self._inhabited(op) for op in ops if isinstance(op, ListNamespacesOp)}
        expected = self.theirs.batch(ops)
        got = (await self.ours.abatch(ops)) if self.by_async else self.ours.batch(ops)
        for op, mine, other in zip(ops, got, expected, strict=True):
            assert plain(mine) == namespaces.get(id(op), plain(other)), op
        return got

    def _inhabited(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        kept = self.theirs._data
        try:
            self.theirs._data = type(kept)(dict, {ns: rows for ns, rows in kept.items() if rows})
            return self.theirs.batch([op])[0]
        finally:
            self.theirs._data = kept


def plain(result: Any) -> Any:
    if isinstance(result, SearchItem):
        score = None if result.score is None else pytest.approx(result.score, abs=1e-9)
        return result.namespace, result.key, result.value, score
    if isinstance(result, Item):
        return result.namespace, result.key, result.value
    if isinstance(result, list):
        return [plain(one) for one in result]
    return result


NAMESPACES = [
    ("a",),
    ("a", "b"),
    ("a", "b", "c"),
    ("a", "x"),
    ("ab",),
    ("b",),
    ("b", "a"),
    ("b", "é ö", "☃"),
    ("c", "b"),
]
KEYS = ["k1", "k2", "k3", "", "ключ", "a/b||c"]


class Script:
    """Random operations that both stores take."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # To get from a namespace, or to delete, gives it a place in InMemoryStore's order of namespaces.
        self.known: list[tuple[str, ...]] = []

    def ops(self) -> list[Any]:
        ops = [self.op() for _ in range(self.random.choice((1, 1, 1, 2, 6)))]
        self.known += [op.namespace for op in ops if isinstance(op, PutOp)]
        return ops

    def op(self) -> Any:
        pick = self.random.choice
        kind = pick(("put",) * 5 + ("delete", "get", "search", "search", "namespaces"))
        if kind == "put" or not self.known:
            return PutOp(pick(NAMESPACES), pick(KEYS), self.value())
        if kind == "delete":
            return PutOp(pick(self.known), pick(KEYS), None)
        if kind == "get":
            return GetOp(pick(self.known), pick(KEYS))
        if kind == "namespaces":
            return ListNamespacesOp(
                match_conditions=pick((None, (self.condition(),), (self.condition(), self.condition()))),
                max_depth=pick((None, None, 1, 2)),
                limit=pick((100, 2, 1)),
                offset=pick((0, 0, 1, 3)),
            )
        return SearchOp(
            pick(((), ("a",), ("a", "b"), ("b",), ("a", "b", "c"), ("none",), ("c",))),
            filter=pick((None, None, self.filter())),
            limit=pick((10, 1, 2, 100, 0)),
            offset=pick((0, 0, 1, 4)),
        )

    def condition(self) -> MatchCondition:
        pick = self.random.choice
        path = pick((("a",), ("a", "b"), ("*", "b"), ("a", "*"), ("*",), ("c",), ("b", "*", "☃"), ("a", "b", "c", "d")))
        return MatchCondition(pick(("prefix", "suffix")), path)

    def value(self) -> dict[str, Any]:
        pick = self.random.choice
        return {
            "n": self.random.randrange(10),
            "kind": pick(("x", "y", None)),
            "deep": {"m": self.random.randrange(3), "l": [1, pick((2, 3))]},
            "pair": [1, pick((1, 2))],
            "when": datetime(2026, 1, 1 + self.random.randrange(9), tzinfo=UTC),
            **pick(({}, {"only": True}, {"big": "x" * 40_000})),
        }

    def filter(self) -> dict[str, Any]:
        number = self.random.randrange(10)
        return self.random.choice(
            (
                {"n": number},
                {"n": {"$gt": number}},
                {"n": {"$gte": number, "$lt": number + 3}},
                {"n": {"$lte": str(number)}},
                {"kind": {"$ne": "x"}},
                {"kind": {"$eq": None}},
                {"kind": "y", "n": {"$ne": number}},
                {"deep": {"m": 1}},
                {"deep": {"m": {"$gt": 0}, "l": [1, 2]}},
                {"pair": (1, 2)},
                {"only": True},
                {"only": None},
                {"missing": {"$eq": 1}},
            )
        )


@pytest.mark.parametrize("by_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(4))
async def test_random_operations(make: MakeStore, seed: int, by_async: bool) -> None:
    both, script = Both(make(), InMemoryStore(), by_async), Script(seed)
    for turn in range(120):
        if turn % 40 == 39:
            both.ours = make()  # a new process remembers nothing
        await both.batch(script.ops())
    await both.batch([SearchOp((), limit=1000), ListNamespacesOp()])


@pytest.mark.parametrize("by_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fields", [None, ["n", "deep.l[*]"]], ids=["whole", "fields"])
async def test_random_semantic_searches(make: MakeStore, fields: list[str] | None, by_async: bool) -> None:
    config = index(**({"fields": fields} if fields else {}))
    both, script, counter = Both(make(index=config), InMemoryStore(index=config), by_async), Script(7), 0
    for _ in range(80):
        op = script.op()
        if isinstance(op, PutOp):
            script.known.append(op.namespace)
        if isinstance(op, PutOp) and op.value is not None:
            # Numbers that differ: InMemoryStore refuses the same text twice in one batch.
            # It also takes no dates here, since it embeds JSON.
            counter += 3
            op = op._replace(value={"n": counter, "deep": {"l": [counter + 1, counter + 2]}, "kind": op.value["kind"]})
            if (op.namespace[0], op.key) in (("b", "k1"), ("ab", "k1")):
                op = op._replace(index=False)  # always, as InMemoryStore keeps vectors of earlier puts
        elif isinstance(op, SearchOp):
            op = op._replace(query=script.random.choice(("what", "who", None)), filter=None, limit=op.limit or 3)
            if op.query:
                op = op._replace(offset=0)  # its later pages repeat what has no vector
        await both.batch([op])
    await both.batch([SearchOp((), limit=1000, query="all"), SearchOp((), limit=5, query="some", filter={"kind": "x"})])


async def test_pages_of_a_semantic_search(make: MakeStore) -> None:
    both = Both(make(index=index()), InMemoryStore(index=index()), False)
    await both.batch([PutOp(("d",), f"k{n}", {"text": f"text {n}"}) for n in range(150)])
    for offset in (0, 10, 145, 200):
        await both.batch([SearchOp(("d",), query="text", limit=10, offset=offset)])


async def test_large_namespaces_keep_their_order(make: MakeStore) -> None:
    both = Both(make(), InMemoryStore(), False)
    everything = [SearchOp(("big",), limit=1000), SearchOp(("big",), limit=7, offset=205), SearchOp((), limit=1000)]
    await both.batch([PutOp(("big",), f"k{n}", {"n": n}) for n in range(330)])
    await both.batch(everything)
    # Whole pages become empty, at the front, in the middle and at the end.
    gone = [*range(0, 120), 150, *range(200, 330)]
    await both.batch([PutOp(("big",), f"k{n}", None) for n in gone])
    await both.batch(everything)
    await both.batch([PutOp(("big",), f"k{n}", {"again": n}) for n in (5, 150, 160, 250)])
    both.ours = make()
    await both.batch(everything)
    await both.batch([PutOp(("big",), f"k{n}", None) for n in range(330)])
    await both.batch([*everything, ListNamespacesOp()])
    await both.batch([PutOp(("big",), "k1", {"once": "more"})])
    await both.batch([*everything, ListNamespacesOp()])


async def test_many_namespaces(make: MakeStore) -> None:
    both = Both(make(), InMemoryStore(), False)
    await both.batch([PutOp(("users", f"u{n}", "facts"), "k", {"n": n}) for n in range(170)])
    await both.batch([PutOp(("users", "u7", "facts"), "k", None), PutOp(("users", "u9"), "k", {"n": 9})])
    both.ours = make()
    await both.batch(
        [
            ListNamespacesOp(limit=500),
            ListNamespacesOp((MatchCondition("prefix", ("users", "u7")),)),
            ListNamespacesOp((MatchCondition("prefix", ("users", "*", "facts")),), max_depth=2, limit=500),
            ListNamespacesOp((MatchCondition("suffix", ("u9", "facts")),)),
            SearchOp(("users",), limit=500),
            SearchOp(("users",), limit=5, offset=130),
            SearchOp(("users", "u9")),
        ]
    )


async def test_reads_of_a_batch_see_what_was_before_it(make: MakeStore) -> None:
    both = Both(make(), InMemoryStore(), True)
    await both.batch([PutOp(("n",), "k", {"v": 1})])
    await both.batch([PutOp(("n",), "k", {"v": 2}), GetOp(("n",), "k"), SearchOp(("n",)), PutOp(("n",), "k", {"v": 3})])
    await both.batch([GetOp(("n",), "k"), GetOp(("n",), "k"), PutOp(("n",), "k", None), PutOp(("n",), "k", {"v": 4})])
    assert both.ours.get(("n",), "k").value == {"v": 4}


async def test_the_methods_of_the_base_class(make: MakeStore) -> None:
    store: BaseStore = make()
    await store.aput(("m", "1"), "k", {"v": 1})
    store.put(("m", "2"), "k", {"v": 2})
    assert (await store.aget(("m", "2"), "k")).value == {"v": 2}
    assert [item.value["v"] for item in await store.asearch(("m",))] == [1, 2]
    assert [item.value["v"] for item in store.search(("m",), filter={"v": {"$gt": 1}})] == [2]
    assert await store.alist_namespaces(prefix=("m",), max_depth=1) == [("m",)]
    await store.adelete(("m", "1"), "k")
    store.delete(("m", "2"), "k")
    store.delete(("never", "there"), "k")
    assert store.search(()) == []
    assert store.list_namespaces() == []
    with pytest.raises(ValueError, match="unknown operation"):
        store.batch(["what"])


def test_times(make: MakeStore) -> None:
    store = make()
    clock = [1_800_000_000.0]
    store._clock = lambda: clock[0]
    store.put(("t",), "k", {"v": 1})
    clock[0] += 60
    store.put(("t",), "k", {"v": 2})
    item = store.get(("t",), "k")
    assert item is not None
    assert item.created_at == datetime.fromtimestamp(1_800_000_000, UTC)
    assert item.updated_at == datetime.fromtimestamp(1_800_000_060, UTC)
    store.delete(("t",), "k")
    store.put(("t",), "k", {"v": 3})
    assert store.search(("t",))[0].created_at == datetime.fromtimestamp(1_800_000_060, UTC)


# --- what InMemoryStore cannot show, or does otherwise


def test_ttl(make: MakeStore) -> None:
    store = make(ttl={"default_ttl": 10, "refresh_on_read": True})
    clock = [1_800_000_000.0]
    store._clock = lambda: clock[0]

    def after(minutes: float) -> None:
        clock[0] += minutes * 60

    store.put(("t",), "default", {"v": 1})
    store.put(("t",), "short", {"v": 2}, ttl=1)
    store.put(("t",), "ever", {"v": 3}, ttl=None)
    store.put(("t", "sub"), "short", {"v": 4}, ttl=0.5)
    after(0.9)
    assert [item.key for item in store.search(("t",), refresh_ttl=False)] == ["default", "short", "ever"]
    assert store.list_namespaces() == [("t",)]
    assert store.get(("t",), "short") is not None  # which begins its minute anew
    after(0.9)
    assert store.get(("t",), "short", refresh_ttl=False) is not None
    after(0.1)
    assert store.get(("t",), "short") is None
    after(8.2)  # ten minutes after the put; the first search and get did not, or did not touch it
    assert [item.key for item in store.search(("t",))] == ["ever"]
    store.put(("t",), "default", {"v": 5}, ttl=10)
    assert [item.key for item in store.search(("t",))] == ["ever", "default"]  # a life of its own
    after(9)
    assert len(store.search(("t",))) == 2  # refreshes
    after(9)
    assert len(store.search(("t",), refresh_ttl=False)) == 2
    after(1)
    assert len(store.search(("t",), refresh_ttl=False)) == 1


def test_without_refresh_on_read(make: MakeStore) -> None:
    store = make(ttl={"default_ttl": 1, "refresh_on_read": False})
    clock = [1_800_000_000.0]
    store._clock = lambda: clock[0]
    store.put(("t",), "k", {})
    clock[0] += 59
    assert store.get(("t",), "k") is not None
    assert store.search(("t",))
    clock[0] += 1
    assert store.get(("t",), "k") is None
    store.put(("t",), "k", {})
    clock[0] += 59
    assert store.get(("t",), "k", refresh_ttl=True) is not None
    clock[0] += 59
    assert store.get(("t",), "k") is not None


@pytest.mark.parametrize("by_async", [False, True], ids=["sync", "async"])
async def test_sweeping(make: MakeStore, by_async: bool) -> None:
    store = make(ttl={"default_ttl": 1}, index=index())
    clock = [1_800_000_000.0]
    store._clock = lambda: clock[0]
    store.batch([PutOp(("t", str(n % 3)), f"k{n}", {"n": n, "big": "x" * 20_000}, ttl=1) for n in range(50)])
    store.put(("t", "0"), "kept", {"n": 1}, ttl=None)
    assert store.sweep_ttl() == 0
    clock[0] += 61
    assert (await store.asweep_ttl() if by_async else store.sweep_ttl()) == 50
    assert store.sweep_ttl() == 0
    clock[0] -= 61
    assert [item.key for item in store.search((), limit=100)] == ["kept"]
    assert store.list_namespaces() == [("t", "0")]


def test_the_sweeper(make: MakeStore) -> None:
    store = make(ttl={"default_ttl": 1 / 60 / 20})
    store.put(("t",), "k", {})
    future = store.start_ttl_sweeper(sweep_interval_minutes=0.1 / 60)
    assert not future.done()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.5)
    assert store.stop_ttl_sweeper(timeout=10)
    assert future.result(timeout=1) is None
    assert store.sweep_ttl() == 0
    assert make().start_ttl_sweeper().done()  # nothing to sweep for
    assert store.start_ttl_sweeper(1).cancel()
    assert store.stop_ttl_sweeper(timeout=10)


def test_a_search_clears_away_what_has_expired(make: MakeStore) -> None:
    store = make(ttl={})
    clock = [1_800_000_000.0]
    store._clock = lambda: clock[0]
    store.batch([PutOp(("t",), f"k{n}", {"n": n}, ttl=1) for n in range(30)])
    clock[0] += 61
    assert store.search(("t",)) == []
    assert store.sweep_ttl() == 10
    assert store.sweep_ttl() == 0


def test_an_overwritten_item_is_found_by_its_new_text_only(make: MakeStore) -> None:
    store = make(index=index(fields=["text"]))
    store.put(("d",), "k", {"text": "old"})
    store.put(("d",), "k", {"text": "new"})
    assert store.search(("d",), query="new")[0].score == pytest.approx(1)
    assert store.search(("d",), query="old")[0].score < 0.999
    store.put(("d",), "k", {"text": "new"}, index=False)
    assert store.search(("d",), query="new")[0].score is None
    store.put(("d",), "k", {"other": "elsewhere"}, index=["other"])
    assert store.search(("d",), query="elsewhere")[0].score == pytest.approx(1)


def test_the_same_text_in_several_items(make: MakeStore) -> None:
    store = make(index=index(fields=["text"]))
    store.batch([PutOp(("d",), key, {"text": "same"}) for key in "abc"])
    assert [(item.key, item.score) for item in store.search(("d",), query="same")] == [
        (key, pytest.approx(1)) for key in "abc"
    ]


def test_items_without_vectors_are_on_one_page_only(make: MakeStore) -> None:
    store = make(index=index(fields=["text"]))
    for n in range(6):
        store.put(("d",), f"k{n}", {"text": f"t{n}"}, index=False if n % 2 else None)
    pages = [store.search(("d",), query="t", limit=2, offset=offset) for offset in (0, 2, 4, 6)]
    assert [len(page) for page in pages] == [2, 2, 2, 0]
    assert sorted(item.key for page in pages for item in page) == [f"k{n}" for n in range(6)]


def test_vectors_of_another_model(make: MakeStore) -> None:
    make(index=index()).put(("d",), "k", {"text": "t"})
    other = make(index=IndexConfig(dims=3, embed=lambda texts: [[1.0, 2.0, 3.0] for _ in texts]))
    other.put(("d",), "l", {"text": "t"})
    assert [(item.key, item.score) for item in other.search(("d",), query="t")] == [
        ("l", pytest.approx(1)),
        ("k", None),
    ]
    with pytest.raises(ValueError, match="dims=4"):
        make(index=IndexConfig(dims=4, embed=embed)).put(("d",), "k", {"text": "t"})


async def test_an_async_embedding(make: MakeStore) -> None:
    async def aembed(texts: list[str]) -> list[list[float]]:
        return embed(texts)

    store = make(index=IndexConfig(dims=DIMS, embed=aembed))
    await store.aput(("d",), "k", {"text": "t"})
    assert (await store.asearch(("d",), query='{"text": "t"}'))[0].score == pytest.approx(1)


def test_what_a_filter_cannot_compare_does_not_match(make: MakeStore) -> None:
    store = make()
    for key, value in {"none": {}, "word": {"v": "word"}, "number": {"v": 3}, "date": {"v": "2026-03-01"}}.items():
        store.put(("f",), key, value)
    assert [item.key for item in store.search(("f",), filter={"v": {"$gt": 2}})] == ["number"]
    assert [item.key for item in store.search(("f",), filter={"v": {"$gte": "2026-01-31"}})] == ["word", "date"]
    with pytest.raises(ValueError, match=r"\$in"):
        store.search(("f",), filter={"v": {"$in": [1]}})


def test_cosines_with_and_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    query, *vectors = embed([f"t{n}" for n in range(30)])
    vectors.append([0.0] * DIMS)
    expected = [
        sum(a * b for a, b in zip(query, other, strict=True)) / (math.hypot(*query) * math.hypot(*other) or 1)
        for other in vectors
    ]
    assert store_vectors.cosine(query, vectors) == pytest.approx(expected)
    assert store_vectors.cosine([0.0] * DIMS, vectors) == [0.0] * len(vectors)
    monkeypatch.setattr(store_vectors, "_numpy", None)
    assert store_vectors.cosine(query, vectors) == pytest.approx(expected)
    assert store_vectors.cosine([0.0] * DIMS, vectors) == [0.0] * len(vectors)
    assert store_vectors.cosine(query, []) == []


def test_tuples_come_back_as_lists_as_from_all_stores_that_outlive_the_process(make: MakeStore) -> None:
    store = make()
    store.put(("n",), "k", {"pair": (1, 2)})
    assert store.get(("n",), "k").value == {"pair": [1, 2]}
    assert store.search(("n",), filter={"pair": (1, 2)})


def test_large_values_and_odd_names(make: MakeStore) -> None:
    store = make()
    value = {"text": "\x00é" * 1_500_000, "bytes": random.Random(2).randbytes(3_000_000)}
    namespace = ("a" * 300, "☃ \t", "||", " ")
    store.put(namespace, "k" * 5000, value)
    store.put(namespace, "k" * 5000, value)
    assert make().get(namespace, "k" * 5000).value == value
    assert make().search(namespace[:2])[0].value == value
    assert make().list_namespaces() == [namespace]
    store.delete(namespace, "k" * 5000)
    assert make().search(()) == []
    with pytest.raises(RecordTooLargeError, match="key"):
        store.put(("a",), "k" * 70_000, {})


def test_what_cannot_be_serialised_is_refused_before_anything_is_written(make: MakeStore) -> None:
    store = make()
    with pytest.raises(SerializationError, match="serde"):
        store.batch([PutOp(("n",), "a", {"v": 1}), PutOp(("n",), "b", {"v": lambda: 1})])
    assert store.search(()) == []


class _Xor(CipherProtocol):
    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "xor", bytes(byte ^ 0x5A for byte in plaintext)

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        assert ciphername == "xor"
        return bytes(byte ^ 0x5A for byte in ciphertext)


def test_encrypted(make: MakeStore) -> None:
    store = make(serde=EncryptedSerializer(_Xor()), index=index(fields=["text"]))
    for size in (1, 3000):
        store.put(("n",), f"k{size}", {"text": "Rumpelstilzchen" * size})
    assert store.search(("n",), query="Rumpelstilzchen")[0].score == pytest.approx(1)
    assert store.get(("n",), "k3000").value == {"text": "Rumpelstilzchen" * 3000}
    key = item_key(("n",), "k1")
    item = make()._client.run(_read(key))
    assert b"Rumpelstilzchen" not in bytes(records.decode(key, records.ITEM, item)["b"][1])


def _read(key: str) -> Any:
    return (yield Get((key,)))[key].data


def _save(key: str, data: bytes) -> Any:
    yield Save([(key, data)])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data[:-3], CorruptRecordError),
        (lambda data: b"foreign", CorruptRecordError),
        (lambda data: data[:2] + b"\x09" + data[3:], UnknownFormatError),
    ],
    ids=["truncated", "foreign", "newer"],
)
def test_damage_is_told(make: MakeStore, damage: Callable[[bytes], bytes], error: type[Exception]) -> None:
    store = make()
    store.put(("n",), "k", {"v": 1})
    key = item_key(("n",), "k")
    client = store._client
    client.run(_save(key, damage(client.run(_read(key)))))
    for read in (lambda: store.get(("n",), "k"), lambda: store.search(("n",)), lambda: store.put(("n",), "k", {})):
        with pytest.raises(error, match=key):
            read()


def test_a_missing_record_is_told(make: MakeStore) -> None:
    store = make()
    store.put(("n",), "k", {"v": random.Random(1).randbytes(3_000_000)})
    client, key = store._client, item_key(("n",), "k")
    blob = records.decode(key, records.ITEM, client.run(_read(key)))["b"][0]

    def remove(name: str) -> Any:
        yield Delete([name])

    client.run(remove(f"{blob}-c1"))
    with pytest.raises(CorruptRecordError, match=blob):
        store.get(("n",), "k")
    client.run(remove(blob))
    with pytest.raises(CorruptRecordError, match=blob):
        store.search(("n",))
