"""The node's warm parents: who keeps them, and replicas forked off them instead of started anew.

Whatever goes wrong here costs a replica time and nothing else: it then starts the ordinary way.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.abc
import msgspec

from snowdrop.agent.sandbox.bubblewrap import UidPool
from snowdrop.agent.sandbox.forked import WarmParent, start_parent
from snowdrop.agent.sandbox.launcher import LaunchSpec, Output, SandboxHandle
from snowdrop.agent.sandbox.limits import LimitBackend
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId, fresh_id
from snowdrop.policy.warm import IDLE_S_MAX, Candidate, Key, allowed_imports, keep_warm
from snowdrop.wire.control import StartReplica

HOST_ENVIRONMENT = "host"
"""The environment of replicas that have no image: the node's own."""
LOOK_S = 5.0
"""How often parents are looked at when nobody asks for one."""
EXPECTED_BYTES = 512 << 20
"""What a parent is taken to need until it has said what it has."""
ROOM_BYTES = 256 << 20
"""What importing may need above that, for its limit."""
KNOWN_MAX = 1_000
"""Kinds of parents remembered; those unused for longest are forgotten."""
ERROR_BYTES_MAX = 2_000

log = logging.getLogger("snowdrop.agent")


class _Kept:
    """What is known of one kind of parent."""

    def __init__(self) -> None:
        self.used_s = time.monotonic()
        self.memory_bytes = EXPECTED_BYTES
        self.parent: WarmParent | None = None
        self.starting: anyio.CancelScope | None = None
        self.failures = 0
        self.failed_s = 0.0


class WarmPool:
    """`run` keeps the parents; `launch` forks one, if there is one for it."""

    def __init__(self, limits: LimitBackend, uids: UidPool, bwrap: Path, *, memory_bytes_max: int) -> None:
        self._limits = limits
        self._uids = uids
        self._bwrap = bwrap
        self._memory_bytes_max = memory_bytes_max
        self._kept: dict[Key, _Kept] = {}
        self._wanted = anyio.Event()
        self._changed = anyio.Event()

    async def launch(self, order: StartReplica, spec: LaunchSpec) -> SandboxHandle | None:
        """A fork for the replica; None where it is to start the ordinary way."""
        key = key_of(order)
        if key is None or self._memory_bytes_max == 0:
            return None
        kept = self._kept.setdefault(key, _Kept())
        kept.used_s = time.monotonic()
        self._wanted.set()
        if kept.parent is None:
            return None
        try:
            return await kept.parent.fork(spec)
        except (SandboxError, OSError, TimeoutError) as error:
            log.warning("%s starts the ordinary way: %s", order.key.replica, error)
            self._failed(kept, str(error))
            return None

    async def until_warm(self, key: Key) -> None:
        """Waits until a parent for `key` has its imports done."""
        while (kept := self._kept.get(key)) is None or kept.parent is None:
            self._changed = anyio.Event()
            await self._changed.wait()

    async def run(self) -> None:
        """For ever; when cancelled, every parent ends, and whoever was forked off one with it."""
        async with anyio.create_task_group() as tasks:
            while True:
                self._decide(tasks)
                self._wanted = anyio.Event()
                with anyio.move_on_after(LOOK_S):
                    await self._wanted.wait()

    def _decide(self, tasks: anyio.abc.TaskGroup) -> None:
        now_s = time.monotonic()
        for key in sorted(self._kept, key=lambda k: self._kept[k].used_s, reverse=True):
            kept = self._kept[key]
            idle = now_s - kept.used_s > 2 * IDLE_S_MAX or len(self._kept) > KNOWN_MAX
            if idle and kept.parent is None and kept.starting is None:
                del self._kept[key]
        candidates = tuple(
            Candidate(
                key=key,
                unused_s=now_s - kept.used_s,
                memory_bytes=kept.memory_bytes,
                is_running=kept.parent is not None,
                is_starting=kept.starting is not None,
                failures=kept.failures,
                failed_s=now_s - kept.failed_s,
            )
            for key, kept in self._kept.items()
        )
        keep = keep_warm(candidates, memory_bytes_max=self._memory_bytes_max)
        for key in keep.stop:
            log.info("warm parent of %s goes: %s", "/".join(key[:2]), keep.reasons[key])
            self._stop(self._kept[key])
        for key in keep.start:
            scope = self._kept[key].starting = anyio.CancelScope()
            tasks.start_soon(self._live, key, self._kept[key], scope)

    def _stop(self, kept: _Kept) -> None:
        if kept.parent is not None:
            kept.parent.retire()
            kept.parent = None
        elif kept.starting is not None:
            kept.starting.cancel()

    def _failed(self, kept: _Kept, reason: str) -> None:
        """It is of no use: its replicas live on, another is started after a while."""
        log.warning("warm parent: %s", reason)
        kept.failures += 1
        kept.failed_s = time.monotonic()
        self._stop(kept)

    async def _live(self, key: Key, kept: _Kept, scope: anyio.CancelScope) -> None:
        """One parent from its start until it and all that were forked off it have ended."""
        parent: WarmParent | None = None
        try:
            with scope:
                try:
                    parent = await self._start(key, kept)
                except (SandboxError, OSError, TimeoutError) as error:
                    self._failed(kept, str(error))
            kept.starting = None
            if parent is None:
                return
            kept.parent = parent
            self._changed.set()
            await parent.ended()
            if kept.parent is parent:
                self._failed(kept, f"that of {'/'.join(key[:2])} ended")
            await parent.wait()
        finally:
            kept.starting = None
            if parent is not None:
                if kept.parent is parent:
                    kept.parent = None
                with anyio.CancelScope(shield=True):
                    await parent.close()
            self._wanted.set()

    async def _start(self, key: Key, kept: _Kept) -> WarmParent:
        output = os.memfd_create("warm", os.MFD_CLOEXEC)
        parent: WarmParent | None = None
        try:
            parent = await start_parent(
                self._limits,
                self._uids,
                self._bwrap,
                name=ReplicaId(fresh_id("warm")),
                memory_bytes_max=self._memory_bytes_max + ROOM_BYTES,
                output=Output(stdout_fd=output, stderr_fd=output),
            )
            warmed = await parent.warm(key[2])
        except BaseException as error:
            if parent is not None:
                with anyio.CancelScope(shield=True):
                    await parent.close()
            if isinstance(error, SandboxError):
                with suppress(OSError):
                    said = os.pread(output, ERROR_BYTES_MAX, 0).decode(errors="replace").strip()
                    log.warning("warm parent of %s: %s", "/".join(key[:2]), said)
            raise
        finally:
            os.close(output)
        kept.memory_bytes = max(1, warmed.memory_bytes)
        kept.failures = 0
        log.info("warm parent of %s: %s", "/".join(key[:2]), msgspec.json.encode(warmed).decode())
        return parent


def key_of(order: StartReplica) -> Key | None:
    """Whose parent could serve this replica; None if none may."""
    spec = order.revision.spec
    imports = allowed_imports(spec.warm_imports)
    # Volumes are the tenant's user's, which a fork cannot become; a command executes another program anyway.
    if not spec.warm or not imports or spec.volumes or spec.command is not None:
        return None
    return (order.key.tenant, HOST_ENVIRONMENT, imports)
