"""What the queues want done: values that `QueueCore` returns and the owner carries out."""

from __future__ import annotations

import msgspec

from snowdrop.domain.errors import NotFoundError, QueueFullError, SnowdropError, TimedOutError, WaitedTooLongError
from snowdrop.domain.ids import DeploymentName, ReplicaId, TenantId
from snowdrop.wire.control import DeploymentRoute
from snowdrop.wire.slots import Denied, Granted, Looked, WaitNews

TicketKey = tuple[str, int]
"""A worker, and its number for one of its requests."""
DeploymentKey = tuple[TenantId, DeploymentName]


class Now(msgspec.Struct, frozen=True):
    """The two clocks: monotonic seconds for decisions, unix nanoseconds for records."""

    s: float
    unix_ns: int


class Grant(msgspec.Struct, frozen=True):
    """Send `message` to `worker`: its request has a slot."""

    worker: str
    message: Granted


class Deny(msgspec.Struct, frozen=True):
    """Send `message` to `worker`: its request gets an error."""

    worker: str
    message: Denied


class Tell(msgspec.Struct, frozen=True):
    """Send `message` to `worker`: how it stands. Nothing is granted or denied by it."""

    worker: str
    message: WaitNews | Looked


class DemandChanged(msgspec.Struct, frozen=True):
    """A request found no slot, or somebody woke the deployment: tell control now, not with the next report."""

    key: DeploymentKey


class Idle(msgspec.Struct, frozen=True):
    """A replica that may get nothing more has nothing in flight here."""

    replica: ReplicaId


Effect = Grant | Deny | Tell | DemandChanged | Idle


def deny(worker: str, ticket: int, error: SnowdropError) -> Deny:
    return Deny(worker, Denied(ticket=ticket, error=error.body()))


def unknown(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no deployment {name!r}", where="request path", next_step="`snowdrop ps` lists deployments"
    )


def no_longer_served(name: str, revision: str) -> NotFoundError:
    return NotFoundError(
        f"{name!r} does not serve revision {revision!r} any more: its rollout has ended",
        where="header snowdrop-revision",
        next_step=f"`snowdrop rollout status {name}` says how",
    )


def queue_full(route: DeploymentRoute, *, waiting: int, retry_after_s: float) -> QueueFullError:
    return QueueFullError(
        f"{waiting} requests are waiting for {route.deployment!r} already",
        where=f"queue.length_max={route.queue.length_max}",
        next_step="try again later, or raise scale.max, concurrency or queue.length_max",
        retry_after_s=retry_after_s,
    )


def deadline_came(route: DeploymentRoute, reason: str) -> TimedOutError:
    """Nobody waits for an answer any more, whatever the deployment would still do."""
    return TimedOutError(
        f"the caller's own deadline came before a slot was free for {route.deployment!r}: {reason}",
        where="header snowdrop-timeout or snowdrop-deadline",
        next_step="allow it more time; nothing was started",
    )


def waited_too_long(
    route: DeploymentRoute, *, ready: int, asked_s: float | None, retry_after_s: float
) -> WaitedTooLongError:
    """`asked_s` is what the caller wanted to wait at most."""
    own = asked_s is not None and asked_s < route.queue.wait_s_max
    return WaitedTooLongError(
        f"no slot came free for {route.deployment!r} ({ready} replicas ready, {route.starting} starting)",
        where=f"the caller's own bound of {asked_s:.3g} s"
        if own
        else f"queue.wait_s_max={route.queue.wait_s_max:g}",
        next_step="try again after retry_after_s; `snowdrop why` says what the deployment is doing",
        retry_after_s=retry_after_s,
    )
