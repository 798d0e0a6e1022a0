"""Errors of the embedded sidecar."""

from __future__ import annotations


class EmbeddedStoreError(RuntimeError):
    """The database file cannot be used: it is not ours, too new, or its folder cannot be written."""


class Conflict(Exception):
    """A compare-and-swap on a state record failed; raised inside a transaction to roll it back."""


class Refused(Exception):
    """A request that the rules refuse, with the gRPC status code name daprd answers with.

    Attributes:
        code: Name of a `grpc.StatusCode`, for example ``"ALREADY_EXISTS"``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
