"""The agent's part of a measurement, in a process of its own: runs a data plane and gives models to readers.

`python -m benchmarks.node SETTINGS`, SETTINGS being DataPlaneSettings as JSON. Lines on standard input, each
answered by one:

    {"do": "prepare", "pool_bytes": N}              a reader is ready, and the pool has N bytes that were touched
    {"do": "load", "artefact": A, "holder": H}      ensures, gives the model to the reader, says what both measured
    {"do": "directory", "artefact": A}              waits until the directory is complete
    {"do": "release", "holder": H}

It is a process so that it can run at one end of a shaped link.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from benchmarks.memory import (
    MIB,
    PeakSampler,
    anonymous_bytes,
    shared_memory_bytes,
    system_shared_and_cached_bytes,
)
from benchmarks.reader import MESSAGE_BYTES_MAX, Given, Read
from snowdrop.agent.dataplane.client import DataPlane, EnsuredContent, start_process
from snowdrop.content.settings import decode_settings
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.wire.replica import ModelHandle, SlabHandle

READY_S_MAX = 120.0
READ_S_MAX = 600.0
POOL_POLL_S = 0.1


class Order(msgspec.Struct, frozen=True, kw_only=True):
    do: str
    artefact: Digest = Digest("")
    holder: str = "bench"
    pool_bytes: int = 0


class Reader:
    """A reader's process, ready to be given a model."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(READY_S_MAX)
        with theirs:
            command = [sys.executable, "-m", "benchmarks.reader", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        if self._sock.recv(16) != b"ready":
            raise RuntimeError(f"the reader ended with {self.process.wait()}")

    def give(self, given: Given, fds: list[int]) -> Read:
        self._sock.settimeout(READ_S_MAX)
        socket.send_fds(self._sock, [msgspec.json.encode(given)], fds)
        answer = self._sock.recv(MESSAGE_BYTES_MAX)
        if not answer:
            raise RuntimeError(f"the reader ended with {self.process.wait()}")
        return msgspec.json.decode(answer, type=Read)

    def close(self) -> None:
        self._sock.close()
        self.process.wait()


class Node:
    def __init__(self, plane: DataPlane, pid: int) -> None:
        self._plane = plane
        self._pid = pid
        self._reader: Reader | None = None

    async def obey(self, order: Order) -> dict[str, Any]:
        if order.do == "prepare":
            return await self._prepare(order.pool_bytes)
        if order.do == "load":
            return await self._load(order.artefact, order.holder)
        if order.do == "directory":
            begun = time.monotonic()
            await self._plane.wait_directory(order.artefact)
            return {"directory_s": time.monotonic() - begun}
        if order.do == "release":
            await self._plane.release(order.holder)
            return {}
        raise ValueError(f"what is {order.do!r}?")

    async def close(self) -> None:
        if self._reader is not None:
            await anyio.to_thread.run_sync(self._reader.close)

    async def _prepare(self, pool_bytes: int) -> dict[str, Any]:
        await self.close()
        self._reader = await anyio.to_thread.run_sync(Reader)
        with anyio.fail_after(READY_S_MAX):
            while shared_memory_bytes(self._pid) < pool_bytes:  # noqa: ASYNC110 -- of another process
                await anyio.sleep(POOL_POLL_S)
        return {"shared_memory_mib": shared_memory_bytes(self._pid) / MIB}

    async def _load(self, artefact: Digest, holder: str) -> dict[str, Any]:
        reader = self._reader
        if reader is None:
            raise ValueError("prepare first")
        shared_before = system_shared_and_cached_bytes()
        cpu_before = _cpu_s(self._pid)
        with PeakSampler((self._pid, reader.process.pid)) as peak:
            begun_ns = time.monotonic_ns()
            ensured = await self._plane.ensure(DEFAULT_TENANT, artefact, holder, map_tensors=True)
            ensured_s = (time.monotonic_ns() - begun_ns) / 1e9
            try:
                handle, fds = _handle(ensured)
                given = Given(handle=handle, begun_ns=begun_ns)
                found = await anyio.to_thread.run_sync(reader.give, given, fds)
            finally:
                ensured.close()
        filled = await self._plane.wait_filled(artefact, holder)
        return {
            **msgspec.to_builtins(found),
            "ensured_s": ensured_s,
            "content": msgspec.to_builtins(filled.content),
            "private_mib": found.private_bytes / MIB,
            "shared_growth_mib": (system_shared_and_cached_bytes() - shared_before) / MIB,
            "peak_mib": peak.peak_bytes / MIB,
            "peak_growth_mib": (peak.peak_bytes - peak.before_bytes) / MIB,
            "data_plane_anonymous_mib": anonymous_bytes(self._pid) / MIB,
            "data_plane_cpu_s": _cpu_s(self._pid) - cpu_before,
        }


def _handle(ensured: EnsuredContent) -> tuple[ModelHandle, list[int]]:
    """What the agent would tell a replica, and the descriptors that it would send."""
    area = ensured.area
    assert area is not None
    fds = [*area.slab_fds, area.progress_fd, area.wake_fd]
    slabs = tuple(SlabHandle(fd=index, size=size) for index, size in enumerate(area.slab_bytes))
    handle = ModelHandle(
        name="bench",
        param="model",
        directory=str(ensured.directory),
        area_bytes=area.area_bytes,
        area_files=area.files,
        slabs=slabs,
        progress_fd=len(slabs),
        wake_fd=len(slabs) + 1,
        lazy=False,
    )
    return handle, fds


def _cpu_s(pid: int) -> float:
    """User and system time of all threads of a process (proc(5): stat)."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run() -> None:
    process, plane = await start_process(decode_settings(sys.argv[1].encode()))
    async with process, anyio.create_task_group() as tasks:
        await tasks.start(plane.run)
        node = Node(plane, process.pid)
        print('{"ready": true}', flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            answer = await node.obey(msgspec.json.decode(line, type=Order))
            print(msgspec.json.encode(answer).decode(), flush=True)
        await node.close()
        tasks.cancel_scope.cancel()
    # Cancelling the reader of answers closed the channel, which ends the data plane.


if __name__ == "__main__":
    anyio.run(run)
