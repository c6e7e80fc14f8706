"""Processes of the gateway besides the owner: relaying workers, the HTTP/2 listener. Kept alive, and replaced."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

import anyio
import anyio.abc
import msgspec

from snowdrop.domain.errors import PlatformDownError

RESTART_S_FIRST = 0.1
RESTART_S_MAX = 5.0
STEADY_S = 10.0
READY_S_MAX = 10.0
STOP_MARGIN_S = 5.0
log = logging.getLogger("snowdrop.gateway")


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A process to keep. `command(life, ready_fd)` is its argv: it writes a byte to `ready_fd` when it serves.

    A name of its own for each life: leases of the one before must not be mistaken for its own. At SIGTERM it ends
    within `stop_s_max`; at SIGHUP it ends what it has begun, within `replace_s_max`.
    """

    name: str
    command: Callable[[str, int], Sequence[str]]
    pass_fds: tuple[int, ...]
    stop_s_max: float
    replace_s_max: float


class Keeper:
    """Keeps one process. `replace` starts its successor first, so that somebody serves at any time."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._lives = 0
        self._replace = anyio.Event()
        self._life: Life | None = None

    def tell(self, what: signal.Signals) -> None:
        """Sends the process a signal, if it lives."""
        if self._life is not None and not self._life.ended:
            self._life.tell(what)

    def replace(self) -> None:
        """The process is to be replaced by a new one, which reads settings and code anew."""
        self._replace.set()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Says started when the first process is ready; raises PlatformDownError if that does not become so."""
        async with anyio.create_task_group() as leaving:
            life, pause_s = await self._start(), RESTART_S_FIRST
            if life is None:
                raise PlatformDownError(
                    f"{self._kept.name} did not start",
                    where=f"ready_s_max={READY_S_MAX:g}",
                    next_step="its words are in platform/gateway.log of the state folder",
                )
            task_status.started()
            while True:
                self._life = life
                try:
                    await self._ended_or_replaced(life)
                except BaseException:
                    await life.stop(self._kept.stop_s_max)
                    raise
                if self._replace.is_set() and not life.ended:
                    self._replace = anyio.Event()
                    successor = await self._started_beside(life)
                    if successor is not None:
                        leaving.start_soon(life.leave, self._kept.replace_s_max, self._kept.stop_s_max)
                        life = successor
                    continue
                await life.stop(0.0)
                log.warning("%s ended with %s and is started again", self._kept.name, life.code)
                while True:
                    pause_s = RESTART_S_FIRST if life.was_steady else min(pause_s * 2, RESTART_S_MAX)
                    await anyio.sleep(pause_s)
                    again = await self._start()
                    if again is not None:
                        life = again
                        break

    async def _started_beside(self, life: Life) -> Life | None:
        try:
            successor = await self._start()
        except BaseException:
            await life.stop(self._kept.stop_s_max)
            raise
        if successor is None:
            log.error("the successor of %s did not start; the old one goes on", self._kept.name)
        return successor

    async def _start(self) -> Life | None:
        """A process that serves, or None."""
        self._lives += 1
        reader, writer = os.pipe()
        try:
            command = self._kept.command(f"{self._kept.name}-{self._lives}", writer)
            process = _spawn(command, (writer, *self._kept.pass_fds))
        finally:
            os.close(writer)
        life = Life(process)
        ready = False
        try:
            with anyio.move_on_after(READY_S_MAX):
                await anyio.wait_readable(reader)
                ready = bool(os.read(reader, 1))  # the end of the pipe means that it died
        finally:
            os.close(reader)
            if not ready:
                await life.stop(0.0)
        return life if ready else None

    async def _ended_or_replaced(self, life: Life) -> None:
        async with anyio.create_task_group() as either:

            async def wait(call: Callable[[], object]) -> None:
                await call()  # type: ignore[misc]
                either.cancel_scope.cancel()

            either.start_soon(wait, life.wait)
            either.start_soon(wait, self._replace.wait)


class Life:
    """One process from its start to its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._began_s = time.monotonic()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def code(self) -> int | None:
        return self._process.returncode

    @property
    def was_steady(self) -> bool:
        """Lived so long that its end is no sign of a start that cannot succeed."""
        return time.monotonic() - self._began_s > STEADY_S

    def tell(self, what: signal.Signals) -> None:
        self._process.send_signal(what)

    async def wait(self) -> None:
        await anyio.wait_readable(self._pidfd)

    async def stop(self, s_max: float) -> None:
        """SIGTERM, then SIGKILL after the bound. Not to be cancelled: no process may be left behind."""
        await self._end(signal.SIGTERM, s_max)

    async def leave(self, replace_s_max: float, stop_s_max: float) -> None:
        """SIGHUP: it ends what it has begun. Cancelled, it is stopped like the others."""
        self._process.send_signal(signal.SIGHUP)
        try:
            with anyio.move_on_after(replace_s_max + STOP_MARGIN_S):
                await self.wait()
        finally:
            await self.stop(stop_s_max)

    async def _end(self, how: signal.Signals, s_max: float) -> None:
        if self._pidfd < 0:
            return
        if not self.ended:
            self._process.send_signal(how)
            with anyio.move_on_after(s_max, shield=True):
                await self.wait()
        self._process.kill()
        self._process.wait()
        os.close(self._pidfd)
        self._pidfd = -1


def _spawn(command: Sequence[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds)
