"""Agent -> gateway, on a connection that is about to be given to a replica: whose calls come on it.

HTTP on a unix socket that only the platform may open. The agent's first request says who will call; after its
answer the connection is the replica's, and whatever that sends is a call by it: no header can say otherwise.
"""

from __future__ import annotations

import msgspec

from snowdrop.domain.ids import DeploymentName, ReplicaId, TenantId

INTRODUCTION_PATH = "/-/caller"
SOCKET_SUFFIX = ".sock"
INTRODUCTION_BYTES_MAX = 64 << 10


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """The replica that will call, and which deployments of its tenant it may."""

    tenant: TenantId
    deployment: DeploymentName
    replica: ReplicaId
    calls: tuple[str, ...]
