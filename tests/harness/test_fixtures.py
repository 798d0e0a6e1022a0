from __future__ import annotations

import os

import pytest
from dapr.conf import settings

pytestmark = pytest.mark.acceptance


def test_this_process_and_its_children_are_pointed_to_the_sidecar(sidecar: str, sidecar_env: dict[str, str]) -> None:
    ours = {name: value for name, value in os.environ.items() if name.startswith(("DAPR_", "OUTLAST_"))}
    ours.pop("OUTLAST_CACHE", None)
    assert ours == sidecar_env
    if sidecar == "daprd":
        assert str(settings.DAPR_GRPC_PORT) == sidecar_env["DAPR_GRPC_PORT"]
    else:
        assert list(sidecar_env) == ["OUTLAST_EMBEDDED_PATH"]


def test_replicas_share_the_state_and_not_the_sidecar_process(
    sidecar: str, sidecar_replicas: list[dict[str, str]], sidecar_env: dict[str, str]
) -> None:
    first, second = sidecar_replicas
    assert sidecar_env == first
    assert (first == second) == (sidecar == "embedded")
