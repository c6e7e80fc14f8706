"""From the world to what gateways are told: a pure translation."""

from __future__ import annotations

from snowdrop.control import rollouts
from snowdrop.control.world import DeploymentEntry, DeploymentKey, ReplicaEntry, World
from snowdrop.domain.deployment import DeploymentHealth
from snowdrop.domain.errors import ErrorBody, RevisionFailedError, UnavailableError
from snowdrop.domain.ids import ReplicaId, receipt_id_of
from snowdrop.domain.replica import STARTING_STATES, ReplicaState
from snowdrop.wire.control import DeploymentRoute, Parked, ReplicaRoute, StartingReplica

KNOWN_STATES = frozenset({ReplicaState.READY, ReplicaState.DRAINING})


def deployment_route(world: World, key: DeploymentKey) -> DeploymentRoute | None:
    """The deployment's entry in the table of gateways; None if it has none."""
    entry = world.deployments.get(key)
    if entry is None:
        return None
    replicas = list(world.replicas_of(key))
    serving = any(replica.state is ReplicaState.READY and not replica.draining for _, replica in replicas)
    coming = [(n, r) for n, r in replicas if r.state in STARTING_STATES and not r.draining]
    coming.sort(key=lambda each: each[1].age)
    learned = entry.scaling.learned
    return DeploymentRoute(
        tenant=key[0],
        deployment=key[1],
        revision=entry.revision.id,
        queue=entry.revision.spec.queue,
        concurrency=entry.revision.spec.concurrency,
        replicas=tuple(_route(name, replica) for name, replica in replicas if replica.state in KNOWN_STATES),
        starting=len(coming),
        replicas_max=entry.scale.max,
        start_s=learned.start_s,
        start_high_s=learned.start_high_s,
        service_s=_steady(learned.service_s()),
        coming=tuple(_coming(name, replica) for name, replica in coming),
        own_readyz=any(endpoint.path == "/readyz" for endpoint in entry.revision.spec.endpoints),
        refusal=_refusal(entry, serving=serving),
        weights=rollouts.weights(world, key),
        parked=_parked(entry, serving=serving),
        openai=entry.revision.spec.openai_paths,
        created_unix_s=entry.deployment.created_unix_ns // 1_000_000_000,
    )


def _coming(name: ReplicaId, replica: ReplicaEntry) -> StartingReplica:
    ordered = replica.order.ordered_unix_ns if replica.order is not None else 0
    if not ordered and replica.report is not None:
        ordered = replica.report.started_unix_ns
    return StartingReplica(replica=name, revision=replica.revision, state=replica.state, ordered_unix_ns=ordered)


def _steady(service_s: float) -> float:
    """To one digit: gateways only estimate with it, and need not hear of each request."""
    return float(f"{service_s:.1g}")


def _route(name: ReplicaId, replica: ReplicaEntry) -> ReplicaRoute:
    report = replica.report
    if report is None:
        raise AssertionError("a replica is ready only by a report")
    ready = next((t.unix_ns for t in report.history if t.after is ReplicaState.READY), 0)
    return ReplicaRoute(
        replica=name,
        revision=replica.revision,
        socket_path=report.socket_path,
        concurrency=replica.concurrency,
        accepting=report.state is ReplicaState.READY and not replica.draining,
        receipt=receipt_id_of(name),
        ordered_unix_ns=replica.order.ordered_unix_ns if replica.order is not None else report.started_unix_ns,
        ready_unix_ns=ready,
        spans=tuple(span for span in report.spans if not span.parent),
        content=report.content,
    )


def _refusal(entry: DeploymentEntry, *, serving: bool) -> ErrorBody | None:
    """Why requests are refused at once instead of waiting for something that will not come."""
    name = entry.deployment.name
    if entry.deployment.deleting:
        return UnavailableError(f"deployment {name!r} is being deleted", where=name).body()
    if entry.revision.spec.park_s_max == 0 and _is_looping(entry, serving=serving) and not entry.is_half_open:
        return _failed(entry)  # when the pause is over, whoever comes next waits for the one start that it causes
    return None


def _parked(entry: DeploymentEntry, *, serving: bool) -> Parked | None:
    """Why and how long requests wait while nothing is started."""
    if entry.deployment.deleting or not _is_looping(entry, serving=serving) or entry.revision.spec.park_s_max == 0:
        return None
    return Parked(
        error=_failed(entry),
        wait_s_max=entry.revision.spec.park_s_max,
        next_try_unix_ns=entry.parked_until_unix_ns,
    )


def _is_looping(entry: DeploymentEntry, *, serving: bool) -> bool:
    """A replica that serves, of an older revision for example, goes on doing so; and a newer revision may help."""
    return entry.health is DeploymentHealth.CRASH_LOOPING and not serving and not rollouts.may_help(entry)


def _failed(entry: DeploymentEntry) -> ErrorBody:
    name = entry.deployment.name
    return RevisionFailedError(
        f"revision {entry.revision.id} of {name!r} does not start: {entry.starts.failures} starts failed in a row,"
        f" the last with: {entry.starts.reason}",
        where=f"revision {entry.revision.id}",
        next_step=f"`snowdrop logs {name}` shows why; deploy a fix, or retry: `snowdrop scale {name}`",
    ).body()
