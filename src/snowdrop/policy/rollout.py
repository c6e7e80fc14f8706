"""What a rollout does next: wait, take a step, shift all traffic, or go back.

A new revision gets no traffic before it is ready, and while it gets some it is compared with the old one. It is
judged only from `samples_min` answers on, and by the lower end of a confidence interval, so that chance alone
rarely sends a good revision back; the price is that a small harm needs more answers to be seen.
"""

from __future__ import annotations

import math

import msgspec

from snowdrop.domain.rollout import Rollout, RolloutPhase, RolloutSpec, Sample

LATENCY_S_MIN = 0.001
LATENCY_BUCKETS = 40
"""Bucket i of a latency histogram has answers up to LATENCY_S_MIN * 2**(i/2) seconds; the last has all later."""
CONFIDENCE_Z = 2.33
"""One-sided 99 %."""
OLD_QUANTILE = 0.95
SLOW_SHARE_MAX = 0.10


class RolloutInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is seen now. `old` is all that is known of the old revision, `new` what came since the step began.

    `failures` counts failed starts of the new one in a row; `no_room` says that a start of it was not placed;
    `candidate_max` is the bound that somebody set for it alone.
    """

    now_unix_ns: int
    desired: int
    stable_living: int
    candidate_ready: int
    candidate_starting: int
    failures: int = 0
    failure_reason: str = ""
    no_room: bool = False
    candidate_max: int | None = None
    new: Sample = Sample()
    old: Sample = Sample()


class Shares(msgspec.Struct, frozen=True):
    """How many replicas each revision should have."""

    stable: int
    candidate: int


def decide(rollout: Rollout, seen: RolloutInput) -> Rollout:
    """The rollout after one look; the same value if nothing changes. An ended one never changes."""
    if rollout.ended_unix_ns:
        return rollout
    bad = _failed_starts(rollout, seen) or _judged(rollout, seen)
    if bad:
        return ended(rollout, RolloutPhase.ROLLED_BACK, bad, seen.now_unix_ns)
    if rollout.phase is RolloutPhase.PROVING:
        return _prove(rollout, seen)
    if rollout.paused:
        return rollout
    if seen.stable_living == 0 and seen.desired == 0 and not rollout.spec.steps:
        return _shifted(rollout, seen, "nothing ran, so the next start is of the new revision")
    if rollout.phase is RolloutPhase.STARTING:
        return _start(rollout, seen)
    return _shift(rollout, seen)


def ended(rollout: Rollout, phase: RolloutPhase, reason: str, now_unix_ns: int) -> Rollout:
    """The rollout with its end."""
    return msgspec.structs.replace(rollout, phase=phase, reason=reason, before={}, ended_unix_ns=now_unix_ns)


def promoted(rollout: Rollout, now_unix_ns: int) -> Rollout:
    """All steps that are left are skipped; from PROVING it is done. It still has to be ready."""
    if rollout.phase is RolloutPhase.PROVING:
        return ended(rollout, RolloutPhase.DONE, "promoted by hand", now_unix_ns)
    spec = msgspec.structs.replace(rollout.spec, steps=())
    return msgspec.structs.replace(rollout, spec=spec, step=0, paused=False, reason="promoted by hand")


def shares(rollout: Rollout, seen: RolloutInput, *, pinned: int = 0) -> Shares:
    """Replicas by revision, of `desired` in all. The new one's first comes on top, so that the old revision
    loses no capacity to one that may not even start; `pinned` requests ask for the new one by name.
    """
    desired = seen.desired
    if rollout.phase is RolloutPhase.PROVING:
        kept = min(rollout.spec.keep_warm, seen.stable_living) if desired or seen.candidate_ready else 0
        return Shares(kept, desired)
    wanted = 1 if desired > 0 or pinned > 0 else 0
    if rollout.phase is RolloutPhase.STARTING:
        return Shares(desired, wanted)
    preparing = rollout.step >= len(rollout.spec.steps)
    part = 1.0 if preparing else rollout.weight
    candidate = max(wanted, math.ceil(part * desired))
    # While full traffic is prepared the old revision still carries it.
    stable = math.ceil((1.0 - rollout.weight) * desired - 1e-9)
    return Shares(max(stable, 1 if desired else 0), candidate)


def next_look_unix_ns(rollout: Rollout) -> int | None:
    """When time alone may change something; None if it cannot."""
    if rollout.ended_unix_ns or not rollout.step_unix_ns:
        return None
    if rollout.phase is RolloutPhase.PROVING:
        return rollout.step_unix_ns + _ns(rollout.spec.prove_s)
    if rollout.phase is RolloutPhase.SHIFTING and rollout.step < len(rollout.spec.steps) and not rollout.paused:
        step = rollout.spec.steps[rollout.step]
        return None if step.hold else rollout.step_unix_ns + _ns(step.s)
    return None


def judge(new: Sample, old: Sample, spec: RolloutSpec) -> str | None:
    """Why the new revision is worse than the old one, or None: it is not, or it is too early to tell."""
    if new.done < spec.samples_min:
        return None
    old_rate = old.failed / old.done if old.done else 0.0
    if lower_bound(new.failed, new.done) > min(old_rate + spec.error_rate_more_max, 1.0):
        return (
            f"{new.failed} of {new.done} answers of the new revision failed ({new.failed / new.done:.1%}),"
            f" of the old one {old_rate:.1%}"
        )
    if spec.latency_ratio_max and old.done >= spec.samples_min and sum(new.latency) >= spec.samples_min:
        usual_s = quantile_s(old.latency, OLD_QUANTILE)
        limit_s = usual_s * spec.latency_ratio_max
        slow = sum(count for index, count in enumerate(new.latency) if bucket_floor_s(index) >= limit_s)
        if usual_s and lower_bound(slow, sum(new.latency)) > SLOW_SHARE_MAX:
            return (
                f"{slow} of {sum(new.latency)} answers of the new revision took longer than {limit_s:.3g} s,"
                f" {spec.latency_ratio_max:g} times what 95 % of the old one's take"
            )
    return None


def lower_bound(hits: int, total: int) -> float:
    """Lower end of the one-sided Wilson interval of a share (E. B. Wilson, 1927)."""
    if total == 0:
        return 0.0
    share, z2 = hits / total, CONFIDENCE_Z**2
    spread = CONFIDENCE_Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, (share + z2 / (2 * total) - spread) / (1 + z2 / total))


def latency_bucket(latency_s: float) -> int:
    """The histogram's bucket of one answer."""
    if latency_s <= LATENCY_S_MIN:
        return 0
    return min(LATENCY_BUCKETS - 1, math.ceil(2 * math.log2(latency_s / LATENCY_S_MIN) - 1e-9))


