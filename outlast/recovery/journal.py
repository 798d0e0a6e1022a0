"""The journal: what the steps of a run came to, so that an attempt that takes over does not do them again.

It has a head of its own, built like a thread's: swapped with the ETag it was read with, owned by the attempt whose
epoch it shows, with pages of fixed size behind it. Steps that end at the same time are recorded in one commit.
A first attempt reads nothing; one that takes over puts its epoch into the head first and then reads, so that whatever
the old owner could still record is read, and it records nothing after.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from outlast.checkpointer import keys
from outlast.checkpointer.blobs import Locator, PackReader, PackWriter
from outlast.checkpointer.client import StateClient, Steps
from outlast.checkpointer.head import Entry, Head
from outlast.checkpointer.lane import Lane
from outlast.checkpointer.thread import Fence, ThreadLog
from outlast.errors import FencedError
from outlast.recovery import failures
from outlast.recovery.codec import Codec, Typed

Round = tuple[int, int]
"""How often a person or a policy had the run, and the framework the node, tried again before."""
Kind = Literal["result", "error", "intent", "pause", "grant"]


@dataclass(frozen=True)
class Usage:
    """Tokens that a model call took.

    Attributes:
        input, output: Tokens.
        model: Name of the model, as its provider gives it.
    """

    input: int = 0
    output: int = 0
    model: str = ""


@dataclass(frozen=True)
class Record:
    """What is written of a step.

    Attributes:
        kind: `result` or `error`: how it ended; `intent`: that it begins; `pause`: that it came to no outcome and is
            made again; `grant`: that a person raised a limit.
        key: Where in the run, and what; the same in every attempt.
        slot: Which of several equal calls at that place.
        number: How many outcomes the slot had before.
        type, name: What kind of step, and of what.
        digest: Digest of the request.
        request: The request for a person to read, shortened.
        value: The result; for `pause` the tries so far; for `grant` the raise.
        error: The exception, see `failures`.
        round: See Round.
        attempt, epoch: The attempt that made it.
        started, ended: Unix times in seconds.
        usage: Of a model call.
        undo: What `compensate` needs: where the function is, and the result and the arguments of the call.
    """

    kind: Kind
    key: str
    slot: int
    number: int
    type: str
    name: str
    digest: str
    request: str
    value: Any = None
    error: dict[str, Any] | None = None
    round: Round = (0, 1)
    attempt: int = 0
    epoch: int = 0
    started: float = 0.0
    ended: float = 0.0
    usage: Usage | None = None
    undo: dict[str, Any] | None = None

    def dumps(self, codec: Codec) -> Typed:
        """Return the record as a typed value."""
        usage = self.usage and [self.usage.input, self.usage.output, self.usage.model]
        plain = {**vars(self), "value": None, "round": list(self.round), "usage": usage}
        return codec.dumps_typed({**plain, "value": list(codec.dumps_typed(self.value))})

    @staticmethod
    def loads(typed: Typed, codec: Codec) -> Record:
        """Return the record that `dumps` made."""
        body = codec.loads_typed(typed)
        kind, data = body["value"]
        usage, (generation, tried) = body["usage"], body["round"]
        return Record(
            **{
                **body,
                "value": codec.loads_typed((kind, data)),
                "round": (generation, tried),
                "usage": Usage(*usage) if usage else None,
            }
        )

    def exception(self, codec: Codec) -> Exception:
        """Return the recorded exception."""
        assert self.error is not None
        return failures.decode(self.error, codec)


@dataclass
class Slot:
    """One of the equal calls of a key: its outcomes in order, errors and at last a result.

    Attributes:
        busy: Whether the call is in progress in this attempt.
        intents: Intents not followed by an outcome, from attempts before.
        tries: How often the retry policy had tried when the last pause began.
    """

    index: int
    outcomes: list[Record] = field(default_factory=list)
    busy: bool = False
    intents: int = 0
    tries: int = 0


@dataclass
class Place:
    """What a caller of `Journal.take` has to do: give back `found`, or make the call and `Journal.record` it."""

    key: str
    slot: Slot
    found: Record | None = None


class _Log(ThreadLog):
    """The log under a journal. Only attempts write it, so its first owner creates it."""

    def __init__(self, run_id: str, fence: Fence, owned: bool) -> None:
        super().__init__(run_id, fence if owned else None, key=journal_key(run_id))
        self._begin_with = Head(run_id, epoch=fence.epoch, owner=fence.owner)

    def _first(self) -> Steps[Head]:
        yield from ()
        return self._begin_with


def journal_key(run_id: str) -> str:
    """Return the key of a run's journal; the keys of its records start with it."""
    return f"j-{keys.digest(run_id)}"


