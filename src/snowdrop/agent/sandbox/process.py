"""Child processes by pidfd: started in the calling thread, waited for on the event loop, no watcher threads.

PR_SET_PDEATHSIG follows the *thread* that made the child, so `spawn` is called on the event loop's own thread
and never handed to a worker that may retire.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

import anyio

KILL_WAIT_S_MAX = 10.0


class Process:
    """A process that is not necessarily our child, held by pidfd so that its pid cannot come to mean another.

    Raises ProcessLookupError if it is gone already.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def gone(self) -> None:
        """Waits until it has ended."""
        await anyio.wait_readable(self._pidfd)

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Child:
    """One child process. `wait` may be awaited by several tasks."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._turn = anyio.Lock()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def ended(self) -> bool:
        return self._popen.returncode is not None

    async def wait(self) -> int:
        """The return code, negative for a signal."""
        async with self._turn:  # a descriptor has one reader at a time
            if self._popen.returncode is None:
                await anyio.wait_readable(self._pidfd)
                self._popen.wait()
        return self._popen.returncode

    def kill(self) -> None:
        if self._popen.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def close(self) -> None:
        """Kills and reaps. Idempotent; TimeoutError after KILL_WAIT_S_MAX: it is stuck in the kernel."""
        if self._pidfd < 0:
            return
        self.kill()
        with anyio.fail_after(KILL_WAIT_S_MAX, shield=True):
            await self.wait()
        os.close(self._pidfd)
        self._pidfd = -1


def spawn(
    argv: Sequence[str],
    *,
    stdout_fd: int,
    stderr_fd: int,
    pass_fds: Sequence[int],
    env: Mapping[str, str],
    uid: int | None = None,
    new_session: bool = False,
) -> Child:
    """Starts `argv` with nothing inherited but what is named. Raises OSError."""
    popen = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=stdout_fd,
        stderr=stderr_fd,
        pass_fds=pass_fds,
        env=env,
        cwd="/",
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
        start_new_session=new_session,
    )
    return Child(popen)
