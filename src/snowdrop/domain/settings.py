"""Settings, one typed group per process or concern. `snowdrop.cli.settings_file` reads them with their sources.

Every number has its unit in its name. Ports of 0 mean: let the system choose (tests do).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from snowdrop.domain.origin import OriginOptions

Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Launches = Annotated[int, msgspec.Meta(ge=0, le=1_024)]
Workers = Annotated[int, msgspec.Meta(ge=1, le=64)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
SomeBytes = Annotated[int, msgspec.Meta(ge=1)]
Period = Annotated[float, msgspec.Meta(ge=0.01, le=3_600)]
"""Of a loop: below 10 ms it would only burn the processor."""
Grace = Annotated[float, msgspec.Meta(ge=0, le=31_536_000)]
"""How long garbage is kept: up to a year."""
Bound = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]
LeaseTime = Annotated[float, msgspec.Meta(ge=0.5, le=3_600)]
NodeName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Uid = Annotated[int, msgspec.Meta(ge=1_000, le=2_000_000_000)]


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP edge. `workers` is how many processes relay; one of them owns the queues.

    With a certificate the port speaks TLS. HTTP/2 has a port of its own: with TLS, or without a certificate in the
    clear and with prior knowledge. After a reload old workers get `reload_s_max` to end what they have begun.
    """

    host: str = "127.0.0.1"
    port: Port = 8642
    workers: Workers = 1
    keys_required: bool = False
    request_bytes_max: SomeBytes = 1 << 30
    load_report_s: Period = 0.25
    shutdown_s_max: Bound = 30.0
    reload_s_max: Bound = 3_600.0
    websocket_idle_s_max: Bound = 3_600.0
    tls_certificate_file: str = ""
    tls_key_file: str = ""
    tls_version_min: Literal["1.2", "1.3"] = "1.2"
    http2: bool = False
    http2_port: Port = 8643

    def url(self, host: str, port: int) -> str:
        """The gateway's address, as it is told to people."""
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls_certificate_file else 'http'}://{shown}:{port}"


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The reconcile loop; how many receipts, ended replicas, waits, and decisions of each deployment are kept.

    With `make_room` a start that finds no room takes that of replicas of other deployments that have been without
    a request for `make_room_idle_s`.
    """

    tick_s: Period = 0.5
    settle_s_max: Bound = 3.0
    receipts_kept_max: Count = 10_000
    replicas_kept_max: Count = 10_000
    decisions_kept_max: Count = 1_000
    waits_kept_max: Count = 10_000
    make_room: bool = True
    make_room_idle_s: Bound = 1.0


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The node. Memory for replicas is what placement may promise; 0 means all but a tenth of the machine's.

    `volumes_read_only` and `volumes_writable` are directories of the host that services may mount, joined by
    colons; what lies in them is shared with every tenant. `bwrap` is the path of bubblewrap; empty means the one
    that is installed with Snowdrop. Of replicas that start at once, `launches_max` make their sandboxes and import
    at a time; 0 is as many as there are processors.
    Parents with imports done, of which replicas are forks, use `warm_bytes_max` at most; 0 is none.
    """

    node: NodeName = "node-0"
    instance_type: str = "local"
    memory_bytes: Bytes = 0
    usage_tick_s: Period = 1.0
    content_s_max: Bound = 3_600.0
    log_bytes_max: SomeBytes = 8 << 20
    unsafe_no_sandbox: bool = False
    bwrap: str = ""
    uid_base: Uid = 700_000
    volumes_read_only: str = ""
    volumes_writable: str = ""
    stop_s_max: Bound = 10.0
    launches_max: Launches = 0
    warm_bytes_max: Bytes = 1 << 30


class ContentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where content comes from and how much of it the node keeps. An empty origin is a folder in the state.

    `ram_bytes_max` bounds landing areas and what is kept ready for them, of which there are `pool_bytes`.
    What is on disk is read again at `scrub_bytes_per_s`, 0 is not at all.
    Secrets are no settings: they come from the environment, or from `origin_credentials_file`. The two limits of
    bytes per second are of this node, 0 is none; `tenant_bytes_per_s_max` holds for each tenant by itself.
    """

    origin_url: str = ""
    origin_endpoint: str = ""
    origin_region: str = ""
    origin_credentials_file: str = ""
    origin_ca_file: str = ""
    origin_anonymous: bool = False
    origin_bytes_per_s_max: Bytes = 0
    tenant_bytes_per_s_max: Bytes = 0
    collect_grace_s: Grace = 86_400.0
    ram_bytes_max: SomeBytes = 4 << 30
    pool_bytes: Bytes = 1 << 30
    disk_bytes_max: SomeBytes = 100 << 30
    fetch_threads: Workers = 8
    scrub_bytes_per_s: Bytes = 32 << 20

    def origin_options(self) -> OriginOptions:
        """How to reach `origin_url`."""
        return OriginOptions(
            endpoint=self.origin_endpoint,
            region=self.origin_region,
            credentials_file=self.origin_credentials_file,
            ca_file=self.origin_ca_file,
            anonymous=self.origin_anonymous,
        )


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the platform's processes write to their logs, and which requests get a line there."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: Literal["none", "errors", "all"] = "errors"


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Prometheus metrics over TCP; without a host they are on a unix socket in the state folder only."""

    host: str = ""
    port: Port = 9642


class TracingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Traces by OTLP over HTTP to a collector's base address; empty is off.

    `sample_ratio` is for requests that come without a trace; for others it is their caller's word.
    """

    otlp_endpoint: str = ""
    sample_ratio: Ratio = 0.01


class TaskSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Durable tasks: how long a lease lasts, how many wait and run, what is kept of them and for how long.

    Ended tasks go after `kept_s`, and oldest first above `kept_max` or `stored_bytes_max`. Webhooks go to public
    addresses only, unless `webhook_private_allowed`.
    """

    lease_s: LeaseTime = 15.0
    attempts_max: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    ttl_s: Grace = 86_400.0
    waiting_max: Count = 100_000
    running_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 256
    body_bytes_max: SomeBytes = 64 << 20
    result_bytes_max: SomeBytes = 256 << 20
    stored_bytes_max: SomeBytes = 10 << 30
    kept_s: Grace = 604_800.0
    kept_max: Count = 100_000
    webhook_private_allowed: bool = False


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All groups. `state` is the folder that holds everything the platform writes."""

    state: str = ""
    gateway: GatewaySettings = GatewaySettings()
    control: ControlSettings = ControlSettings()
    agent: AgentSettings = AgentSettings()
    content: ContentSettings = ContentSettings()
    logs: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    metrics: MetricsSettings = MetricsSettings()
    tasks: TaskSettings = TaskSettings()
