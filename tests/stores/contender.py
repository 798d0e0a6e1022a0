"""Commits checkpoints to a thread that others write to at the same time, until there are enough of its own.

It may be killed at any instant and started again with the same arguments. It notes down, a line each:
    swap ETAG                  the store said that the head with this ETag was swapped for another
    try COMMIT PREDECESSOR     it is about to swap the head for one with this commit, on top of that one (- for none)
    won COMMIT PREDECESSOR     the store said that it went through
    put CHECKPOINT VALUE       the saver said that this checkpoint is there
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outlast.checkpointer import DaprSaver, keys
from outlast.checkpointer.client import Operation, StateClient, Swap
from outlast.checkpointer.head import Head
from tests.stores.test_stores import put

LARGE_EVERY = 10
"""One in so many values is kept in a record of its own."""


def large(value: str) -> str:
    """What is put for a `value` that is to be large; it does not compress below the size of a record of its own."""
    return value + os.urandom(15_000).hex()


class Noted(StateClient):
    """A client that notes down the swaps of one head."""

    def __init__(self, head: str, note: Callable[..., None]) -> None:
        super().__init__("statestore")
        self._head = head
        self._note = note

    def _perform(self, operation: Operation) -> Any:
        if not (isinstance(operation, Swap) and operation.key == self._head):
            return super()._perform(operation)
        # A swap without records is no commit: it announces what is to come.
        commit = ("-", *Head.decode(operation.key, operation.value).recent)[-2:] if operation.records else ()
        if commit:
            self._note("try", *reversed(commit))
        won = super()._perform(operation)
        if won:
            self._note("swap", operation.etag)
        if won and commit:
            self._note("won", *reversed(commit))
        return won


def main() -> None:
    thread_id, path, count = sys.argv[1:]
    notes = Path(path)
    done = notes.read_text().count("\nput ") if notes.exists() else 0
    # Unbuffered and appending: a line is one system call, which a kill does not cut in two.
    with notes.open("ab", buffering=0) as log:

        def note(*words: str) -> None:
            log.write(f"\n{' '.join(words)}".encode())

        saver = DaprSaver(client=Noted(keys.thread_key(thread_id), note))
        config = None
        for step in range(done, int(count)):
            value = os.urandom(8).hex()
            config = put(saver, thread_id, large(value) if step % LARGE_EVERY == 0 else value, config, step)
            note("put", config["configurable"]["checkpoint_id"], value)


if __name__ == "__main__":
    main()
