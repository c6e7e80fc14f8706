"""Starts in mounted images, on the agent's side: what is told of them, and completing images behind them.

An image's data is fetched as it is read. So that the next start need not wait for it, what this one reads is
recorded until it is ready; from then on the image is brought as a whole, one image at a time, until mounts of it
need no data plane. None is begun while something starts: that has the link to itself.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import anyio

from snowdrop.agent.dataplane.client import DataPlane
from snowdrop.domain.errors import SnowdropError, StorageFullError
from snowdrop.domain.ids import Digest, TenantId
from snowdrop.image.mount.port import ImageMount
from snowdrop.wire.dataplane import AskStart, EndStart, StartTold

FILLS_MAX = 256
"""Images that wait to be completed; more are completed when something of them starts again."""
TRIES_MAX = 5
STARTING_S_MAX = 300.0
"""So long a start holds up what is to be completed, if it does not say that it is ready."""
REST_S = 10.0
"""Between two tries to complete an image: the origin, or the data plane, may be away."""

log = logging.getLogger("snowdrop.agent")


class ImageStarts:
    """`run` must be running for images to be completed."""

    def __init__(self, data_plane: Callable[[], Awaitable[DataPlane]]) -> None:
        self._data_plane = data_plane
        self._waiting: dict[Digest, ImageMount] = {}
        self._more = anyio.Event()
        self._starting: set[str] = set()
        self._none_starts = anyio.Event()
        self._none_starts.set()

    async def begin(
        self, tenant: TenantId, manifest: Digest, pin: str, holder: str, start: str, *, record: bool
    ) -> None:
        """`holder` starts `start` in an image that is pinned for `pin`. Never raises: it is for speed alone."""
        if not self._starting:
            self._none_starts = anyio.Event()
        self._starting.add(holder)
        try:
            plane = await self._data_plane()
            await plane.begin_start(tenant, manifest, pin, holder, start, record=record)
        except SnowdropError as error:
            log.warning("%s starts without what earlier starts have read: %s", holder, error)

    async def ready(self, holder: str) -> StartTold | None:
        """What `holder` starts is ready. None if the data plane knows of no start of it."""
        self.over(holder)
        return await self._told(EndStart, holder)

    def over(self, holder: str) -> None:
        """`holder` starts no more: it is ready, or gone."""
        self._starting.discard(holder)
        if not self._starting:
            self._none_starts.set()

    async def told(self, holder: str) -> StartTold | None:
        """The start of `holder` as it is now, with its late bytes; None as above."""
        return await self._told(AskStart, holder)

    def complete(self, manifest: Digest, mount: ImageMount) -> None:
        """Has the image brought to this node as a whole, when its turn comes."""
        if len(self._waiting) < FILLS_MAX:
            self._waiting.setdefault(manifest, mount)
            self._more.set()

    def forget(self, manifest: Digest) -> None:
        """Nobody has it mounted any more; if it is being completed, that goes on."""
        self._waiting.pop(manifest, None)

    async def run(self) -> None:
        """Completes images, one after the other, until cancelled."""
        while True:
            while not self._waiting:
                self._more = anyio.Event()
                await self._more.wait()
            with anyio.move_on_after(STARTING_S_MAX):
                await self._none_starts.wait()
            manifest, mount = next(iter(self._waiting.items()), (None, None))
            if manifest is None or mount is None:
                continue  # nobody has it mounted any more
            await self._complete(manifest, mount)
            self._waiting.pop(manifest, None)

    # --- inside -------------------------------------------------------------------------------------------

    async def _told(self, make: type[EndStart | AskStart], holder: str) -> StartTold | None:
        try:
            return await (await self._data_plane()).ask(
                lambda request: make(request=request, holder=holder), StartTold
            )
        except SnowdropError as error:
            log.info("nothing is known of the start of %s: %s", holder, error)
            return None

    async def _complete(self, manifest: Digest, mount: ImageMount) -> None:
        for _ in range(TRIES_MAX):
            if manifest not in self._waiting:
                return
            try:
                await mount.complete()
            except StorageFullError as error:
                log.warning("image %s is not completed on this node: %s", manifest[:19], error)
                return
            except SnowdropError as error:
                log.info("image %s is not complete yet: %s", manifest[:19], error)
                await anyio.sleep(REST_S)
            else:
                log.info("image %s is complete on this node", manifest[:19])
                return
        log.warning("image %s is not completed on this node until something starts in it again", manifest[:19])
