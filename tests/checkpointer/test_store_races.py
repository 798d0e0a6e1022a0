"""DaprStore when many write at once: random interleavings request by request, lost answers, deaths at every request."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from langgraph.store.base import Op, PutOp, SearchOp

from outlast.checkpointer import DaprStore, store_index, store_items
from outlast.checkpointer.client import Create, Delete, Get, Item, Operation, Pause, Save, StateClient, Steps, Swap
from outlast.doctor.memories import mend

NAMESPACE = ("memories", "u1")


class Death(BaseException):
    """The process is gone."""


class Shelf:
    """A state store in memory as bad as a sound one may be: ETags begin again after a delete, a stale one revives a
    deleted key, and the answer to a conditional write may get lost."""

    capabilities = SimpleNamespace(quirks=SimpleNamespace(max_value=300))

    def __init__(self) -> None:
        self.data: dict[str, tuple[bytes, int]] = {}
        self.lossy = 0.0
        self.random = random.Random(0)
        self.left: int | None = None
        self.before_dying = True
        self.done = 0

    def perform(self, operation: Operation) -> Any:
        if self.left == 0 and not self.before_dying:
            raise Death
        result = self._perform(operation)
        self.done += 1
        if self.left is not None:
            self.left -= 1
            if self.left == 0 and self.before_dying:
                raise Death
        return result

    def _perform(self, operation: Operation) -> Any:
        match operation:
            case Get(keys):
                found = {key: self.data.get(key) for key in keys}
                return {key: Item(pair[0], str(pair[1])) if pair else Item() for key, pair in found.items()}
            case Save(records):
                for key, value in records:
                    self._set(key, value)
            case Create(key, value):
                if key in self.data:
                    return False
                self._set(key, value)
                return self.random.random() >= self.lossy
            case Swap(key, value, etag, records):
                for name, record in records:
                    self._set(name, record)
                if key in self.data and str(self.data[key][1]) != etag:
                    return False
                self._set(key, value)
                return self.random.random() >= self.lossy
            case Delete(keys):
                for key in keys:
                    self.data.pop(key, None)
            case Pause():
                pass
        return None

    def _set(self, key: str, value: bytes) -> None:
        self.data[key] = (value, self.data.get(key, (b"", 0))[1] + 1)

    def run(self, steps: Steps[Any]) -> Any:
        try:
            operation = next(steps)
            while True:
                operation = steps.send(self.perform(operation))
        except StopIteration as stop:
            return stop.value


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_index, "PAGE", 2)
    monkeypatch.setattr(store_index, "_LABELS", 2)
    monkeypatch.setattr(store_items, "_INLINE", 60)


def opened(shelf: Shelf, **arguments: Any) -> DaprStore:
    return DaprStore(client=shelf, **arguments)


def steps_of(store: DaprStore, ops: Sequence[Op]) -> Steps[Any]:
    plan = store._plan(ops)
    return store._carry_out(plan, store._drafts(plan))


def assert_sound(
    reopen: Callable[[], DaprStore], names: Sequence[str], namespaces: Sequence[tuple[str, ...]] = (NAMESPACE,)
) -> None:
    """What can be got is found, and the other way round, each once; and all that is found is listed."""
    got = {
        (space, name): item.value
        for space in namespaces
        for name in names
        if (item := reopen().get(space, name, refresh_ttl=False))
    }
    for _ in range(2):  # the first one clears away
        items = reopen().search((), limit=10_000, refresh_ttl=False)
        found = [((item.namespace, item.key), item.value) for item in items]
        assert len(found) == len({ref for ref, _ in found})
        assert dict(found) == got
        assert set(reopen().list_namespaces(limit=10_000)) == {space for space, _ in got}


def assert_no_orphans(shelf: Shelf) -> None:
    """Every record is named by a cell."""
    keys = [key for key in shelf.data if key.startswith("m-")]
    rows = shelf.run(opened(shelf)._items.read(key for key in keys if key.count("-") == 1))
    assert {key for key in keys if key not in rows} <= {name for row in rows.values() for name in row.records()}


def interleave(shelf: Shelf, rules: list[Steps[Any]], chance: random.Random) -> list[Any]:
    """Carry out rules request by request in random order, by fits and starts, each as if in a process of its own."""
    waiting: dict[int, Any] = {}
    results: list[Any] = [None] * len(rules)
    for number, steps in enumerate(rules):
        waiting[number] = (steps, next(steps))
    while waiting:
        number = chance.choice(list(waiting))
        for _ in range(chance.choice((1, 2, 4, 50))):
            steps, operation = waiting[number]
            try:
                waiting[number] = (steps, steps.send(shelf.perform(operation)))
            except StopIteration as stop:
                results[number] = stop.value
                del waiting[number]
                break
    return results


class World:
    """Some writers and readers of the same few items, and a clock that all of them read."""

    def __init__(self, chance: random.Random, lossy: float) -> None:
        self.chance, self.lossy = chance, lossy
        self.names = chance.choice((("a",), ("a", "b", "c")))
        self.now = 1_000.0
        self.shelf = Shelf()
        self.shelf.random = chance
        self.stable = [f"s{number}" for number in range(chance.randrange(5))]
        self.open().batch([PutOp(NAMESPACE, name, {"v": name}) for name in self.stable])

    def open(self) -> DaprStore:
        store = opened(self.shelf)
        store._clock = lambda: self.now
        return store

    def rule(self, number: int, outcomes: dict[str, set[str | None]]) -> Steps[Any]:
        """One operation at random; enters into `outcomes` what it may leave behind."""
        kind = self.chance.choice(("put", "put", "put", "expiring", "delete", "delete", "search", "batch"))
        name, value = self.chance.choice(self.names), f"{number}"
        if kind == "search":
            return steps_of(self.open(), [SearchOp(("memories",), limit=1000)])
        if kind == "batch":
            for each in self.names:
                outcomes.setdefault(each, set()).add(value)
            return steps_of(self.open(), [PutOp(NAMESPACE, each, {"v": value}) for each in self.names])
        if kind == "delete":
            outcomes.setdefault(name, set()).add(None)
            return steps_of(self.open(), [PutOp(NAMESPACE, name, None)])
        outcomes.setdefault(name, set()).update({value, None} if kind == "expiring" else {value})
        whole = {"v": value, "big": "x" * self.chance.choice((0, 100, 1000))}
        return steps_of(self.open(), [PutOp(NAMESPACE, name, whole, ttl=1 if kind == "expiring" else None)])

    def values(self) -> dict[str, str | None]:
        items = {name: self.open().get(NAMESPACE, name, refresh_ttl=False) for name in self.names}
        return {name: item and item.value["v"] for name, item in items.items()}

    def round(self) -> None:
        before, outcomes = self.values(), dict[str, set[str | None]]()
        self.shelf.lossy = self.lossy
        rules = [self.rule(number, outcomes) for number in range(self.chance.randrange(2, 8))]
        for result in interleave(self.shelf, rules, self.chance):
            if result and result[0] is not None:
                found = [item.key for item in result[0]]
                assert max(Counter(found).values(), default=1) == 1
                # What nobody touches meanwhile is found, at its place.
                assert [name for name in found if name in self.stable] == self.stable
        self.shelf.lossy = 0
        self.now += self.chance.choice((0, 61))
        for name, after in self.values().items():
            assert after in outcomes.get(name, {before[name], None})
        assert_sound(self.open, [*self.names, *self.stable])


@pytest.mark.parametrize("lossy", [0.0, 0.1], ids=["", "lost answers"])
@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving(seed: int, lossy: float) -> None:
    chance = random.Random(seed)
    for _ in range(12):
        world = World(chance, lossy)
        for _ in range(6):
            world.round()
        world.now += 100_000
        world.open().sweep_ttl()
        assert_sound(world.open, [*world.names, *world.stable])
        if not lossy:
            assert_no_orphans(world.shelf)


class Paused:
    """A rule that is carried out up to a point, and then to its end."""

    def __init__(self, shelf: Shelf, steps: Steps[Any]) -> None:
        self.shelf, self.steps = shelf, steps
        self.operation: Operation | None = next(steps)
        self.result: Any = None

    def step(self) -> None:
        assert self.operation is not None
        try:
            self.operation = self.steps.send(self.shelf.perform(self.operation))
        except StopIteration as stop:
            self.operation, self.result = None, stop.value

    def until(self, met: Callable[[Operation], bool]) -> None:
        while self.operation is not None and not met(self.operation):
            self.step()


def test_an_item_that_moves_during_a_search_is_found() -> None:
    shelf = Shelf()
    store = opened(shelf)
    names = [f"k{number}" for number in range(5)]
    store.batch([PutOp(NAMESPACE, name, {"n": 0}) for name in names])
    for pause in range(20):
        search = Paused(shelf, steps_of(opened(shelf), [SearchOp(NAMESPACE)]))
        for _ in range(pause):
            if search.operation:
                search.step()
        store.delete(NAMESPACE, "k0")
        store.put(NAMESPACE, "k0", {"n": 0})
        search.until(lambda operation: False)
        assert sorted(item.key for item in search.result[0]) == names


def test_an_entry_that_was_taken_for_a_leftover() -> None:
    shelf = Shelf()
    store = opened(shelf)
    slow = Paused(shelf, steps_of(opened(shelf), [PutOp(NAMESPACE, "k", {"by": "slow"})]))
    slow.until(lambda operation: isinstance(operation, Create) and operation.key.startswith("m-"))
    store.put(NAMESPACE, "k", {"by": "fast"})
    slow.step()  # refused
    store.search(NAMESPACE)  # clears away the entry of the slow one
    store.delete(NAMESPACE, "k")
    slow.until(lambda operation: False)
    assert [item.value for item in store.search(NAMESPACE)] == [{"by": "slow"}]
    assert_sound(partial(opened, shelf), ["k"])


@pytest.mark.parametrize("first", [True, False], ids=["create", "overwrite"])
def test_a_put_whose_answer_is_lost_and_that_is_overwritten_often(first: bool) -> None:
    shelf = Shelf()
    store = opened(shelf)
    if not first:
        store.put(NAMESPACE, "k", {"v": "old " * 100})
    slow = Paused(shelf, steps_of(opened(shelf), [PutOp(NAMESPACE, "k", {"v": "slow " * 100})]))
    slow.until(lambda operation: isinstance(operation, Create | Swap) and operation.key.startswith("m-"))
    shelf.lossy = 1.0
    slow.step()
    shelf.lossy = 0.0
    for number in range(6):
        store.put(NAMESPACE, "k", {"v": f"{number} " * 100})
    slow.until(lambda operation: False)
    assert store.get(NAMESPACE, "k").value == {"v": "slow " * 100}
    assert_sound(partial(opened, shelf), ["k"])
    assert_no_orphans(shelf)


def test_new_namespaces_at_once() -> None:
    chance = random.Random(3)
    for _ in range(60):
        shelf = Shelf()
        shelf.lossy, shelf.random = 0.05, chance
        spaces = [
            (chance.choice("ab"), chance.choice("abcd"), *chance.choice(((), ("x",), ("x", "y")))) for _ in range(8)
        ]
        interleave(shelf, [steps_of(opened(shelf), [PutOp(space, "k", {"n": 1})]) for space in spaces], chance)
        shelf.lossy = 0
        assert_sound(partial(opened, shelf), ["k"], spaces)
        assert len(opened(shelf).search((), limit=100)) == len(set(spaces))


def scenarios() -> Iterator[tuple[str, list[Op], list[Op]]]:
    big = {"v": "x" * 1000}
    some: list[Op] = [PutOp(NAMESPACE, f"k{number}", {"v": number}) for number in range(4)]
    yield "first put", [], [PutOp(NAMESPACE, "k0", big)]
    yield "put", some, [PutOp(NAMESPACE, "new", big)]
    yield "full page", some[:3], [PutOp(NAMESPACE, "new", {"v": 1})]
    yield "overwrite", [PutOp(NAMESPACE, "k0", big)], [PutOp(NAMESPACE, "k0", {"v": "y" * 1000})]
    yield "delete", [*some, PutOp(NAMESPACE, "k1", big)], [PutOp(NAMESPACE, "k1", None)]
    yield "delete a page", some, [PutOp(NAMESPACE, f"k{number}", None) for number in range(4)]
    yield "batch", some, [PutOp((*NAMESPACE, "b"), f"k{number}", {"v": -number}) for number in range(5)]


@pytest.mark.parametrize(("before", "ops"), [pytest.param(*rest, id=name) for name, *rest in scenarios()])
@pytest.mark.parametrize("answered", [True, False], ids=["after", "before"])
def test_death_at_every_request(before: list[Op], ops: list[Op], answered: bool) -> None:
    names, spaces = ["new", *(f"k{number}" for number in range(6))], [NAMESPACE, (*NAMESPACE, "b")]

    def state(shelf: Shelf) -> dict[Any, Any]:
        return {(item.namespace, item.key): item.value for item in opened(shelf).search((), limit=100)}

    whole = Shelf()
    opened(whole).batch(before)
    start = whole.done
    old = state(whole)
    start = whole.done
    opened(whole).batch(ops)
    requests = whole.done - start
    new = state(whole)
    assert requests > 1
    for number in range(1, requests + 1):
        shelf = Shelf()
        opened(shelf).batch(before)
        shelf.left, shelf.before_dying = number - (not answered), answered
        with pytest.raises(Death):
            opened(shelf).batch(ops)
        shelf.left = None
        assert_sound(partial(opened, shelf), names, spaces)
        now = state(shelf)
        # Each item is as it was or as it should be, whole.
        assert all(now.get(ref) in (old.get(ref), new.get(ref)) for ref in {*old, *new, *now})
        opened(shelf).batch(ops)
        assert_sound(partial(opened, shelf), names, spaces)
        assert state(shelf) == new


def unreachable(shelf: Shelf) -> set[str]:
    """The keys of records that neither an item's cell nor a namespace leads to."""
    reached: set[str] = set()
    for depth in range(4):
        key = store_index.node_key((*NAMESPACE, "b")[:depth])
        reached |= {key, *(f"{key}-{kind}{number}" for kind in "el" for number in range(20))}
    rows = shelf.run(opened(shelf)._items.read(key for key in shelf.data if re.fullmatch(r"m-\w+", key)))
    reached |= {name for cell, row in rows.items() for name in (cell, *row.records())}
    return shelf.data.keys() - reached


