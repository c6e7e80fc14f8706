"""Completes landing directories behind the load: written while chunks still arrive, durable in steps.

One thread writes for all artefacts of the node, so that the disk takes nothing from the fetch threads; what is
written and not yet durable is bounded. Loading never waits for any of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import anyio
import anyio.to_thread

from snowdrop.content.area import Area
from snowdrop.content.artefact import Artefact
from snowdrop.content.fetch import FetchEngine
from snowdrop.content.landing import Landing
from snowdrop.content.progress import FillState
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.ids import Digest
from snowdrop.policy.prefetch import LATER

DIRTY_BYTES_MAX = 64 << 20
"""Written behind but not yet durable, at most so much of an artefact."""
STEP_BYTES = 32 << 20
HOLD_S = 0.5
"""A load begins without the disk: what serves it may be the processors that bring the first tensors."""
GATHER_S = 0.1
"""While a load goes on, what has come in so long is written together: each look at what is there costs, too."""
KEEP_S = 5.0
"""What came one by one, because a reader of a mount asked for it, is durable after about so long."""
KEEP_FAILED_S = 60.0
KEEP_LAST_S_MAX = 10.0
"""At the end no further directory is begun after so long."""

log = logging.getLogger("snowdrop.content")


class Completer:
    """`complete` runs as one task for each artefact."""

    def __init__(self, engine: FetchEngine) -> None:
        self._engine = engine
        self._thread = anyio.CapacityLimiter(1)

    async def complete(self, artefact: Artefact, landing: Landing, area: Area | None) -> None:
        """Until the directory is complete, or until nobody wants more of the artefact; then what came is kept.

        Ends `artefact.behind`. A failure is not lost: whoever waits for the directory is told, and asking again
        tries again.
        """
        try:
            if area is None:
                await self._bring_rest(artefact, landing)
            else:
                with area.use():  # it stays until it has been written
                    await self._write_as_it_comes(artefact, landing, area)
                    if area.is_complete or artefact.must_complete:
                        await self._bring_rest(artefact, landing)
        except SnowdropError as error:
            artefact.behind_error = error
        finally:
            done, artefact.behind = artefact.behind, None
            if done is not None:
                done.set()

    async def keep(self, artefacts: Mapping[Digest, Artefact]) -> None:
        """Makes durable what is in directories that nobody completes, from time to time and when cancelled."""
        try:
            while True:
                is_kept = await self._keep_now(artefacts)
                await anyio.sleep(KEEP_S if is_kept else KEEP_FAILED_S)
        finally:
            with anyio.move_on_after(KEEP_LAST_S_MAX, shield=True):
                await self._keep_now(artefacts)

    async def _keep_now(self, artefacts: Mapping[Digest, Artefact]) -> bool:
        """Whether all of it could be."""
        is_kept = True
        for artefact in list(artefacts.values()):
            landing = artefact.landing
            if landing is None or artefact.behind is not None or not landing.is_undurable:
                continue
            try:
                await anyio.to_thread.run_sync(landing.sync, limiter=self._thread)
            except SnowdropError as error:
                is_kept = False
                log.warning("what was read of %s is fetched again after a restart: %s", artefact.digest, error)
        return is_kept

    async def _write_as_it_comes(self, artefact: Artefact, landing: Landing, area: Area) -> None:
        undurable = 0
        await self._gather(artefact, area, HOLD_S)
        while True:
            is_last = not self._more_will_come(artefact, area)
            written = await anyio.to_thread.run_sync(landing.write_behind, area, STEP_BYTES, limiter=self._thread)
            undurable += written
            if undurable >= DIRTY_BYTES_MAX or (undurable and is_last and not written):
                await anyio.to_thread.run_sync(landing.sync, limiter=self._thread)
                undurable = 0
            if not written:
                if is_last:
                    return
                await artefact.more()
                await self._gather(artefact, area, GATHER_S)

    async def _gather(self, artefact: Artefact, area: Area, s_max: float) -> None:
        """Lets chunks come for so long; less if all are there, or if somebody waits for the directory."""
        with anyio.move_on_after(s_max):
            while self._more_will_come(artefact, area) and not artefact.must_complete:
                await artefact.more()

    def _more_will_come(self, artefact: Artefact, area: Area) -> bool:
        fill = artefact.fill
        if area.is_complete or area.progress.state is not FillState.FILLING:
            return False
        return fill.is_whole_wanted or (bool(fill.readers) and not artefact.must_complete)

    async def _bring_rest(self, artefact: Artefact, landing: Landing) -> None:
        missing = [chunk for chunk in artefact.all_chunks if not landing.is_verified(chunk)]
        await artefact.bring(self._engine, missing, "landing", LATER)
        await anyio.to_thread.run_sync(landing.sync, limiter=self._thread)
