"""What is kept of a request that waited for a slot, or was refused one: the answer to "why did it wait?"."""

from __future__ import annotations

from typing import Literal

import msgspec

from snowdrop.domain.ids import DeploymentName, ReceiptId, ReplicaId, TenantId

Outcome = Literal["granted", "refused", "too_long", "gone", "waiting"]


class WaitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One wait, from its beginning in the queue to its end.

    `position` is how many were ahead when it began, `reason` what it waited for then, in words, `expected_s` what
    was forecast then (None: nothing was known). Of one that waits still (`waiting`) all of it is as it is at
    `ended_unix_ns`. `gone`: the caller left. `receipt` is there if it waited for a
    replica to start; that has the phases. `error` is the kind of the error it got.
    """

    request_id: str
    tenant: TenantId
    deployment: DeploymentName
    arrived_unix_ns: int
    ended_unix_ns: int
    outcome: Outcome
    reason: str
    position: int = 0
    priority: int = 0
    expected_s: float | None = None
    replica: ReplicaId | None = None
    receipt: ReceiptId | None = None
    error: str = ""

    @property
    def waited_s(self) -> float:
        return (self.ended_unix_ns - self.arrived_unix_ns) / 1e9