@pytest.mark.parametrize(("before", "ops"), [pytest.param(*rest, id=name) for name, *rest in scenarios()])
@pytest.mark.parametrize("answered", [True, False], ids=["after", "before"])
def test_what_a_dead_writer_leaves_is_found(before: list[Op], ops: list[Op], answered: bool) -> None:
    found: list[Any] = []
    for number in range(1, 80):
        shelf = Shelf()
        opened(shelf).batch(before)
        shelf.left, shelf.before_dying = number - (not answered), answered
        try:
            opened(shelf).batch(ops)
        except Death:
            ended = False
        else:
            ended = True
        shelf.left = None
        if not ended:
            # What an overwrite leaves is cleared away by the next one; without one there is a record too many.
            opened(shelf).search(())
        shelf.run(mend(cast(StateClient, shelf), lambda *note: found.append(note), dry_run=False, grace=0))
        assert not unreachable(shelf)
        seen = len(found)
        shelf.run(mend(cast(StateClient, shelf), lambda *note: found.append(note), dry_run=False, grace=0))
        assert len(found) == seen
        assert_sound(
            partial(opened, shelf), ["new", *(f"k{each}" for each in range(6))], [NAMESPACE, (*NAMESPACE, "b")]
        )
        if ended:
            return
    pytest.fail("never reached the end")


