"""Control <-> agent and control <-> gateway, over message streams that the lower side opens.

Agents and gateways connect to control and, whenever the connection breaks, connect again and say who they are
and all that they hold. Control therefore can be restarted at any time: it learns the world from the Hellos.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from snowdrop.domain.deployment import NodeRecord, Revision
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DeploymentName, NodeId, ReceiptId, ReplicaId, RevisionId, TenantId
from snowdrop.domain.receipt import CallerTimes, ContentBytes, Span
from snowdrop.domain.replica import ReplicaKey, ReplicaReport, ReplicaState
from snowdrop.domain.secret import SecretValue
from snowdrop.domain.service import QueueSpec
from snowdrop.domain.usage import UsageRecord
from snowdrop.wire.codec import Codec, Message
from snowdrop.wire.waits import WaitRecord

# --- agent -> control -------------------------------------------------------------------------------------


class AgentHello(Message, frozen=True, kw_only=True):
    """First message of an agent: itself and every replica it holds. `incarnation` is new at each start."""

    version: int
    node: NodeRecord
    incarnation: str
    api_socket: str
    replicas: tuple[ReplicaReport, ...]


class ReplicaChanged(Message, frozen=True, kw_only=True):
    """A replica entered another state; the report is whole."""

    report: ReplicaReport


class UsageBatch(Message, frozen=True, kw_only=True):
    """Records in sequence order; sent again until acknowledged."""

    records: tuple[UsageRecord, ...]


# --- control -> agent -------------------------------------------------------------------------------------


class StartReplica(Message, frozen=True, kw_only=True):
    """Bring a replica up. Sending it twice is harmless: the replica's id makes it one start.

    `secrets` are those that the revision names, by variable; they are in no other message and are never stored.
    """

    key: ReplicaKey
    revision: Revision
    ordered_unix_ns: int
    secrets: dict[str, SecretValue] = msgspec.field(default_factory=dict)


class DrainReplica(Message, frozen=True, kw_only=True):
    """Stop a replica: gateways already send it nothing; let it finish within the bound, then end it."""

    replica: ReplicaId
    reason: str
    drain_s_max: float


class UsageStored(Message, frozen=True, kw_only=True):
    """All records of `source` up to and with `sequence` are durable in the ledger."""

    node: NodeId
    source: str
    sequence: int


# --- gateway -> control -----------------------------------------------------------------------------------


class RevisionLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of one revision's replicas since the gateway started: all, failed ones, and when they began.

    `latency` is a histogram of seconds from slot to first byte, in the buckets of `policy.rollout`.
    """

    revision: RevisionId
    done: int = 0
    failed: int = 0
    latency: tuple[int, ...] = ()


class DeploymentLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway holds for one deployment at this instant, and how many requests came since start.

    `peak` is the highest in-flight + queued since the last report, so that a burst between two is not lost;
    `busy` has the requests in flight by replica, without those that have none. `done` requests gave their slot
    back since start, after `slot_s` seconds in all; those in flight now have had theirs for `running_s` in all.
    Neither sum counts what is far longer than the rest (`gateway.slottimes`).
    `pinned` requests wait for a revision that they name.
    """

    tenant: TenantId
    deployment: DeploymentName
    in_flight: int
    queued: int
    peak: int
    arrived: int
    refused: int
    busy: dict[ReplicaId, int] = msgspec.field(default_factory=dict)
    done: int = 0
    slot_s: float = 0.0
    running_s: float = 0.0
    revisions: tuple[RevisionLoad, ...] = ()
    pinned: dict[RevisionId, int] = msgspec.field(default_factory=dict)


class GatewayHello(Message, frozen=True, kw_only=True):
    version: int
    gateway: str
    draining: tuple[ReplicaId, ...] = ()


class LoadReport(Message, frozen=True, kw_only=True):
    """Sent at once when a request finds no slot, and periodically while anything is in flight.

    `waits` ended since the last report, a bounded number of them; each is said once.
    """

    gateway: str
    loads: tuple[DeploymentLoad, ...]
    waits: tuple[WaitRecord, ...] = ()


class ReplicaIdle(Message, frozen=True, kw_only=True):
    """A draining replica has no request of this gateway in flight any more."""

    gateway: str
    replica: ReplicaId


class ReplicaUnreachable(Message, frozen=True, kw_only=True):
    """The gateway could not connect to a ready replica; a hint, the agent has the last word."""

    gateway: str
    replica: ReplicaId
    message: str


class WaitsTold(Message, frozen=True, kw_only=True):
    """Answers AskWaits: how the request waits, if it does so here."""

    ticket: int
    waits: tuple[WaitRecord, ...]


class CallerServed(Message, frozen=True, kw_only=True):
    """The first request answered by a new replica; completes the start's receipt. Sent until acknowledged."""

    receipt: ReceiptId
    caller: CallerTimes


