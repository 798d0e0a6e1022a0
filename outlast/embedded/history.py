"""Building history events, and what an orchestrator's actions turn into. Pure: no database, no I/O."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dapr.ext.workflow._durabletask.internal.protos as pb
from google.protobuf import timestamp_pb2, wrappers_pb2

FINAL = frozenset(
    {
        pb.ORCHESTRATION_STATUS_COMPLETED,
        pb.ORCHESTRATION_STATUS_FAILED,
        pb.ORCHESTRATION_STATUS_CANCELED,
        pb.ORCHESTRATION_STATUS_TERMINATED,
    }
)
# An indefinite wait for an external event is a timer at the end of the calendar; it must never fire.
_NEVER = 253402300799
NEVER = 2**63 - 1


def stamp(nanoseconds: int) -> timestamp_pb2.Timestamp:
    """A protobuf timestamp of a time in nanoseconds since the epoch."""
    return timestamp_pb2.Timestamp(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)


def nanoseconds(timestamp: timestamp_pb2.Timestamp) -> int:
    """The time of a protobuf timestamp in nanoseconds since the epoch."""
    return int(timestamp.seconds) * 1_000_000_000 + int(timestamp.nanos)


def new_event(event_id: int = -1, **kind: Any) -> pb.HistoryEvent:
    """A history event of now; `kind` names the one event type and its message."""
    return pb.HistoryEvent(eventId=event_id, timestamp=stamp(time.time_ns()), **kind)


def started(
    name: str,
    instance_id: str,
    *,
    input: wrappers_pb2.StringValue | None,
    execution_id: str = "",
    parent: pb.ParentInstanceInfo | None = None,
    scheduled: timestamp_pb2.Timestamp | None = None,
    trace: pb.TraceContext | None = None,
    tags: dict[str, str] | None = None,
    router: pb.TaskRouter | None = None,
) -> pb.HistoryEvent:
    """The event that starts an instance."""
    return new_event(
        executionStarted=pb.ExecutionStartedEvent(
            name=name,
            input=input,
            workflowInstance=pb.WorkflowInstance(
                instanceId=instance_id,
                executionId=wrappers_pb2.StringValue(value=execution_id or str(uuid.uuid4())),
            ),
            parentInstance=parent,
            scheduledStartTimestamp=scheduled,
            parentTraceContext=trace,
            tags=tags,
        ),
        router=router,
    )


def optional(message: Any, name: str) -> Any:
    """A sub-message, or None where it is not set."""
    return getattr(message, name) if message.HasField(name) else None


class Timer(NamedTuple):
    """A durable timer to create; `fire_at` in nanoseconds since the epoch, `waits_for` the event that makes it moot."""

    fire_at: int
    timer_id: int
    event: pb.HistoryEvent
    waits_for: str | None


class Message(NamedTuple):
    """An event for another instance; an ExecutionStarted creates it and may show it the sender's history."""

    app: str
    instance_id: str
    event: pb.HistoryEvent
    scope: pb.HistoryPropagationScope.ValueType = pb.HISTORY_PROPAGATION_SCOPE_NONE
    produced: int = 0  # how many events of the turn come with that history


class ScheduledTask(NamedTuple):
    """An activity to run; `scope` and `produced` as in `Message`."""

    event: pb.HistoryEvent
    scope: pb.HistoryPropagationScope.ValueType
    produced: int


@dataclass
class Turn:
    """Everything one orchestrator response asks for."""

    events: list[pb.HistoryEvent] = field(default_factory=list)
    tasks: list[ScheduledTask] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    children: list[Message] = field(default_factory=list)
    completed: pb.ExecutionCompletedEvent | None = None
    continued: list[pb.HistoryEvent] | None = None
    stalled: bool = False


