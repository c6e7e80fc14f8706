"""Small valid values of the platform's vocabulary, for tests that care about one field of them."""

from typing import Any

from multidict import CIMultiDict

from snowdrop.domain.deployment import Deployment, NodeRecord, Revision
from snowdrop.domain.ids import (
    DEFAULT_TENANT,
    DeploymentName,
    Digest,
    NodeId,
    ReplicaId,
    RevisionId,
    TenantId,
    receipt_id_of,
)
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.receipt import CallerTimes, Receipt
from snowdrop.domain.replica import ReplicaKey, ReplicaReport, ReplicaState, Transition
from snowdrop.domain.service import QueueSpec, Scale, ServiceSpec
from snowdrop.domain.usage import UsageRecord
from snowdrop.gateway.call import Call, Caller, WaitOptions, WholeBody
from snowdrop.wire.control import DeploymentLoad, DeploymentRoute, ReplicaRoute

NAME = DeploymentName("embed")
KEY = (DEFAULT_TENANT, NAME)
REVISION = RevisionId("rev-1")
NODE = NodeId("node-0")
SECOND_NS = 1_000_000_000


def artefact(letter: str = "a") -> ArtefactRef:
    return ArtefactRef(manifest=Digest("blake3:" + letter * 64), kind="code", total_bytes=10, file_count=1)


def service(**fields: Any) -> ServiceSpec:
    return ServiceSpec(class_name="Embed", entry="service:Embed", **fields)


def revision(
    name_id: str = "rev-1",
    *,
    tenant: TenantId = DEFAULT_TENANT,
    name: str = "embed",
    created: int = 1,
    **spec: Any,
) -> Revision:
    return Revision(
        id=RevisionId(name_id),
        tenant=tenant,
        deployment=DeploymentName(name),
        created_unix_ns=created,
        spec=service(**spec),
        code=artefact(),
    )


def deployment(
    *,
    tenant: TenantId = DEFAULT_TENANT,
    name: str = "embed",
    revision: str = "rev-1",
    generation: int = 1,
    **more: Any,
) -> Deployment:
    return Deployment(
        tenant=tenant,
        name=DeploymentName(name),
        revision=RevisionId(revision),
        generation=generation,
        created_unix_ns=1,
        **more,
    )


def replica_key(
    replica: str = "rep-1", *, tenant: TenantId = DEFAULT_TENANT, name: str = "embed", revision: str = "rev-1"
) -> ReplicaKey:
    return ReplicaKey(
        tenant=tenant,
        deployment=DeploymentName(name),
        revision=RevisionId(revision),
        replica=ReplicaId(replica),
    )


def report(
    replica: str | ReplicaKey = "rep-1",
    state: ReplicaState = ReplicaState.READY,
    *,
    version: int = 5,
    node: NodeId = NODE,
    **more: Any,
) -> ReplicaReport:
    key = replica if isinstance(replica, ReplicaKey) else replica_key(replica)
    history = more.pop("history", ())
    if state is ReplicaState.READY and not history:
        history = (Transition(unix_ns=9, before=ReplicaState.LOADING, after=ReplicaState.READY, reason="serving"),)
    return ReplicaReport(
        key=key,
        node=node,
        state=state,
        reason=more.pop("reason", str(state)),
        version=version,
        socket_path=more.pop("socket_path", f"/run/{key.replica}.sock"),
        history=history,
        **more,
    )


def receipt(
    replica: str = "rep-1", *, tenant: TenantId = DEFAULT_TENANT, name: str = "embed", **more: Any
) -> Receipt:
    return Receipt(
        id=receipt_id_of(ReplicaId(replica)),
        tenant=tenant,
        deployment=DeploymentName(name),
        revision=REVISION,
        replica=ReplicaId(replica),
        node=NODE,
        outcome=more.pop("outcome", "ready"),
        started_unix_ns=more.pop("started", 10),
        ready_unix_ns=more.pop("ready", 20),
        spans=more.pop("spans", ()),
        **more,
    )


def caller(request_id: str = "req-1", *, arrived: int = 0, admitted: int = 5, first_byte: int = 7) -> CallerTimes:
    return CallerTimes(
        request_id=request_id,
        arrived_unix_ns=arrived,
        admitted_unix_ns=admitted,
        first_byte_unix_ns=first_byte,
    )


def usage(
    sequence: int, quantity: int = 1, *, tenant: TenantId = DEFAULT_TENANT, source: str = "jrn-1", **more: Any
) -> UsageRecord:
    return UsageRecord(
        node=NODE,
        source=source,
        sequence=sequence,
        tenant=tenant,
        deployment=NAME,
        revision=REVISION,
        replica=ReplicaId("rep-1"),
        unit=more.pop("unit", "replica_ns"),
        quantity=quantity,
        from_unix_ns=0,
        to_unix_ns=quantity,
        **more,
    )


def node_record(
    name: str = "node-0", *, memory_bytes: int = 64 << 30, cpus: float = 8.0, **more: Any
) -> NodeRecord:
    return NodeRecord(id=name, instance_type="local", memory_bytes=memory_bytes, cpus=cpus, **more)


def load(in_flight: int = 0, queued: int = 0, *, peak: int | None = None, name: str = "embed") -> DeploymentLoad:
    return DeploymentLoad(
        tenant=DEFAULT_TENANT,
        deployment=DeploymentName(name),
        in_flight=in_flight,
        queued=queued,
        peak=in_flight + queued if peak is None else peak,
        arrived=0,
        refused=0,
    )


def replica_route(
    replica: str = "rep-1", *, accepting: bool = True, concurrency: int = 2, ready: int = 0, **more: Any
) -> ReplicaRoute:
    return ReplicaRoute(
        replica=ReplicaId(replica),
        revision=REVISION,
        socket_path=more.pop("socket_path", f"/run/{replica}.sock"),
        concurrency=concurrency,
        accepting=accepting,
        receipt=receipt_id_of(ReplicaId(replica)),
        ordered_unix_ns=more.pop("ordered", 0),
        ready_unix_ns=ready,
        **more,
    )


def route(
    *replicas: ReplicaRoute, name: str = "embed", tenant: TenantId = DEFAULT_TENANT, **more: Any
) -> DeploymentRoute:
    return DeploymentRoute(
        tenant=tenant,
        deployment=DeploymentName(name),
        revision=REVISION,
        queue=more.pop("queue", QueueSpec()),
        concurrency=2,
        replicas=replicas,
        starting=more.pop("starting", 0),
        replicas_max=4,
        **more,
    )


def scale(**fields: Any) -> Scale:
    return Scale(**{"max": 10, **fields})


def call(name: str = "embed", *, key: str | None = None, wait: WaitOptions | None = None, **more: Any) -> Call:
    caller_ = Caller(key_sha256=key, tenant=more.pop("tenant", None), label=more.pop("label", ""))
    return Call(
        deployment=DeploymentName(name),
        method=more.pop("method", "POST"),
        target=more.pop("target", "/x"),
        headers=more.pop("headers", CIMultiDict()),
        body=WholeBody(more.pop("body", b"")),
        caller=caller_,
        request_id=more.pop("request_id", "req-1"),
        arrived_unix_ns=more.pop("arrived", 1),
        wait=wait or WaitOptions(),
        **more,
    )
