"""Eight processes commit to one thread, and are killed at random: nothing acknowledged is lost, nothing is left over.

`PUTS=1000` sets how often each one commits, `SEED=…` repeats which are killed when.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.checkpointer import keys
from outlast.checkpointer.head import Head
from outlast.checkpointer.thread import ThreadLog
from outlast.doctor import repair
from tests.harness.procs import Child, wait_for
from tests.stores import listing
from tests.stores.conftest import Running

logger = logging.getLogger(__name__)

WRITERS = 8
PUTS = int(os.environ.get("PUTS", "40"))
KILLS = max(8, PUTS * WRITERS // 200)

pytestmark = [pytest.mark.kill, pytest.mark.timeout(240 + 2 * PUTS)]


class Contest:
    """The writers, and what they have noted down."""

    def __init__(self, running: Running, thread_id: str, home: Path) -> None:
        self._env = running.sidecar.env
        self._arguments = ("-m", "tests.stores.contender", thread_id)
        self._home = home
        self.writers = [self._start(number) for number in range(WRITERS)]

    def _start(self, number: int) -> Child:
        log = self._home / f"writer-{number}.log"
        return Child.python(*self._arguments, self._notes(number), str(PUTS), log=log, env=self._env)

    def _notes(self, number: int) -> Path:
        return self._home / f"notes-{number}"

    def notes(self, what: str) -> Iterator[list[str]]:
        """All notes of a kind, those of each writer in the order it made them."""
        for number in range(WRITERS):
            notes = self._notes(number)
            for line in notes.read_text().splitlines() if notes.exists() else ():
                if line.startswith(f"{what} "):
                    yield line.split()[1:]

    def put(self) -> int:
        """How many checkpoints were acknowledged so far."""
        for writer in self.writers:
            assert writer.returncode in (None, 0), writer.tail()
        return sum(1 for _ in self.notes("put"))

    def kill(self, chance: random.Random) -> None:
        """SIGKILL for one that is not done, and another one in its place."""
        busy = [number for number, writer in enumerate(self.writers) if writer.alive]
        if busy:
            number = chance.choice(busy)
            self.writers[number].kill()
            self.writers[number] = self._start(number)

    def finish(self) -> None:
        for writer in self.writers:
            writer.check(timeout=120 + PUTS)

    def stop(self) -> None:
        for writer in self.writers:
            writer.kill()


def test_eight_processes_killed_at_random(sound: Running, tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED") or secrets.randbelow(1_000_000))
    chance = random.Random(seed)
    logger.warning("SEED=%d PUTS=%d", seed, PUTS)
    thread_id = f"contested-{secrets.token_hex(4)}"
    started = time.monotonic()
    contest = Contest(sound, thread_id, tmp_path)
    try:
        for due in sorted(chance.randrange(WRITERS * PUTS * 9 // 10) for _ in range(KILLS)):
            wait_for(lambda due=due: contest.put() >= due, 120 + PUTS, f"{due} puts", every=0.05)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.05))
            contest.kill(chance)
        contest.finish()
    finally:
        contest.stop()
    seconds = time.monotonic() - started
    log = ThreadLog(thread_id)
    head = sound.client().run(log.read())
    assert head is not None
    assert_one_winner_per_head(contest, head)
    assert_nothing_lost(sound, contest, thread_id)
    sound.measured["contest"] = {"puts": WRITERS * PUTS, "kills": KILLS, "seconds": round(seconds, 1), "seed": seed}
    if listing.can_list(sound.component):
        sound.measured["contest"]["orphans"] = assert_no_orphan_is_left(sound, thread_id)
        assert_nothing_lost(sound, contest, thread_id)


def assert_one_winner_per_head(contest: Contest, head: Head) -> None:
    """No ETag was good for two swaps, and all commits are one chain, each the only one on top of its predecessor."""
    swapped = [etag for (etag,) in contest.notes("swap")]
    assert len(set(swapped)) == len(swapped), "two swaps of the same head went through"
    won = list(contest.notes("won"))
    assert len({predecessor for _, predecessor in won}) == len(won), "two commits won over the same head"
    # A commit that is tried again did not go through before.
    before = dict(contest.notes("try"))
    chain: dict[str, None] = {}
    commit = head.recent[-1]
    while commit != "-":
        assert commit not in chain
        chain[commit] = None
        commit = before[commit]
    assert not {commit for commit, _ in won} - set(chain), "acknowledged, and not what the head came from"


def assert_nothing_lost(running: Running, contest: Contest, thread_id: str) -> None:
    found = {
        item.config["configurable"]["checkpoint_id"]: item.checkpoint["channel_values"]["value"]
        for item in running.saver().list({"configurable": {"thread_id": thread_id}})
    }
    acknowledged = dict(contest.notes("put"))
    assert len(acknowledged) == WRITERS * PUTS
    assert not set(acknowledged) - set(found)
    assert all(found[checkpoint_id].startswith(value) for checkpoint_id, value in acknowledged.items())


def assert_no_orphan_is_left(running: Running, thread_id: str) -> int:
    """Every record of the thread is one that its head reaches, once `outlast doctor --repair` was there."""
    before = unreached(running, thread_id)
    found = repair(running.client(), grace=0)
    assert not found.left
    assert not unreached(running, thread_id)
    return len(before)


def unreached(running: Running, thread_id: str) -> set[str]:
    log = ThreadLog(thread_id)
    client = running.client()
    head = client.run(log.read())
    assert head is not None
    reached = {log.key, *client.run(log._records(head))}
    return {key for key in listing.keys(running.component) if key.startswith(keys.thread_key(thread_id))} - reached
