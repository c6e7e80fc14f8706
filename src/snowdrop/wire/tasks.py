"""Tasks over HTTP: what people submit and see, and what gateways and control say of leases.

A gateway passes people's requests on to control with the hash of their key. It leases tasks by a long poll
(`POST /v1/task-leases`), keeps leases alive (`PUT /v1/task-leases`) and reports ends with the answer as the body
(`POST /v1/task-leases/{tenant}/{id}/{generation}`). Those three are MessagePack and open to gateways only.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DeploymentName, TaskId, TenantId
from snowdrop.domain.task import Task

KEY_HEADER = "x-snowdrop-key-sha256"
"""On what a gateway passes on: the hash of the caller's key, empty without one. Control then finds the tenant."""
TASK_HEADER = "x-snowdrop-task"
"""On a submission whose body is the request's own: the `NewTask` as JSON, and nothing of it in the body."""
END_HEADER = "x-snowdrop-task-end"
WAIT_S_MAX = 60.0
"""Longest wait of one question for a task's end."""
POLL_S_MAX = 20.0
"""Longest wait of a gateway that asks for tasks."""

NO_BODY = msgspec.Raw(b"null")

Text = Annotated[str, msgspec.Meta(max_length=2_048)]
Key = Annotated[str, msgspec.Meta(max_length=255)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=31_536_000)]


class NewTask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task to be: the call, and how it is to be carried. `body` is any JSON; what is left out has its default.

    `timeout_s` bounds one attempt, `ttl_s` the time until the task is given up, `delay_s` is before the first.
    """

    deployment: str
    path: Text = "/"
    method: Annotated[str, msgspec.Meta(pattern="^[A-Z]{1,16}$")] = "POST"
    headers: dict[str, Text] = msgspec.field(default_factory=dict)
    body: msgspec.Raw = NO_BODY
    attempts_max: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    timeout_s: Seconds = 0.0
    ttl_s: Seconds | None = None
    delay_s: Seconds = 0.0
    webhook: Text = ""
    idempotency_key: Key = ""


class TaskPage(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks, newest first. `next` is the `before` of the page after; empty on the last one."""

    tasks: tuple[Task, ...]
    next: str = ""


class TaskCount(msgspec.Struct, frozen=True, kw_only=True):
    deployment: DeploymentName
    state: str
    count: int


class WebhookSecret(msgspec.Struct, frozen=True, kw_only=True):
    """The secret that signs a tenant's webhooks, as `whsec_...` (Standard Webhooks)."""

    secret: str


class LeaseWish(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway wants up to `room` tasks; with 0 it only hears what is revoked."""

    holder: str
    room: int


class LeasedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task to carry. `body` is its request's if that is small; without it, it is to be fetched."""

    task: Task
    body: bytes | None = None


class LeaseName(msgspec.Struct, frozen=True, kw_only=True):
    """One lease: a task in one generation."""

    tenant: TenantId
    task: TaskId
    generation: int


class LeaseAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks for the gateway, and leases that it holds no more: their work is to be cancelled."""

    tasks: tuple[LeasedTask, ...] = ()
    revoked: tuple[LeaseName, ...] = ()


class KeepLeases(msgspec.Struct, frozen=True, kw_only=True):
    """All leases that the gateway holds; sent several times in the time of a lease. Answered with those lost."""

    holder: str
    leases: tuple[LeaseName, ...]


class LeasesLost(msgspec.Struct, frozen=True, kw_only=True):
    lost: tuple[LeaseName, ...]


class TaskEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How one attempt ended. With `status` the answer's body follows; `started` is whether the service saw it."""

    started: bool
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    error: ErrorBody | None = None
    retryable: bool = False
    retry_after_s: float | None = None
