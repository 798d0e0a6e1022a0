"""Who holds a work item, and what becomes of answers that come late, twice, or while the disk is full."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dapr.ext.workflow._durabletask.internal.protos as pb
import grpc
import pytest

from outlast.embedded import EmbeddedSidecar
from tests.embedded.raw import RawWorker, complete, schedule, string
from tests.harness.procs import wait_for


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[EmbeddedSidecar]:
    with EmbeddedSidecar(tmp_path / "outlast.db") as sidecar:
        yield sidecar


@pytest.fixture
def worker(sidecar: EmbeddedSidecar) -> Iterator[RawWorker]:
    with RawWorker(sidecar.grpc_address) as worker:
        yield worker


def test_work_of_a_broken_stream_goes_to_another_at_once(sidecar: EmbeddedSidecar) -> None:
    first, second = RawWorker(sidecar.grpc_address), None
    first.start("wf")
    turn = first.next()
    first.finish_turn(turn, schedule(0), schedule(1))
    held = [first.next(), first.next()]
    second = RawWorker(sidecar.grpc_address)
    assert second.nothing()
    before = time.monotonic()
    first.stream.cancel()
    again = [second.next(), second.next()]
    assert time.monotonic() - before < 0.3
    assert {i.activityRequest.taskId for i in again} == {i.activityRequest.taskId for i in held}
    first.finish_task(held[0], "late")  # its lease is lost: ignored
    for item in again:
        second.finish_task(item, "mine")
    events = second.next().workflowRequest.newEvents
    results = [event.taskCompleted.result.value for event in events if event.HasField("taskCompleted")]
    assert set(results) == {"mine"}
    first.close()
    second.close()


def test_an_answer_counts_once(worker: RawWorker) -> None:
    worker.start("wf")
    turn = worker.next()
    worker.finish_turn(turn, schedule(0))
    worker.finish_turn(turn, schedule(0), schedule(1))
    task = worker.next()
    assert worker.nothing()
    worker.finish_task(task, "first")
    worker.finish_task(task, "second")
    turn = worker.next()
    assert [e.taskCompleted.result.value for e in turn.workflowRequest.newEvents[1:]] == ["first"]
    worker.finish_turn(turn, complete(1))
    worker.finish_turn(turn, complete(1, "again"))
    assert worker.state("wf").output.value == "done"
    assert worker.history("wf").count("taskCompleted") == 1


def test_a_made_up_token_changes_nothing(worker: RawWorker) -> None:
    worker.start("wf")
    turn = worker.next()
    forged = pb.WorkItem()
    forged.CopyFrom(turn)
    forged.completionToken = "0" * 32
    worker.finish_turn(forged, complete(0))
    assert worker.state("wf").workflowStatus == pb.ORCHESTRATION_STATUS_PENDING
    worker.finish_turn(turn, complete(0))
    assert worker.state("wf").workflowStatus == pb.ORCHESTRATION_STATUS_COMPLETED


def test_one_instance_is_run_by_one_worker_at_a_time(sidecar: EmbeddedSidecar) -> None:
    with RawWorker(sidecar.grpc_address) as one, RawWorker(sidecar.grpc_address) as two:
        one.start("wf")
        wait_for(lambda: one.items.qsize() + two.items.qsize())
        holder, other = (one, two) if one.items.qsize() else (two, one)
        turn = holder.next()
        other.stub.RaiseEvent(pb.RaiseEventRequest(instanceId="wf", name="e", input=string("1")))
        assert one.nothing()
        assert two.nothing()
        holder.finish_turn(turn)
        wait_for(lambda: one.items.qsize() + two.items.qsize())
        item = (one if one.items.qsize() else two).next()
        assert item.workflowRequest.newEvents[1].eventRaised.name == "e"


def test_work_is_dealt_out_in_turn(sidecar: EmbeddedSidecar) -> None:
    with RawWorker(sidecar.grpc_address) as one, RawWorker(sidecar.grpc_address) as two:
        one.start("wf")
        wait_for(lambda: one.items.qsize() + two.items.qsize())
        worker = one if one.items.qsize() else two
        worker.finish_turn(worker.next(), *(schedule(number) for number in range(10)))
        wait_for(lambda: one.items.qsize() + two.items.qsize() == 10)
        assert one.items.qsize() == two.items.qsize() == 5


def test_work_waits_for_a_worker(sidecar: EmbeddedSidecar) -> None:
    with RawWorker(sidecar.grpc_address, listen=False) as client:
        client.start("wf")
        time.sleep(0.1)
        assert client.state("wf").workflowStatus == pb.ORCHESTRATION_STATUS_PENDING
    with RawWorker(sidecar.grpc_address) as worker:
        assert worker.next().workflowRequest.instanceId == "wf"


def test_more_work_than_a_worker_may_hold(sidecar: EmbeddedSidecar, worker: RawWorker) -> None:
    worker.start("wf")
    worker.finish_turn(worker.next(), *(schedule(number) for number in range(1050)))
    wait_for(lambda: worker.items.qsize() >= 1000)
    time.sleep(0.3)
    assert worker.items.qsize() == 1000
    for _ in range(60):
        worker.finish_task(worker.next())
    wait_for(lambda: worker.items.qsize() >= 990)


def test_only_the_new_history_is_sent_to_a_worker_that_keeps_it(sidecar: EmbeddedSidecar) -> None:
    with RawWorker(sidecar.grpc_address, keeps_history=True) as worker:
        worker.start("wf")
        worker.finish_turn(worker.next(), schedule(0))
        worker.finish_task(worker.next())
        second = worker.next()
        assert len(second.workflowRequest.pastEvents) == 3
        worker.finish_turn(second, schedule(1))
        worker.finish_task(worker.next())
        third = worker.next().workflowRequest
        assert third.cachedHistory.eventCount == 3
        assert len(third.pastEvents) == 3
        assert len(worker.history("wf")) == 6


def test_a_stalled_instance_is_tried_again_by_the_next_worker(sidecar: EmbeddedSidecar, worker: RawWorker) -> None:
    worker.start("wf")
    unknown = pb.WorkflowAction(id=0, workflowVersionNotAvailable=pb.WorkflowVersionNotAvailableAction())
    worker.finish_turn(worker.next(), unknown)
    assert worker.state("wf").workflowStatus == pb.ORCHESTRATION_STATUS_STALLED
    assert worker.history("wf") == ["executionStalled"]
    with pytest.raises(grpc.RpcError, match="workflow is stalled"):
        worker.stub.RaiseEvent(pb.RaiseEventRequest(instanceId="wf", name="e"))
    worker.stream.cancel()
    with RawWorker(sidecar.grpc_address) as newer:
        turn = newer.next()
        assert turn.workflowRequest.newEvents[1].HasField("executionStarted")
        newer.finish_turn(turn, complete(0))
        assert newer.state("wf").workflowStatus == pb.ORCHESTRATION_STATUS_COMPLETED


def test_patches_that_vanish_stall_an_instance(worker: RawWorker) -> None:
    worker.start("wf")
    worker.finish_turn(worker.next(), schedule(0), version=pb.WorkflowVersion(patches=["p1"]))
    worker.finish_task(worker.next())
    worker.finish_turn(worker.next(), schedule(1))
    assert worker.state("wf").workflowStatus == pb.ORCHESTRATION_STATUS_STALLED


def test_nothing_is_half_written_when_the_disk_is_full(sidecar: EmbeddedSidecar, worker: RawWorker) -> None:
    worker.start("wf")
    turn = worker.next()
    limit_pages(sidecar, 0)
    big = string("x" * 900_000)
    many = [
        pb.WorkflowAction(id=number, scheduleTask=pb.ScheduleTaskAction(name="act", input=big)) for number in range(3)
    ]
    with pytest.raises(grpc.RpcError) as caught:
        worker.finish_turn(turn, *many)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "full" in caught.value.details()
    assert worker.history("wf") == []
    limit_pages(sidecar, 1_000_000)
    # The answer was kept, and is applied by itself: nobody runs the turn again.
    items = [worker.next() for _ in range(3)]
    assert [item.activityRequest.taskId for item in items] == [0, 1, 2]
    assert worker.history("wf").count("taskScheduled") == 3


def limit_pages(sidecar: EmbeddedSidecar, more: int) -> None:
    """A full disk, as SQLite sees it."""

    def work(connection: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]  # type: ignore[attr-defined]
        connection.execute(f"PRAGMA max_page_count = {pages + more}")  # type: ignore[attr-defined]

    sidecar._database.write(work)


def test_activities_and_children_of_another_app(sidecar: EmbeddedSidecar, worker: RawWorker) -> None:
    with (
        EmbeddedSidecar(sidecar.path, app_id="other") as elsewhere,
        RawWorker(elsewhere.grpc_address) as other,
    ):
        worker.start("wf")
        child = pb.WorkflowAction(
            id=1,
            createChildWorkflow=pb.CreateChildWorkflowAction(name="child", instanceId="kid"),
            router=pb.TaskRouter(targetAppID="other"),
        )
        worker.finish_turn(worker.next(), schedule(0, app="other"), child)
        assert worker.nothing()
        for _ in range(2):
            item = other.next()
            if item.HasField("activityRequest"):
                other.finish_task(item, "from afar")
            else:
                assert item.workflowRequest.instanceId == "kid"
                other.finish_turn(item, complete(0, "grown"))
        events: list[pb.HistoryEvent] = []
        while len(events) < 2:
            item = worker.next()
            events += item.workflowRequest.newEvents[1:]
            worker.finish_turn(item)
        kinds = {event.WhichOneof("eventType") for event in events}
        assert kinds == {"taskCompleted", "childWorkflowInstanceCompleted"}
        assert not worker.stub.GetInstance(pb.GetInstanceRequest(instanceId="kid")).exists


def test_one_workflow_may_speak_to_another(worker: RawWorker) -> None:
    worker.start("target")
    worker.finish_turn(worker.next())
    worker.start("speaker")
    send = pb.SendEventAction(instance=pb.WorkflowInstance(instanceId="target"), name="hi", data=string('"there"'))
    worker.finish_turn(worker.next(), pb.WorkflowAction(id=0, sendEvent=send), complete(1))
    event = worker.next().workflowRequest.newEvents[1]
    assert (event.eventRaised.name, event.eventRaised.input.value) == ("hi", '"there"')


def test_a_detached_workflow_has_no_parent(worker: RawWorker) -> None:
    worker.start("wf")
    detached = pb.CreateDetachedWorkflowAction(name="free", instanceId="free-1", input=string("7"))
    worker.finish_turn(worker.next(), pb.WorkflowAction(id=0, createDetachedWorkflow=detached), complete(1))
    start = worker.next().workflowRequest.newEvents[1].executionStarted
    assert (start.name, start.input.value, start.HasField("parentInstance")) == ("free", "7", False)


def test_an_event_ends_the_timer_of_its_wait(sidecar: EmbeddedSidecar, worker: RawWorker) -> None:
    def wait_for_event(number: int, milliseconds: int) -> pb.WorkflowAction:
        timer = pb.CreateTimerAction(externalEvent=pb.TimerOriginExternalEvent(name="Word"))
        timer.fireAt.FromMilliseconds(milliseconds)
        return pb.WorkflowAction(id=number, createTimer=timer)

    soon = int(time.time() * 1000) + 1000
    worker.start("wf")
    worker.finish_turn(worker.next(), wait_for_event(0, 253402300799_000), wait_for_event(1, soon))
    for _ in range(2):  # the first event ends the wait without end, the second the one with a deadline
        worker.stub.RaiseEvent(pb.RaiseEventRequest(instanceId="wf", name="word"))
        worker.finish_turn(worker.next())
    assert worker.nothing(1.5)
    assert worker.history("wf").count("timerFired") == 0
