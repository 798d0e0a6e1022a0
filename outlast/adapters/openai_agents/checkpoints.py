"""Checkpoints of long runs, so that an attempt that takes over need not go through all of the run again.

At the beginning of every so many turns the SDK's RunState is entered in the journal, with the counters of the run's
place. What is entered is what has changed since the last one: lists that grow cost what is new in them. An attempt
that takes over begins with the newest; what was recorded after it is replayed.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from agents import Agent, RunState
from agents._run_state_agent_identity import _build_agent_identity_keys_by_id
from agents.items import ModelResponse
from agents.run_internal.run_steps import NextStepRunAgain
from agents.run_internal.session_persistence import session_items_for_turn
from agents.run_internal.tool_use_tracker import serialize_tool_use_tracker

from outlast.adapters.openai_agents import results
from outlast.adapters.openai_agents.context import Contexts
from outlast.adapters.openai_agents.place import Place, here
from outlast.recovery.attempt import Attempt
from outlast.recovery.journal import Record

logger = logging.getLogger("outlast.steps")

EVERY: Final = 5
"""Turns between checkpoints; in a run so long that each turn costs the SDK much, fewer."""
_LONG: Final = 150
_EVERY_LONG: Final = 3
TYPE: Final = "checkpoint"
_TAIL: Final = 8
"""Items of the session that are remembered, to recognise its end."""

_CURRENT: contextvars.ContextVar[Checkpoints | None] = contextvars.ContextVar("outlast_checkpoints", default=None)


class Checkpoints:
    """The checkpoints of one attempt.

    Args:
        agent: The agent that the run began with.
        attempt: The attempt.
        place: The run.
        contexts: Its context object.
        stretch: How often the run has waited for approvals.
    """

    def __init__(self, agent: Agent[Any], attempt: Attempt, place: Place, contexts: Contexts, stretch: int) -> None:
        self._agent = agent
        self._attempt = attempt
        self._place = place
        self._contexts = contexts
        self._key = f"{TYPE}/s{stretch}"
        self._before: Any = None
        self._count = 0
        self._turn = self._last = 0
        self._off = False
        self._responses = self._requests = 0
        self._items: list[Any] = []
        self._written: list[Any] = []
        self._progress = _Progress()

    # --- beginning

    async def newest(self, start: Any) -> tuple[Any, int]:
        """Return what the attempt begins with, and how many records it begins after.

        Args:
            start: What it begins with if there is no checkpoint.
        """
        entered = [
            (at, record) for at, record in enumerate(self._attempt.journal.records, 1) if record.key == self._key
        ]
        if entered:
            try:
                start, skipped = await self._load(entered)
            except Exception:
                logger.warning(
                    "run %s: the checkpoint cannot be read by this release of the SDK; the run is replayed from its "
                    "beginning", self._attempt.run_id, exc_info=True,
                )  # fmt: skip
                self._before, self._count, self._responses, self._requests = None, len(entered), 0, 0
                self._items, self._written = [], []
                skipped = 0
        else:
            skipped = 0
        if isinstance(start, RunState):
            self._turn = self._last = start._current_turn
            self._progress = _Progress(start)
        return start, skipped

    async def _load(self, entered: Sequence[tuple[int, Record]]) -> tuple[RunState[Any], int]:
        body: Any = None
        stored: list[Any] = []
        usage: list[Any] = []
        for _, record in self._chain(entered):
            body = patched(None if record.value["whole"] else body, json.loads(record.value["state"]))
            stored += record.value["responses"]
            usage += record.value["usage"]
        at, newest = entered[-1]
        value = newest.value
        context = value["context"]
        self._contexts.begin((context[0], context[1]) if context else None, value["changes"])
        responses = [results.CODEC.loads_typed((kind, data)) for kind, data in stored]
        state = await results.loads_state(self._agent, json.dumps(body), self._contexts.value)
        state._model_responses = responses
        assert state._context is not None
        state._context.usage.request_usage_entries = [results.CODEC.loads_typed((kind, data)) for kind, data in usage]
        self._requests = len(usage)
        if value["same"]:
            state._generated_items = list(state._session_items)
        self._before, self._count, self._responses = body, len(entered), len(responses)
        self._items, self._written = list(state._session_items), body["session_items"]
        self._place.go_on(value["counts"])
        if self._place.session is not None:
            self._place.session._outlast_known = value["session"]
        return state, at

    @staticmethod
    def _chain(entered: Sequence[tuple[int, Record]]) -> Sequence[tuple[int, Record]]:
        """Return the newest whole checkpoint and the changes after it."""
        start = max(at for at, (_, record) in enumerate(entered) if record.value["whole"])
        return entered[start:]

    # --- keeping

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep checkpoints of what runs in this context."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def begins(self, build: Callable[[_Progress], RunState[Any]]) -> None:
        """A turn of the run begins.

        Args:
            build: Returns the RunState in which the SDK would go on with this turn.
        """
        self._turn += 1
        every = EVERY if self._turn < _LONG else _EVERY_LONG
        if self._off or self._turn - 1 - self._last < every or self._place.track.replaying:
            return
        self._last = self._turn - 1
        try:
            state = build(self._progress)
            state._current_turn = self._turn - 1
            state._current_step = NextStepRunAgain()
            state._current_turn_persisted_item_count = 0
            state._last_processed_response = None
            self._enter(state)
        except Exception as error:
            # It only makes a resume quicker: agents of one name, say, are nothing the SDK can write down.
            logger.info("run %s is kept without checkpoints: %s", self._attempt.run_id, error)
            self._off = True

    def ended(self, result: Any) -> None:
        """A turn of a run that is not streamed has ended."""
        self._progress.add(result)

    def _body(self, state: RunState[Any]) -> dict[str, Any]:
        """Return a state as a tree; of a history that has only grown, what was written before is taken as it was."""
        known = len(self._items)
        items = state._session_items
        if not _same(state._generated_items, items) or not _same(items[:known], self._items):
            self._items, self._written = [], []
            return results.state_body(state)
        keys = _build_agent_identity_keys_by_id(self._agent)
        new = [state._serialize_item(item, agent_identity_keys_by_id=keys) for item in items[known:]]
        self._items, self._written = list(items), [*self._written, *json.loads(json.dumps(new))]
        state._generated_items, state._session_items = [], []
        return {**results.state_body(state), "session_items": self._written}

    def _enter(self, state: RunState[Any]) -> None:
        assert state._context is not None
        responses, state._model_responses = state._model_responses[self._responses :], []
        spent = state._context.usage
        requests = spent.request_usage_entries[self._requests :]
        # A copy: the run goes on counting in its own.
        state._context.usage = dataclasses.replace(spent, request_usage_entries=[])
        same = _same(state._generated_items, state._session_items)
        body = self._body(state)
        changes = difference(self._before, body) if self._before is not None else {"=": body}
        session = self._place.session
        known = session._outlast_known if session is not None else None
        value = {
            "whole": self._before is None,
            "state": json.dumps(changes, separators=(",", ":")),
            "same": same,
            "responses": [list(results.CODEC.dumps_typed(response)) for response in responses],
            "usage": [list(results.CODEC.dumps_typed(request)) for request in requests],
            "counts": self._place.counts,
            "session": None if known is None else known[-_TAIL:],
            "context": self._contexts.encoded(),
            "changes": self._contexts.number,
        }
        now = time.time()
        record = Record(
            kind="result", key=self._key, slot=self._count, number=0, type=TYPE, name=f"turn {self._turn - 1}",
            digest="", request="", value=value, started=now, ended=now,
        )  # fmt: skip
        # Nobody waits for it: what is recorded after it is committed after it.
        self._attempt.journal.write(record)
        self._before, self._count, self._responses = body, self._count + 1, self._responses + len(responses)
        self._requests += len(requests)


class _Progress:
    """What a run that is not streamed has come to, which the SDK has nowhere but in its loop.

    Args:
        start: The state that the attempt begins with, if it does not begin with the run.
    """

    def __init__(self, start: RunState[Any] | None = None) -> None:
        self.items: list[Any] = list(start._session_items) if start else []
        self.responses: list[ModelResponse] = list(start._model_responses) if start else []
        self.tool_inputs: list[Any] = list(start._tool_input_guardrail_results) if start else []
        self.tool_outputs: list[Any] = list(start._tool_output_guardrail_results) if start else []

    def add(self, result: Any) -> None:
        """Take what a turn has come to, before the SDK clears it."""
        self.items += session_items_for_turn(result)
        self.responses.append(result.model_response)
        self.tool_inputs += result.tool_input_guardrail_results
        self.tool_outputs += result.tool_output_guardrail_results


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(one is other for one, other in zip(first, second, strict=True))


# --- what has changed in a tree of JSON


def difference(old: Any, new: Any) -> Any:
    """Return what makes `new` of `old`: None if nothing has changed."""
    if isinstance(old, dict) and isinstance(new, dict):
        changed = {key: {"=": value} for key, value in new.items() if key not in old}
        changed |= {key: found for key in old if key in new and (found := difference(old[key], new[key])) is not None}
        gone = [key for key in old if key not in new]
        return {"~": changed, "-": gone} if changed or gone else None
    if isinstance(old, list) and isinstance(new, list) and old and new[: len(old)] == old:
        return {"+": new[len(old) :]} if len(new) > len(old) else None
    return None if old == new and type(old) is type(new) else {"=": new}


def patched(old: Any, change: Any) -> Any:
    """Return what `difference` was given as new."""
    if change is None:
        return old
    if "=" in change:
        return change["="]
    if "+" in change:
        return [*old, *change["+"]]
    kept = {key: value for key, value in old.items() if key not in change["-"]}
    return {**kept, **{key: patched(old.get(key), found) for key, found in change["~"].items()}}


# --- seams


def _mine() -> Checkpoints | None:
    """Return the checkpoints of the run whose turn this is, if it is the durable run itself and not one in it."""
    found, place = _CURRENT.get(), here()
    return found if found is not None and place is found._place else None


def run_single_turn(original: Any) -> Any:
    """Return the SDK's `run_single_turn`, which tells of the turns of a durable run."""

    @functools.wraps(original)
    async def run(**kwargs: Any) -> Any:
        found = _mine()
        if found is None:
            return await original(**kwargs)
        found.begins(functools.partial(_state_of_turn, found._agent, kwargs))
        result = await original(**kwargs)
        found.ended(result)
        return result

    return run