# --- control -> gateway -----------------------------------------------------------------------------------


class ReplicaRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that gateways know of. Only with `accepting` may it get new requests."""

    replica: ReplicaId
    revision: RevisionId
    socket_path: str
    concurrency: int
    accepting: bool
    receipt: ReceiptId
    ordered_unix_ns: int
    ready_unix_ns: int
    spans: tuple[Span, ...] = ()
    content: ContentBytes = ContentBytes()


class StartingReplica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica on its way: since when, and how far it is."""

    replica: ReplicaId
    revision: RevisionId
    state: ReplicaState
    ordered_unix_ns: int


class RevisionWeight(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a deployment's traffic a revision gets. With 0 it gets only requests that name it."""

    revision: RevisionId
    role: Literal["stable", "candidate"]
    weight: float


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """No replica serves, and none is started before `next_try_unix_ns`.

    Requests wait `wait_s_max`, then get `error`.
    """

    error: ErrorBody
    wait_s_max: float
    next_try_unix_ns: int


class DeploymentRoute(msgspec.Struct, frozen=True, kw_only=True):
    """All a gateway needs to know of a deployment. With `refusal`, waiting and new requests get that error.

    `start_s` is how long a start takes by what was seen (the median of the latest), `start_high_s` what nine of
    ten stay below, `service_s` how long a request holds its slot; 0 if not known. `coming` are the replicas that
    `starting` counts, the oldest first. Without `weights` all replicas are alike. With `own_readyz` the service
    has an endpoint of the path /readyz. `openai` are the paths of OpenAI's dialect that it serves.
    """

    tenant: TenantId
    deployment: DeploymentName
    revision: RevisionId
    queue: QueueSpec
    concurrency: int
    replicas: tuple[ReplicaRoute, ...]
    starting: int
    replicas_max: int
    start_s: float = 0.0
    start_high_s: float = 0.0
    service_s: float = 0.0
    coming: tuple[StartingReplica, ...] = ()
    own_readyz: bool = False
    refusal: ErrorBody | None = None
    weights: tuple[RevisionWeight, ...] = ()
    parked: Parked | None = None
    openai: tuple[str, ...] = ()
    created_unix_s: int = 0


class KeyGrant(msgspec.Struct, frozen=True, kw_only=True):
    """An API key as gateways know it: the SHA-256 of its secret, never the secret."""

    key_sha256: str
    tenant: TenantId
    priority_max: int | None = None


class Routes(Message, frozen=True, kw_only=True):
    """The whole table; replaces what the gateway had. `generation` grows within one life of control."""

    generation: int
    deployments: tuple[DeploymentRoute, ...]
    keys: tuple[KeyGrant, ...] = ()


class RouteChanged(Message, frozen=True, kw_only=True):
    """One deployment of the table, or its removal (`route` None)."""

    generation: int
    tenant: TenantId
    deployment: DeploymentName
    route: DeploymentRoute | None


class AskWaits(Message, frozen=True, kw_only=True):
    """Whether a request waits at the gateway now. Answered once, by WaitsTold of that ticket; not repeated."""

    ticket: int
    tenant: TenantId
    deployment: DeploymentName
    request_id: str


class CallerStored(Message, frozen=True, kw_only=True):
    receipt: ReceiptId


class LinkRefused(Message, frozen=True, kw_only=True):
    """Control -> agent or gateway, before it closes: why it will not talk to this peer."""

    error: ErrorBody


FromAgent = AgentHello | ReplicaChanged | UsageBatch
ToAgent = StartReplica | DrainReplica | UsageStored | LinkRefused
FromGateway = GatewayHello | LoadReport | ReplicaIdle | ReplicaUnreachable | CallerServed | WaitsTold
ToGateway = Routes | RouteChanged | CallerStored | AskWaits | LinkRefused

FROM_PEER: Codec[FromAgent | FromGateway] = Codec(FromAgent | FromGateway)
TO_AGENT: Codec[ToAgent] = Codec(ToAgent)
TO_GATEWAY: Codec[ToGateway] = Codec(ToGateway)
