"""Wires one node's agent from settings: launcher, data plane, journal, link, API."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from aiohttp import web

from snowdrop.agent.api import build_agent_api
from snowdrop.agent.bytecode import keep_bytecode
from snowdrop.agent.content import DataPlaneKeeper
from snowdrop.agent.context import NodeContext
from snowdrop.agent.dataplane.client import DataPlane, raise_descriptor_limit
from snowdrop.agent.link import AgentLink
from snowdrop.agent.metrics import add_metrics_route
from snowdrop.agent.mounting import add_mount_routes
from snowdrop.agent.mounts import ModelMounts
from snowdrop.agent.node import Node
from snowdrop.agent.sandbox.bubblewrap import BubblewrapLauncher, UidPool, find_bwrap
from snowdrop.agent.sandbox.detect import detect_limits
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.launcher import Launcher
from snowdrop.agent.sandbox.limits import LimitBackend
from snowdrop.agent.sandbox.unsafe import PlainLauncher
from snowdrop.agent.turns import Turns
from snowdrop.agent.warm import WarmPool
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.deployment import NodeRecord
from snowdrop.domain.ids import NodeId, fresh_id
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.settings import AgentSettings, Settings
from snowdrop.metering.journal import UsageJournal
from snowdrop.telemetry.tracing import open_tracing
from snowdrop.wire.http import serving_unix

MEMORY_KEPT_SHARE = 0.1
"""Part of the machine's memory that placement leaves to everything else."""

UID_SLOTS = 16
UIDS_EACH = 4096

log = logging.getLogger("snowdrop.agent")


async def run_agent(
    layout: StateLayout,
    settings: Settings,
    *,
    ready: Callable[[], None],
    until_stopped: Callable[[anyio.CancelScope], Coroutine[Any, Any, None]],
) -> None:
    """Runs until stopped; then drains every replica within `agent.stop_s_max`."""
    raise_descriptor_limit()
    agent = settings.agent
    limits, launcher = _isolation(layout, agent)
    tracing = open_tracing(settings.tracing)
    journal = UsageJournal(layout.journal, NodeId(agent.node))
    node = Node(journal, usage_tick_s=agent.usage_tick_s)

    async def renew(plane: DataPlane) -> None:
        async with anyio.create_task_group() as renewals:
            renewals.start_soon(mounts.renew, plane)  # at once: readers wait
            renewals.start_soon(node.renew_pins, plane)

    keeper = DataPlaneKeeper(data_plane_settings(layout, settings), renew)
    mounts = ModelMounts(layout.mounts, layout.mounts_record, keeper.current)
    mounts.sweep()
    context = NodeContext(
        node=NodeId(agent.node),
        python=Environment.current().python,
        launcher=launcher,
        data_plane=keeper.current,
        mounts=mounts,
        sockets=layout.sockets,
        calls=layout.calls,
        logs=layout.replica_logs,
        volumes=layout.volumes,
        settings=agent,
        on_change=node.on_change,
        turns=Turns(agent.launches_max),
        tracing=tracing,
        warm=_warm_pool(agent, limits, launcher),
    )
    link = _link(layout, agent, launcher)
    api = _api(layout, agent, keeper, node, mounts)
    try:
        async with serving_unix(api, layout.agent_socket), anyio.create_task_group() as background:
            await background.start(keeper.run)
            node.bind(context, background)
            background.start_soon(link.run, node)
            _start_upkeep(context, background)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(until_stopped, tasks.cancel_scope)
                tasks.start_soon(node.meter)
                ready()
            await node.stop(agent.stop_s_max)
            await node.meter_once()
            await mounts.close()
            background.cancel_scope.cancel()
    finally:
        tracing.close()
        journal.close()
        limits.sweep()  # the groups of this life are empty now; they are not left for the next one


