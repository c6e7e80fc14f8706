"""Small valid tasks, for tests that care about one field of them."""

from typing import Any

from platform_helpers import NAME
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, TaskId, TenantId
from snowdrop.domain.task import Task, TaskAnswer, TaskCall
from snowdrop.policy.tasks import Event, Happening, step

DAY_NS = 86_400 * 10**9


def task(
    name: str = "task-1",
    *,
    tenant: TenantId = DEFAULT_TENANT,
    deployment: str = NAME,
    submitted: int = 1,
    sha256: str = "",
    body_bytes: int = 0,
    **more: Any,
) -> Task:
    return Task(
        tenant=tenant,
        id=TaskId(name),
        deployment=DeploymentName(deployment),
        call=TaskCall(method="POST", path="/embed", body_bytes=body_bytes, body_sha256=sha256),
        submitted_unix_ns=submitted,
        due_unix_ns=more.pop("due", submitted),
        expires_unix_ns=more.pop("expires", submitted + DAY_NS),
        **more,
    )


def happening(event: Event, now: int = 10, generation: int = 1, **more: Any) -> Happening:
    return Happening(event=event, now_unix_ns=now, generation=generation, **more)


def leased(given: Task, now: int = 5) -> Task:
    return step(given, happening(Event.LEASED, now, holder="gateway-1"))


def answer(status: int = 200, *, body_bytes: int = 0, generation: int = 1) -> TaskAnswer:
    return TaskAnswer(status=status, body_bytes=body_bytes, generation=generation)
