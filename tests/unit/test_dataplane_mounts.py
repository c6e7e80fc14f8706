"""Mounts that the agent hands to the data plane."""

import os
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from agent_helpers import open_fds
from snowdrop.agent.dataplane import mounts as served_module
from snowdrop.agent.dataplane.mounts import MountServer
from snowdrop.content.fuse.journal import create_journal
from snowdrop.domain.ids import Digest

pytestmark = pytest.mark.anyio

MODEL = Digest("a" * 64)
TURNS = 20


async def settle() -> None:
    for _ in range(TURNS):
        await anyio.lowlevel.checkpoint()
    await anyio.to_thread.run_sync(lambda: None)
    for _ in range(TURNS):
        await anyio.lowlevel.checkpoint()


async def test_a_mount_has_one_session_however_often_it_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    ended = anyio.Event()

    class Session:
        def __init__(self, device_fd: int, *_args: object, **_options: object) -> None:
            self.device_fd = device_fd

        async def run(self) -> None:
            running.append(self.device_fd)
            await ended.wait()
            running.remove(self.device_fd)

    landing = SimpleNamespace(manifest=SimpleNamespace(files=(), total_bytes=0))
    store: Any = SimpleNamespace(landing_of=lambda _digest: landing)
    monkeypatch.setattr(served_module, "Session", Session)
    before = open_fds()
    device_fd, journal_fd = os.memfd_create("device"), create_journal(0)
    async with anyio.create_task_group() as tasks:
        server = MountServer(store, tasks)
        async with anyio.create_task_group() as callers:
            for _ in range(3):
                callers.start_soon(server.serve, MODEL, (os.dup(device_fd), os.dup(journal_fd)))
        await settle()
        assert len(running) == 1
        ended.set()
        await settle()
        ended = anyio.Event()
        await server.serve(MODEL, (os.dup(device_fd), os.dup(journal_fd)))
        await settle()
        assert len(running) == 1
        ended.set()
    os.close(device_fd)
    os.close(journal_fd)
    assert open_fds() == before
