"""A task: one request that is kept until it has been answered, whoever dies meanwhile."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DeploymentName, TaskId, TenantId

HISTORY_MAX = 20
"""Changes that a task remembers; of a task that is tried more often the oldest go."""


class TaskState(StrEnum):
    """`failed` is the dead letter: nothing tries it again by itself, `retry` does."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED_STATES = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED})


class TaskCall(msgspec.Struct, frozen=True, kw_only=True):
    """The request that is to be made. `path` begins after the deployment and may have a query."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body_bytes: int = 0
    body_sha256: str = ""


class TaskAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the service answered; the body is stored beside. `generation` is that of the attempt."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body_bytes: int = 0
    generation: int = 0


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """Who is told of the task's end, and how far that is. `due_unix_ns` is 0 when nothing is to be sent."""

    url: str
    state: Literal["waiting", "due", "delivered", "given up"] = "waiting"
    event: str = ""
    attempts: int = 0
    due_unix_ns: int = 0
    last_error: str = ""


class TaskChange(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a task's life."""

    unix_ns: int
    after: TaskState
    reason: str


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it is stored and shown, without the bodies of request and answer.

    `generation` grows with each lease and fences those before; `attempts` counts the leases under which the
    service may have worked. `due_unix_ns` is when it may run next, `expires_unix_ns` when it is given up.
    `attempt_s_max` bounds one attempt, 0 leaves it to the deployment.
    """

    tenant: TenantId
    id: TaskId
    deployment: DeploymentName
    call: TaskCall
    submitted_unix_ns: int
    due_unix_ns: int
    expires_unix_ns: int
    state: TaskState = TaskState.QUEUED
    reason: str = "submitted"
    generation: int = 0
    attempts: int = 0
    attempts_max: int = 3
    attempt_s_max: float = 0.0
    holder: str = ""
    started_unix_ns: int = 0
    ended_unix_ns: int = 0
    answer: TaskAnswer | None = None
    error: ErrorBody | None = None
    webhook: Webhook | None = None
    idempotency_key: str = ""
    history: tuple[TaskChange, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def stored_bytes(self) -> int:
        """Bytes of bodies that are kept for it. A task that succeeded needs its request no more."""
        request = 0 if self.state is TaskState.SUCCEEDED else self.call.body_bytes
        return request + (self.answer.body_bytes if self.answer is not None else 0)
