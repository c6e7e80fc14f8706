"""What a start in a mounted image reads is recorded, and fetched ahead of the next one: over real data planes."""

import os
import signal
import tarfile
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from content_helpers import noise
from fuse_helpers import needs_fuse
from image_helpers import member, tar
from image_node_helpers import Stage, read, staged
from snowdrop.content.imagetrace import encode_trace, key_of, stored_traces
from snowdrop.content.origin import DirectoryOrigin
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.imagetrace import ImageTrace
from snowdrop.image.mount.kernel import possible_methods
from snowdrop.image.mount.port import Method
from snowdrop.policy.replay import covered_bytes, merged

pytestmark = [pytest.mark.anyio, needs_fuse]

WAIT_S_MAX = 60.0
LOOK_S = 0.02
START = "python -m app"
FILE_BYTES = 3 << 20
WANTED, UNWANTED = noise(FILE_BYTES, 1), noise(2 * FILE_BYTES, 2)
SMALL = noise(5_000, 3)
served_methods = pytest.mark.parametrize("method", [name for name in possible_methods() if name != "unpack"])


def layer() -> bytes:
    return tar(
        member("app", tarfile.DIRTYPE, mode=0o755),
        member("app/0-unwanted", data=UNWANTED, mode=0o644),
        member("app/1-wanted", data=WANTED, mode=0o644),
        member("app/2-small", data=SMALL, mode=0o644),
    )


async def started(stage: Stage, holder: str = "rep-1") -> Path:
    return await stage.mounts.mount(DEFAULT_TENANT, stage.artefact, holder, start=START)


def traces(folder: Path, stage: Stage) -> list[ImageTrace]:
    origin = DirectoryOrigin(folder / "origin")
    return list(stored_traces(origin, "public", DEFAULT_TENANT, stage.artefact.manifest))


async def kept_trace(folder: Path, stage: Stage) -> ImageTrace:
    with anyio.fail_after(WAIT_S_MAX):
        while not (found := traces(folder, stage)):
            await anyio.sleep(LOOK_S)
    (trace,) = found
    return trace


async def fetched(folder: Path, node: str, bytes_min: int) -> None:
    """Until so much of the image is on the node."""
    with anyio.fail_after(WAIT_S_MAX):
        while sum(path.stat().st_blocks * 512 for path in (folder / node).rglob("partial/data")) < bytes_min:
            await anyio.sleep(LOOK_S)


@served_methods
async def test_what_one_start_reads_is_there_before_the_next_one_asks(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method, layer=layer(), node="one") as stage:
        at = await started(stage)
        assert await read(at / "app/1-wanted") == WANTED
        assert await read(at / "app/2-small") == SMALL
        told = await stage.mounts.ready("rep-1")
        assert told is not None
        assert told.foreseen_bytes == 0
        assert told.recorded_bytes >= FILE_BYTES
        assert told.missed_bytes >= FILE_BYTES
        trace = await kept_trace(tmp_path, stage)
        assert trace.start == START
        read_bytes = sum(length for _, length in trace.extents)
        assert FILE_BYTES <= read_bytes < len(UNWANTED)
        offset = len(UNWANTED)
        assert covered_bytes(merged(trace.extents), offset, FILE_BYTES) == FILE_BYTES

    async with staged(tmp_path, monkeypatch, method, layer=layer(), node="two") as stage:
        at = await started(stage)
        await fetched(tmp_path, "two", FILE_BYTES + len(SMALL))
        (tmp_path / "origin").rename(tmp_path / "away")
        assert await read(at / "app/1-wanted") == WANTED
        assert await read(at / "app/2-small") == SMALL
        told = await stage.mounts.started("rep-1")
        assert told is not None
        assert told.missed_bytes == 0
        assert told.foreseen_bytes >= FILE_BYTES
        with pytest.raises(OSError, match="Input/output error"):
            await read(at / "app/0-unwanted")
        (tmp_path / "away").rename(tmp_path / "origin")
        assert await read(at / "app/0-unwanted") == UNWANTED


