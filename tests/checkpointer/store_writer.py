"""Puts and deletes, and logs what was acknowledged: `python -m tests.checkpointer.store_writer NAME LOG COUNT`.

Items `NAME-<n>` are its own; `shared-<n>` are put by every writer and deleted by none.
"""

from __future__ import annotations

import itertools
import os
import sys

from outlast.checkpointer import DaprStore

NAMESPACE = ("crowd", "of", "writers")


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[3])
    store = DaprStore("statestore")
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(*words: str) -> None:
        os.write(log, (" ".join(words) + "\n").encode())

    for number in itertools.count():
        if count and number == count:
            break
        key = f"{name}-{number}"
        tell("try", key)
        store.put(NAMESPACE, key, {"by": name, "n": number, "big": "x" * (20_000 if number % 10 == 0 else 10)})
        tell("put", key)
        if number % 3 == 0:
            tell("doom", key)
            store.delete(NAMESPACE, key)
            tell("gone", key)
        store.put(NAMESPACE, f"shared-{number % 7}", {"by": name, "n": number})
        store.put((*NAMESPACE, f"room-{number % 5}"), f"{name}-{number}", {"n": number})
    tell("end", name)


if __name__ == "__main__":
    main()
