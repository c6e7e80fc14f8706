"""Volumes: what may be mounted, by whom it can be written, and that nothing in use is removed."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from agent_helpers import open_fds
from platform_helpers import KEY, NODE, deployment, node_record, replica_key, report, revision
from snowdrop.agent.volumes import VolumeMounts, opened
from snowdrop.control import volumes
from snowdrop.control.loop import ControlLoop
from snowdrop.control.recorder import Recorder
from snowdrop.control.volumes import UID_SPAN, Volumes, measure
from snowdrop.control.world import DeploymentEntry, NodeEntry, World
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError, SandboxError, StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.service import Scale, ServiceSpec
from snowdrop.domain.settings import AgentSettings
from snowdrop.domain.volume import Volume, is_shared, variable_of
from snowdrop.state.memory import MemoryState
from snowdrop.wire.codec import Message
from snowdrop.wire.control import StartReplica

pytestmark = pytest.mark.anyio
OTHER = TenantId("other")
DATA = Volume(target="/data", name="cache")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")


class Bench:
    def __init__(self, folder: Path) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.settings = AgentSettings(volumes_read_only=str(self.shared), volumes_writable=str(folder / "scratch"))
        self.folder = folder / "volumes"
        self.world = World()
        self.state = MemoryState()
        self.volumes = Volumes(self.state, self.folder, self.settings, self.world)
        self._opened = ExitStack()

    def open(self, *volumes: Volume, tenant: TenantId = DEFAULT_TENANT) -> VolumeMounts:
        return self._opened.enter_context(opened(volumes, tenant, self.folder, self.settings))

    def close(self) -> None:
        self._opened.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("target", ["data", "/", "/etc", "/etc/x", "/proc/1", "/a/../etc", "/data/", "//x"])
def test_targets_that_would_cover_the_sandbox_are_refused(target: str) -> None:
    with pytest.raises(InvalidInputError):
        Volume(target=target, name="cache")


def test_volumes_are_apart_and_say_what_they_are() -> None:
    for wrong in ({}, {"name": "a", "host": "/b"}, {"host": "relative"}, {"name": "UPPER"}):
        with pytest.raises(InvalidInputError):
            Volume(target="/data", **wrong)
    inner = Volume(target="/data/inner", name="b")
    with pytest.raises(InvalidInputError, match="out of range"):
        ServiceSpec(class_name="X", volumes=(DATA, inner))
    assert variable_of(inner) == "SNOWDROP_VOLUME_DATA_INNER"


def test_only_named_folders_are_shared() -> None:
    assert is_shared("/mnt/sets/a", "/srv:/mnt/sets")
    for outside in ("/mnt/sets-other", "/mnt", "/mnt/sets/../x", "/etc"):
        assert not is_shared(outside, "/srv:/mnt/sets")
    assert not is_shared("/etc", "")


async def test_a_named_volume_is_made_listed_and_removed(bench: Bench) -> None:
    made = await bench.volumes.create(DEFAULT_TENANT, "cache", 1 << 20)
    assert (made.used_bytes, made.files) == (0, 0)
    with pytest.raises(ConflictError):
        await bench.volumes.create(DEFAULT_TENANT, "cache", 0)
    (bench.folder / "default" / "cache" / "data" / "x").write_bytes(b"x" * 10_000)
    (view,) = await bench.volumes.listed(DEFAULT_TENANT)
    assert (view.files, view.size_bytes_max) == (1, 1 << 20)
    assert view.used_bytes >= 10_000
    assert await bench.volumes.listed(OTHER) == []
    with pytest.raises(NotFoundError):
        await bench.volumes.remove(OTHER, "cache")
    await bench.volumes.remove(DEFAULT_TENANT, "cache")
    assert list((bench.folder / "default").iterdir()) == []


async def test_a_volume_in_use_is_not_removed(bench: Bench) -> None:
    await bench.volumes.create(DEFAULT_TENANT, "cache", 0)
    used = revision(volumes=(DATA,))
    bench.world.deployments[KEY] = DeploymentEntry(deployment(), revision("rev-0"), rival=used)
    with pytest.raises(ConflictError, match="used by embed"):
        await bench.volumes.remove(DEFAULT_TENANT, "cache")


async def test_what_a_service_cannot_be_given_is_refused_when_it_is_deployed(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="snowdrop volume create cache"):
        await bench.volumes.check(DEFAULT_TENANT, (DATA,))
    await bench.volumes.create(OTHER, "cache", 0)
    with pytest.raises(NotFoundError):
        await bench.volumes.check(DEFAULT_TENANT, (DATA,))
    await bench.volumes.create(DEFAULT_TENANT, "cache", 1_000)
    await bench.volumes.check(DEFAULT_TENANT, (DATA,))
    (bench.folder / "default" / "cache" / "data" / "x").write_bytes(b"x" * 10_000)
    with pytest.raises(StorageFullError, match="size_bytes_max=1000"):
        await bench.volumes.check(DEFAULT_TENANT, (DATA,))
    await bench.volumes.check(DEFAULT_TENANT, (msgspec.structs.replace(DATA, read_only=True),))
    for host in ("/etc", str(bench.shared / ".." / "volumes")):
        with pytest.raises(InvalidInputError, match="operator does not share"):
            await bench.volumes.check(DEFAULT_TENANT, (Volume(target="/d", host=host, read_only=True),))
    with pytest.raises(InvalidInputError, match="for writing"):
        await bench.volumes.check(DEFAULT_TENANT, (Volume(target="/d", host=str(bench.shared)),))


async def test_a_link_out_of_what_is_shared_is_found_at_the_start(bench: Bench) -> None:
    (bench.shared / "in").mkdir()
    (bench.shared / "out").symlink_to("/etc")
    mounted = bench.open(Volume(target="/d", host=str(bench.shared / "in"), read_only=True))
    assert [mount.read_only for mount in mounted.mounts] == [True]
    with pytest.raises(InvalidInputError, match="operator does not share"):
        bench.open(Volume(target="/d", host=str(bench.shared / "out"), read_only=True))


async def test_a_volume_that_became_a_link_is_not_followed(bench: Bench) -> None:
    await bench.volumes.create(DEFAULT_TENANT, "cache", 0)
    data = bench.folder / "default" / "cache" / "data"
    data.rmdir()
    data.symlink_to("/etc")
    with pytest.raises(NotFoundError):
        bench.open(DATA)


@root_only
async def test_each_tenants_volumes_belong_to_a_uid_of_its_own(bench: Bench) -> None:
    for tenant in (DEFAULT_TENANT, OTHER):
        await bench.volumes.create(tenant, "cache", 0)
    await bench.volumes.create(DEFAULT_TENANT, "more", 0)
    mine, others = bench.open(DATA), bench.open(DATA, tenant=OTHER)
    assert mine.uid is not None
    assert mine.uid >= bench.settings.uid_base + UID_SPAN, "a uid that a replica may have for its own"
    assert others.uid == mine.uid + 1
    assert (bench.folder / "default" / "more" / "data").stat().st_uid == mine.uid
    assert bench.folder.stat().st_mode & 0o777 == 0o700


class Control:
    """A control loop whose one deployment writes a bounded volume."""

    def __init__(self, bench: Bench) -> None:
        self.loop = ControlLoop(bench.state, Recorder(), tick_s=0.5)
        bench.world = self.loop.world
        bench.volumes = self.loop.volumes = Volumes(bench.state, bench.folder, bench.settings, bench.world)
        self.sent: list[Message] = []
        self.loop.send_agent = lambda _node, message: self.sent.append(message)
        self.loop.world.nodes[NODE] = NodeEntry(node_record(), "inc-1", "/agent.sock")


async def test_a_volume_above_its_bound_lets_nothing_start_that_would_write_it(bench: Bench) -> None:
    control = Control(bench)
    await bench.volumes.create(DEFAULT_TENANT, "cache", 1_000)
    await bench.volumes.create(DEFAULT_TENANT, "boundless", 0)
    boundless = Volume(target="/more", name="boundless")
    used = revision(scale=Scale(min=1), volumes=(DATA, boundless))
    await bench.state.put_revision(used)
    await bench.state.put_deployment(deployment(), expected_generation=0)
    await control.loop.load()
    for name in ("cache", "boundless"):
        (bench.folder / "default" / name / "data" / "x").write_bytes(b"x" * 10_000)
    await bench.volumes.look()
    await control.loop.look(KEY)
    assert control.sent == []
    assert "volume 'cache' holds" in bench.world.deployments[KEY].starts.reason
    bench.volumes.check_start(DEFAULT_TENANT, (msgspec.structs.replace(DATA, read_only=True), boundless))
    bench.volumes.check_start(OTHER, (DATA,))
    (bench.folder / "default" / "cache" / "data" / "x").unlink()
    await bench.volumes.look()
    bench.volumes.check_start(DEFAULT_TENANT, (DATA,))
    (bench.folder / "default" / "cache" / "data" / "x").write_bytes(b"x" * 10_000)
    await bench.volumes.look()
    with pytest.raises(StorageFullError):
        bench.volumes.check_start(DEFAULT_TENANT, (DATA,))
    reader = revision(volumes=(msgspec.structs.replace(DATA, read_only=True),))
    bench.world.deployments[KEY].revision = reader
    await bench.volumes.look()
    bench.volumes.check_start(DEFAULT_TENANT, (DATA,))  # nobody may write it, so nobody looks at it


@pytest.mark.parametrize("known", ["ordered in this life of control", "ordered in an earlier one"])
async def test_a_volume_stays_while_a_replica_that_has_it_is_draining(bench: Bench, known: str) -> None:
    control = Control(bench)
    await bench.volumes.create(DEFAULT_TENANT, "cache", 0)
    old = revision("rev-0", volumes=(DATA,))
    for each in (old, revision("rev-1")):
        await bench.state.put_revision(each)
    await bench.state.put_deployment(deployment(), expected_generation=0)
    await control.loop.load()
    key = replica_key("rep-1", revision="rev-0")
    control.loop.heard_replica(report(key, ReplicaState.DRAINING, version=1))
    if known.endswith("this life of control"):
        order = StartReplica(key=key, revision=old, ordered_unix_ns=1)
        bench.world.replicas[key.replica].order = order
        await bench.state.delete_deployment(*KEY, expected_generation=1)
    with pytest.raises(ConflictError, match="used by embed"):
        await bench.volumes.remove(DEFAULT_TENANT, "cache")
    with pytest.raises(NotFoundError):
        await bench.volumes.remove(OTHER, "cache")
    control.loop.heard_replica(report(key, ReplicaState.STOPPED, version=2))
    await bench.volumes.remove(DEFAULT_TENANT, "cache")


@pytest.mark.parametrize(("tenant", "name"), [("default", "UP"), ("default", "../x"), ("../x", "cache")])
async def test_names_that_would_leave_the_folder_are_refused(bench: Bench, tenant: str, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await bench.volumes.create(TenantId(tenant), name, 0)
    assert not bench.folder.exists()


async def test_a_name_cannot_reach_another_tenants_volume(bench: Bench) -> None:
    await bench.volumes.create(OTHER, "cache", 0)
    await bench.volumes.create(DEFAULT_TENANT, "mine", 0)
    with pytest.raises(InvalidInputError):
        await bench.volumes.remove(DEFAULT_TENANT, "../other/cache")
    assert (bench.folder / "other" / "cache" / "data").is_dir()


async def test_what_was_left_half_made_is_not_shown_and_goes_with_the_next_removal(bench: Bench) -> None:
    await bench.volumes.create(DEFAULT_TENANT, "cache", 0)
    left = bench.folder / "default" / ".gone-vol-1"
    left.mkdir()
    (left / "volume.json").write_bytes((bench.folder / "default" / "cache" / "volume.json").read_bytes())
    assert len(await bench.volumes.listed(DEFAULT_TENANT)) == 1
    await bench.volumes.remove(DEFAULT_TENANT, "cache")
    assert list((bench.folder / "default").iterdir()) == []


async def test_only_its_owner_gets_into_a_volume(bench: Bench) -> None:
    await bench.volumes.create(DEFAULT_TENANT, "cache", 0)
    mine = bench.folder / "default"
    assert [path.stat().st_mode & 0o777 for path in (mine, mine / "cache" / "data")] == [0o700, 0o700]


def test_measuring_follows_no_link_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "large").write_bytes(b"x" * 1_000_000)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "folder").symlink_to(outside)
    (inside / "file").symlink_to(outside / "large")
    (inside / "own").write_bytes(b"x" * 100)
    used_bytes, files = measure(inside)
    assert files == 2
    assert used_bytes < 500_000
    monkeypatch.setattr(volumes, "MEASURED_MAX", 1)
    assert measure(inside)[1] == 1
    monkeypatch.setattr(os, "walk", lambda *_args, **_more: [(str(inside), [], ["vanished"])])
    assert measure(inside) == (0, 0)


async def test_a_hosts_folder_is_opened_only_as_it_is_shared(bench: Bench, tmp_path: Path) -> None:
    (bench.shared / "in").mkdir()
    with pytest.raises(InvalidInputError, match="for writing"):
        bench.open(Volume(target="/d", host=str(bench.shared / "in")))
    with pytest.raises(InvalidInputError, match="does not share"):
        bench.open(Volume(target="/d", host="/etc/there-is-none", read_only=True))  # nor told that there is none
    with pytest.raises(SandboxError, match="cannot open"):
        bench.open(Volume(target="/d", host=str(bench.shared / "none"), read_only=True))
    await bench.volumes.check(
        DEFAULT_TENANT, (Volume(target="/d", host=f"{bench.shared}/x/../in", read_only=True),)
    )
    (tmp_path / "link").symlink_to(bench.shared)
    bench.settings = AgentSettings(volumes_read_only=str(tmp_path / "link"))
    bench.open(Volume(target="/d", host=str(bench.shared / "in"), read_only=True))


async def test_a_folder_that_is_swapped_after_the_look_is_refused_and_nothing_stays_open(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.shared / "in").mkdir()
    before = open_fds()
    really = os.open
    monkeypatch.setattr(os, "open", lambda _path, flags, *more: really("/etc", flags, *more))
    with pytest.raises(InvalidInputError, match="does not share"):
        bench.open(Volume(target="/d", host=str(bench.shared / "in"), read_only=True))
    monkeypatch.undo()
    bench.open(Volume(target="/d", host=str(bench.shared / "in"), read_only=True))
    bench.close()
    assert open_fds() == before


def test_a_service_has_only_so_many_volumes() -> None:
    many = tuple(Volume(target=f"/d{number}", name="cache") for number in range(17))
    ServiceSpec(class_name="X", volumes=many[:16])
    with pytest.raises(InvalidInputError, match="at most 16"):
        ServiceSpec(class_name="X", volumes=many)
