"""Dapr's workflow API, through the real worker and clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from dapr.ext.workflow import DaprWorkflowClient, WorkflowState, WorkflowStatus
from dapr.ext.workflow.aio import DaprWorkflowClient as AsyncDaprWorkflowClient

from tests.embedded import sample
from tests.embedded.conftest import Ports

DONE, FAILED, TERMINATED = WorkflowStatus.COMPLETED, WorkflowStatus.FAILED, WorkflowStatus.TERMINATED


def finish(client: DaprWorkflowClient, instance_id: str, timeout: int = 30) -> WorkflowState:
    state = client.wait_for_workflow_completion(instance_id, timeout_in_seconds=timeout)
    assert state is not None
    return state


def result_of(client: DaprWorkflowClient, name: str, argument: Any, instance_id: str | None = None) -> Any:
    state = finish(client, client.schedule_new_workflow(name, input=argument, instance_id=instance_id))
    assert state.runtime_status == DONE, state
    return json.loads(state.serialized_output)


def code_of(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def until(client: DaprWorkflowClient, instance_id: str, status: WorkflowStatus) -> WorkflowState:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        state = client.get_workflow_state(instance_id)
        if state is not None and state.runtime_status == status:
            return state
        time.sleep(0.01)
    raise AssertionError(f"{instance_id} is not {status} but {state}")


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("chain", 5, 10),
        ("chain_async", 3, 3),
        ("fan_out", 50, 1225),
        ("parent", 4, [0, 0, 1, 3]),
        ("immediate", {"deep": [1, None, "ü"]}, {"deep": [1, None, "ü"]}),
        ("generations", 10, "the last one"),
        ("fire_and_forget", "x", "x"),
        ("shows_its_history", 2, ["shows_its_history"] * 3),
    ],
)
def test_results(workflows: DaprWorkflowClient, name: str, argument: Any, expected: Any) -> None:
    assert result_of(workflows, name, argument) == expected


def test_a_long_history(workflows: DaprWorkflowClient, embedded: None) -> None:
    assert result_of(workflows, "chain", 200) == 19900


def test_activities_run_side_by_side(workflows: DaprWorkflowClient) -> None:
    before = time.monotonic()
    assert result_of(workflows, "fan_slow", 10) == 10
    assert time.monotonic() - before < 2.5


def test_a_failure_carries_its_type_and_text(workflows: DaprWorkflowClient) -> None:
    state = finish(workflows, workflows.schedule_new_workflow("failing", input=99))
    assert state.runtime_status == FAILED
    assert "attempt 1" in state.failure_details.message
    assert state.failure_details.error_type == "TaskFailedError"


def test_retries_with_durable_timers(workflows: DaprWorkflowClient, key: str) -> None:
    assert result_of(workflows, "retrying", 2, key) == "good at last"
    assert sample.attempts[key] == 3
    state = finish(workflows, workflows.schedule_new_workflow("retrying", input=3, instance_id=f"{key}-b"))
    assert state.runtime_status == FAILED
    assert sample.attempts[f"{key}-b"] == 3


@pytest.mark.parametrize("name", ["unknown_activity", "nobody knows this workflow"])
def test_unknown_names_fail(workflows: DaprWorkflowClient, name: str) -> None:
    assert finish(workflows, workflows.schedule_new_workflow(name)).runtime_status == FAILED


def test_timers_keep_the_time(workflows: DaprWorkflowClient) -> None:
    before = time.monotonic()
    assert result_of(workflows, "sleeper", 0.5) >= 0.5
    assert 0.5 <= time.monotonic() - before < 2.5


def test_an_earlier_timer_overtakes_a_later_one(workflows: DaprWorkflowClient) -> None:
    late = workflows.schedule_new_workflow("sleeper", input=60.0)
    workflows.wait_for_workflow_start(late, timeout_in_seconds=10)
    assert result_of(workflows, "sleeper", 0.2) < 2
    workflows.terminate_workflow(late)


@pytest.mark.parametrize("event", ["answer", "ANSWER"])
def test_an_event_ends_a_wait(workflows: DaprWorkflowClient, event: str) -> None:
    instance_id = workflows.schedule_new_workflow("approval", input=30.0)
    workflows.raise_workflow_event(instance_id, event, data={"yes": True})
    assert json.loads(finish(workflows, instance_id).serialized_output) == {"yes": True}


def test_a_timer_ends_a_wait(workflows: DaprWorkflowClient) -> None:
    assert result_of(workflows, "approval", 0.1) == "timeout"


def test_events_before_the_wait_are_kept_in_order(workflows: DaprWorkflowClient) -> None:
    instance_id = workflows.schedule_new_workflow("listener", input=20)
    for number in range(1, 21):
        workflows.raise_workflow_event(instance_id, "word", data=number)
    assert json.loads(finish(workflows, instance_id).serialized_output) == list(range(1, 21))
    instance_id = workflows.schedule_new_workflow("late_listener", input=0.3)
    workflows.raise_workflow_event(instance_id, "word", data="early")
    assert json.loads(finish(workflows, instance_id).serialized_output) == "early"


def test_a_scheduled_start_waits(workflows: DaprWorkflowClient, key: str) -> None:
    start_at = datetime.now(UTC) + timedelta(seconds=0.7)
    before = time.monotonic()
    workflows.schedule_new_workflow("listener", input=1, instance_id=key, start_at=start_at)
    state = workflows.get_workflow_state(key)
    assert state is not None
    assert state.runtime_status == WorkflowStatus.PENDING
    code, _ = code_of(lambda: workflows.schedule_new_workflow("listener", input=1, instance_id=key))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    workflows.wait_for_workflow_start(key, timeout_in_seconds=10)
    assert time.monotonic() - before >= 0.6
    workflows.raise_workflow_event(key, "word", data="x")
    assert finish(workflows, key).runtime_status == DONE


def test_an_event_for_one_not_yet_started_is_kept(workflows: DaprWorkflowClient, key: str, embedded: None) -> None:
    start_at = datetime.now(UTC) + timedelta(seconds=0.5)
    workflows.schedule_new_workflow("listener", input=1, instance_id=key, start_at=start_at)
    workflows.raise_workflow_event(key, "word", data="early")
    assert workflows.get_workflow_state(key).runtime_status == WorkflowStatus.PENDING  # type: ignore[union-attr]
    assert json.loads(finish(workflows, key).serialized_output) == ["early"]


def test_an_active_id_is_refused_and_a_completed_one_runs_anew(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("listener", input=1, instance_id=key)
    code, text = code_of(lambda: workflows.schedule_new_workflow("listener", input=1, instance_id=key))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    reason = f"an active workflow with ID '{key}' already exists"
    assert text == f"failed to create workflow instance: rpc error: code = AlreadyExists desc = {reason}"
    workflows.raise_workflow_event(key, "word", data="first")
    first = finish(workflows, key)
    assert result_of(workflows, "immediate", "second", key) == "second"
    again = finish(workflows, key)
    assert again.created_at > first.created_at
    assert again.name == "immediate"


def test_one_of_many_starters_of_an_id_wins(workflows: DaprWorkflowClient, key: str) -> None:
    outcomes: list[str] = []

    def start() -> None:
        try:
            workflows.schedule_new_workflow("listener", input=1, instance_id=key)
            outcomes.append("started")
        except grpc.RpcError as error:
            outcomes.append(error.code().name)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ALREADY_EXISTS"] * 7 + ["started"]
    workflows.terminate_workflow(key)


def test_suspend_and_resume(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("listener", input=2, instance_id=key)
    workflows.pause_workflow(key)
    assert workflows.get_workflow_state(key).runtime_status == WorkflowStatus.SUSPENDED  # type: ignore[union-attr]
    workflows.raise_workflow_event(key, "word", data=1)
    workflows.raise_workflow_event(key, "word", data=2)
    time.sleep(0.3)
    assert workflows.get_workflow_state(key).runtime_status == WorkflowStatus.SUSPENDED  # type: ignore[union-attr]
    workflows.resume_workflow(key)
    assert json.loads(finish(workflows, key).serialized_output) == [1, 2]


def test_terminate(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("listener", input=1, instance_id=key)
    workflows.terminate_workflow(key, output={"why": "test"})
    state = finish(workflows, key)
    assert state.runtime_status == TERMINATED
    assert json.loads(state.serialized_output) == {"why": "test"}
    workflows.terminate_workflow(key)  # once more does no harm
    workflows.raise_workflow_event(key, "word", data="too late")
    workflows.pause_workflow(key)
    assert finish(workflows, key).runtime_status == TERMINATED


@pytest.mark.parametrize("recursive", [True, False])
def test_terminate_reaches_the_children_if_asked(workflows: DaprWorkflowClient, key: str, recursive: bool) -> None:
    child = f"{key}-child"
    request = {"name": "listener", "input": 1, "id": child}
    workflows.schedule_new_workflow("parent_of", input=request, instance_id=key)
    until(workflows, child, WorkflowStatus.RUNNING)
    workflows.terminate_workflow(key, recursive=recursive)
    if recursive:
        assert finish(workflows, child).runtime_status == TERMINATED
        return
    assert workflows.get_workflow_state(child).runtime_status == WorkflowStatus.RUNNING  # type: ignore[union-attr]
    code, text = code_of(lambda: workflows.schedule_new_workflow("immediate", input=1, instance_id=key))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert "cannot recreate workflow" in text
    workflows.terminate_workflow(child)
    assert result_of(workflows, "immediate", 1, key) == 1


def test_a_childs_failure_reaches_its_parent(workflows: DaprWorkflowClient) -> None:
    text = result_of(workflows, "parent_of", {"name": "failing", "input": 99})
    assert text.startswith("child failed:")
    assert "attempt" in text


def test_a_child_whose_id_is_taken_fails(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("listener", input=1, instance_id=key)
    text = result_of(workflows, "parent_of", {"name": "immediate", "input": 1, "id": key})
    assert "already exists" in text
    workflows.terminate_workflow(key)


def test_continue_as_new_carries_events_over(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("collector", input=[], instance_id=key)
    for number in range(5):
        workflows.raise_workflow_event(key, "word", data=f"w{number}")
    assert json.loads(finish(workflows, key).serialized_output) == [f"w{number}" for number in range(5)]


def test_continue_as_new_keeps_the_history_short(workflows: DaprWorkflowClient, key: str) -> None:
    result_of(workflows, "generations", 15, key)
    assert len(workflows.get_workflow_history(key)) < 12


def test_custom_status(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("status_setter", input="half way", instance_id=key)
    workflows.wait_for_workflow_start(key, timeout_in_seconds=10)
    state = workflows.get_workflow_state(key)
    assert state is not None
    assert state.serialized_custom_status in ("half way", json.dumps("half way"))
    assert state.name == "status_setter"
    bare = workflows.get_workflow_state(key, fetch_payloads=False)
    assert bare is not None
    assert (bare.serialized_input, bare.serialized_custom_status) == (None, None)
    workflows.terminate_workflow(key)


def test_history_tells_what_happened(workflows: DaprWorkflowClient, key: str) -> None:
    result_of(workflows, "chain", 2, key)
    kinds = [event.event_type.name for event in workflows.get_workflow_history(key)]
    assert kinds == [
        "WORKFLOW_STARTED",
        "EXECUTION_STARTED",
        "TASK_SCHEDULED",
        "WORKFLOW_STARTED",
        "TASK_COMPLETED",
        "TASK_SCHEDULED",
        "WORKFLOW_STARTED",
        "TASK_COMPLETED",
        "EXECUTION_COMPLETED",
    ]
    assert code_of(lambda: workflows.get_workflow_history(f"{key}-none")) == (
        grpc.StatusCode.NOT_FOUND,
        f"workflow instance '{key}-none' not found",
    )


def test_purge(workflows: DaprWorkflowClient, key: str) -> None:
    child = f"{key}-child"
    request = {"name": "immediate", "input": 1, "id": child}
    assert result_of(workflows, "parent_of", request, key) == 1
    workflows.purge_workflow(key)
    assert workflows.get_workflow_state(key) is None
    assert workflows.get_workflow_state(child) is None
    assert result_of(workflows, "parent_of", request, key) == 1
    workflows.purge_workflow(key, recursive=False)
    assert workflows.get_workflow_state(child) is not None


@pytest.mark.parametrize("recursive", [True, False])
def test_purge_refuses_what_is_not_completed(workflows: DaprWorkflowClient, key: str, recursive: bool) -> None:
    workflows.schedule_new_workflow("listener", input=1, instance_id=key)
    workflows.wait_for_workflow_start(key, timeout_in_seconds=10)
    code, text = code_of(lambda: workflows.purge_workflow(key, recursive=recursive))
    assert code == grpc.StatusCode.UNKNOWN
    assert text == "failed to purge workflow state: orchestration has not yet completed"
    workflows.terminate_workflow(key)


def test_unknown_instances(workflows: DaprWorkflowClient, key: str) -> None:
    assert workflows.get_workflow_state(key) is None
    unknown = grpc.StatusCode.UNKNOWN
    assert code_of(lambda: workflows.raise_workflow_event(key, "word")) == (unknown, "no such instance exists")
    assert code_of(lambda: workflows.pause_workflow(key)) == (unknown, "no such instance exists")
    assert code_of(lambda: workflows.resume_workflow(key)) == (unknown, "no such instance exists")
    code, text = code_of(lambda: workflows.terminate_workflow(key))
    assert (code, text) == (unknown, "failed to submit termination request: no such instance exists")
    code, text = code_of(lambda: workflows.purge_workflow(key, recursive=False))
    assert (code, text) == (unknown, "failed to purge workflow state: no such instance exists")
    with pytest.raises(TimeoutError):
        workflows.wait_for_workflow_completion(key, timeout_in_seconds=1)


def test_a_wait_sees_an_instance_that_comes_later(workflows: DaprWorkflowClient, key: str) -> None:
    states: list[WorkflowState] = []
    waiter = threading.Thread(target=lambda: states.append(finish(workflows, key)))
    waiter.start()
    time.sleep(0.2)
    result_of(workflows, "immediate", "here", key)
    waiter.join(10)
    assert states[0].runtime_status == DONE


def test_wait_times_out(workflows: DaprWorkflowClient, key: str) -> None:
    workflows.schedule_new_workflow("listener", input=1, instance_id=key)
    with pytest.raises(TimeoutError):
        workflows.wait_for_workflow_completion(key, timeout_in_seconds=1)
    workflows.terminate_workflow(key)


def test_instances_are_listed_in_pages(workflows: DaprWorkflowClient, key: str) -> None:
    mine = {f"{key}-{number}" for number in range(7)}
    for instance_id in mine:
        result_of(workflows, "immediate", 1, instance_id)
    page = workflows.list_workflow_instance_ids(page_size=3)
    assert len(page.instance_ids) == 3
    assert mine <= set(workflows.iter_workflow_instance_ids(page_size=3))


def test_a_late_result_of_a_terminated_run_is_ignored(workflows: DaprWorkflowClient, key: str, embedded: None) -> None:
    sample.gate.clear()
    workflows.schedule_new_workflow("gated", input=20, instance_id=key)
    workflows.wait_for_workflow_start(key, timeout_in_seconds=10)
    time.sleep(0.2)
    workflows.terminate_workflow(key)
    workflows.schedule_new_workflow("listener", input=1, instance_id=key)
    sample.gate.set()
    time.sleep(0.3)
    kinds = [event.event_type.name for event in workflows.get_workflow_history(key)]
    assert "TASK_COMPLETED" not in kinds
    workflows.raise_workflow_event(key, "word", data="new")
    assert json.loads(finish(workflows, key).serialized_output) == ["new"]


def test_many_at_once(workflows: DaprWorkflowClient, key: str) -> None:
    ids = [workflows.schedule_new_workflow("chain", input=3, instance_id=f"{key}-{n}") for n in range(40)]
    assert all(finish(workflows, instance_id).runtime_status == DONE for instance_id in ids)
    assert all(sample.attempts[instance_id] == 3 for instance_id in ids)


def test_payloads_larger_than_grpc_would_take(workflows: DaprWorkflowClient, embedded: None) -> None:
    request = {"name": "immediate", "input": "x" * 6_000_000}
    instance_id = workflows.schedule_new_workflow("parent_of", input=request)
    state = workflows.wait_for_workflow_completion(instance_id, fetch_payloads=False, timeout_in_seconds=20)
    assert state is not None
    assert state.runtime_status == DONE


async def test_the_async_client(workflows: DaprWorkflowClient, ports: Ports, key: str) -> None:
    client = AsyncDaprWorkflowClient(host="127.0.0.1", port=str(ports.grpc))
    await client.schedule_new_workflow("listener", input=1, instance_id=key)
    await client.wait_for_workflow_start(key, timeout_in_seconds=10)
    await client.pause_workflow(key)
    await client.resume_workflow(key)
    await client.raise_workflow_event(key, "word", data="x")
    state = await client.wait_for_workflow_completion(key, timeout_in_seconds=10)
    assert state is not None
    assert state.runtime_status == DONE
    await client.purge_workflow(key)
    assert await client.get_workflow_state(key) is None