class Journal:
    """The journal of one run, in the hands of one attempt.

    Args:
        client: The store.
        run_id: The run.
        fence: What the attempt holds.
        codec: Serialises results; the agent's own.
        attempt: Number of the attempt.
    """

    def __init__(self, client: StateClient, run_id: str, fence: Fence, codec: Codec, attempt: int) -> None:
        self.run_id = run_id
        self.codec = codec
        self.records: list[Record] = []
        self._client = client
        self._fence = fence
        self._attempt = attempt
        self._lane = Lane(client, _Log(run_id, fence, owned=True))
        self._lock = threading.RLock()
        self._slots: dict[str, list[Slot]] = {}
        self._given: dict[tuple[str, Round], dict[int, int]] = {}
        self._sequence = 0

    def take_over(self) -> Steps[None]:
        """Own the journal and read what attempts before have recorded.

        Raises:
            FencedError: If a later attempt owns it.
        """
        log = _Log(self.run_id, self._fence, owned=False)

        def own(head: Head) -> Head | None:
            if head.epoch > self._fence.epoch:
                raise FencedError(
                    f"the journal of run {self.run_id!r} is at epoch {head.epoch}: a later attempt has it"
                )
            if (head.epoch, head.owner) == (self._fence.epoch, self._fence.owner):
                return None
            return replace(head, epoch=self._fence.epoch, owner=self._fence.owner)

        head = yield from log.change(own)
        for record in (yield from read_records(log, head, self.codec)):
            self._enter(record)

    def _enter(self, record: Record) -> None:
        if record.kind == "grant":
            self.records.append(record)
            return
        slots = self._slots.setdefault(record.key, [])
        while len(slots) <= record.slot:
            slots.append(Slot(len(slots)))
        slot = slots[record.slot]
        if record.kind in ("result", "error") and record.number < len(slot.outcomes):
            return  # written again, because the acknowledgement of the first commit was lost
        self.records.append(record)
        if record.kind == "intent":
            slot.intents += 1
        elif record.kind == "pause":
            slot.tries, slot.intents = int(record.value), 0
        else:
            slot.outcomes.append(record)
            slot.intents = slot.tries = 0

    # --- steps

    def take(self, key: str, round: Round) -> Place:
        """Return what is recorded for the next call of `key` in this attempt, or a place to record it in.

        Equal calls take the slots in their order. A result is given once a round. An error is given again as what it
        was; asked for once more in the same round, the call is made again, and so it is in a later round.
        """
        with self._lock:
            slots = self._slots.setdefault(key, [])
            given = self._given.setdefault((key, round), {})
            for slot in slots:
                if slot.busy:
                    continue
                at = given.get(slot.index, 0)
                if at and at <= len(slot.outcomes) and slot.outcomes[at - 1].kind == "result":
                    continue
                while at < len(slot.outcomes) and slot.outcomes[at].kind == "error" and slot.outcomes[at].round < round:
                    at += 1
                if at < len(slot.outcomes):
                    given[slot.index] = at + 1
                    return Place(key, slot, slot.outcomes[at])
                slot.busy = True
                return Place(key, slot)
            slot = Slot(len(slots), busy=True)
            slots.append(slot)
            return Place(key, slot)

    def leave(self, place: Place) -> None:
        """Give up a place without an outcome: the call is to be made again."""
        with self._lock:
            place.slot.busy = False

    def settle(self, place: Place, record: Record, round: Round) -> None:
        """Enter the outcome of a call that is recorded; again, changes nothing."""
        with self._lock:
            self._enter(record)
            self._given.setdefault((place.key, round), {})[place.slot.index] = len(place.slot.outcomes)
            place.slot.busy = False

    def write(self, record: Record) -> Future[None]:
        """Ask for a record to be committed; the future ends when it is durable.

        Raises (from the future):
            FencedError: If a later attempt owns the run.
            StoreError, SidecarUnavailableError: If the store fails.
        """
        record = replace(record, attempt=self._attempt, epoch=self._fence.epoch)
        return self._lane.enqueue(_Append(self, record.dumps(self.codec)))

    def note(self, record: Record) -> None:
        """Enter a record that is no outcome."""
        with self._lock:
            self._enter(record)

    def next_sequence(self) -> str:
        """Return the place of the next record in the journal's index; grows from attempt to attempt."""
        self._sequence += 1
        return f"{self._fence.epoch:08d}.{self._sequence:08d}"


@dataclass
class _Append:
    journal: Journal
    typed: Typed
    completes: bool = True

    def prepare(self, lane: Lane, pack: PackWriter) -> Steps[Entry]:
        yield from ()
        sequence = self.journal.next_sequence()
        pack.writes.append([_NS, sequence, "", "", 0, "", pack.add(self.typed), False])
        return Entry(_NS, sequence, pack=pack.name)


_NS: Final = "s"


def read_records(log: ThreadLog, head: Head, codec: Codec) -> Steps[list[Record]]:
    """Return the records of a journal, oldest first."""
    entries = sorted((yield from log.index.entries(head)), key=lambda entry: entry.checkpoint_id)
    reader = PackReader(log.key, codec.loads_typed)
    packs = yield from reader.packs(dict.fromkeys(entry.pack for entry in entries))
    where: dict[str, Locator] = {}
    for name in dict.fromkeys(entry.pack for entry in entries):
        where |= {row[1]: row[6] for row in packs[name]["w"]}
    locators = [where[entry.checkpoint_id] for entry in entries]
    yield from reader.fetch(locators)
    return [Record.loads(reader.typed(locator), codec) for locator in locators]


def read(run_id: str, codec: Codec) -> Steps[list[Record]]:
    """Return what the journal of a run holds, oldest first, to show it."""
    log = ThreadLog(run_id, key=journal_key(run_id))
    head = yield from log.read()
    return (yield from read_records(log, head, codec)) if head else []


def remove(run_id: str) -> Steps[None]:
    """Delete the journal of a run; called again, completes what was cut short."""
    yield from ThreadLog(run_id, key=journal_key(run_id)).delete()


def digest(*parts: str | bytes) -> str:
    """Return a digest of a request."""
    joined = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        joined.update(len(data).to_bytes(8, "big") + data)
    return joined.hexdigest()[:32]


def shortened(text: str, limit: int = 1000) -> str:
    """Return a text for a person to read, its middle left out where it is long."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
