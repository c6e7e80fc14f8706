"""The fake of the scaling store, over dictionaries."""

from __future__ import annotations

from snowdrop.domain.ids import DeploymentName, TenantId
from snowdrop.policy.autoscale.learned import Learned
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.wire.waits import WaitRecord

DeploymentKey = tuple[TenantId, DeploymentName]


class MemoryScaling:
    """Lives as long as the object."""

    def __init__(self) -> None:
        self._decisions: dict[DeploymentKey, dict[int, ScalingRecord]] = {}
        self._learned: dict[DeploymentKey, Learned] = {}
        self._waits: dict[tuple[TenantId, str, int], WaitRecord] = {}

    async def put_decision(self, record: ScalingRecord) -> None:
        self._decisions.setdefault((record.tenant, record.deployment), {})[record.unix_ns] = record

    async def list_decisions(
        self, tenant: TenantId, deployment: DeploymentName, *, since_unix_ns: int, limit: int
    ) -> list[ScalingRecord]:
        kept = self._decisions.get((tenant, deployment), {})
        return [kept[moment] for moment in sorted(kept, reverse=True) if moment >= since_unix_ns][:limit]

    async def put_learned(self, tenant: TenantId, deployment: DeploymentName, learned: Learned) -> None:
        self._learned[tenant, deployment] = learned

    async def get_learned(self, tenant: TenantId, deployment: DeploymentName) -> Learned | None:
        return self._learned.get((tenant, deployment))

    def forget(self, tenant: TenantId, deployment: DeploymentName) -> None:
        """What was learned of a deployment that is gone."""
        self._learned.pop((tenant, deployment), None)

    async def put_waits(self, waits: tuple[WaitRecord, ...]) -> None:
        for wait in waits:
            self._waits[wait.tenant, wait.request_id, wait.ended_unix_ns] = wait

    async def get_waits(
        self, tenant: TenantId, deployment: DeploymentName, *, request_id: str | None, limit: int
    ) -> list[WaitRecord]:
        found = [w for w in self._waits.values() if (w.tenant, w.deployment) == (tenant, deployment)]
        chosen = [w for w in found if request_id in {None, w.request_id}]
        return sorted(chosen, key=lambda w: w.ended_unix_ns, reverse=True)[:limit]

    async def trim(self, *, decisions_max: int, waits_max: int) -> None:
        by_end = sorted(self._waits, key=lambda key: key[2], reverse=True)
        for key in by_end[waits_max:]:
            del self._waits[key]
        for kept in self._decisions.values():
            for moment in sorted(kept, reverse=True)[decisions_max:]:
                del kept[moment]
