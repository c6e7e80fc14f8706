"""A rollout in control's memory: what is seen of it, its next step, what that means for replicas and traffic."""

from __future__ import annotations

from typing import Literal

import msgspec

from snowdrop.control.world import DeploymentEntry, DeploymentKey, ReplicaEntry, World
from snowdrop.domain.deployment import Deployment, Revision
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.replica import STARTING_STATES, ReplicaState
from snowdrop.domain.rollout import Rollout, RolloutPhase, Sample
from snowdrop.policy import reconcile, restart, rollout
from snowdrop.policy.rollout import RolloutInput
from snowdrop.wire.control import RevisionLoad, RevisionWeight

ENDED_KEPT_MAX = 10


def step(world: World, key: DeploymentKey, *, now_unix_ns: int) -> Deployment | None:
    """The deployment after its rollout's next step, to be stored; None if nothing changes."""
    entry = world.deployments[key]
    active = entry.deployment.rollout
    if active is None or entry.deployment.deleting:
        return None
    desired = entry.decision.desired if entry.decision is not None else None
    if desired is None:
        return None  # nothing was looked at yet in this life of control
    heard = bool(world.gateways) and world.told >= set(world.gateways)
    if active.phase is not RolloutPhase.STARTING and not heard:
        return None  # what came of the traffic so far is not known, so nothing may be concluded from it
    following = rollout.decide(active, _seen(world, key, active, desired, now_unix_ns))
    if following == active:
        return None
    if (following.phase, following.step) != (active.phase, active.step) and not following.ended_unix_ns:
        following = msgspec.structs.replace(following, before=_counted(world, key, active.candidate))
    return with_rollout(entry.deployment, following)


def with_rollout(deployment: Deployment, following: Rollout) -> Deployment:
    """The deployment with its rollout one step further: which revision has full traffic follows from it."""
    goes_back = following.phase in {RolloutPhase.ROLLED_BACK, RolloutPhase.ABORTED}
    shifted = not goes_back and following.weight >= 1.0
    over = bool(following.ended_unix_ns)
    return msgspec.structs.replace(
        deployment,
        revision=following.candidate if shifted else following.stable,
        generation=deployment.generation + 1,
        rollout=None if over else following,
        rollouts=(following, *deployment.rollouts)[:ENDED_KEPT_MAX] if over else deployment.rollouts,
    )


def is_older(deployment: Deployment, known: Deployment) -> bool:
    """Whether another writer's later value is known already. A deployment made anew begins to count again."""
    made, known_made = deployment.created_unix_ns, known.created_unix_ns
    return made < known_made or (made == known_made and deployment.generation < known.generation)


def acted(entry: DeploymentEntry, deployment: Deployment, revision: Revision, rival: Revision | None) -> None:
    """Somebody changed the deployment: failed starts of before do not count, but for a revision that a new rollout
    is about to replace.
    """
    begins = deployment.rollout is not None and deployment.rollout != entry.deployment.rollout
    if not begins or revision.id != entry.revision.id:
        entry.starts = restart.StartHistory()
    entry.rival_starts = restart.StartHistory()
    entry.deployment, entry.revision, entry.rival = deployment, revision, rival


def stepped(entry: DeploymentEntry, deployment: Deployment) -> None:
    """The rollout went on by itself; at a shift the two revisions change places."""
    if deployment.revision != entry.revision.id and entry.rival is not None:
        entry.revision, entry.rival = entry.rival, entry.revision
        entry.starts, entry.rival_starts = entry.rival_starts, entry.starts
    if deployment.rollout is None:
        entry.rival, entry.rival_starts = None, restart.StartHistory()
    entry.deployment = deployment


def newly_ended(before: Deployment, after: Deployment) -> list[Rollout]:
    """Rollouts that ended between two values of one deployment."""
    known = {(each.began_unix_ns, each.candidate) for each in before.rollouts}
    return [each for each in after.rollouts if (each.began_unix_ns, each.candidate) not in known]


def targets(
    world: World, key: DeploymentKey, desired: int, *, now_s: float, now_unix_ns: int
) -> tuple[int, reconcile.Rival | None]:
    """How many replicas the current revision should have, and its rival."""
    entry = world.deployments[key]
    active = entry.deployment.rollout
    if active is None or entry.rival is None or entry.deployment.deleting:
        return desired, None
    pinned = sum(load.pinned.get(active.candidate, 0) for load in world.loads(key))
    shares = rollout.shares(active, _seen(world, key, active, desired, now_unix_ns), pinned=pinned)
    verdict = restart.verdict(entry.rival_starts, now_s)
    if active.phase is RolloutPhase.PROVING:
        if shares.stable == 0:
            return shares.candidate, None  # it goes as every older revision does: when a new replica is ready
        return shares.candidate, reconcile.Rival(revision=entry.rival.id, desired=shares.stable, may_start=False)
    starting, living = _starting(world, key, entry.rival.id)
    most = restart.starts_max(verdict, starting=starting, now_s=now_s)
    wanted = shares.candidate if most is None else min(shares.candidate, living + most)
    may_start = most is None or most > 0
    # What it has stays: a start that is not tried now is no reason to drain one that serves.
    desired_rival = wanted if may_start else shares.candidate
    return shares.stable, reconcile.Rival(revision=entry.rival.id, desired=desired_rival, may_start=may_start)