@served_methods
async def test_bytes_that_readers_wait_for_after_ready_are_late(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method, layer=layer()) as stage:
        at = await started(stage)
        assert await read(at / "app/2-small") == SMALL
        packs, away = tmp_path / "origin/public/packs", tmp_path / "away"
        packs.rename(away)  # so that it is not completed before it is read
        told = await stage.mounts.ready("rep-1")
        assert told is not None
        assert told.late_bytes == 0
        with pytest.raises(OSError, match="Input/output error"):
            await read(at / "app/1-wanted")
        away.rename(packs)
        assert await read(at / "app/1-wanted") == WANTED
        again = await stage.mounts.started("rep-1")
        assert again is not None
        assert again.missed_bytes == told.missed_bytes
        assert 0 < again.late_bytes <= FILE_BYTES + (1 << 20)


async def test_behind_a_start_the_image_is_completed_and_the_next_mount_needs_no_data_plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "erofs" not in possible_methods():
        pytest.skip("no EROFS over files in this kernel")
    async with staged(tmp_path, monkeypatch, "erofs", layer=layer()) as stage:
        at = await started(stage)
        assert await read(at / "app/2-small") == SMALL
        await stage.mounts.ready("rep-1")
        with anyio.fail_after(WAIT_S_MAX):
            while not list((tmp_path / "cache").rglob("tree/data")):
                await anyio.sleep(LOOK_S)
        await stage.mounts.release("rep-1")
        at = await started(stage, "rep-2")
        pid = stage.plane_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await read(at / "app/0-unwanted") == UNWANTED
        finally:
            os.kill(pid, signal.SIGCONT)


@served_methods
@pytest.mark.parametrize("kind", ["garbage", "cut", "foreign", "beyond", "everything"])
async def test_a_hostile_trace_costs_nobody_a_byte(
    method: Method, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, method, layer=layer()) as stage:
        digest = stage.artefact.manifest
        whole = ((0, 4096), (len(UNWANTED), FILE_BYTES))
        made = ImageTrace(1, digest, START, 1, whole)
        foreign = ImageTrace(1, type(digest)("blake3:" + "0" * 64), START, 1, whole)
        data = {
            "garbage": noise(5_000, 9),
            "cut": encode_trace(made)[:-3],
            "foreign": encode_trace(foreign),
            "beyond": encode_trace(ImageTrace(1, digest, START, 1, ((1 << 50, 1 << 40),))),
            "everything": encode_trace(ImageTrace(1, digest, START, 1, tuple((4096 * n, 1) for n in range(500)))),
        }[kind]
        DirectoryOrigin(tmp_path / "origin").put(key_of("public", DEFAULT_TENANT, digest, START), data)
        at = await started(stage)
        assert await read(at / "app/1-wanted") == WANTED
        assert await read(at / "app/0-unwanted") == UNWANTED
        assert await read(at / "app/2-small") == SMALL
        told = await stage.mounts.ready("rep-1")
        assert told is not None
        assert (told.foreseen_bytes > 0) == (kind == "everything")
        with anyio.fail_after(WAIT_S_MAX):
            # The start that was misled leaves a right one behind.
            while not any(trace.recorded_unix_ns > 1 for trace in traces(tmp_path, stage)):
                await anyio.sleep(LOOK_S)


async def test_a_second_start_in_a_mount_is_not_taken_for_all_that_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with staged(tmp_path, monkeypatch, layer=layer()) as stage:
        at = await started(stage, "rep-1")
        assert await read(at / "app/1-wanted") == WANTED
        await started(stage, "rep-2")
        told = await stage.mounts.ready("rep-2")
        assert told is not None
        assert told.recorded_bytes == 0
        told = await stage.mounts.ready("rep-1")
        assert told is not None
        assert told.recorded_bytes >= FILE_BYTES
        again = await stage.mounts.ready("rep-1")
        assert again is not None
        assert again.recorded_bytes == told.recorded_bytes
