import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from content_helpers import CountingOrigin, noise, push, settings_for, write_model
from snowdrop.agent.dataplane.client import DataPlane, EnsuredContent, start_process
from snowdrop.agent.dataplane.server import serve_store
from snowdrop.content.mapping import map_slabs
from snowdrop.content.origin import DirectoryOrigin
from snowdrop.content.progress import ProgressReader
from snowdrop.content.store import ContentStore, open_store
from snowdrop.domain.errors import (
    IntegrityError,
    NotFoundError,
    PlatformDownError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.wire.packet import packet_pair

pytestmark = pytest.mark.anyio
WAIT_S_MAX = 10.0
NOTHING = Digest("blake3:" + "0" * 64)


class Mapped:
    """What a replica makes of an answer."""

    def __init__(self, got: EnsuredContent) -> None:
        assert got.area is not None
        self.files = got.area.files
        self.view = map_slabs(got.area.slab_fds, got.area.slab_bytes)
        wake = socket.socket(fileno=os.dup(got.area.wake_fd))
        self.reader = ProgressReader(got.area.progress_fd, wake)
        got.close()


@asynccontextmanager
async def connected(store: ContentStore) -> AsyncIterator[DataPlane]:
    ours, theirs = packet_pair()
    with theirs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve_store, theirs, store)
            plane = DataPlane(ours)
            await tasks.start(plane.run)
            yield plane
            tasks.cancel_scope.cancel()


