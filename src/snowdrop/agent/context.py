"""What every replica on a node shares: the launcher, the data plane, folders, bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.agent.mounts import ModelMounts
from snowdrop.agent.sandbox.launcher import Launcher
from snowdrop.agent.turns import Turns
from snowdrop.agent.warm import WarmPool
from snowdrop.domain.ids import NodeId
from snowdrop.domain.replica import ReplicaKey, ReplicaReport
from snowdrop.domain.settings import AgentSettings
from snowdrop.telemetry.tracing import NoTracing, Tracing

LOGS_KEPT_MAX = 20
"""Log files kept per deployment; the oldest go when a new replica starts."""


class NodeContext(msgspec.Struct, frozen=True, kw_only=True):
    """Given to every ReplicaRunner. `data_plane` waits for a living one, bounded."""

    node: NodeId
    python: str
    launcher: Launcher
    data_plane: Callable[[], Awaitable[DataPlane]]
    mounts: ModelMounts
    sockets: Path
    calls: Path
    logs: Path
    volumes: Path
    settings: AgentSettings
    on_change: Callable[[ReplicaReport], None]
    turns: Turns
    tracing: Tracing = NoTracing()
    warm: WarmPool | None = None

    @property
    def is_tracing(self) -> bool:
        """Whether spans have anywhere to go, so that a replica need not tell of them otherwise."""
        return not isinstance(self.tracing, NoTracing)

    def socket_path(self, key: ReplicaKey) -> Path:
        return self.sockets / f"{key.replica}.sock"

    def log_path(self, key: ReplicaKey) -> Path:
        """The log's path; its folder exists afterwards and holds at most LOGS_KEPT_MAX logs with it."""
        folder = log_folder(self.logs, key.tenant, key.deployment)
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in old[LOGS_KEPT_MAX - 1 :]:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".1").unlink(missing_ok=True)
        return folder / f"{key.replica}.log"


def log_folder(logs: Path, tenant: str, deployment: str) -> Path:
    return logs / tenant / deployment
