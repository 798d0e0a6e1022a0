"""What came of a disturbed run, next to undisturbed ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from outlast.chaos.events import Event
from outlast.chaos.proxy import Calls

_EFFECTS: Final = ("tool", "function")
_MODEL_FAULTS: Final = ("rate-limit", "drop-model")
_SHOWN: Final = 3


@dataclass(frozen=True)
class Disturbance:
    """What was done to a run.

    Attributes:
        scenario: Which.
        what: In words: what happened, and where in the run.
        at: Unix time; 0 if it never came to that.
        unmade: Key of the step whose call was about to be made, and that was not because its process was killed there.
        stale: Pid of the worker that was frozen.
        problem: Why it did not go as it should, if so.
    """

    scenario: str
    what: str
    at: float = 0.0
    unmade: str = ""
    stale: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Seen:
    """A run, as it was seen from outside.

    Attributes:
        run: Its id.
        events: What its workers wrote down.
        calls: What its model's proxy counted.
        state: The final state as plain data; None if there is none.
        ended: `done`, `waiting` for a person, or what went wrong.
        effects: New entries of the ledger, if there is one.
    """

    run: str
    events: Sequence[Event]
    calls: Calls
    state: Any
    ended: str
    effects: int | None = None

    @property
    def steps(self) -> int:
        """How many steps are recorded."""
        return len({event.key for event in self.events if event.what == "recorded"})


@dataclass
class Verdict:
    """Whether the promise held.

    Attributes:
        scenario, what: See Disturbance.
        ended: See Seen.
        seconds: From the disturbance to the next step of the run that somebody began.
        repeated: Names of the steps that were in flight and were made again.
        keyed: Those of them with effects that asked for their idempotency key.
        doubled: Those with effects that did not, so that nothing keeps the effect from happening twice.
        recorded_again: Names of recorded steps that were made again.
        model_calls: Calls of the model: undisturbed, here, and those here that were failed on purpose.
        ledger: New entries of the ledger: undisturbed, and here.
        differences: Where the final state is not what it is undisturbed.
        failures: What of the promise did not hold, and what mends it.
    """

    scenario: str
    what: str
    ended: str
    seconds: float | None
    repeated: list[str] = field(default_factory=list)
    keyed: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    recorded_again: list[str] = field(default_factory=list)
    model_calls: tuple[int, int, int] = (0, 0, 0)
    ledger: tuple[int, int] | None = None
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether all of it held."""
        return not self.failures


def judge(calm: Sequence[Seen], seen: Seen, disturbance: Disturbance, harmless: Collection[str]) -> Verdict:
    """Compare a disturbed run with the undisturbed ones.

    Args:
        harmless: Names of tools and functions that may run twice without harm.
    """
    verdict = Verdict(disturbance.scenario, disturbance.what, seen.ended, _recovery(seen, disturbance))
    _count(verdict, seen, disturbance, harmless)
    failed = sum(not well for _, well in seen.calls.made)
    verdict.model_calls = (len(calm[-1].calls.made), len(seen.calls.made), failed)
    if seen.effects is not None and calm[-1].effects is not None:
        verdict.ledger = (calm[-1].effects, seen.effects)
    if seen.ended == calm[-1].ended:
        verdict.differences = differences([each.state for each in calm], seen.state)
    verdict.failures = list(_failures(verdict, calm[-1], seen, disturbance))
    return verdict


def _recovery(seen: Seen, disturbance: Disturbance) -> float | None:
    if not disturbance.at:
        return None
    if disturbance.scenario in _MODEL_FAULTS:
        times = [at for at, well in seen.calls.made if well and at > disturbance.at]
    else:
        steps = (event for event in seen.events if event.what == "begin" and event.at > disturbance.at)
        times = [event.at for event in steps if event.pid != disturbance.stale]
    return min(times) - disturbance.at if times else None


def _count(verdict: Verdict, seen: Seen, disturbance: Disturbance, harmless: Collection[str]) -> None:
    by_key: dict[str, list[Event]] = {}
    for event in seen.events:
        by_key.setdefault(event.key, []).append(event)
    for key, events in by_key.items():
        begun = [event for event in events if event.what == "begin"]
        if not begun:
            continue
        name, kind = begun[0].name, begun[0].type
        results = [event.at for event in events if event.what == "recorded" and event.detail == "result"]
        # An overtaken worker that wakes up makes the call it was about to make; it cannot know.
        if any(event.at > min(results) and event.pid != disturbance.stale for event in begun if results):
            verdict.recorded_again.append(name)
        ineffective = sum(event.what in ("failed", "hung") for event in events) + (key == disturbance.unmade)
        # A call that hangs is told of twice: that it hangs, and that its time was up.
        ineffective -= min(
            sum(event.what == "hung" for event in events),
            sum(event.what == "failed" and event.detail == "StepTimeoutError" for event in events),
        )
        if len(begun) - ineffective < 2:
            continue
        verdict.repeated.append(name)
        if kind in _EFFECTS and name not in harmless:
            keyed = any(event.what == "read" for event in events)
            (verdict.keyed if keyed else verdict.doubled).append(name)


def _failures(verdict: Verdict, calm: Seen, seen: Seen, disturbance: Disturbance) -> Iterator[str]:
    if disturbance.problem:
        yield disturbance.problem
    elif seen.ended != calm.ended and not seen.ended.startswith("asks"):
        yield f"undisturbed the run ends as {calm.ended!r}, here as: {seen.ended}"
    if verdict.recorded_again:
        yield f"recorded steps were made again: {', '.join(verdict.recorded_again)}"
    for path in verdict.differences[:_SHOWN]:
        yield f"the final state differs: {path}"
    if len(verdict.differences) > _SHOWN:
        yield f"and in {len(verdict.differences) - _SHOWN} more places"
    if verdict.ledger is not None:
        if verdict.ledger[1] > verdict.ledger[0]:
            yield f"the ledger has {verdict.ledger[1]} new entries, undisturbed {verdict.ledger[0]}: effects doubled"
        elif verdict.ledger[1] < verdict.ledger[0] and not seen.ended.startswith("asks"):
            yield f"the ledger has {verdict.ledger[1]} new entries, undisturbed {verdict.ledger[0]}: effects are lost"
    elif verdict.doubled:
        names = ", ".join(sorted(set(verdict.doubled)))
        yield (
            f"{names}: in flight at the disturbance, made again, and never asked for the idempotency key, so the "
            "effect may have happened twice. Pass current_step().idempotency_key on to the service, or set "
            "StepPolicy(on_in_doubt='ask'); if it does no harm, say --harmless " + names.replace(", ", " --harmless ")
        )


def differences(calm: Sequence[Any], here: Any) -> list[str]:
    """Return where `here` differs from what all of `calm` agree on."""
    same = dict(_leaves(calm[0]))
    varying: set[str] = set()
    for other in map(dict, map(_leaves, calm[1:])):
        varying |= {path for path in {*same, *other} if path not in same or path not in other}
        varying |= {path for path in same.keys() & other.keys() if same[path] != other[path]}
    found = dict(_leaves(here))
    return [
        f"{path} is {_shown(found, path)}, undisturbed {_shown(same, path)}"
        for path in sorted({*same, *found} - varying)
        if path not in same or path not in found or same[path] != found[path]
    ]


def varying(calm: Sequence[Any]) -> list[str]:
    """Return the places at which undisturbed runs differ from each other, and which are therefore not compared."""
    return sorted({path.partition(" is ")[0] for other in calm[1:] for path in differences(calm[:1], other)})


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return json.dumps(leaves[path], ensure_ascii=False)[:80] if path in leaves else "absent"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, value