def run_single_turn_streamed(original: Any) -> Any:
    """Return the SDK's `run_single_turn_streamed`, which tells of the turns of a durable run."""

    @functools.wraps(original)
    async def run(streamed_result: Any, *args: Any, **kwargs: Any) -> Any:
        found = _mine()
        if found is not None:
            found.begins(lambda progress: streamed_result.to_state())
        return await original(streamed_result, *args, **kwargs)

    return run


def _state_of_turn(agent: Agent[Any], turn: dict[str, Any], progress: _Progress) -> RunState[Any]:
    state: RunState[Any] = copy.copy(turn["run_state"])
    state._context = turn["context_wrapper"]._copy_for_run_state()
    state._original_input = turn["original_input"]
    if turn.get("server_conversation_tracker") is not None:
        raise ValueError("its conversation is kept by a server")
    state._generated_items = list(turn["generated_items"])
    state._session_items = list(progress.items)
    state._model_responses = list(progress.responses)
    state._tool_input_guardrail_results = list(progress.tool_inputs)
    state._tool_output_guardrail_results = list(progress.tool_outputs)
    state._current_agent = turn["bindings"].public_agent
    state.set_tool_use_tracker_snapshot(serialize_tool_use_tracker(turn["tool_use_tracker"], starting_agent=agent))
    return state
