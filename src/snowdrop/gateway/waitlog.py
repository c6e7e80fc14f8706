"""Keeps what is worth knowing of waits until control has been told: why did this request wait?"""

from __future__ import annotations

from collections import deque

from snowdrop.domain.errors import ErrorBody
from snowdrop.gateway.effects import Now
from snowdrop.gateway.table import Deployment, Waiting
from snowdrop.wire.slots import Acquire, Granted
from snowdrop.wire.waits import Outcome, WaitRecord

RECORDS_MAX = 2_000
"""Beyond it the oldest are forgotten."""
REPORTED_MAX = 100
"""So many ride on one report of load."""
WORTH_S = 0.1
"""A grant after a shorter wait is not kept."""


class WaitLog:
    """A bounded list of records, oldest first."""

    def __init__(self) -> None:
        self._records: deque[WaitRecord] = deque(maxlen=RECORDS_MAX)

    def __bool__(self) -> bool:
        return bool(self._records)

    def take(self) -> tuple[WaitRecord, ...]:
        """The oldest few, which are forgotten by this."""
        return tuple(self._records.popleft() for _ in range(min(REPORTED_MAX, len(self._records))))

    def granted(self, deployment: Deployment, waited: Waiting, granted: Granted, now: Now) -> None:
        if now.s - waited.since_s >= WORTH_S:
            self._ended(deployment, waited, "granted", now, granted=granted)

    def denied(self, deployment: Deployment, waited: Waiting, error: ErrorBody, now: Now) -> None:
        outcome: Outcome = "too_long" if error.kind in {"waited_too_long", "timed_out"} else "refused"
        self._ended(deployment, waited, outcome, now, error=error.kind)

    def gone(self, deployment: Deployment, waited: Waiting, now: Now) -> None:
        self._ended(deployment, waited, "gone", now)

    def refused(self, deployment: Deployment, request: Acquire, error: ErrorBody, now: Now) -> None:
        """Refused when it came: it has not waited at all."""
        self._records.append(
            WaitRecord(
                request_id=request.request_id,
                tenant=deployment.route.tenant,
                deployment=deployment.route.deployment,
                arrived_unix_ns=request.arrived_unix_ns,
                ended_unix_ns=now.unix_ns,
                outcome="refused",
                reason=error.message,
                position=len(deployment.line),
                error=error.kind,
            )
        )

    def _ended(
        self,
        deployment: Deployment,
        waited: Waiting,
        outcome: Outcome,
        now: Now,
        *,
        granted: Granted | None = None,
        error: str = "",
    ) -> None:
        self._records.append(
            WaitRecord(
                request_id=waited.request.request_id,
                tenant=deployment.route.tenant,
                deployment=deployment.route.deployment,
                arrived_unix_ns=waited.since_unix_ns,
                ended_unix_ns=now.unix_ns,
                outcome=outcome,
                reason=waited.reason,
                position=waited.position,
                priority=waited.priority,
                expected_s=waited.expected_s,
                replica=granted.replica if granted is not None else None,
                receipt=granted.receipt if granted is not None else None,
                error=error,
            )
        )


def waiting_now(deployment: Deployment, request_id: str, now: Now) -> tuple[WaitRecord, ...]:
    """How requests of that id wait at this instant; costs as much as the line is long."""
    found = [waiting for waiting in deployment.line.values() if waiting.request.request_id == request_id]
    ranks = deployment.line.ranks() if found else {}
    return tuple(
        WaitRecord(
            request_id=request_id,
            tenant=deployment.route.tenant,
            deployment=deployment.route.deployment,
            arrived_unix_ns=waiting.since_unix_ns,
            ended_unix_ns=now.unix_ns,
            outcome="waiting",
            reason=deployment.reason,
            position=ranks[waiting.ticket],
            priority=waiting.priority,
            expected_s=deployment.expected_s(now, ranks[waiting.ticket]),
        )
        for waiting in found
    )
