"""How calls that fail are answered: the statuses, texts and details that daprd gives."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from typing import NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from outlast.embedded.errors import Conflict, Refused

logger = logging.getLogger("outlast.embedded")


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, reason: str = "") -> NoReturn:
    """End the call; `reason` is the ErrorInfo that daprd attaches, as the SDK's error codes show it."""
    if reason:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="dapr.io"))
        status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
        context.abort_with_status(rpc_status.to_status(status))
    context.abort(code, message)
    raise AssertionError("abort returned")


@contextlib.contextmanager
def answering(
    context: grpc.ServicerContext, what: str = "", reason: str = "", code: grpc.StatusCode | None = None
) -> Iterator[None]:
    """Turn the errors of the rules into the statuses daprd gives; `code` overrides theirs, as in transactions."""
    try:
        yield
    except Refused as error:
        abort(context, code or grpc.StatusCode[error.code], f"{what}{error}", reason)
    except Conflict as error:
        abort(context, code or grpc.StatusCode.ABORTED, f"{what}{error}", reason)
    except sqlite3.Error as error:
        # The database cannot be written or read now; callers may try again.
        logger.error("%sthe embedded store failed: %s", what, error)
        abort(context, grpc.StatusCode.INTERNAL, f"{what}the embedded store failed: {error}", reason)
