"""What control knows now: deployments from the state, replicas from agents, load from gateways.

Memory only. All of it can be built again from the state store and the hellos of agents and gateways, which is
why control can be restarted at any time.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from snowdrop.domain.deployment import Deployment, DeploymentHealth, NodeRecord, Revision
from snowdrop.domain.ids import DeploymentName, NodeId, ReplicaId, RevisionId, TenantId
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport, ReplicaState
from snowdrop.domain.service import ResourceSpec, Scale
from snowdrop.policy.autoscale import AutoscaleDecision, AutoscaleState, Signals
from snowdrop.policy.autoscale.learned import Learned
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.policy.idle import IdleChoice
from snowdrop.policy.placement import NodeView
from snowdrop.policy.restart import StartHistory
from snowdrop.policy.schedule import Bounded
from snowdrop.wire.control import DeploymentLoad, StartReplica

DeploymentKey = tuple[TenantId, DeploymentName]
ENDED_KEPT_MAX = 1_000
"""Ended replicas remembered, so that a repeated report of one is not counted as a second failure."""


class ReplicaEntry(msgspec.Struct):
    """A replica and what was ordered for it. `report` is None until its agent has said something."""

    key: DeploymentKey
    revision: RevisionId
    node: NodeId
    age: int
    concurrency: int
    drain_s_max: float
    resources: ResourceSpec
    ordered_s: float
    order: StartReplica | None = None
    report: ReplicaReport | None = None
    ready_s: float | None = None
    draining: str = ""
    idle_at: set[str] = msgspec.field(default_factory=set)
    drain_sent: bool = False
    failed_start_counted: bool = False

    @property
    def state(self) -> ReplicaState:
        return self.report.state if self.report is not None else ReplicaState.PENDING


class ScalingMemory(msgspec.Struct):
    """What autoscaling keeps of a deployment beside the decider's own state (`control.scaling`).

    `arrived` are the requests since the last look; `room` is how many replicas may stay after some made room.
    """

    learned: Learned = Learned()
    arrived: int = 0
    signals: Signals | None = None
    recorded: ScalingRecord | None = None
    idle: IdleChoice | None = None
    bounded: Bounded | None = None
    bounds_of: object = None
    room: int | None = None
    wants_room: bool = False


class DeploymentEntry(msgspec.Struct):
    """A deployment with its current revision and the deciders' memory."""

    deployment: Deployment
    revision: Revision
    autoscale: AutoscaleState = AutoscaleState()
    decision: AutoscaleDecision | None = None
    starts: StartHistory = StartHistory()
    health: DeploymentHealth = DeploymentHealth.OK
    health_reason: str = ""
    placement_reason: str = ""
    rival: Revision | None = None
    rival_starts: StartHistory = StartHistory()
    rival_no_room: bool = False
    parked_until_unix_ns: int = 0
    is_half_open: bool = False
    scaling: ScalingMemory = msgspec.field(default_factory=ScalingMemory)

    @property
    def scale(self) -> Scale:
        if self.deployment.deleting:
            scale = self.deployment.scale or self.revision.spec.scale
            return msgspec.structs.replace(scale, min=0, buffer=0, idle_s=0.0, idle="fixed", schedules=())
        return self.deployment.scale or self.revision.spec.scale


class NodeEntry(msgspec.Struct):
    """A connected agent."""

    record: NodeRecord
    incarnation: str
    api_socket: str


class World:
    """Plain data with the questions that loop and API ask of it.

    Replicas that have been idle for `make_room_idle_s` give way to a start that finds no room (None: they never
    do); `disturbed` are deployments that lost some so and must be looked at. `told` are the gateways that have
    said what they hold since they are connected.
    """

    def __init__(self) -> None:
        self.deployments: dict[DeploymentKey, DeploymentEntry] = {}
        self.replicas: dict[ReplicaId, ReplicaEntry] = {}
        self.nodes: dict[NodeId, NodeEntry] = {}
        self.gateways: dict[str, dict[DeploymentKey, DeploymentLoad]] = {}
        self.told: set[str] = set()
        self.ended: dict[ReplicaId, int] = {}
        self.make_room_idle_s: float | None = None
        self.disturbed: set[DeploymentKey] = set()
        self.tasks_due: dict[DeploymentKey, int] = {}
        self._ages = 0

    def next_age(self) -> int:
        self._ages += 1
        return self._ages

    def replicas_of(self, key: DeploymentKey) -> Iterator[tuple[ReplicaId, ReplicaEntry]]:
        """Living replicas of a deployment."""
        return ((name, entry) for name, entry in self.replicas.items() if entry.key == key)

    def loads(self, key: DeploymentKey) -> list[DeploymentLoad]:
        """What each gateway holds for a deployment."""
        return [loads[key] for loads in self.gateways.values() if key in loads]

    def load(self, key: DeploymentKey) -> tuple[int, int, int]:
        """In flight, queued and peak over all gateways. A task that could run now waits like a request."""
        loads = self.loads(key)
        in_flight, queued = sum(load.in_flight for load in loads), sum(load.queued for load in loads)
        due = self.tasks_due.get(key, 0)
        return in_flight, queued + due, sum(load.peak for load in loads) + due

    def in_flight_at(self, key: DeploymentKey, replica: ReplicaId) -> int:
        """Requests that gateways have at one replica."""
        return sum(loads[key].busy.get(replica, 0) for loads in self.gateways.values() if key in loads)

    def clear_peaks(self, key: DeploymentKey) -> None:
        """The decider has seen the peaks."""
        for loads in self.gateways.values():
            load = loads.get(key)
            if load is not None:
                loads[key] = msgspec.structs.replace(load, peak=load.in_flight + load.queued)

    def node_views(self) -> tuple[NodeView, ...]:
        """What each connected node has left."""
        views: list[NodeView] = []
        for name, node in self.nodes.items():
            taken = [entry.resources for entry in self.replicas.values() if entry.node == name]
            views.append(
                NodeView(
                    id=name,
                    free_memory_bytes=node.record.memory_bytes - sum(r.memory_bytes_max for r in taken),
                    free_cpus=node.record.cpus - sum(r.cpus for r in taken),
                    devices=node.record.devices,
                )
            )
        return tuple(views)

    def remember_end(self, report: ReplicaReport) -> bool:
        """Notes that a replica ended; False if that was known."""
        if report.state not in TERMINAL_STATES or report.key.replica in self.ended:
            return False
        self.ended[report.key.replica] = report.version
        while len(self.ended) > ENDED_KEPT_MAX:
            del self.ended[next(iter(self.ended))]
        return True