def plan(app: str, instance_id: str, start: pb.ExecutionStartedEvent, actions: list[pb.WorkflowAction]) -> Turn:
    """Turn an orchestrator's actions into history events and the things to do.

    Raises:
        ValueError: An action this sidecar does not know, or one that lacks what it needs.
    """
    turn = Turn()
    for action in actions:
        kind = action.WhichOneof("workflowActionType")
        body: Any = getattr(action, kind) if kind else None
        router = pb.TaskRouter()
        router.CopyFrom(action.router)
        router.sourceAppID = app
        target = router.targetAppID or app
        if kind == "completeWorkflow":
            if body.workflowStatus == pb.ORCHESTRATION_STATUS_CONTINUED_AS_NEW:
                # A new generation forgets all else this turn asked for.
                return Turn(continued=_next_generation(instance_id, start, body, router))
            turn.completed = pb.ExecutionCompletedEvent(
                workflowStatus=body.workflowStatus,
                result=optional(body, "result"),
                failureDetails=optional(body, "failureDetails"),
            )
            turn.events.append(new_event(action.id, executionCompleted=turn.completed, router=router))
            if start.HasField("parentInstance"):
                turn.messages.append(_report_to_parent(app, start.parentInstance, turn.completed))
        elif kind == "scheduleTask":
            task = pb.TaskScheduledEvent(
                name=body.name,
                version=optional(body, "version"),
                input=optional(body, "input"),
                taskExecutionId=body.taskExecutionId,
                parentTraceContext=optional(start, "parentTraceContext"),
                historyPropagationScope=optional(body, "historyPropagationScope"),
            )
            event = new_event(action.id, taskScheduled=task, router=router)
            turn.events.append(event)
            turn.tasks.append(ScheduledTask(event, body.historyPropagationScope, len(turn.events)))
        elif kind == "createTimer":
            created = pb.TimerCreatedEvent(fireAt=body.fireAt)
            if body.HasField("name"):
                created.name = body.name
            origin = body.WhichOneof("origin")
            if origin:
                getattr(created, origin).CopyFrom(getattr(body, origin))
                getattr(created, origin).SetInParent()
            turn.events.append(new_event(action.id, timerCreated=created, router=router))
            fire_at = nanoseconds(body.fireAt) if body.fireAt.seconds < _NEVER else NEVER
            fired = new_event(timerFired=pb.TimerFiredEvent(fireAt=body.fireAt, timerId=action.id))
            waits_for = body.externalEvent.name.upper() if origin == "externalEvent" else None
            turn.timers.append(Timer(min(fire_at, NEVER), action.id, fired, waits_for))
        elif kind == "createChildWorkflow":
            child = body.instanceId or f"{instance_id}:{action.id:04x}"
            created_child = pb.ChildWorkflowInstanceCreatedEvent(
                instanceId=child,
                name=body.name,
                version=optional(body, "version"),
                input=optional(body, "input"),
                parentTraceContext=optional(start, "parentTraceContext"),
                historyPropagationScope=optional(body, "historyPropagationScope"),
                retryParentInstanceInfo=optional(body, "retryParentInstanceInfo"),
            )
            turn.events.append(new_event(action.id, childWorkflowInstanceCreated=created_child, router=router))
            parent = pb.ParentInstanceInfo(
                taskScheduledId=action.id,
                name=wrappers_pb2.StringValue(value=start.name),
                workflowInstance=pb.WorkflowInstance(
                    instanceId=instance_id, executionId=optional(start.workflowInstance, "executionId")
                ),
                appID=app,
            )
            event = started(
                body.name,
                child,
                input=optional(body, "input"),
                parent=parent,
                trace=optional(start, "parentTraceContext"),
                router=router,
            )
            message = Message(target, child, event, body.historyPropagationScope, len(turn.events))
            turn.children.append(message)
            turn.messages.append(message)
        elif kind == "createDetachedWorkflow":
            if not body.instanceId:
                raise ValueError("a detached workflow needs an instance id")
            detached = pb.DetachedWorkflowInstanceCreatedEvent(instanceId=body.instanceId)
            turn.events.append(new_event(action.id, detachedWorkflowInstanceCreated=detached, router=router))
            event = started(
                body.name,
                body.instanceId,
                input=optional(body, "input"),
                execution_id=body.executionId.value,
                scheduled=optional(body, "scheduledStartTimestamp"),
                trace=optional(body, "parentTraceContext") or optional(start, "parentTraceContext"),
                tags=dict(body.tags),
            )
            turn.messages.append(Message(target, body.instanceId, event))
        elif kind == "sendEvent":
            sent = pb.EventSentEvent(instanceId=body.instance.instanceId, name=body.name, input=optional(body, "data"))
            turn.events.append(new_event(action.id, eventSent=sent, router=router))
            raised = pb.EventRaisedEvent(name=body.name, input=optional(body, "data"))
            turn.messages.append(Message(target, body.instance.instanceId, new_event(eventRaised=raised)))
        elif kind == "terminateWorkflow":
            end = pb.ExecutionTerminatedEvent(input=optional(body, "reason"), recurse=body.recurse)
            turn.messages.append(Message(target, body.instanceId, new_event(executionTerminated=end, router=router)))
        elif kind == "workflowVersionNotAvailable":
            turn.stalled = True
        else:
            raise ValueError(f"unknown orchestrator action {kind!r}")
    return turn


def _next_generation(
    instance_id: str, start: pb.ExecutionStartedEvent, action: pb.CompleteWorkflowAction, router: pb.TaskRouter
) -> list[pb.HistoryEvent]:
    """The start of the next generation: the same workflow with a new input, and the events it has not taken yet."""
    event = started(
        start.name,
        instance_id,
        input=optional(action, "result"),
        parent=optional(start, "parentInstance"),
        trace=optional(start, "parentTraceContext"),
        router=router,
    )
    return [event, *action.carryoverEvents]


def _report_to_parent(app: str, parent: pb.ParentInstanceInfo, completed: pb.ExecutionCompletedEvent) -> Message:
    kind: dict[str, Any]
    if completed.workflowStatus == pb.ORCHESTRATION_STATUS_COMPLETED:
        kind = {
            "childWorkflowInstanceCompleted": pb.ChildWorkflowInstanceCompletedEvent(
                taskScheduledId=parent.taskScheduledId, result=optional(completed, "result")
            )
        }
    else:
        kind = {
            "childWorkflowInstanceFailed": pb.ChildWorkflowInstanceFailedEvent(
                taskScheduledId=parent.taskScheduledId, failureDetails=optional(completed, "failureDetails")
            )
        }
    return Message(parent.appID or app, parent.workflowInstance.instanceId, new_event(**kind))


def child_failed(task_id: int, error_type: str, message: str) -> pb.HistoryEvent:
    """The event that tells a parent that its child could not be created."""
    details = pb.TaskFailureDetails(errorType=error_type, errorMessage=message)
    return new_event(
        childWorkflowInstanceFailed=pb.ChildWorkflowInstanceFailedEvent(taskScheduledId=task_id, failureDetails=details)
    )


def suspended_after(suspended: bool, events: list[pb.HistoryEvent]) -> bool:
    """Whether an instance is suspended once it has seen `events`."""
    for event in events:
        if event.HasField("executionSuspended"):
            suspended = True
        elif event.HasField("executionResumed"):
            suspended = False
    return suspended