def weights(world: World, key: DeploymentKey) -> tuple[RevisionWeight, ...]:
    """How gateways share traffic out; empty while all replicas are alike."""
    entry = world.deployments[key]
    active = entry.deployment.rollout
    if active is None or entry.rival is None:
        return ()
    candidate = active.weight
    if active.phase is RolloutPhase.PROVING and not _ready(world, key, active.candidate):
        candidate = 0.5  # whichever is ready serves
    return (
        _weight(active.stable, "stable", 1.0 - candidate),
        _weight(active.candidate, "candidate", candidate),
    )


def may_help(entry: DeploymentEntry) -> bool:
    """Whether a new revision is on its way whose replicas could serve."""
    active = entry.deployment.rollout
    return active is not None and active.phase is not RolloutPhase.PROVING


def older_reason(entry: DeploymentEntry) -> str:
    """Why replicas of other revisions than the current one drain."""
    last = entry.deployment.rollouts[0] if entry.deployment.rollouts else None
    if entry.deployment.rollout is None and last is not None and last.phase is not RolloutPhase.DONE:
        return f"{last.phase}: {last.reason}"
    return "a newer revision is ready"


def summary(deployment: Deployment) -> str:
    """One line on the rollout under way, or on the last one."""
    active = deployment.rollout or (deployment.rollouts[0] if deployment.rollouts else None)
    if active is None:
        return "none"
    held = " (paused)" if active.paused else ""
    reason = f": {active.reason}" if active.reason else ""
    if active.ended_unix_ns:
        return f"{active.candidate} {active.phase}{reason}"
    return f"{active.candidate} {active.phase} at {active.weight:.3g} of the traffic{held}{reason}"


def samples(world: World, key: DeploymentKey, active: Rollout) -> tuple[Sample, Sample]:
    """Answers of the new revision since the step began, and all that are known of the old one."""
    new = _counted(world, key, active.candidate)
    since = [_less(sample, active.before.get(gateway)) for gateway, sample in new.items()]
    return _sum(since), _sum(list(_counted(world, key, active.stable).values()))


def _counted(world: World, key: DeploymentKey, revision: RevisionId) -> dict[str, Sample]:
    """What each gateway has counted of a revision."""
    return {
        gateway: _sample(load)
        for gateway, loads in world.gateways.items()
        if key in loads
        for load in loads[key].revisions
        if load.revision == revision
    }


def _seen(world: World, key: DeploymentKey, active: Rollout, desired: int, now_unix_ns: int) -> RolloutInput:
    entry = world.deployments[key]
    starts = entry.starts if entry.revision.id == active.candidate else entry.rival_starts
    living = [replica for _, replica in world.replicas_of(key) if not replica.draining]
    ours = [replica for replica in living if replica.revision == active.candidate]
    new, old = samples(world, key, active)
    bounds = entry.deployment.revision_bounds.get(active.candidate)
    return RolloutInput(
        now_unix_ns=now_unix_ns,
        desired=desired,
        stable_living=sum(1 for replica in living if replica.revision == active.stable),
        candidate_ready=_count_ready(ours),
        candidate_starting=sum(1 for replica in ours if replica.state in STARTING_STATES),
        failures=starts.failures,
        failure_reason=starts.reason,
        no_room=entry.rival_no_room,
        candidate_max=bounds.max if bounds is not None else None,
        new=new,
        old=old,
    )


def _starting(world: World, key: DeploymentKey, revision: RevisionId) -> tuple[int, int]:
    """Of a revision's replicas that are not draining: how many are on their way, and how many there are."""
    ours = [r for _, r in world.replicas_of(key) if not r.draining and r.revision == revision]
    return sum(1 for replica in ours if replica.state in STARTING_STATES), len(ours)


def _ready(world: World, key: DeploymentKey, revision: RevisionId) -> int:
    return _count_ready([r for _, r in world.replicas_of(key) if not r.draining and r.revision == revision])


def _count_ready(replicas: list[ReplicaEntry]) -> int:
    return sum(1 for replica in replicas if replica.state is ReplicaState.READY)


def _weight(revision: RevisionId, role: Literal["stable", "candidate"], weight: float) -> RevisionWeight:
    return RevisionWeight(revision=revision, role=role, weight=weight)


def _sample(load: RevisionLoad) -> Sample:
    return Sample(done=load.done, failed=load.failed, latency=load.latency)


def _less(now: Sample, before: Sample | None) -> Sample:
    """What came since `before`. A counter that fell began anew: its gateway had forgotten the revision."""
    if before is None or now.done < before.done:
        return now
    padded = (*before.latency, *([0] * (len(now.latency) - len(before.latency))))
    return Sample(
        done=max(0, now.done - before.done),
        failed=max(0, now.failed - before.failed),
        latency=tuple(max(0, a - b) for a, b in zip(now.latency, padded, strict=False)),
    )


def _sum(parts: list[Sample]) -> Sample:
    length = max((len(part.latency) for part in parts), default=0)
    return Sample(
        done=sum(part.done for part in parts),
        failed=sum(part.failed for part in parts),
        latency=tuple(
            sum(part.latency[index] for part in parts if index < len(part.latency)) for index in range(length)
        ),
    )
