"""The fake: the whole port over dictionaries. It passes the same contract suite as SQLite."""

from __future__ import annotations

import msgspec

from snowdrop.domain.deployment import Deployment, ModelRecord, Revision
from snowdrop.domain.errors import ConflictError
from snowdrop.domain.ids import DeploymentName, ModelName, NodeId, ReceiptId, ReplicaId, RevisionId, TenantId
from snowdrop.domain.receipt import CallerTimes, Receipt
from snowdrop.domain.ref import Seen
from snowdrop.domain.replica import TERMINAL_STATES, ReplicaReport
from snowdrop.domain.usage import UsageRecord, UsageTotal
from snowdrop.state.memory_scaling import MemoryScaling
from snowdrop.state.memory_tasks import MemoryTasks
from snowdrop.state.port import KeyRecord
from snowdrop.state.secrets import MemorySecrets


class MemoryState:
    """State that lives as long as the object."""

    def __init__(self) -> None:
        self._models: dict[tuple[TenantId, ModelName], ModelRecord] = {}
        self._seen: dict[tuple[TenantId, ModelName], Seen] = {}
        self._revisions: dict[tuple[TenantId, DeploymentName, RevisionId], Revision] = {}
        self._deployments: dict[tuple[TenantId, DeploymentName], Deployment] = {}
        self._replicas: dict[ReplicaId, ReplicaReport] = {}
        self._receipts: dict[ReceiptId, Receipt] = {}
        self._usage: dict[tuple[NodeId, str, int], UsageRecord] = {}
        self._keys: dict[tuple[TenantId, str], KeyRecord] = {}
        self.tasks = MemoryTasks()
        self.scaling = MemoryScaling()
        self.secrets = MemorySecrets()

    async def put_model(self, record: ModelRecord) -> None:
        key = (record.tenant, record.name)
        newest = self._seen.get(key)
        if newest is not None and not newest.allows(record.generation, record.artefact.manifest):
            raise stale_model(record, newest)
        self._seen[key] = Seen(generation=record.generation, manifest=record.artefact.manifest)
        self._models[key] = record

    async def newest_ref(self, tenant: TenantId, name: ModelName) -> Seen | None:
        return self._seen.get((tenant, name))

    async def get_model(self, tenant: TenantId, name: ModelName) -> ModelRecord | None:
        return self._models.get((tenant, name))

    async def list_models(self, tenant: TenantId | None) -> list[ModelRecord]:
        found = (m for m in self._models.values() if tenant in {None, m.tenant})
        return sorted(found, key=lambda m: (m.tenant, m.name))

    async def delete_model(self, tenant: TenantId, name: ModelName) -> bool:
        return self._models.pop((tenant, name), None) is not None

    async def put_revision(self, revision: Revision) -> None:
        key = (revision.tenant, revision.deployment, revision.id)
        if self._revisions.get(key, revision) != revision:
            raise ConflictError(f"revision {revision.id} exists already", where=str(revision.deployment))
        self._revisions[key] = revision

    async def get_revision(
        self, tenant: TenantId, deployment: DeploymentName, revision: RevisionId
    ) -> Revision | None:
        return self._revisions.get((tenant, deployment, revision))

    async def list_revisions(self, tenant: TenantId, deployment: DeploymentName) -> list[Revision]:
        found = [r for r in self._revisions.values() if (r.tenant, r.deployment) == (tenant, deployment)]
        return sorted(found, key=lambda r: r.created_unix_ns, reverse=True)

    async def list_all_revisions(self) -> list[Revision]:
        return list(self._revisions.values())

    async def put_deployment(self, deployment: Deployment, *, expected_generation: int) -> None:
        key = (deployment.tenant, deployment.name)
        stored = self._deployments.get(key)
        generation = stored.generation if stored else 0
        if generation != expected_generation:
            raise stale_deployment(deployment.name, generation, expected_generation)
        self._deployments[key] = deployment

    async def get_deployment(self, tenant: TenantId, name: DeploymentName) -> Deployment | None:
        return self._deployments.get((tenant, name))

    async def list_deployments(self, tenant: TenantId | None) -> list[Deployment]:
        found = [d for d in self._deployments.values() if tenant in {None, d.tenant}]
        return sorted(found, key=lambda d: (d.tenant, d.name))

    async def delete_deployment(self, tenant: TenantId, name: DeploymentName, *, expected_generation: int) -> bool:
        stored = self._deployments.get((tenant, name))
        if stored is None or stored.generation != expected_generation:
            return False
        for key in [k for k in self._revisions if k[:2] == (tenant, name)]:
            del self._revisions[key]
        del self._deployments[tenant, name]
        self.scaling.forget(tenant, name)
        return True

    async def put_replica(self, report: ReplicaReport) -> None:
        stored = self._replicas.get(report.key.replica)
        if stored is None or stored.version < report.version:
            self._replicas[report.key.replica] = report

    async def list_replicas(
        self, tenant: TenantId | None, deployment: DeploymentName | None, *, ended: bool, limit: int
    ) -> list[ReplicaReport]:
        found = [
            r
            for r in self._replicas.values()
            if tenant in {None, r.key.tenant}
            and deployment in {None, r.key.deployment}
            and (ended or r.state not in TERMINAL_STATES)
        ]
        return sorted(found, key=lambda r: r.started_unix_ns, reverse=True)[:limit]

    async def put_receipt(self, receipt: Receipt) -> None:
        stored = self._receipts.get(receipt.id)
        if stored is not None and receipt.caller is None:
            receipt = msgspec.structs.replace(receipt, caller=stored.caller)
        self._receipts[receipt.id] = receipt

    async def set_caller(self, receipt: ReceiptId, caller: CallerTimes) -> bool:
        stored = self._receipts.get(receipt)
        if stored is None:
            return False
        if stored.caller is None:
            self._receipts[receipt] = msgspec.structs.replace(stored, caller=caller)
        return True

    async def get_receipt(self, tenant: TenantId, receipt: ReceiptId) -> Receipt | None:
        found = self._receipts.get(receipt)
        return found if found is not None and found.tenant == tenant else None

    async def list_receipts(
        self, tenant: TenantId, deployment: DeploymentName | None, *, limit: int
    ) -> list[Receipt]:
        found = [r for r in self._receipts.values() if r.tenant == tenant and deployment in {None, r.deployment}]
        return sorted(found, key=lambda r: r.started_unix_ns, reverse=True)[:limit]

    async def trim(self, *, receipts_max: int, replicas_max: int) -> None:
        receipts = sorted(self._receipts.values(), key=lambda r: r.started_unix_ns, reverse=True)
        for receipt in receipts[receipts_max:]:
            del self._receipts[receipt.id]
        ended = [r for r in self._replicas.values() if r.state in TERMINAL_STATES]
        for report in sorted(ended, key=lambda r: r.started_unix_ns, reverse=True)[replicas_max:]:
            del self._replicas[report.key.replica]

    async def append_usage(self, records: tuple[UsageRecord, ...]) -> None:
        for record in records:
            self._usage.setdefault((record.node, record.source, record.sequence), record)

    async def last_usage_sequence(self, node: NodeId, source: str) -> int:
        return max((key[2] for key in self._usage if key[:2] == (node, source)), default=0)

    async def usage_totals(self, tenant: TenantId) -> list[UsageTotal]:
        sums: dict[tuple[DeploymentName, str, str], int] = {}
        for record in self._usage.values():
            if record.tenant == tenant:
                key = (record.deployment, record.unit, record.detail)
                sums[key] = sums.get(key, 0) + record.quantity
        rows = [{"deployment": d, "unit": u, "detail": t, "quantity": q} for (d, u, t), q in sorted(sums.items())]
        return msgspec.convert(rows, list[UsageTotal])

    async def put_key(self, record: KeyRecord) -> None:
        if (record.tenant, record.name) in self._keys:
            raise ConflictError(
                f"a key named {record.name!r} exists", next_step="revoke it first, or choose another"
            )
        self._keys[record.tenant, record.name] = record

    async def list_keys(self, tenant: TenantId | None) -> list[KeyRecord]:
        found = [k for k in self._keys.values() if tenant in {None, k.tenant}]
        return sorted(found, key=lambda k: (k.tenant, k.name))

    async def delete_key(self, tenant: TenantId, name: str) -> bool:
        return self._keys.pop((tenant, name), None) is not None

    async def aclose(self) -> None:
        return None


def stale_deployment(name: str, stored: int, expected: int) -> ConflictError:
    """The error for a fenced write that came second."""
    if expected == 0:
        return ConflictError(f"deployment {name!r} exists already", where=name)
    return ConflictError(
        f"deployment {name!r} changed meanwhile (generation {stored}, expected {expected})",
        where=name,
        next_step="read it again and repeat the change",
    )


def stale_model(record: ModelRecord, newest: Seen) -> ConflictError:
    """The error for a model's record that is not newer than what was stored before."""
    return ConflictError(
        f"model {record.name!r} was pushed by somebody else meanwhile (generation {newest.generation})",
        where=f"generation {record.generation}",
        next_step="look at what is there now; push again to replace it",
    )
