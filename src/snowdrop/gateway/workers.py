"""Relaying workers in processes of their own: started by the owner, started again when they die."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import anyio.abc

from snowdrop.domain.errors import PlatformDownError
from snowdrop.domain.settings import GatewaySettings

RESTART_S_FIRST = 0.1
RESTART_S_MAX = 5.0
STEADY_S = 10.0
READY_S_MAX = 10.0
log = logging.getLogger("snowdrop.gateway")


async def keep_workers(
    state: Path,
    settings: GatewaySettings,
    listen_fd: int,
    *,
    task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Keeps `settings.workers` workers on one listening socket; says started when the first ones are ready."""
    async with anyio.create_task_group() as tasks:
        for number in range(settings.workers):
            await tasks.start(_keep_one, state, settings, listen_fd, number)
        task_status.started()


async def _keep_one(
    state: Path,
    settings: GatewaySettings,
    listen_fd: int,
    number: int,
    *,
    task_status: anyio.abc.TaskStatus[None],
) -> None:
    life, told, pause_s = 0, False, RESTART_S_FIRST
    while True:
        began_s = time.monotonic()
        # A name of its own for each life: leases of the one before must not be mistaken for its own.
        process, reader = _spawn(state, listen_fd, f"worker-{number}-{life}")
        pidfd = os.pidfd_open(process.pid)
        try:
            ready = await _is_ready(reader)
            if not told:
                if not ready:
                    raise PlatformDownError(
                        f"gateway worker {number} did not start", where=f"ready_s_max={READY_S_MAX:g}"
                    )
                task_status.started()
                told = True
            await anyio.wait_readable(pidfd)
        finally:
            os.close(reader)
            process.terminate()
            with anyio.move_on_after(settings.shutdown_s_max, shield=True):
                await anyio.wait_readable(pidfd)
            os.close(pidfd)
            process.kill()
            process.wait()
        log.warning("worker %d ended with %s and is started again", number, process.returncode)
        life += 1
        pause_s = RESTART_S_FIRST if time.monotonic() - began_s > STEADY_S else min(pause_s * 2, RESTART_S_MAX)
        await anyio.sleep(pause_s)


async def _is_ready(reader: int) -> bool:
    """Whether the worker has said so; an end of the pipe means that it died."""
    with anyio.move_on_after(READY_S_MAX):
        await anyio.wait_readable(reader)
        return bool(os.read(reader, 1))
    return False


def _spawn(state: Path, listen_fd: int, worker: str) -> tuple[subprocess.Popen[bytes], int]:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "snowdrop.main", "gateway-worker", "--state", str(state)]
    command += ["--ready-fd", str(writer), "--listen-fd", str(listen_fd), "--worker", worker]
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(writer, listen_fd)), reader
    finally:
        os.close(writer)
