"""The part of durable state that holds what autoscaling decided and learned, and why requests waited.

A port of its own, implemented by SQLite and by the memory fake. All of it may be lost without harm: deciding goes
on from what is seen.
"""

from __future__ import annotations

from typing import Protocol

from snowdrop.domain.ids import DeploymentName, TenantId
from snowdrop.policy.autoscale.learned import Learned
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.wire.waits import WaitRecord


class ScalingStore(Protocol):
    """Raises as `StateStore` does."""

    async def put_decision(self, record: ScalingRecord) -> None:
        """Adds it to the history of its deployment; one of the same moment is replaced."""
        ...

    async def list_decisions(
        self, tenant: TenantId, deployment: DeploymentName, *, since_unix_ns: int, limit: int
    ) -> list[ScalingRecord]:
        """Newest first, not older than `since_unix_ns`."""
        ...

    async def put_learned(self, tenant: TenantId, deployment: DeploymentName, learned: Learned) -> None: ...
    async def get_learned(self, tenant: TenantId, deployment: DeploymentName) -> Learned | None: ...
    async def put_waits(self, waits: tuple[WaitRecord, ...]) -> None:
        """Keeps how requests waited, all or none."""
        ...

    async def get_waits(
        self, tenant: TenantId, deployment: DeploymentName, *, request_id: str | None, limit: int
    ) -> list[WaitRecord]:
        """Of one request (which may have waited several times), or of all; those that ended last first."""
        ...

    async def trim(self, *, decisions_max: int, waits_max: int) -> None:
        """Drops the oldest decisions of each deployment, and the oldest waits of all, beyond the bounds."""
        ...