def _warm_pool(agent: AgentSettings, limits: LimitBackend, launcher: Launcher) -> WarmPool | None:
    """None where replicas have no sandbox, or the agent may not hand mounts to one that runs."""
    if not isinstance(launcher, BubblewrapLauncher) or os.geteuid() != 0 or agent.warm_bytes_max == 0:
        return None
    return WarmPool(limits, launcher.uids, find_bwrap(agent.bwrap), memory_bytes_max=agent.warm_bytes_max)


def _start_upkeep(context: NodeContext, tasks: anyio.abc.TaskGroup) -> None:
    """What goes on beside the replicas."""
    tasks.start_soon(context.mounts.run)
    tasks.start_soon(keep_bytecode, context.python)
    if context.warm is not None:
        tasks.start_soon(context.warm.run)


def _api(
    layout: StateLayout, agent: AgentSettings, keeper: DataPlaneKeeper, node: Node, mounts: ModelMounts
) -> web.Application:
    api = build_agent_api(layout.replica_logs, node.is_living, keeper.current)
    add_mount_routes(api, mounts)
    add_metrics_route(api, agent.node, keeper.current, node.reports)
    return api


def _link(layout: StateLayout, agent: AgentSettings, launcher: Launcher) -> AgentLink:
    sockets = (str(layout.link_socket), str(layout.agent_socket))
    return AgentLink(*sockets, node_record(agent, launcher), fresh_id("inc"))


def _isolation(layout: StateLayout, agent: AgentSettings) -> tuple[LimitBackend, Launcher]:
    """How replicas are bounded and confined, under names and uids of this platform alone. No socket is left."""
    _sweep_sockets(layout.sockets)
    # Of the whole path: another platform on this machine must not be taken for an earlier life of this one.
    place = hashlib.sha256(str(layout.root).encode()).hexdigest()
    limits = detect_limits(f"{agent.node}-{place[:12]}")
    return limits, make_launcher(agent, limits, uid_slot=int(place[:4], 16) % UID_SLOTS)


def data_plane_settings(layout: StateLayout, settings: Settings) -> DataPlaneSettings:
    """What the data plane of this node is told."""
    return DataPlaneSettings(
        origin_url=settings.content.origin_url,
        cache_directory=str(layout.cache),
        ram_bytes_max=settings.content.ram_bytes_max,
        disk_bytes_max=settings.content.disk_bytes_max,
        pool_bytes=settings.content.pool_bytes,
        fetch_threads=settings.content.fetch_threads,
        scrub_bytes_per_s=settings.content.scrub_bytes_per_s,
        keys_directory=str(layout.content_keys),
        origin=settings.content.origin_options(),
        origin_bytes_per_s_max=settings.content.origin_bytes_per_s_max,
        tenant_bytes_per_s_max=settings.content.tenant_bytes_per_s_max,
    )


def make_launcher(settings: AgentSettings, limits: LimitBackend, *, uid_slot: int) -> Launcher:
    """The launcher of this node; what a killed agent left is removed first. Raises SandboxError.

    `uid_slot` keeps the uids of two platforms on one machine apart, as far as a hash can.
    """
    swept = limits.sweep()
    if swept:
        log.warning("removed %d sandboxes that an earlier agent left", swept)
    if settings.unsafe_no_sandbox:
        log.warning("replicas run WITHOUT a sandbox: they can read and reach what this user can")
        return PlainLauncher(limits)
    uids = UidPool(settings.uid_base + uid_slot * UIDS_EACH, UIDS_EACH)
    return BubblewrapLauncher(limits, bwrap=find_bwrap(settings.bwrap), uids=uids)


def node_record(settings: AgentSettings, launcher: Launcher) -> NodeRecord:
    """What this node offers."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return NodeRecord(
        id=settings.node,
        instance_type=settings.instance_type,
        memory_bytes=settings.memory_bytes or int(total * (1 - MEMORY_KEPT_SHARE)),
        cpus=float(len(os.sched_getaffinity(0))),
        sandbox=launcher.describe,
    )


def _sweep_sockets(folder: Path) -> None:
    """Sockets of replicas that died with an earlier agent."""
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)
