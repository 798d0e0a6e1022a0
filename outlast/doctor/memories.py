"""Looks through the long-term store for puts that a writer died in, and clears away what they left."""

from __future__ import annotations

import time
from collections.abc import Callable

from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from outlast.checkpointer.client import Pause, StateClient, Steps
from outlast.checkpointer.store_index import Index, Node, Place
from outlast.checkpointer.store_items import Items
from outlast.checkpointer.store_scan import Scan

Note = Callable[[str, str, str, bool], None]


def mend(client: StateClient, note: Note, *, dry_run: bool, grace: float) -> Steps[None]:
    """Clear away what puts that were cut short have left.

    Args:
        note: Told of what was found: kind, namespace, detail, mended.
        grace: Seconds after which a put is not under way any more.
    """
    index = Index()
    items = Items(client, JsonPlusSerializer(), index, time.time)
    doubtful: dict[Node, list[Place]] = {}
    for node in (yield from index.nodes(())):
        scan = yield from _walked(items, node)
        if scan.begun:
            doubtful[node] = scan.begun
    if doubtful:
        yield Pause(grace)
    for node, begun in doubtful.items():
        scan = yield from _walked(items, node)
        dead = [place for place in scan.begun if place in begun]
        if dead and not dry_run:
            yield from scan.settle(dead)
        if dead:
            detail = f"{len(dead)} puts whose writer died before the item was there"
            note("put cut short", "/".join(node.namespace), detail, True)


def _walked(items: Items, node: Node) -> Steps[Scan]:
    scan = Scan(items, [node], time.time())
    yield from scan.collect(None, None)
    return scan
