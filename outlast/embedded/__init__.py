"""The sidecar that needs no install: Dapr's gRPC API for state and workflows over one SQLite file.

Any program written for Dapr's state and workflow APIs runs on it unchanged:

    with EmbeddedSidecar("outlast.db") as sidecar:
        runtime = WorkflowRuntime(host="127.0.0.1", port=str(sidecar.grpc_port))
"""

from outlast.embedded.errors import EmbeddedStoreError
from outlast.embedded.server import EmbeddedSidecar, default_path, ensure_started

__all__ = ["EmbeddedSidecar", "EmbeddedStoreError", "default_path", "ensure_started"]