def test_a_put_under_way_outlives_the_search_for_dead_ones() -> None:
    """It is taken for dead at each of its requests, and yet what it puts is there in the end, whole."""
    for big in (False, True):
        for pause in range(12):
            shelf = Shelf()
            opened(shelf).put(NAMESPACE, "other", {"n": 0})
            slow = Paused(shelf, steps_of(opened(shelf), [PutOp(NAMESPACE, "k", {"v": "x" * (1000 if big else 1)})]))
            for _ in range(pause):
                if slow.operation:
                    slow.step()
            for _ in range(2):
                shelf.run(mend(cast(StateClient, shelf), lambda *note: None, dry_run=False, grace=0))
            slow.until(lambda operation: False)
            assert opened(shelf).get(NAMESPACE, "k").value == {"v": "x" * (1000 if big else 1)}
            assert_sound(partial(opened, shelf), ["k", "other"])
            assert not unreachable(shelf)


@pytest.mark.parametrize("rounds", [30])
def test_nothing_piles_up(rounds: int) -> None:
    shelf = Shelf()
    sizes = []
    for _ in range(rounds):
        store = opened(shelf)
        store.batch([PutOp(NAMESPACE, f"k{each}", {"v": "x" * 1000}) for each in range(7)])
        store.put(NAMESPACE, "k1", {"v": "y" * 900})
        store.batch([PutOp(NAMESPACE, f"k{each}", None) for each in range(7)])
        assert store.search(()) == []
        live = [key for key, (data, _) in shelf.data.items() if key.startswith("m-")]
        assert len(live) == 7  # tombstones, nothing else
        start = shelf.done
        store.search(())
        sizes.append(shelf.done - start)
    assert max(sizes[2:]) <= sizes[2] + 1  # dead pages are linked past


def test_requests_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_index, "PAGE", 100)
    shelf = Shelf()
    store = opened(shelf)

    def cost(call: Callable[..., Any], *arguments: Any, **more: Any) -> int:
        start = shelf.done
        call(*arguments, **more)
        return shelf.done - start

    space = ("a", "b")
    puts = [cost(store.put, space, f"k{number}", {"v": number}) for number in range(1050)]
    assert {requests for number, requests in enumerate(puts) if number % 100} == {4}  # cell, page, page, cell
    assert max(puts[1:]) <= 10
    assert {cost(store.put, space, f"k{number}", {"v": -1}) for number in (0, 500, 1049)} == {2}
    assert {cost(store.get, space, f"k{number}") for number in (0, 1049)} == {1}
    assert {cost(store.delete, space, f"k{number}") for number in (0, 500, 1049)} == {4}
    assert cost(store.search, space, limit=10) <= 4
    assert cost(store.search, ("a",), limit=2000) <= 30
