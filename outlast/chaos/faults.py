"""The scenarios: what is done to a run, and where in it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from outlast.chaos import events
from outlast.chaos.events import HANG, Event, Hold
from outlast.chaos.verdict import Disturbance

if TYPE_CHECKING:
    from outlast.chaos.trial import Trial

_AWAY: Final = 1.0
"""Seconds that a sidecar stays away."""
_WHERE: Final = {"begin": "before", "end": "after", "recorded": "with the outcome recorded of"}


def impossible(trial: Trial, scenario: str) -> str:
    """Return why a scenario cannot be played with this agent; empty if it can."""
    if scenario == "kill-sidecar" and trial.options.sidecar:
        return "kill-sidecar kills a sidecar of its own: leave --dapr out"
    if scenario in ("rate-limit", "drop-model") and not trial.calm[0].calls.made:
        return (
            f"{scenario} needs the agent's model calls to come through a proxy, and none did: let the model take its "
            "base URL from OPENAI_BASE_URL (ChatOpenAI does by itself), and name the real one with --model-url"
        )
    if scenario == "hang-tool":
        names = sorted({event.name for event in trial.points if event.type == "tool"})
        if not names:
            return "hang-tool needs an agent that calls a tool; undisturbed, this one did not"
        if trial.options.tool and trial.options.tool not in names:
            return f"undisturbed, no tool {trial.options.tool!r} was called; these were: {', '.join(names)}"
    if scenario not in ("rate-limit", "drop-model") and not trial.points:
        return "the agent made no step: no model call, tool call or function marked with @step"
    return ""


def places(trial: Trial, scenario: str) -> list[int]:
    """Return the places at which a run can be disturbed."""
    if scenario in ("rate-limit", "drop-model"):
        return list(range(len(trial.calm[0].calls.made)))
    if scenario == "hang-tool":
        named = [
            number
            for number, event in enumerate(trial.points)
            if event.what == "begin" and event.type == "tool" and trial.options.tool in ("", event.name)
        ]
        # A hanging tool is named, so there is one place for each name.
        return list({trial.points[number].name: number for number in named}.values())
    return list(range(len(trial.points)))


def mend(trial: Trial) -> None:
    """Let nothing of a disturbance reach the next run."""
    events.withdraw(trial.folder)
    (trial.folder / HANG).unlink(missing_ok=True)
    for worker in list(trial.workers):
        if worker.ended:
            trial.replace_worker(worker)


def _hold(trial: Trial, run: str, place: int) -> Event | None:
    """Submit a run, and return the point at which its worker is held."""
    trial.proxy.begin()
    events.order(trial.folder, Hold(run, place))
    trial.submit(run)

    def held() -> Event | None:
        return next((event for event in trial.events(run) if event.what == "held"), None)

    found: Event | None = trial.until(held, trial.options.timeout)
    return found


def _missed(trial: Trial, scenario: str) -> Disturbance:
    events.withdraw(trial.folder)
    return Disturbance(scenario, "never", problem="the run never came to the point at which it was to be disturbed")


def _at(what: str, held: Event) -> str:
    unrecorded = " (not recorded yet)" if held.detail == "end" else ""
    return f"{what} {_WHERE[held.detail]} {held.type} {held.name}{unrecorded}"


def _kill_worker(trial: Trial, run: str, place: int) -> Disturbance:
    held = _hold(trial, run, place)
    if held is None:
        return _missed(trial, "kill-worker")
    trial.worker(held.pid).kill()
    unmade = held.key if held.detail == "begin" else ""
    return Disturbance("kill-worker", _at("worker killed", held), time.time(), unmade=unmade)


def _kill_sidecar(trial: Trial, run: str, place: int) -> Disturbance:
    held = _hold(trial, run, place)
    if held is None:
        return _missed(trial, "kill-sidecar")
    assert trial.sidecar is not None
    trial.sidecar.kill()
    at = time.time()
    events.withdraw(trial.folder)
    time.sleep(_AWAY)
    trial.start_sidecar()
    return Disturbance("kill-sidecar", _at("sidecar killed", held), at)


def _freeze_worker(trial: Trial, run: str, place: int) -> Disturbance:
    held = _hold(trial, run, place)
    if held is None:
        return _missed(trial, "freeze-worker")
    worker = trial.worker(held.pid)
    worker.signal(signal.SIGSTOP)
    at = time.time()
    # It goes on from where it is held once it is awake again.
    events.withdraw(trial.folder)
    last = place == len(trial.points) - 1

    def overtaken() -> bool:
        return any(event.pid != held.pid for event in trial.events(run))

    # After its last step a run may end elsewhere without another.
    found = trial.until(overtaken, 3 * trial.options.heartbeat if last else trial.options.timeout)
    worker.signal(signal.SIGCONT)
    problem = "" if found or last else "no other worker took the run over from the frozen one"
    return Disturbance("freeze-worker", _at("worker frozen", held), at, stale=held.pid, problem=problem)


def _misbehave(scenario: str) -> Callable[[Trial, str, int], Disturbance]:
    def play(trial: Trial, run: str, place: int) -> Disturbance:
        trial.misbehave(scenario, place)
        trial.submit(run)

        def failed() -> float | None:
            return next((at for at, well in trial.proxy.calls.made if not well), None)

        at = trial.until(failed, trial.options.timeout)
        text = f"{trial.options.failures} model calls failed, from number {place + 1} on"
        problem = "" if at else "the run never came to the model call that was to fail"
        return Disturbance(scenario, text, at or 0.0, problem=problem)

    return play


def _hang_tool(trial: Trial, run: str, place: int) -> Disturbance:
    name = trial.points[place].name
    (trial.folder / HANG).write_text(name)
    trial.proxy.begin()
    trial.submit(run)

    def hung() -> Event | None:
        return next((event for event in trial.events(run) if event.what == "hung"), None)

    found: Event | None = trial.until(hung, trial.options.timeout)
    if found is None:
        return Disturbance("hang-tool", "never", problem=f"the run never called {name}")
    begun = [event for event in trial.events(run) if event.what == "begin" and event.key == found.key]
    problem = ""
    if not begun[-1].detail:
        problem = (
            f"{name} has no timeout, so the run would wait for it for ever: durable(..., policies=Policies(named="
            f"{{{name!r}: StepPolicy(timeout=…, retry=RetryPolicy())}})). Its worker was killed to go on"
        )
        trial.worker(found.pid).kill()
    return Disturbance("hang-tool", f"{name} hangs", found.at, problem=problem)


FAULTS: Final[Mapping[str, Callable[[Trial, str, int], Any]]] = {
    "kill-worker": _kill_worker,
    "kill-sidecar": _kill_sidecar,
    "freeze-worker": _freeze_worker,
    "rate-limit": _misbehave("rate-limit"),
    "drop-model": _misbehave("drop-model"),
    "hang-tool": _hang_tool,
}
