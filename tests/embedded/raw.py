"""A worker that speaks the workflow protocol by hand, so that a test decides what it answers, when, and how often."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Any

import dapr.ext.workflow._durabletask.internal.orchestrator_service_pb2_grpc as workflow_grpc
import dapr.ext.workflow._durabletask.internal.protos as pb
import grpc
from google.protobuf import wrappers_pb2


class RawWorker:
    """One channel with one work-item stream."""

    def __init__(self, address: str, *, listen: bool = True, keeps_history: bool = False) -> None:
        self.channel = grpc.insecure_channel(address)
        self.stub = workflow_grpc.TaskHubSidecarServiceStub(self.channel)
        self.items: queue.Queue[pb.WorkItem] = queue.Queue()
        if listen:
            capabilities = [pb.WORKER_CAPABILITY_STATEFUL_HISTORY] if keeps_history else []
            self.stream = self.stub.GetWorkItems(pb.GetWorkItemsRequest(capabilities=capabilities))
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for item in self.stream:
                self.items.put(item)
        except grpc.RpcError:
            pass

    def next(self, timeout: float = 5) -> pb.WorkItem:
        return self.items.get(timeout=timeout)

    def nothing(self, seconds: float = 0.3) -> bool:
        """Whether no work comes for a while."""
        try:
            self.items.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def start(self, instance_id: str, name: str = "raw", text: str = "") -> None:
        self.stub.StartInstance(pb.CreateInstanceRequest(instanceId=instance_id, name=name, input=string(text)))

    def finish_turn(self, item: pb.WorkItem, *actions: pb.WorkflowAction, **fields: Any) -> None:
        self.stub.CompleteOrchestratorTask(
            pb.WorkflowResponse(
                instanceId=item.workflowRequest.instanceId,
                actions=actions,
                completionToken=item.completionToken,
                **fields,
            )
        )

    def finish_task(self, item: pb.WorkItem, result: str = "1") -> None:
        request = item.activityRequest
        self.stub.CompleteActivityTask(
            pb.ActivityResponse(
                instanceId=request.workflowInstance.instanceId,
                taskId=request.taskId,
                result=string(result),
                completionToken=item.completionToken,
            )
        )

    def state(self, instance_id: str) -> pb.WorkflowState:
        request = pb.GetInstanceRequest(instanceId=instance_id, getInputsAndOutputs=True)
        return self.stub.GetInstance(request).workflowState

    def history(self, instance_id: str) -> list[str]:
        response = self.stub.GetInstanceHistory(pb.GetInstanceHistoryRequest(instanceId=instance_id))
        return [event.WhichOneof("eventType") for event in response.events]

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> RawWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def string(text: str) -> wrappers_pb2.StringValue:
    return wrappers_pb2.StringValue(value=text)


def schedule(number: int, name: str = "act", app: str | None = None) -> pb.WorkflowAction:
    router = pb.TaskRouter(targetAppID=app) if app else None
    return pb.WorkflowAction(id=number, scheduleTask=pb.ScheduleTaskAction(name=name), router=router)


def complete(number: int, result: str = "done") -> pb.WorkflowAction:
    action = pb.CompleteWorkflowAction(workflowStatus=pb.ORCHESTRATION_STATUS_COMPLETED, result=string(result))
    return pb.WorkflowAction(id=number, completeWorkflow=action)
