"""The port to durable state. Every key starts with the tenant; nothing is addressed without one.

Writes are atomic one by one. `put_deployment` is fenced by generation: a writer that read an older one gets
ConflictError. Usage is append-only and idempotent by (node, source, sequence).
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from snowdrop.domain.deployment import Deployment, ModelRecord, Revision
from snowdrop.domain.ids import DeploymentName, ModelName, NodeId, ReceiptId, RevisionId, TenantId
from snowdrop.domain.receipt import CallerTimes, Receipt
from snowdrop.domain.ref import Seen
from snowdrop.domain.replica import ReplicaReport
from snowdrop.domain.usage import UsageRecord, UsageTotal
from snowdrop.state.scaling import ScalingStore
from snowdrop.state.secrets import SecretStore
from snowdrop.state.tasks import TaskStore

LIST_MAX = 10_000
"""Most rows that one list call returns."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An API key: the SHA-256 of its secret, whose it is, and a name to revoke it by.

    `priority_max`: requests with it get no higher priority in queues; None: as high as a deployment lets any.
    """

    tenant: TenantId
    name: str
    key_sha256: str
    created_unix_ns: int
    priority_max: int | None = None


class StateStore(Protocol):
    """All methods raise StorageFullError when nothing can be written; reads of what is not there give None."""

    @property
    def tasks(self) -> TaskStore: ...
    @property
    def scaling(self) -> ScalingStore: ...
    @property
    def secrets(self) -> SecretStore: ...

    async def put_model(self, record: ModelRecord) -> None:
        """Stores it and remembers its generation, for ever. ConflictError if a newer one was stored before,
        or another one of this generation.
        """
        ...

    async def get_model(self, tenant: TenantId, name: ModelName) -> ModelRecord | None: ...
    async def newest_ref(self, tenant: TenantId, name: ModelName) -> Seen | None:
        """The newest generation ever stored of a model's name, also after the model was deleted."""
        ...

    async def list_models(self, tenant: TenantId | None) -> list[ModelRecord]:
        """Of one tenant, or of all; by tenant and name."""
        ...

    async def delete_model(self, tenant: TenantId, name: ModelName) -> bool:
        """Whether it was there."""
        ...

    async def put_revision(self, revision: Revision) -> None:
        """Raises ConflictError if another revision has this id."""
        ...

    async def get_revision(
        self, tenant: TenantId, deployment: DeploymentName, revision: RevisionId
    ) -> Revision | None: ...
    async def list_revisions(self, tenant: TenantId, deployment: DeploymentName) -> list[Revision]:
        """Newest first."""
        ...

    async def list_all_revisions(self) -> list[Revision]:
        """Of all tenants and deployments, without a bound: collection must not miss one."""
        ...

    async def put_deployment(self, deployment: Deployment, *, expected_generation: int) -> None:
        """Stores it if the stored generation is `expected_generation` (0: not there), else ConflictError."""
        ...

    async def get_deployment(self, tenant: TenantId, name: DeploymentName) -> Deployment | None: ...
    async def list_deployments(self, tenant: TenantId | None) -> list[Deployment]:
        """Of one tenant, or of all for the reconcile loop; by tenant and name."""
        ...

    async def delete_deployment(self, tenant: TenantId, name: DeploymentName, *, expected_generation: int) -> bool:
        """Removes it, its revisions and what was learned of it, if it is still of that generation; receipts,
        replicas and usage stay.

        Whether it was removed.
        """
        ...

    async def put_replica(self, report: ReplicaReport) -> None:
        """Keeps the report with the higher version."""
        ...

    async def list_replicas(
        self, tenant: TenantId | None, deployment: DeploymentName | None, *, ended: bool, limit: int
    ) -> list[ReplicaReport]:
        """Newest first; without `ended` only those that are not stopped or failed."""
        ...

    async def put_receipt(self, receipt: Receipt) -> None:
        """Stores it, or replaces the one with its id, whose `caller` is kept if the new one has none."""
        ...

    async def set_caller(self, receipt: ReceiptId, caller: CallerTimes) -> bool:
        """Completes a receipt once; later calls change nothing. Whether the receipt is there."""
        ...

    async def get_receipt(self, tenant: TenantId, receipt: ReceiptId) -> Receipt | None: ...
    async def list_receipts(
        self, tenant: TenantId, deployment: DeploymentName | None, *, limit: int
    ) -> list[Receipt]:
        """Newest first."""
        ...

    async def trim(self, *, receipts_max: int, replicas_max: int) -> None:
        """Drops the oldest receipts and the oldest ended replicas beyond the bounds, over all tenants."""
        ...

    async def append_usage(self, records: tuple[UsageRecord, ...]) -> None:
        """Adds those that are not there yet, all or none."""
        ...

    async def last_usage_sequence(self, node: NodeId, source: str) -> int:
        """The highest sequence stored of a journal; 0 if none."""
        ...

    async def usage_totals(self, tenant: TenantId) -> list[UsageTotal]:
        """Sums by deployment, unit and detail."""
        ...

    async def put_key(self, record: KeyRecord) -> None:
        """Raises ConflictError if the tenant has a key of this name."""
        ...

    async def list_keys(self, tenant: TenantId | None) -> list[KeyRecord]: ...
    async def delete_key(self, tenant: TenantId, name: str) -> bool: ...
    async def aclose(self) -> None: ...
