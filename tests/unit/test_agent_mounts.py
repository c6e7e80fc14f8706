"""Which mounts the agent holds, and who serves them, without a kernel that mounts anything."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from typer.testing import CliRunner

from agent_helpers import FakeDataPlane, open_fds
from fuse_helpers import needs_fuse
from snowdrop.agent import mounts as mounts_module
from snowdrop.agent.mounts import ModelMounts
from snowdrop.cli.app import app
from snowdrop.content.fuse.mount import mount_tree, mounted_trees, unmount_tree
from snowdrop.domain.errors import InvalidInputError, NotFoundError, UnavailableError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.engine.local import take_lock
from snowdrop.wire.mounts import PersonalMount

pytestmark = pytest.mark.anyio

SLOW, FAST = Digest("a" * 64), Digest("b" * 64)


class Plane(FakeDataPlane):
    """Also serves mounts; `served` is by manifest, with the descriptors as they were."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.served: list[tuple[Digest, str]] = []
        self.pins: set[str] = set()
        self.after_ensure = lambda: None

    async def ensure(self, *args: Any, **options: Any) -> Any:
        found = await super().ensure(*args, **options)
        self.pins.add(args[2])
        return found

    async def serve_mount(self, manifest: Digest, device_fd: int, journal_fd: int) -> None:
        await anyio.lowlevel.checkpoint()
        self.served.append((manifest, str(Path(f"/proc/self/fd/{device_fd}").readlink())))
        os.fstat(journal_fd)

    async def release(self, holder: str) -> None:
        await super().release(holder)
        self.pins.discard(holder)


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return Plane(tmp_path / "content")


@pytest.fixture
def mounts(tmp_path: Path, plane: Plane, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelMounts]:
    async def current() -> Any:
        await anyio.lowlevel.checkpoint()
        return plane

    monkeypatch.setattr(mounts_module, "mount_tree", lambda _at: os.memfd_create("device"))
    monkeypatch.setattr(mounts_module, "unmount_tree", lambda _at: None)
    monkeypatch.setattr(mounts_module, "set_read_ahead", lambda _at: True)
    before = open_fds()
    yield ModelMounts(tmp_path / "mounts", tmp_path / "mounts.json", current)
    assert open_fds() == before


def artefact(manifest: Digest) -> ArtefactRef:
    return ArtefactRef(manifest=manifest, kind="model", total_bytes=10, file_count=1)


async def test_a_mount_that_waits_for_its_origin_keeps_no_other_waiting(mounts: ModelMounts, plane: Plane) -> None:
    gate = plane.gates[SLOW] = anyio.Event()
    await mounts.mount(DEFAULT_TENANT, artefact(FAST), "rep-1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mounts.mount, DEFAULT_TENANT, artefact(SLOW), "rep-2")
        while len(plane.ensured) < 2:
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(5.0):
            await mounts.release("rep-1")
            await mounts.mount(DEFAULT_TENANT, artefact(FAST), "rep-3")
        gate.set()
    await mounts.close()
    assert plane.pins == set()


async def test_a_mount_that_goes_while_it_is_renewed_leaves_no_pin(mounts: ModelMounts, plane: Plane) -> None:
    await mounts.mount(DEFAULT_TENANT, artefact(SLOW), "rep-1")
    gate = plane.gates[SLOW] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mounts.renew, plane)
        while len(plane.ensured) < 2:
            await anyio.lowlevel.checkpoint()
        await mounts.release("rep-1")
        gate.set()
    assert plane.pins == set()
    assert len(plane.served) == 1


async def test_giving_up_a_renewal_leaves_the_mount_that_came_instead(
    mounts: ModelMounts, plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts_module, "RENEWALS_MAX", 1)
    monkeypatch.setattr(mounts_module, "RENEWAL_REST_S", 0.0)
    other = Plane(tmp_path / "other")
    other.errors[SLOW] = UnavailableError("no", where="here")
    await mounts.mount(DEFAULT_TENANT, artefact(SLOW), "rep-1")
    gate = other.gates[SLOW] = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mounts.renew, other)
        while not other.ensured:
            await anyio.lowlevel.checkpoint()
        await mounts.release("rep-1")
        at = await mounts.mount(DEFAULT_TENANT, artefact(SLOW), "rep-2")
        gate.set()
    assert at.is_dir()
    assert len(plane.pins) == 1
    await mounts.close()


async def test_what_cannot_be_recorded_is_not_half_done(mounts: ModelMounts, plane: Plane, tmp_path: Path) -> None:
    wanted = PersonalMount(
        directory=str(tmp_path / "at"), tenant=DEFAULT_TENANT, model="m", artefact=artefact(FAST)
    )
    (tmp_path / "mounts.tmp").mkdir()
    with pytest.raises(UnavailableError, match="recorded"):
        await mounts.add(wanted)
    assert (mounts.personal(), plane.pins) == ([], set())
    (tmp_path / "mounts.tmp").rmdir()
    await mounts.add(wanted)
    (tmp_path / "mounts.tmp").mkdir()
    with pytest.raises(UnavailableError, match="recorded"):
        await mounts.remove(wanted.directory)
    (tmp_path / "mounts.tmp").rmdir()
    await mounts.remove(wanted.directory)
    with pytest.raises(NotFoundError):
        await mounts.remove(wanted.directory)
    assert plane.pins == set()


async def test_nothing_is_mounted_on_a_symbolic_link(mounts: ModelMounts, plane: Plane, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "at").symlink_to(tmp_path / "real")
    wanted = PersonalMount(
        directory=str(tmp_path / "at"), tenant=DEFAULT_TENANT, model="m", artefact=artefact(FAST)
    )
    with pytest.raises(InvalidInputError, match="symbolic link"):
        await mounts.add(wanted)
    assert (mounts.personal(), plane.ensured) == ([], [])


@needs_fuse
def test_down_removes_what_a_platform_that_was_killed_has_mounted(tmp_path: Path) -> None:
    layout = StateLayout(tmp_path / "s")
    layout.make()
    layout.lock.touch()
    own, persons, anothers = layout.mounts / ("a" * 64), tmp_path / "mine", tmp_path / "another"
    for at in (own, persons, anothers):
        at.mkdir(parents=True)
        os.close(mount_tree(at))  # nobody serves it: ENOTCONN
    wanted = PersonalMount(directory=str(persons), tenant=DEFAULT_TENANT, model="m", artefact=artefact(SLOW))
    layout.mounts_record.write_bytes(msgspec.json.encode([wanted]))
    try:
        held = take_lock(layout)
        assert held is not None
        with_platform = CliRunner().invoke(app, ["--state", str(layout.root), "down"])
        assert with_platform.exit_code == 0
        assert len(mounted_trees(tmp_path)) == 3, "a platform that is just starting is left alone"
        os.close(held)
        result = CliRunner().invoke(app, ["--state", str(layout.root), "down"])
        assert result.exit_code == 0, result.output
        assert [tree.path for tree in mounted_trees(tmp_path)] == [anothers], "it is no mount of this state's"
    finally:
        for at in (own, persons, anothers):
            unmount_tree(at)
