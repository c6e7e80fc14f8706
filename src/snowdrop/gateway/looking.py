"""What somebody is told who asks whether a deployment is ready."""

from __future__ import annotations

from snowdrop.gateway.effects import Now
from snowdrop.gateway.table import Deployment
from snowdrop.policy.waiting import percent
from snowdrop.wire.slots import Looked


def looked(ticket: int, deployment: Deployment, now: Now) -> Looked:
    """How a deployment stands. `expected_s` is that of a request that would come now."""
    route = deployment.route
    ready = deployment.accepting
    free = deployment.slots - sum(r.in_flight for r in deployment.replicas.values() if r.accepting)
    expected_s = 0.0 if free > 0 and not deployment.line else deployment.expected_s(now, len(deployment.line))
    begun = min((one.ordered_unix_ns for one in route.coming), default=now.unix_ns)
    return Looked(
        ticket=ticket,
        ready=ready,
        starting=route.starting,
        replicas_max=route.replicas_max,
        slots=deployment.slots,
        in_flight=deployment.in_flight,
        queued=len(deployment.line),
        phase="ready" if free > 0 else deployment.phase,
        expected_s=expected_s,
        percent=None if ready else percent(max(0.0, (now.unix_ns - begun) / 1e9), expected_s),
        woken=bool(deployment.woken_until_s),
        own_readyz=route.own_readyz,
        revision=route.revision,
        error=route.refusal,
    )
