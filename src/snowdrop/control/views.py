"""The world as the API shows it."""

from __future__ import annotations

from snowdrop.control import rollouts
from snowdrop.control.world import DeploymentEntry, DeploymentKey, World
from snowdrop.domain.replica import STARTING_STATES, ReplicaReport, ReplicaState
from snowdrop.wire.api import DeploymentView, Description


def deployment_view(world: World, key: DeploymentKey, gateway_url: str) -> DeploymentView:
    """A line of `ps`. Raises KeyError if the deployment is not there."""
    entry = world.deployments[key]
    replicas = [replica for _, replica in world.replicas_of(key)]
    in_flight, queued, _peak = world.load(key)
    decision = entry.decision
    return DeploymentView(
        name=key[1],
        revision=entry.revision.id,
        url=f"{gateway_url}/{key[1]}",
        health="deleting" if entry.deployment.deleting else str(entry.health),
        health_reason=entry.health_reason,
        desired=decision.desired if decision else 0,
        ready=sum(1 for r in replicas if r.state is ReplicaState.READY and not r.draining),
        starting=sum(1 for r in replicas if r.state in STARTING_STATES and not r.draining),
        draining=sum(1 for r in replicas if r.draining),
        in_flight=in_flight,
        queued=queued,
        why=_why(entry),
        scale=entry.scale,
        concurrency=entry.revision.spec.concurrency,
        created_unix_ns=entry.deployment.created_unix_ns,
        rollout=rollouts.summary(entry.deployment) if entry.deployment.rollout is not None else "",
    )


def describe(
    world: World, key: DeploymentKey, *, gateway_url: str, sandbox: str, recent: list[ReplicaReport]
) -> Description:
    """Everything of one deployment. `recent` are its latest replicas, ended ones too."""
    entry = world.deployments[key]
    living = tuple(r.report for _, r in world.replicas_of(key) if r.report is not None)
    names = {report.key.replica for report in living}
    return Description(
        view=deployment_view(world, key, gateway_url),
        revision=entry.revision,
        replicas=living,
        recent=tuple(report for report in recent if report.key.replica not in names),
        sandbox=next((report.sandbox for report in living if report.sandbox), sandbox),
        placement=entry.placement_reason,
        models=tuple(bound.name for bound in entry.revision.models),
    )


def _why(entry: DeploymentEntry) -> str:
    reason = entry.decision.reason if entry.decision else "not looked at yet"
    if entry.health_reason:
        return entry.health_reason
    if entry.deployment.rollout is not None:
        reason = f"{reason}; rollout of {rollouts.summary(entry.deployment)}"
    return f"{reason}; {entry.placement_reason}" if entry.placement_reason else reason
