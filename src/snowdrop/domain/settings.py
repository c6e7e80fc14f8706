"""Settings, one typed group per process or concern. `snowdrop.cli.settings_file` reads them with their sources.

Every number has its unit in its name. Ports of 0 mean: let the system choose (tests do).
"""

from __future__ import annotations

import msgspec


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP edge. `workers` is how many processes relay; one of them owns the queues."""

    host: str = "127.0.0.1"
    port: int = 8642
    workers: int = 1
    keys_required: bool = False
    request_bytes_max: int = 1 << 30
    load_report_s: float = 0.25
    shutdown_s_max: float = 30.0


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The reconcile loop, and how many receipts and ended replicas the state keeps."""

    tick_s: float = 0.5
    settle_s_max: float = 3.0
    receipts_kept_max: int = 10_000
    replicas_kept_max: int = 10_000


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The node. Memory for replicas is what placement may promise; 0 means all but a tenth of the machine's.

    `bwrap` is the path of bubblewrap; empty means the one that is installed with Snowdrop.
    """

    node: str = "node-0"
    instance_type: str = "local"
    memory_bytes: int = 0
    usage_tick_s: float = 1.0
    content_s_max: float = 3_600.0
    log_bytes_max: int = 8 << 20
    unsafe_no_sandbox: bool = False
    bwrap: str = ""
    uid_base: int = 700_000
    stop_s_max: float = 10.0


class ContentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where content comes from and how much of it the node keeps. An empty origin is a folder in the state."""

    origin_url: str = ""
    ram_bytes_max: int = 4 << 30
    disk_bytes_max: int = 100 << 30
    fetch_threads: int = 4


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All groups. `state` is the folder that holds everything the platform writes."""

    state: str = ""
    gateway: GatewaySettings = GatewaySettings()
    control: ControlSettings = ControlSettings()
    agent: AgentSettings = AgentSettings()
    content: ContentSettings = ContentSettings()
