"""Writes numbered keys and logs each one the sidecar has acknowledged: `python -m tests.embedded.appender FILE LOG`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import grpc
from dapr.proto import api_service_v1, api_v1, common_v1

from outlast.embedded import EmbeddedSidecar

THREADS = 4


def main() -> None:
    path, log = Path(sys.argv[1]), Path(sys.argv[2])
    sidecar = EmbeddedSidecar(path).start()
    stub = api_service_v1.DaprStub(grpc.insecure_channel(sidecar.grpc_address))
    acknowledged = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(thread: int) -> None:
        number = 0
        while True:
            key = f"{os.getpid()}-{thread}-{number}"
            if number % 2:
                pair = [common_v1.StateItem(key=f"{key}{side}", value=key.encode()) for side in "ab"]
                operations = [api_v1.TransactionalStateOperation(operationType="upsert", request=i) for i in pair]
                stub.ExecuteStateTransaction(
                    api_v1.ExecuteStateTransactionRequest(storeName="statestore", operations=operations)
                )
                os.write(acknowledged, f"{key}a\n{key}b\n".encode())
            else:
                item = common_v1.StateItem(key=key, value=key.encode())
                stub.SaveState(api_v1.SaveStateRequest(store_name="statestore", states=[item]))
                os.write(acknowledged, f"{key}\n".encode())
            number += 1

    for thread in range(THREADS):
        threading.Thread(target=append, args=(thread,), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
