"""The gRPC faces: Dapr's state API and the workflow service, each a thin layer over the rules."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import dapr.ext.workflow._durabletask.internal.orchestrator_service_pb2_grpc as workflow_grpc
import dapr.ext.workflow._durabletask.internal.protos as pb
import grpc
from dapr.proto import api_service_v1, api_v1
from google.protobuf import empty_pb2

from outlast.embedded import history, state, workflows
from outlast.embedded.answers import abort, answering
from outlast.embedded.database import Database
from outlast.embedded.dispatch import Dispatcher
from outlast.embedded.errors import Conflict, Refused
from outlast.embedded.history import FINAL

RUNTIME_VERSION = "1.18.2"
MARKER = "outlast.embedded"
_CAPABILITIES = ("ETAG", "TRANSACTIONAL", "TTL", "ACTOR")
_MAX_PAGE = 1024

T = TypeVar("T")


class StateService(api_service_v1.DaprServicer):
    """State, metadata and shutdown of Dapr's runtime API; all else is refused with a way out."""

    def __init__(
        self,
        database: Database,
        app: str,
        stores: Sequence[str],
        *,
        connected_workers: Callable[[], int],
        shutdown: Callable[[], None],
    ) -> None:
        self._database = database
        self._app = app
        self._stores = tuple(stores)
        self._connected_workers = connected_workers
        self._shutdown = shutdown
        self._extended = {MARKER: "true", "daprRuntimeVersion": RUNTIME_VERSION}

    def _store(self, name: str, context: grpc.ServicerContext) -> str:
        if not self._stores:
            abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"state store {name} is not configured",
                "DAPR_STATE_NOT_CONFIGURED",
            )
        if name not in self._stores:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"state store {name} is not found", "DAPR_STATE_NOT_FOUND")
        return name

    def _check_keys(self, context: grpc.ServicerContext, keys: Iterable[str]) -> None:
        with answering(context, reason="DAPR_STATE_ILLEGAL_KEY"):
            for key in keys:
                state.check_key(key)

    def GetState(self, request: api_v1.GetStateRequest, context: grpc.ServicerContext) -> api_v1.GetStateResponse:
        store = self._store(request.store_name, context)
        self._check_keys(context, [request.key])
        what = f"fail to get {request.key} from state store {store}: "
        with answering(context, what, "ERR_STATE_GET"), self._database.read() as connection:
            record = state.get(connection, self._app, store, request.key)
        return api_v1.GetStateResponse(data=record.value, etag=record.etag, metadata=record.metadata)

    def GetBulkState(
        self, request: api_v1.GetBulkStateRequest, context: grpc.ServicerContext
    ) -> api_v1.GetBulkStateResponse:
        store = self._store(request.store_name, context)
        response = api_v1.GetBulkStateResponse()
        self._check_keys(context, request.keys)
        with answering(context), self._database.read() as connection:
            for key in request.keys:
                record = state.get(connection, self._app, store, key)
                response.items.add(key=key, data=record.value, etag=record.etag, metadata=record.metadata)
        return response

    def SaveState(self, request: api_v1.SaveStateRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        store = self._store(request.store_name, context)
        if not request.states:
            return empty_pb2.Empty()
        if not all(item.key for item in request.states):
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "state key cannot be empty", "ERR_STATE_SAVE")
        self._check_keys(context, [item.key for item in request.states])
        with answering(context, f"failed saving state in state store {store}: ", "ERR_STATE_SAVE"):
            conflict = self._database.write(lambda c: state.put_many(c, self._app, store, request.states))
            if conflict is not None:
                raise conflict
        return empty_pb2.Empty()

    def DeleteState(self, request: api_v1.DeleteStateRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        store = self._store(request.store_name, context)
        what = f"failed deleting state with key {request.key}: "
        self._check_keys(context, [request.key])
        with answering(context, what, "ERR_STATE_DELETE"):
            self._database.write(lambda c: state.delete(c, self._app, store, request.key, request.etag.value))
        return empty_pb2.Empty()

    def DeleteBulkState(self, request: api_v1.DeleteBulkStateRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        store = self._store(request.store_name, context)

        def work(connection: sqlite3.Connection) -> Conflict | None:
            conflict = None
            for item in request.states:
                try:
                    state.delete(connection, self._app, store, item.key, item.etag.value)
                except Conflict as error:
                    conflict = error
            return conflict

        self._check_keys(context, [item.key for item in request.states])
        with answering(context, f"failed deleting state in state store {store}: ", "ERR_STATE_DELETE_BULK"):
            conflict = self._database.write(work)
            if conflict is not None:
                raise conflict
        return empty_pb2.Empty()

    def ExecuteStateTransaction(
        self, request: api_v1.ExecuteStateTransactionRequest, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        store = self._store(request.storeName, context)
        for operation in request.operations:
            if operation.operationType not in ("upsert", "delete"):
                message = f"operation type {operation.operationType} not supported"
                abort(context, grpc.StatusCode.UNIMPLEMENTED, message)
        what = "error while executing state transaction: "
        self._check_keys(context, [operation.request.key for operation in request.operations])

        def work(connection: sqlite3.Connection) -> None:
            for operation in request.operations:
                item = operation.request
                if operation.operationType == "upsert":
                    state.put(connection, self._app, store, item)
                else:
                    state.delete(connection, self._app, store, item.key, item.etag.value)

        with answering(context, what, "ERR_STATE_TRANSACTION", grpc.StatusCode.INTERNAL):
            self._database.write(work)
        return empty_pb2.Empty()

    def GetMetadata(
        self, request: api_v1.GetMetadataRequest, context: grpc.ServicerContext
    ) -> api_v1.GetMetadataResponse:
        response = api_v1.GetMetadataResponse(
            id=self._app, runtime_version=RUNTIME_VERSION, extended_metadata=self._extended
        )
        for store in self._stores:
            response.registered_components.add(
                name=store, type="state.sqlite", version="v1", capabilities=_CAPABILITIES
            )
        response.workflows.connected_workers = self._connected_workers()
        return response

    def SetMetadata(self, request: api_v1.SetMetadataRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        self._extended = {**self._extended, request.key: request.value}
        return empty_pb2.Empty()

    def Shutdown(self, request: Any, context: grpc.ServicerContext) -> empty_pb2.Empty:
        self._shutdown()
        return empty_pb2.Empty()


def _refuse_the_rest() -> None:
    """Give every method of the runtime API that is not served here an answer that says what to do."""

    def refuse(self: StateService, request: Any, context: grpc.ServicerContext) -> NoReturn:
        message = (
            "the embedded sidecar of outlast serves state and workflows only; run a real daprd for anything else "
            "(pub/sub, bindings, secrets, actors, jobs, ...)"
        )
        abort(context, grpc.StatusCode.UNIMPLEMENTED, message)

    for name in dir(api_service_v1.DaprServicer):
        if not name.startswith("_") and name not in vars(StateService):
            setattr(StateService, name, refuse)


_refuse_the_rest()


class WorkflowService(workflow_grpc.TaskHubSidecarServiceServicer):
    """The service that Dapr's workflow clients and workers speak."""

    def __init__(self, database: Database, dispatcher: Dispatcher, app: str) -> None:
        self._database = database
        self._dispatcher = dispatcher
        self._app = app

    def _target(self, request: Any) -> str:
        return request.router.targetAppID or self._app

    def Hello(self, request: empty_pb2.Empty, context: grpc.ServicerContext) -> empty_pb2.Empty:
        return empty_pb2.Empty()

    def StartInstance(
        self, request: pb.CreateInstanceRequest, context: grpc.ServicerContext
    ) -> pb.CreateInstanceResponse:
        instance_id = request.instanceId or uuid.uuid4().hex
        if not request.name:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the name of the workflow is missing")
        event = history.started(
            request.name,
            instance_id,
            input=history.optional(request, "input"),
            execution_id=request.executionId.value,
            scheduled=history.optional(request, "scheduledStartTimestamp"),
            trace=history.optional(request, "parentTraceContext"),
            tags=dict(request.tags),
        )
        app = self._target(request)

        def work(connection: sqlite3.Connection, changes: workflows.Changes) -> None:
            try:
                workflows.create(connection, app, event, changes)
            except Refused as refused:  # daprd wraps the status of its inner call into the text of the outer one
                raise Refused(refused.code, f"rpc error: code = AlreadyExists desc = {refused}") from None

        with answering(context, "failed to create workflow instance: "):
            self._dispatcher.transact(work)
        return pb.CreateInstanceResponse(instanceId=instance_id)

    def GetInstance(self, request: pb.GetInstanceRequest, context: grpc.ServicerContext) -> pb.GetInstanceResponse:
        with answering(context), self._database.read() as connection:
            found = workflows.state_of(
                connection, self._target(request), request.instanceId, payloads=request.getInputsAndOutputs
            )
        return pb.GetInstanceResponse(exists=found is not None, workflowState=found)

    def _wait(
        self, request: Any, context: grpc.ServicerContext, condition: Callable[[pb.WorkflowState], bool]
    ) -> pb.GetInstanceResponse:
        with answering(context):
            found = self._dispatcher.waiters.wait(
                self._target(request),
                request.instanceId,
                condition,
                payloads=getattr(request, "getInputsAndOutputs", False),
                on_end=context.add_callback,
            )
        if found is None:
            abort(context, grpc.StatusCode.UNAVAILABLE, "the embedded sidecar is stopping")
        return pb.GetInstanceResponse(exists=True, workflowState=found)

    def WaitForInstanceStart(
        self, request: pb.GetInstanceRequest, context: grpc.ServicerContext
    ) -> pb.GetInstanceResponse:
        return self._wait(request, context, lambda s: s.workflowStatus != pb.ORCHESTRATION_STATUS_PENDING)

    def WaitForInstanceCompletion(
        self, request: pb.GetInstanceRequest, context: grpc.ServicerContext
    ) -> pb.GetInstanceResponse:
        return self._wait(request, context, lambda s: s.workflowStatus in FINAL)

    def _add(self, request: Any, context: grpc.ServicerContext, event: pb.HistoryEvent, what: str = "") -> None:
        app = self._target(request)
        with answering(context, what):
            self._dispatcher.transact(
                lambda c, changes: workflows.add_event(c, app, request.instanceId, event, changes)
            )

    def RaiseEvent(self, request: pb.RaiseEventRequest, context: grpc.ServicerContext) -> pb.RaiseEventResponse:
        raised = pb.EventRaisedEvent(name=request.name, input=history.optional(request, "input"))
        self._add(request, context, history.new_event(eventRaised=raised))
        return pb.RaiseEventResponse()

    def TerminateInstance(self, request: pb.TerminateRequest, context: grpc.ServicerContext) -> pb.TerminateResponse:
        end = pb.ExecutionTerminatedEvent(input=history.optional(request, "output"), recurse=request.recursive)
        self._add(
            request, context, history.new_event(executionTerminated=end), "failed to submit termination request: "
        )
        self._wait(request, context, lambda s: s.workflowStatus in FINAL)
        return pb.TerminateResponse()

    def SuspendInstance(self, request: pb.SuspendRequest, context: grpc.ServicerContext) -> pb.SuspendResponse:
        body = pb.ExecutionSuspendedEvent(input=request.reason if request.reason.value else None)
        self._add(request, context, history.new_event(executionSuspended=body))
        self._wait(
            request,
            context,
            lambda s: s.workflowStatus == pb.ORCHESTRATION_STATUS_SUSPENDED or s.workflowStatus in FINAL,
        )
        return pb.SuspendResponse()

    def ResumeInstance(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeResponse:
        body = pb.ExecutionResumedEvent(input=request.reason if request.reason.value else None)
        self._add(request, context, history.new_event(executionResumed=body))
        self._wait(
            request,
            context,
            lambda s: s.workflowStatus == pb.ORCHESTRATION_STATUS_RUNNING or s.workflowStatus in FINAL,
        )
        return pb.ResumeResponse()

    def PurgeInstances(
        self, request: pb.PurgeInstancesRequest, context: grpc.ServicerContext
    ) -> pb.PurgeInstancesResponse:
        if request.HasField("purgeInstanceFilter"):
            abort(context, grpc.StatusCode.UNKNOWN, "multi-instance purge is not unimplemented")
        app = self._target(request)
        with answering(context, "failed to purge workflow state: "):
            count = self._dispatcher.transact(
                lambda c, changes: workflows.purge(
                    c, app, request.instanceId, recursive=request.recursive, force=request.force, changes=changes
                )
            )
        return pb.PurgeInstancesResponse(deletedInstanceCount=count)

    def GetWorkItems(self, request: pb.GetWorkItemsRequest, context: grpc.ServicerContext) -> Iterator[pb.WorkItem]:
        keeps = pb.WORKER_CAPABILITY_STATEFUL_HISTORY in request.capabilities
        stream = self._dispatcher.open_stream(keeps_history=keeps)
        if not context.add_callback(lambda: self._dispatcher.close_stream(stream)):
            self._dispatcher.close_stream(stream)
            return
        context.send_initial_metadata(())
        yield from stream.items()
        if context.is_active():
            abort(context, grpc.StatusCode.UNAVAILABLE, "the embedded sidecar is stopping")

    def CompleteActivityTask(
        self, request: pb.ActivityResponse, context: grpc.ServicerContext
    ) -> pb.CompleteTaskResponse:
        with answering(context):
            self._dispatcher.complete_task(request)
        return pb.CompleteTaskResponse()

    def CompleteWorkflowTask(
        self, request: pb.WorkflowResponse, context: grpc.ServicerContext
    ) -> pb.CompleteTaskResponse:
        try:
            with answering(context):
                self._dispatcher.complete_turn(request)
        except ValueError as error:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.CompleteTaskResponse()

    CompleteOrchestratorTask = CompleteWorkflowTask

    def RerunWorkflowFromEvent(self, request: Any, context: grpc.ServicerContext) -> NoReturn:
        message = "the embedded sidecar cannot rerun a workflow from an event; run a real daprd for that"
        abort(context, grpc.StatusCode.UNIMPLEMENTED, message)

    def GetInstanceHistory(
        self, request: pb.GetInstanceHistoryRequest, context: grpc.ServicerContext
    ) -> pb.GetInstanceHistoryResponse:
        with answering(context), self._database.read() as connection:
            row = connection.execute(
                "SELECT iid FROM instances WHERE app = ? AND id = ?", (self._app, request.instanceId)
            ).fetchone()
            if row is None:
                raise Refused("NOT_FOUND", f"workflow instance '{request.instanceId}' not found")
            return pb.GetInstanceHistoryResponse(events=workflows.events_of(connection, row[0]))

    def ListInstanceIDs(
        self, request: pb.ListInstanceIDsRequest, context: grpc.ServicerContext
    ) -> pb.ListInstanceIDsResponse:
        try:
            after = int(request.continuationToken or 0)
        except ValueError:
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, "invalid continuation token")
        with answering(context), self._database.read() as connection:
            ids, following = workflows.list_ids(connection, self._app, after, request.pageSize or _MAX_PAGE)
        token = None if following is None else str(following)
        return pb.ListInstanceIDsResponse(instanceIds=ids, continuationToken=token)
