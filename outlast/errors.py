"""Every error outlast raises, each with a message that names the cause and the mend."""

from __future__ import annotations


class OutlastError(Exception):
    """Base class of all errors raised by outlast."""


class SidecarUnavailableError(OutlastError):
    """No Dapr sidecar answers at the configured address."""


class StoreNotFoundError(OutlastError):
    """The sidecar has no state store component of the given name."""


class UnsupportedStoreError(OutlastError):
    """The state store cannot compare-and-swap, so it cannot hold exactly-once state."""


class StoreError(OutlastError):
    """The state store answered a request with an error."""


class RecordTooLargeError(StoreError):
    """A value is larger than the sidecar or the state store takes."""


class CorruptRecordError(OutlastError):
    """A stored record is damaged, truncated, or was not written by outlast."""


class UnknownFormatError(OutlastError):
    """A stored record was written by a newer version of outlast."""


class SerializationError(OutlastError, TypeError):
    """A value of the user cannot be serialised."""


class FencedError(OutlastError):
    """Another attempt has taken the thread over; nothing of this attempt can be committed any more."""


class AgentNotFoundError(OutlastError, LookupError):
    """No agent of that name is registered in this process."""


class DuplicateAgentError(OutlastError, ValueError):
    """Two different agents in one process ask for the same name."""


class RunNotFoundError(OutlastError, LookupError):
    """No run of that id was ever submitted to this state store."""


class RunConflictError(OutlastError, ValueError):
    """A run id is submitted again with another agent, thread or input."""


class RunStateError(OutlastError):
    """The run is not in a state in which it takes what was asked of it."""


class ThreadBusyError(OutlastError):
    """The thread has an unfinished run, and the submission asked to be rejected then."""


class RunFailedError(OutlastError):
    """The run ended with an error of the agent's own code.

    Attributes:
        run_id: The id of the run.
        error_type: The qualified name of the exception the agent raised.
    """

    def __init__(self, run_id: str, error_type: str, message: str) -> None:
        super().__init__(f"run {run_id!r} failed with {error_type}: {message}")
        self.run_id = run_id
        self.error_type = error_type


class RunCancelledError(OutlastError):
    """The run was cancelled before it finished."""


class StepError(OutlastError):
    """Base class of errors of a step: a model call, a tool call, a function marked as a step."""


class JournalMismatchError(StepError):
    """A recorded step is met again with another request: the code, or what it depends on, changed between attempts."""


class StepFailedError(StepError):
    """A step failed in an attempt before with an exception that cannot be made again in this process.

    Attributes:
        error_type: The qualified name of that exception.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(f"{error_type}: {message}")
        self.error_type = error_type


class StepTimeoutError(StepError, TimeoutError):
    """A step took longer than its policy allows."""


class StepInDoubtError(StepError):
    """A step was in flight when its worker was lost, and its policy, or a person, says not to make it again."""


class CircuitOpenError(StepError):
    """An endpoint has failed so often of late that no call is made for a while.

    Attributes:
        retry_after: Seconds until a call is let through again.
    """

    def __init__(self, endpoint: str, failures: int, retry_after: float) -> None:
        super().__init__(
            f"{endpoint} failed {failures} times in a row: no call is made for {retry_after:.1f} s; "
            "a RetryPolicy waits for it"
        )
        self.retry_after = retry_after


class BudgetExceededError(StepError):
    """The next call of a run would cross a limit of its budget; it was not made."""


class RunTimeoutError(OutlastError, TimeoutError):
    """A run took longer than its policy allows."""