def bucket_floor_s(index: int) -> float:
    """Answers in the bucket took longer than this."""
    return LATENCY_S_MIN * 2 ** ((index - 1) / 2) if index else 0.0


def quantile_s(latency: tuple[int, ...], share: float) -> float:
    """An upper bound of the time within which `share` of the answers came; 0 if there are none."""
    total, seen = sum(latency), 0
    for index, count in enumerate(latency):
        seen += count
        if total and seen >= share * total:
            return LATENCY_S_MIN * 2 ** (index / 2)
    return 0.0


def _failed_starts(rollout: Rollout, seen: RolloutInput) -> str | None:
    if seen.failures >= rollout.spec.failures_max and seen.candidate_ready == 0:
        return f"{seen.failures} starts of the new revision failed, the last with: {seen.failure_reason}"
    waits = rollout.phase is RolloutPhase.STARTING and rollout.step_unix_ns and not rollout.paused
    if not waits or not (seen.desired or seen.candidate_starting):
        return None
    if seen.now_unix_ns - rollout.step_unix_ns > _ns(rollout.spec.start_s_max):
        room = "; there was no room for it" if seen.no_room else ""
        return f"the new revision was not ready within start_s_max={rollout.spec.start_s_max:g}{room}"
    return None


def _judged(rollout: Rollout, seen: RolloutInput) -> str | None:
    return None if rollout.phase is RolloutPhase.STARTING else judge(seen.new, seen.old, rollout.spec)


def _start(rollout: Rollout, seen: RolloutInput) -> Rollout:
    if seen.candidate_ready == 0:
        wanted = seen.desired > 0 or seen.candidate_starting > 0
        if wanted == bool(rollout.step_unix_ns):
            return rollout
        # Its time to become ready runs only while somebody needs it: a deployment may lie idle for days.
        since_unix_ns = seen.now_unix_ns if wanted else 0
        reason = "waits for the new revision to be ready" if wanted else "nothing runs; the next request starts it"
        return msgspec.structs.replace(rollout, step_unix_ns=since_unix_ns, reason=reason)
    first = rollout.spec.steps[0] if rollout.spec.steps else None
    begun = msgspec.structs.replace(
        rollout,
        phase=RolloutPhase.SHIFTING,
        step=0,
        step_unix_ns=seen.now_unix_ns,
        weight=first.weight if first else 0.0,
        reason="the new revision is ready",
    )
    return begun if first else _shift(begun, seen)


def _shift(rollout: Rollout, seen: RolloutInput) -> Rollout:
    steps = rollout.spec.steps
    if rollout.step >= len(steps):
        most = seen.desired if seen.candidate_max is None else min(seen.desired, seen.candidate_max)
        enough = seen.candidate_ready >= max(1, most)
        squeezed = seen.no_room and seen.candidate_ready >= 1 and seen.candidate_starting == 0
        if enough or squeezed:
            return _shifted(rollout, seen, "the new revision is ready for all traffic")
        return rollout
    step = steps[rollout.step]
    over = seen.now_unix_ns - rollout.step_unix_ns >= _ns(step.s)
    if step.hold or not over or seen.new.done < step.requests_min:
        return rollout
    if seen.desired and seen.candidate_ready == 0:
        return rollout
    following = rollout.step + 1
    weight = steps[following].weight if following < len(steps) else rollout.weight
    reason = f"{seen.new.done} answers at {rollout.weight:.3g} of the traffic gave no cause to go back"
    return msgspec.structs.replace(
        rollout, step=following, weight=weight, step_unix_ns=seen.now_unix_ns, reason=reason
    )


def _shifted(rollout: Rollout, seen: RolloutInput, reason: str) -> Rollout:
    return msgspec.structs.replace(
        rollout,
        phase=RolloutPhase.PROVING,
        step=len(rollout.spec.steps),
        weight=1.0,
        step_unix_ns=seen.now_unix_ns if seen.candidate_ready else 0,
        reason=reason,
    )


def _prove(rollout: Rollout, seen: RolloutInput) -> Rollout:
    if not rollout.step_unix_ns:
        if seen.candidate_ready == 0:
            return rollout
        return msgspec.structs.replace(rollout, step_unix_ns=seen.now_unix_ns)
    if rollout.paused or seen.now_unix_ns - rollout.step_unix_ns < _ns(rollout.spec.prove_s):
        return rollout
    return ended(rollout, RolloutPhase.DONE, "the new revision has proven itself", seen.now_unix_ns)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