async def test_ensure_gives_a_mappable_area_and_a_directory(tmp_path: Path) -> None:
    source, origin = write_model(tmp_path / "m"), CountingOrigin()
    digest = push(source, origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "c"), origin=origin) as store, connected(store) as plane:
        got = await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        area = Mapped(got)
        await anyio.to_thread.run_sync(area.reader.wait_all, WAIT_S_MAX)
        (file,) = area.files
        assert area.view[file.offset : file.offset + file.size] == (source / file.path).read_bytes()
        area.reader.close()
        filled = await plane.wait_filled(digest, "h")
        assert (filled.content.origin, filled.content.total) == (file.size, file.size)
        assert [span.name for span in filled.spans] == ["fetch"]
        await plane.wait_directory(digest)
        assert (got.directory / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert got.content.origin == got.content.total > 0


async def test_without_tensors_there_is_no_area(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/a.txt").write_text("a")
    origin = CountingOrigin()
    digest = push(tmp_path / "m", origin).artefact.manifest
    async with open_store(settings_for(tmp_path / "c"), origin=origin) as store, connected(store) as plane:
        got = await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert got.area is None
        got.close()


async def test_errors_keep_their_type_across_the_channel(tmp_path: Path) -> None:
    async with (
        open_store(settings_for(tmp_path / "c"), origin=CountingOrigin()) as store,
        connected(store) as plane,
    ):
        with pytest.raises(NotFoundError, match="no such object") as caught:
            await plane.ensure(DEFAULT_TENANT, NOTHING, "h", map_tensors=True)
        assert caught.value.next_step
        with pytest.raises(NotFoundError):
            await plane.wait_directory(NOTHING)


@pytest.mark.parametrize("failing", ["dup", "memfd_create", "socketpair"])
async def test_a_system_that_gives_no_descriptors_fails_that_request_and_no_other(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, origin = write_model(tmp_path / "m"), CountingOrigin()
    digest = push(source, origin).artefact.manifest

    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async with open_store(settings_for(tmp_path / "c"), origin=origin) as store, connected(store) as plane:
        with monkeypatch.context() as scarce:
            scarce.setattr(socket if failing == "socketpair" else os, failing, no_more)
            with pytest.raises(UnavailableError, match="Too many open files") as caught:
                await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        assert "ulimit" in caught.value.next_step

        got = await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        await plane.wait_filled(digest, "h")
        got.close()


async def test_a_data_plane_that_talks_nonsense_is_given_up() -> None:
    ours, theirs = packet_pair()
    plane = DataPlane(ours)
    async with anyio.create_task_group() as tasks:
        await tasks.start(plane.run)
        theirs.send(b"\xff garbage")
        with pytest.raises(PlatformDownError):
            await plane.wait_directory(NOTHING)
    theirs.setblocking(False)
    while theirs.recv(1000):
        pass  # what was asked before; then the end
    theirs.close()


async def test_what_a_holder_has_stays_until_it_releases_or_its_channel_closes(tmp_path: Path) -> None:
    origin = CountingOrigin()
    digests = [push(write_model(tmp_path / f"m{seed}", seed=seed), origin).artefact.manifest for seed in (0, 100)]
    settings = settings_for(tmp_path / "c", ram_bytes_max=7 << 20)

    async def hold(plane: DataPlane, digest: Digest) -> None:
        got = await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        got.close()

    async with open_store(settings, origin=origin) as store:
        async with connected(store) as plane:
            await hold(plane, digests[0])
            await plane.wait_directory(digests[0])
            with pytest.raises(StorageFullError):
                await hold(plane, digests[1])
            await plane.release("h")
            await hold(plane, digests[1])
            await plane.wait_directory(digests[1])
        async with connected(store) as plane:
            await hold(plane, digests[0])


class Stuck(CountingOrigin):
    """A load that goes no further until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.gate = threading.Event()

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        if "/packs/" in key:
            self.reached.set()
            assert self.gate.wait(WAIT_S_MAX)
        super().read_range(key, offset, into)


async def test_a_cancelled_call_stops_the_load_and_the_next_one_goes_on(tmp_path: Path) -> None:
    origin = Stuck()
    digest = push(write_model(tmp_path / "m"), origin).artefact.manifest
    settings = settings_for(tmp_path / "c", fetch_threads=1)
    async with open_store(settings, origin=origin) as store, connected(store) as plane:
        async with anyio.create_task_group() as tasks:

            async def call() -> None:
                await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)

            tasks.start_soon(call)
            await anyio.to_thread.run_sync(origin.reached.wait, WAIT_S_MAX)
            tasks.cancel_scope.cancel()
        with pytest.raises(NotFoundError):
            await plane.wait_directory(NOTHING)
        origin.gate.set()
        await store.wait_quiet()
        with pytest.raises(NotFoundError):
            await plane.wait_filled(digest, "h")
        got = await plane.ensure(DEFAULT_TENANT, digest, "h2", map_tensors=True)
        got.close()
        filled = await plane.wait_filled(digest, "h2")
        content = got.content + filled.content
        assert content.origin > content.total / 2
        assert origin.pack_bytes_read == content.total


async def test_an_origin_that_fails_behind_the_answer_is_told_to_whoever_waits(tmp_path: Path) -> None:
    origin = CountingOrigin()
    digest = push(write_model(tmp_path / "m"), origin).artefact.manifest
    origin.flip_byte(noise(5 << 20)[:64])
    async with (
        open_store(settings_for(tmp_path / "c"), origin=origin) as store,
        connected(store) as plane,
    ):
        area = Mapped(await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True))
        with pytest.raises(IntegrityError, match=r"model\.safetensors"):
            await plane.wait_filled(digest, "h")
        with pytest.raises(IntegrityError, match=r"model\.safetensors"):
            await anyio.to_thread.run_sync(area.reader.wait_all, WAIT_S_MAX)
        area.reader.close()


async def test_the_process_serves_and_its_death_tells_every_caller(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    digest = push(source, DirectoryOrigin(tmp_path / "origin")).artefact.manifest
    settings = settings_for(tmp_path / "c", origin_url=f"file://{tmp_path}/origin")
    weights = (source / "model.safetensors").read_bytes()
    process, plane = await start_process(settings)
    async with process, anyio.create_task_group() as tasks:
        await tasks.start(plane.run)
        area = Mapped(await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True))
        await plane.wait_directory(digest)
        process.send_signal(signal.SIGSTOP)
        tasks.start_soon(kill, process.pid)
        with pytest.raises(PlatformDownError):
            await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=True)
        with pytest.raises(PlatformDownError):
            await plane.wait_directory(digest)
        await plane.release("h")
    assert area.view[: len(weights)] == weights
    await anyio.to_thread.run_sync(area.reader.wait_all, 0)
    area.reader.close()
    process, plane = await start_process(settings)
    async with process, anyio.create_task_group() as tasks:
        await tasks.start(plane.run)
        again = await plane.ensure(DEFAULT_TENANT, digest, "h", map_tensors=False)
        assert again.content.disk == again.content.total
        tasks.cancel_scope.cancel()
    assert process.returncode == 0


async def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_the_process_loads_neither_a_framework_nor_a_server() -> None:
    program = "import sys, snowdrop.agent.dataplane.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "aiohttp", "uvicorn", "typer", "rich"} & set(loaded)


def test_bad_settings_end_the_process_with_the_field() -> None:
    command = [sys.executable, "-m", "snowdrop.agent.dataplane", "--fd", "0", "--settings", '{"origin_url": 1}']
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "origin_url" in ended.stderr
