"""The landing areas of the node's artefacts, and the pool of slabs that they are made of."""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import anyio.to_thread
import msgspec

from snowdrop.content.area import Area, RamTier
from snowdrop.content.artefact import Artefact
from snowdrop.content.fetch import FetchEngine
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.ids import Digest
from snowdrop.policy.pool import PoolDecision, decide

POOL_TICK_S = 0.5

log = logging.getLogger("snowdrop.content")

IsHeld = Callable[[Digest], bool]
"""Whether somebody uses an artefact, so that its area must stay."""


class Areas:
    """For one event loop; what blocks is done in threads."""

    def __init__(self, ram: RamTier, engine: FetchEngine, *, pool_bytes: int) -> None:
        self._ram = ram
        self._engine = engine
        self._pool_bytes = pool_bytes
        self._owners: dict[Area, Artefact] = {}
        self._all: tuple[Area, ...] = ()

    @property
    def used_bytes(self) -> int:
        return self._ram.used_bytes

    def all(self) -> tuple[Area, ...]:
        """The areas of the node; from any thread."""
        return self._all

    async def get(self, artefact: Artefact, is_held: IsHeld) -> Area:
        """The artefact's area, made if there is none. Raises StorageFullError."""
        digest = artefact.digest
        area = self._ram.get(digest)
        if area is not None:
            self._own(artefact, area)
            return area
        victims = self._ram.reserve(digest, artefact.layout.size, is_held)
        self._let_go(victims)

        def make() -> Area:
            for victim in victims:
                victim.close()
            return Area(artefact.manifest, artefact.layout, self._ram.pool)

        made: Area | None = None
        try:
            # Shielded: an area that a cancelled caller had made would be lost, with its memory.
            with anyio.CancelScope(shield=True):
                made = await anyio.to_thread.run_sync(make)
        finally:
            self._ram.settle(digest, made)
        assert made is not None, "`make` gave an area or raised"
        self._own(artefact, made)
        return made

    @property
    def ram(self) -> RamTier:
        return self._ram

    async def drop(self, digest: Digest) -> int:
        """Gives the slabs of an artefact's area back; its bytes, 0 if there is none or somebody uses it."""
        area = self._ram.drop(digest)
        if area is None:
            return 0
        size = area.slab_bytes
        self._let_go([area])
        await anyio.to_thread.run_sync(area.close)
        return size

    def _own(self, artefact: Artefact, area: Area) -> None:
        with self._engine.lock:
            self._owners[area] = artefact
            self._all = tuple(self._owners)
            artefact.fill.area = area

    def _let_go(self, victims: list[Area]) -> None:
        with self._engine.lock:
            for victim in victims:
                self._owners.pop(victim).fill.area = None
            self._all = tuple(self._owners)

    async def keep(self, is_held: IsHeld) -> None:
        """Grows and shrinks the pool as `policy.pool` decides, for ever."""
        while True:
            # Abandoned at the end: making a large slab takes seconds, and the pool sees to what is left of it.
            decision = await anyio.to_thread.run_sync(self._keep_pool, abandon_on_cancel=True)
            if decision.evict:
                await self._evict(is_held)
            # While it grows, the next step follows at once: it takes its own rests.
            await anyio.sleep(0 if decision.change_bytes > 0 else POOL_TICK_S)

    async def _evict(self, is_held: IsHeld) -> None:
        area = self._ram.least_used(is_held)
        if area is not None:
            self._let_go([area])
            await anyio.to_thread.run_sync(area.close)

    def _keep_pool(self) -> PoolDecision:
        pool = self._ram.pool
        while pool.clean():
            pass
        state = pool.state(
            target_bytes=self._pool_bytes, limit_bytes=self._ram.bytes_max, is_busy=self._engine.is_busy
        )
        decision = decide(state)
        if decision.change_bytes > 0:
            try:
                pool.grow(decision.change_bytes)
            except (OSError, SnowdropError) as error:
                # Areas are made without it; it is tried again at the next tick.
                log.warning("the pool of slabs cannot grow: %s", error)
                return msgspec.structs.replace(decision, change_bytes=0)
        elif decision.change_bytes < 0:
            pool.shrink(-decision.change_bytes)
        return decision
