"""A handle on an OpenAI Agents run: wait for it, approve or reject what it waits for, follow it; from any process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from agents import RunResult, RunState
from agents.items import ToolApprovalItem

from outlast.adapters.openai_agents import checkpoints, results
from outlast.adapters.openai_agents.results import Approval, RunWaitsError
from outlast.errors import RunStateError
from outlast.recovery import runs
from outlast.recovery.answers import Answer, give_answer
from outlast.recovery.attempt import Attachment
from outlast.recovery.handle import RunHandle
from outlast.recovery.journal import Record
from outlast.recovery.runs import RunHead, Typed
from outlast.recovery.steps import Question

if TYPE_CHECKING:
    from outlast.adapters.openai_agents.face import DurableAgent

_PATIENCE: Final = 30.0
Which = str | Approval | ToolApprovalItem


class AgentRun(RunHandle[RunResult]):
    """A run of an OpenAI agent, wherever it is carried out.

    Args:
        agent: The durable agent.
        run_id: The run.
    """

    def __init__(self, agent: DurableAgent, run_id: str, attachment: Attachment | None = None) -> None:
        self._agent = agent
        super().__init__(agent.runtime, run_id, agent.codec, self._give, attachment)

    def approvals(self) -> list[Approval]:
        """Return the tool calls that the run waits for a person to approve; empty if it waits for none."""
        head = self._head()
        if head.status != "waiting" or head.question or not head.result:
            return []
        return results.approvals(self._read(head))

    def approve(self, *which: Which, always: bool = False) -> None:
        """Approve tool calls that the run waits for; it goes on at once.

        Args:
            which: The calls, by id or as `approvals()` or `result.interruptions` gave them; all of them, if none given.
            always: Approve further calls of the same tools in this run, too.

        Raises:
            RunStateError: If the run does not wait for one of them.
        """
        self._decide(which, {"approve": True, "always": always})

    def reject(self, *which: Which, message: str | None = None, always: bool = False) -> None:
        """Reject tool calls that the run waits for; it goes on at once.

        Args:
            which: As for `approve`.
            message: What the model is told.
            always: Reject further calls of the same tools in this run, too.

        Raises:
            RunStateError: If the run does not wait for one of them.
        """
        self._decide(which, {"approve": False, "always": always, "message": message})

    def _decide(self, which: Iterable[Which], decision: dict[str, Any]) -> None:
        wanted = [_id(item) for item in which]
        self._hand(lambda asked: {"decisions": dict.fromkeys(wanted or asked, decision)})

    def _give(self, run_id: str, value: Any) -> None:
        """Answer as `resume` does.

        Args:
            value: True or False for all pending calls; `{id: True | False | "why not"}`; a RunState with the decisions
                in it; or an answer to a question of outlast.
        """
        if isinstance(value, Answer):
            give_answer(self._runtime, self._codec, run_id, value)
        elif isinstance(value, RunState):
            pending = [results.approval_id(item) for item in value.get_interruptions()]
            state = results.dumps_state(value)
            self._hand(lambda asked: {"state": state, "for": pending}, same=pending)
        elif isinstance(value, Mapping):
            decisions = {_id(key): _decision(item) for key, item in value.items()}
            self._hand(lambda asked: {"decisions": decisions})
        elif isinstance(value, bool):
            self._hand(lambda asked: {"decisions": {id: _decision(value) for id in asked}})
        else:
            raise TypeError(
                f"resume() of an OpenAI Agents run takes True, False, {{id: True | False | 'why not'}}, a RunState or "
                f"an answer, not {type(value).__qualname__}"
            )

    def _hand(self, make: Callable[[list[str]], dict[str, Any]], same: list[str] | None = None) -> None:
        """Signal the run; where it is busy with an earlier answer to the same question, wait for it to ask again."""
        end = time.monotonic() + _PATIENCE
        while True:
            head = self._head()
            if head.question and head.status == "waiting":
                raise RunStateError(
                    f"run {self.run_id!r} waits for an answer to a question of outlast: give it with "
                    "handle.answer(done(...) | again() | fail() | allow(...)), or `outlast answer`"
                )
            asked = [item.id for item in results.approvals(self._read(head))] if head.result else []
            signal = make(asked)
            self._check(head, asked, same if same is not None else list(signal["decisions"]))
            try:
                self._runtime.signal(self.run_id, results.CODEC.dumps_typed(signal), addressed=True)
                return
            except RunStateError:
                head = self._head()
                if head.ended or head.status == "waiting" or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _check(self, head: RunHead, asked: list[str], given: list[str]) -> None:
        unknown = [id for id in given if id not in asked]
        if not given or unknown:
            waits = f"it waits for {', '.join(asked)}" if asked else f"it is {head.status} and waits for no approval"
            named = f" of {', '.join(unknown)}" if unknown else ""
            raise RunStateError(f"run {self.run_id!r} does not wait for an approval{named}: {waits}")

    # --- results

    def steps(self) -> list[Record]:
        """Return the recorded steps of the run, in the order in which they ended."""
        return [record for record in super().steps() if record.type != checkpoints.TYPE]

    def told(self, head: RunHead) -> list[Typed]:
        """Return what readers were told of the run, if that is more than its result has."""
        return [(kind, data) for kind, data in self._read(head).get("told") or ()] if head.result else []

    def _read(self, head: RunHead) -> dict[str, Any]:
        return results.decode(self._runtime.client.run(runs.read_typed(self.run_id, head.result)))

    def _value(self, head: RunHead) -> RunResult:
        if head.status not in ("done", "waiting"):
            return super()._value(head)
        live = self._attachment.extras.get("live")
        if live is not None and live[0] == head.attempts and isinstance(live[1], RunResult) and not head.question:
            return self._named(live[1])
        return self._named(self.rebuilt(head))

    def rebuilt(self, head: RunHead) -> RunResult:
        """Return the result from its record; the context that the caller gave is brought to where the run left it.

        Raises:
            RunWaitsError: If the run waits for an answer to a question of outlast.
        """
        body = self._read(head)
        if body["kind"] == "question":
            raise RunWaitsError(self.run_id, Question(**body["question"]))
        given = self._attachment.extras.get("options", {}).get("context")
        agent = self._attachment.extras.get("agent") or self._agent.agent
        return results.now(results.rebuild(agent, body, self._agent.context_codec, given))

    def _named(self, result: RunResult) -> RunResult:
        named: RunResult = name_states(result, self.run_id)
        return named


def name_states(result: Any, run_id: str) -> Any:
    """Let the states of a result tell which run they are of, so that the run goes on when one is given to Runner."""
    to_state = type(result).to_state

    def named() -> RunState[Any]:
        state: RunState[Any] = to_state(result)
        state._outlast_run_id = run_id  # type: ignore[attr-defined]
        return state

    object.__setattr__(result, "to_state", named)
    return result


def _id(which: Any) -> str:
    if isinstance(which, str):
        return which
    return which.id if isinstance(which, Approval) else results.approval_id(which)


def _decision(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"approve": value}
    if isinstance(value, str):
        return {"approve": False, "message": value}
    raise TypeError(f"an approval is answered with True, False or the reason of a rejection, not {value!r}")
