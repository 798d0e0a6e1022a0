"""Puts checkpoints into a thread until it is killed, and notes each one that was acknowledged."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from outlast.checkpointer import DaprSaver
from tests.stores.test_stores import put


def main() -> None:
    thread_id, path = sys.argv[1:]
    saver = DaprSaver("statestore", guarantee=os.environ["GUARANTEE"])  # type: ignore[arg-type]
    latest = saver.get_tuple({"configurable": {"thread_id": thread_id}})
    config = latest.config if latest else None
    with Path(path).open("a") as log:
        for step in range(100_000):
            value = os.urandom(8).hex()
            config = put(saver, thread_id, value, config, step)
            log.write(f"{config['configurable']['checkpoint_id']} {value}\n")
            log.flush()


if __name__ == "__main__":
    main()
