"""Autoscaling of one deployment in control's memory: what is seen, what was learned, what is kept of it.

The deciders are pure (`policy.autoscale`, `policy.idle`, `policy.schedule`); this gathers their input.
"""

from __future__ import annotations

import msgspec

from snowdrop.control.world import DeploymentEntry, DeploymentKey, ReplicaEntry, World
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import STARTING_STATES, ReplicaState
from snowdrop.policy import autoscale, idle, schedule
from snowdrop.policy.autoscale.learned import Learned, note_done, note_start
from snowdrop.policy.autoscale.record import ScalingRecord, is_worth_keeping
from snowdrop.wire.control import DeploymentLoad


def heard(entry: DeploymentEntry, before: DeploymentLoad | None, load: DeploymentLoad) -> None:
    """A gateway's counters went from `before` to `load`: what came, and how long those that ended took."""
    memory = entry.scaling
    base = before if before is not None and before.arrived <= load.arrived else None
    memory.arrived += load.arrived - (base.arrived if base else 0)
    done = load.done - (base.done if base else 0)
    slot_s = load.slot_s - (base.slot_s if base else 0.0)
    memory.learned = note_done(memory.learned, done=done, slot_s=slot_s)


def became_ready(entry: DeploymentEntry, start_s: float) -> None:
    """A replica that this control ordered is ready."""
    entry.scaling.learned = note_start(entry.scaling.learned, start_s)


def judge(
    world: World,
    key: DeploymentKey,
    replicas: list[tuple[ReplicaId, ReplicaEntry]],
    *,
    now_s: float,
    now_unix_ns: int,
) -> autoscale.AutoscaleDecision:
    """Decides for a deployment, and remembers what the decider and its record need."""
    entry = world.deployments[key]
    memory = entry.scaling
    in_flight, queued, peak = world.load(key)
    world.clear_peaks(key)
    if max(in_flight + queued, peak) > 0:
        memory.room = None
        _note_gap(entry, now_s)
    living = [replica for _, replica in replicas if not replica.draining]
    learned = memory.learned
    starting = [replica for replica in living if replica.state in STARTING_STATES]
    running_s = sum(loads[key].running_s for loads in world.gateways.values() if key in loads)
    memory.idle = _idle_choice(entry)
    seen = autoscale.AutoscaleInput(
        in_flight=in_flight,
        queued=queued,
        peak=peak,
        ready=sum(1 for replica in living if replica.state is ReplicaState.READY),
        starting=len(starting),
        concurrency=entry.revision.spec.concurrency,
        scale=entry.scale,
        arrived=memory.arrived,
        starting_left_s=tuple(max(0.0, learned.start_s - (now_s - replica.ordered_s)) for replica in starting),
        start_s=learned.start_s,
        service_s=learned.service_s(in_flight=in_flight, running_s=running_s),
        bounds=_bounds(entry, now_unix_ns / 1e9),
        idle_s=entry.scale.idle_s if memory.idle is None else memory.idle.idle_s,
        room=memory.room,
    )
    memory.arrived = 0
    state, memory.signals = autoscale.observe(entry.autoscale, seen, now_s)
    entry.decision = autoscale.judge(memory.signals)
    entry.autoscale = autoscale.after(state, memory.signals, entry.decision, now_s)
    return entry.decision


def next_look_s(entry: DeploymentEntry, now_s: float, now_unix_s: float) -> float | None:
    """When a deployment's number may change without an event (monotonic); None if nothing will change it."""
    times: list[float] = []
    idle_s = entry.scaling.signals.idle_s if entry.scaling.signals is not None else entry.scale.idle_s
    idle_at = autoscale.idle_at_s(entry.autoscale, idle_s)
    if idle_at is not None and idle_at > now_s:
        times.append(idle_at)
    hold_until_s = entry.autoscale.hold_until_s
    if hold_until_s is not None and hold_until_s > now_s:
        times.append(hold_until_s)
    bounded = entry.scaling.bounded
    if bounded is not None and bounded.until_unix_s is not None:
        times.append(now_s + max(0.0, bounded.until_unix_s - now_unix_s))
    return min(times) if times else None


def is_due(entry: DeploymentEntry, now_unix_s: float) -> bool:
    """Whether a schedule changes the bounds of a deployment that sleeps."""
    bounded = entry.scaling.bounded
    return bounded is not None and bounded.until_unix_s is not None and bounded.until_unix_s <= now_unix_s


def record(entry: DeploymentEntry, *, now_unix_ns: int) -> ScalingRecord | None:
    """The latest decision, if it is worth keeping; None else."""
    made = latest(entry, now_unix_ns=now_unix_ns)
    if made is None or not is_worth_keeping(entry.scaling.recorded, made):
        return None
    entry.scaling.recorded = made
    return made


def latest(entry: DeploymentEntry, *, now_unix_ns: int) -> ScalingRecord | None:
    """The latest decision with its signals; None before the first look."""
    memory = entry.scaling
    if memory.signals is None or entry.decision is None:
        return None
    return ScalingRecord(
        tenant=entry.deployment.tenant,
        deployment=entry.deployment.name,
        revision=entry.revision.id,
        unix_ns=now_unix_ns,
        signals=memory.signals,
        decision=entry.decision,
        note=short(entry),
    )


def short(entry: DeploymentEntry) -> str:
    """Why there are fewer replicas than decided, if something is in the way."""
    signals = entry.scaling.signals
    if entry.decision is None or signals is None or entry.decision.desired <= signals.capacity:
        return ""
    return entry.health_reason or (entry.placement_reason if entry.scaling.wants_room else "")


def _bounds(entry: DeploymentEntry, now_unix_s: float) -> autoscale.Bounds:
    """Worked out anew when they may have changed: a schedule began or ended, somebody set others."""
    memory = entry.scaling
    revision = entry.deployment.revision_bounds.get(entry.revision.id)
    asked = (entry.scale, revision, memory.learned.start_s)
    bounded = memory.bounded
    over = bounded is not None and bounded.until_unix_s is not None and bounded.until_unix_s <= now_unix_s
    if bounded is None or over or asked != memory.bounds_of:
        bounded = schedule.bounds_at(entry.scale, now_unix_s, lead_s=memory.learned.start_s, revision=revision)
        memory.bounded, memory.bounds_of = bounded, asked
    return bounded.bounds


def _idle_choice(entry: DeploymentEntry) -> idle.IdleChoice | None:
    scale, learned = entry.scale, entry.scaling.learned
    if scale.idle != "auto" or entry.deployment.deleting:
        return None
    return idle.choose(learned.gaps, start_s=learned.start_s, wait_price=scale.wait_price, fallback_s=scale.idle_s)


def _note_gap(entry: DeploymentEntry, now_s: float) -> None:
    """A request came after a time without any."""
    busy_s = entry.autoscale.busy_s
    if busy_s is None or entry.autoscale.load > 0 or now_s - busy_s < idle.GAP_S_MIN:
        return
    learned = entry.scaling.learned
    gaps = idle.note_gap(learned.gaps, now_s - busy_s)
    entry.scaling.learned = msgspec.structs.replace(learned, gaps=gaps)


def restore(entry: DeploymentEntry, learned: Learned | None, starts_s: list[float]) -> None:
    """What an earlier life of control learned; start-up times are those of the receipts, the oldest first."""
    made = msgspec.structs.replace(learned or Learned(), starts_s=())
    for start_s in starts_s:
        made = note_start(made, start_s)
    entry.scaling.learned = made
