"""Usage facts: immutable, append-only, counted exactly once.

A record's identity is (node, source, sequence): the agent numbers its records in a durable journal before it
sends them, so the ledger can drop a repeat by its key and notice a gap.
"""

from typing import Literal

import msgspec

from snowdrop.domain.ids import DeploymentName, NodeId, ReplicaId, RevisionId, TenantId

UsageUnit = Literal["replica_ns", "content_bytes"]


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One metered fact about [from_unix_ns, to_unix_ns). `detail` is the tier for content bytes."""

    node: NodeId
    source: str
    sequence: int
    tenant: TenantId
    deployment: DeploymentName
    revision: RevisionId
    replica: ReplicaId
    unit: UsageUnit
    quantity: int
    detail: str = ""
    from_unix_ns: int
    to_unix_ns: int


class UsageTotal(msgspec.Struct, frozen=True, kw_only=True):
    """A sum over records of one unit and detail."""

    deployment: DeploymentName
    unit: UsageUnit
    detail: str
    quantity: int
