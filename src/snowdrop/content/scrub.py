"""Reads landing directories again in the background: bit rot is found, set aside and mended before a reader meets
it.

Reads go past the page cache, so the disk itself is read, at a bounded rate, in the idle class of the I/O
scheduler, and not while a load is under way.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from snowdrop.content.disk import DiskTier
from snowdrop.content.keys import Hasher, HasherSource
from snowdrop.content.landing import Landing
from snowdrop.domain.errors import NotFoundError, SnowdropError
from snowdrop.domain.ids import Digest
from snowdrop.policy.scrub import BUSY_S_MAX, ScrubCandidate, next_pass, pause_s

_IOPRIO_SYSCALLS = {"x86_64": (251, 252), "aarch64": (30, 31)}
"""ioprio_set, ioprio_get"""
_IOPRIO_IDLE = 3 << 13
_IOPRIO_THREAD = 1

_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")
Mend = Callable[[Digest, list[int]], Awaitable[None]]
"""Brings chunks of an artefact that its landing directory lost from another source."""


class Scrubbed(msgspec.Struct, frozen=True, kw_only=True):
    """One artefact, read through: `bad` chunks were wrong and are set aside."""

    chunks: int
    read_bytes: int
    bad: tuple[int, ...]


def check_chunk(landing: Landing, chunk: int, hasher: Hasher) -> bool:
    """Whether the disk holds the right bytes of a chunk, in every place. Blocks; raises SnowdropError.

    A right one is thereby proven. What is done about a wrong one is the caller's.
    """
    data = bytearray(landing.manifest.chunks[chunk].plain_bytes)
    view = memoryview(data)
    covered: list[tuple[int, int]] = []
    for place in landing.places_of(chunk):
        end = place.chunk_offset + place.length
        part = memoryview(bytearray(place.length))
        if not landing.read_place(place, part):
            return False
        if any(begin <= place.chunk_offset and end <= until for begin, until in covered):
            if part != view[place.chunk_offset : end]:
                return False
        else:
            view[place.chunk_offset : end] = part
            covered.append((place.chunk_offset, end))
    if hasher.hexdigest(data) != landing.manifest.chunks[chunk].digest:
        return False
    landing.learn(chunk, view)
    landing.confirm(chunk, view)
    return True


class Scrubber:
    """Call `run` in a task of its own; `scrub` reads one artefact now.

    `mend` is called with what was found wrong; `is_busy` says whether a load is under way. Neither a chunk that
    cannot be mended now nor a disk that cannot be read ends the run: the chunk is fetched when it is next needed.
    """

    def __init__(
        self,
        disk: DiskTier,
        keyring: HasherSource,
        mend: Mend,
        *,
        bytes_per_s: int,
        is_busy: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._disk = disk
        self._keyring = keyring
        self._mend = mend
        self._bytes_per_s = bytes_per_s
        self._is_busy = is_busy
        self._sleep = sleep
        # One thread, so that it never takes more than one from the loads.
        self._limiter = anyio.CapacityLimiter(1)

    async def run(self) -> None:
        """Pass after pass, until cancelled. Returns at once if the rate is 0."""
        while self._bytes_per_s:
            candidates = [
                ScrubCandidate(name=digest, scrubbed_unix_s=scrubbed)
                for digest, scrubbed in (await self._in_thread(self._disk.scrub_times)).items()
            ]
            plan = next_pass(candidates, time.time())
            if plan.name is None:
                await self._sleep(plan.wait_s)
                continue
            try:
                await self.scrub(Digest(plan.name))
            except SnowdropError:
                # Dropped meanwhile, its key is not here, or the disk cannot be read: others get their turn.
                await self._sleep(1.0)
            await self._in_thread(self._disk.note_scrubbed, Digest(plan.name))

    async def scrub(self, digest: Digest, bytes_per_s: int | None = None) -> Scrubbed:
        """Reads all that is on disk of one artefact; sets wrong chunks aside and has them mended.

        At the rate of the settings, or at `bytes_per_s`; 0 is as fast as it goes. Raises NotFoundError if it is
        not on this node or its key is not, UnavailableError if the disk cannot be read.
        """
        rate = self._bytes_per_s if bytes_per_s is None else bytes_per_s
        landing = await self._in_thread(self._disk.known_landing, digest)
        if landing is None:
            raise NotFoundError("the artefact is not on this node's disk", where=digest)
        hasher = await self._in_thread(self._keyring.hasher, landing.manifest.key_domain)
        bad: list[int] = []
        read_bytes = 0
        chunks = await self._in_thread(landing.held_chunks)
        for chunk in chunks:
            begun = time.monotonic()
            if not await self._in_thread(self._checked, landing, chunk, hasher):
                bad.append(chunk)
            size = landing.manifest.chunks[chunk].plain_bytes
            read_bytes += size
            if rate:
                await self._pause(size, time.monotonic() - begun, rate)
        if bad:
            await self._mend(digest, bad)
        return Scrubbed(chunks=len(chunks), read_bytes=read_bytes, bad=tuple(bad))

    def _checked(self, landing: Landing, chunk: int, hasher: Hasher) -> bool:
        """False if the chunk was wrong; it is then set aside. One that is gone meanwhile is not wrong."""
        with idle_io_priority():
            if not landing.holds(chunk) or check_chunk(landing, chunk, hasher):
                return True
            landing.quarantine(chunk, "scrub")
            return False

    async def _pause(self, read_bytes: int, took_s: float, rate: int) -> None:
        busy_s = 0.0
        while True:
            is_busy = self._is_busy()
            wait_s = pause_s(read_bytes, took_s, rate, is_busy=is_busy, busy_s=busy_s)
            await self._sleep(wait_s)
            if not is_busy or busy_s >= BUSY_S_MAX:
                return
            busy_s += wait_s
            read_bytes = 0

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self._limiter)


@contextmanager
def idle_io_priority() -> Iterator[None]:
    """This thread's reads give way to all others, where the I/O scheduler knows classes; otherwise nothing."""
    numbers = _IOPRIO_SYSCALLS.get(platform.machine())
    if numbers is None:
        yield
        return
    set_number, get_number = numbers
    before = _libc.syscall(get_number, _IOPRIO_THREAD, 0)
    _libc.syscall(set_number, _IOPRIO_THREAD, 0, _IOPRIO_IDLE)
    try:
        yield
    finally:
        _libc.syscall(set_number, _IOPRIO_THREAD, 0, max(before, 0))
