"""A replica: one running copy of a revision, its states, and what an agent reports of it."""

from enum import StrEnum

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DeploymentName, NodeId, ReplicaId, RevisionId, TenantId
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.domain.service import ResourceSpec


class ReplicaState(StrEnum):
    """The states of `snowdrop.policy.lifecycle`, in the order a healthy replica passes through them."""

    PENDING = "pending"
    MOUNTING = "mounting"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


STARTING_STATES = frozenset(
    {ReplicaState.PENDING, ReplicaState.MOUNTING, ReplicaState.STARTING, ReplicaState.LOADING}
)
TERMINAL_STATES = frozenset({ReplicaState.STOPPED, ReplicaState.FAILED})


class ReplicaKey(msgspec.Struct, frozen=True, kw_only=True):
    """Who a replica is and whose it is. The tenant is part of every key."""

    tenant: TenantId
    deployment: DeploymentName
    revision: RevisionId
    replica: ReplicaId


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a replica's history: when, from where to where, and why."""

    unix_ns: int
    before: ReplicaState
    after: ReplicaState
    reason: str


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows of a replica, whole, so that a report never has to be applied on top of another.

    `version` grows with every change; a reader keeps the report with the higher one. The limits are those of
    the replica's own revision, which need not be the deployment's current one.
    """

    key: ReplicaKey
    node: NodeId
    state: ReplicaState
    reason: str
    version: int
    socket_path: str
    history: tuple[Transition, ...] = ()
    spans: tuple[Span, ...] = ()
    content: ContentBytes = ContentBytes()
    error: ErrorBody | None = None
    sandbox: str = ""
    started_unix_ns: int = 0
    ended_unix_ns: int = 0
    concurrency: int = 1
    drain_s_max: float = 3_600.0
    resources: ResourceSpec = ResourceSpec()
