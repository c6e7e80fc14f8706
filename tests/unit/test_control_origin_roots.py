"""Control and the origin: which refs it believes, and what it has said there before it records something."""

from pathlib import Path

import pytest

from platform_helpers import artefact, revision, service
from snowdrop.content.gcformat import ROOTS, PlatformRoots, read_record
from snowdrop.content.layout import manifest_key, ref_key
from snowdrop.content.leases import push_lease
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.refs import make_ref
from snowdrop.content.signing import KeyStore, Signer
from snowdrop.control.deploying import Deploying
from snowdrop.control.loop import ControlLoop
from snowdrop.control.origin_roots import OriginRoots, platform_id
from snowdrop.control.recorder import Recorder
from snowdrop.domain.errors import (
    ConflictError,
    CorruptContentError,
    InvalidInputError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
    UntrustedError,
)
from snowdrop.domain.ids import DEFAULT_TENANT, ModelName, TenantId
from snowdrop.state.memory import MemoryState
from snowdrop.wire.api import Deploy, PutModel

pytestmark = pytest.mark.anyio
KEY = ref_key("public", DEFAULT_TENANT, "minilm")
NAME = ModelName("minilm")


class FullOrigin(MemoryOrigin):
    """Takes no object below `full`."""

    full = "nothing"

    def put(self, key: str, data: bytes | memoryview) -> None:
        if key.startswith(self.full):
            raise StorageFullError("the origin is full", where=key)
        super().put(key, data)


class Bench:
    """Control's write side over memory."""

    def __init__(self, folder: Path) -> None:
        self.origin = FullOrigin()
        self.keys = KeyStore(folder / "keys")
        self.signer = self.keys.signer()
        self.state = MemoryState()
        self.loop = ControlLoop(self.state, Recorder(), tick_s=1.0)
        self.roots = OriginRoots(self.origin, self.keys, self.state, self.loop.world, "platform-a")
        self.deploying = Deploying(self.loop, self.roots)
        for letter in "abc":
            self.origin.put(manifest_key("public", artefact(letter).manifest), b"manifest")

    def ref(
        self, generation: int, letter: str = "a", *, signer: Signer | None = None, name: str = "minilm"
    ) -> str:
        return make_ref(
            artefact(letter),
            tenant=DEFAULT_TENANT,
            name=name,
            generation=generation,
            created_unix_ns=7,
            signer=signer or self.signer,
        ).decode()

    async def put(self, generation: int, letter: str = "a", *, lease: str = "", **more: Signer) -> None:
        body = PutModel(ref=self.ref(generation, letter, **more), source="here", lease=lease)
        await self.deploying.put_model(DEFAULT_TENANT, "minilm", body)

    def named_at_origin(self) -> set[str]:
        record = read_record(self.origin, ROOTS + "platform-a", PlatformRoots)
        return {root.manifest for root in record.roots} if record else set()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_a_push_is_recorded_and_its_ref_stands_at_the_origin(bench: Bench) -> None:
    assert await bench.roots.next_generation(DEFAULT_TENANT, NAME) == 1
    await bench.put(1)
    record = await bench.state.get_model(DEFAULT_TENANT, NAME)
    assert record is not None
    assert (record.generation, record.artefact, record.created_unix_ns) == (1, artefact("a"), 7)
    assert bench.origin.objects[KEY] == bench.ref(1).encode()
    assert artefact("a").manifest in bench.named_at_origin()
    assert await bench.roots.next_generation(DEFAULT_TENANT, NAME) == 2


async def test_a_name_of_another_kind_is_refused_before_anything_is_pushed(bench: Bench) -> None:
    assert await bench.roots.next_generation(DEFAULT_TENANT, NAME, "image") == 1
    await bench.put(1)
    assert await bench.roots.next_generation(DEFAULT_TENANT, NAME, "code") == 2
    with pytest.raises(ConflictError, match=f"'{NAME}' is taken by a code") as taken:
        await bench.roots.next_generation(DEFAULT_TENANT, NAME, "image")
    assert f"snowdrop code rm {NAME}" in taken.value.next_step


async def test_the_same_push_told_twice_is_one(bench: Bench) -> None:
    await bench.put(1)
    await bench.put(1)
    assert await bench.roots.next_generation(DEFAULT_TENANT, NAME) == 2


async def test_of_two_pushes_of_one_name_the_second_is_told(bench: Bench) -> None:
    await bench.put(1, "a")
    await bench.put(2, "b")
    with pytest.raises(ConflictError, match="somebody else"):
        await bench.put(2, "c")
    assert bench.origin.objects[KEY] == bench.ref(2, "b").encode()


async def test_what_must_not_be_believed_is_refused_and_changes_nothing(bench: Bench) -> None:
    await bench.put(1)
    before = dict(bench.origin.objects)
    bodies: list[tuple[str, type[Exception]]] = [
        ("", CorruptContentError),
        (bench.ref(2, signer=Signer.make()), UntrustedError),
        (bench.ref(2).replace('"generation":2', '"generation":3'), UntrustedError),
        (bench.ref(2, name="other"), UntrustedError),
        (bench.ref(1, "b"), ConflictError),
        (bench.ref(3), InvalidInputError),
        (bench.ref(2, "d"), NotFoundError),
        ("x" * 10_000, InvalidInputError),
    ]
    for ref, error in bodies:
        with pytest.raises(error):
            await bench.deploying.put_model(DEFAULT_TENANT, "minilm", PutModel(ref=ref))
    with pytest.raises(UntrustedError):
        await bench.deploying.put_model(TenantId("eve"), "minilm", PutModel(ref=bench.ref(2)))
    after = {key: data for key, data in bench.origin.objects.items() if not key.startswith(ROOTS)}
    assert after == {key: data for key, data in before.items() if not key.startswith(ROOTS)}
    record = await bench.state.get_model(DEFAULT_TENANT, NAME)
    assert record is not None
    assert record.generation == 1


async def test_a_rollback_at_the_origin_is_remembered_past_a_removal(bench: Bench) -> None:
    await bench.put(1, "a")
    old = bench.origin.objects[KEY]
    await bench.put(2, "b")
    await bench.deploying.delete_model(DEFAULT_TENANT, "minilm")
    assert KEY not in bench.origin.objects
    bench.origin.put(KEY, old)
    assert await bench.roots.next_generation(DEFAULT_TENANT, NAME) == 3
    with pytest.raises(ConflictError):
        await bench.deploying.put_model(DEFAULT_TENANT, "minilm", PutModel(ref=old.decode()))


async def test_a_push_that_lost_its_lease_names_nothing(bench: Bench) -> None:
    with push_lease(bench.origin, purpose="test") as lease:
        await bench.put(1, lease=lease.id)
    with pytest.raises(UnavailableError, match="no lease"):
        await bench.put(2, "b", lease=lease.id)
    assert bench.origin.objects[KEY] == bench.ref(1).encode()


async def test_a_full_origin_is_told_and_the_model_stays_as_it_was(bench: Bench) -> None:
    await bench.put(1, "a")
    bench.origin.full = KEY
    with pytest.raises(StorageFullError):
        await bench.put(2, "b")
    record = await bench.state.get_model(DEFAULT_TENANT, NAME)
    assert record is not None
    assert record.generation == 1


async def test_a_revision_is_named_at_the_origin_before_the_state_names_it(bench: Bench) -> None:
    body = Deploy(spec=service(), code=artefact("b"))
    bench.origin.full = ROOTS
    with pytest.raises(StorageFullError):
        await bench.deploying.deploy(DEFAULT_TENANT, "embed", body)
    assert await bench.state.list_all_revisions() == []
    bench.origin.full = "nothing"
    await bench.deploying.deploy(DEFAULT_TENANT, "embed", body)
    assert bench.named_at_origin() == {artefact("b").manifest}


async def test_everything_that_the_state_names_is_gathered_over_all_tenants(bench: Bench) -> None:
    await bench.put(1, "c")
    await bench.state.put_revision(revision(tenant=TenantId("other")))
    async with bench.roots.changing:
        found = await bench.roots.gather()
    assert found.platform == "platform-a"
    names = {name for root in found.roots for name in root.named_by}
    assert names == {"model default/minilm", "deployment other/embed"}
    await bench.deploying.delete_model(DEFAULT_TENANT, "minilm")
    async with bench.roots.changing:
        assert {name for root in (await bench.roots.gather()).roots for name in root.named_by} == {
            "deployment other/embed"
        }
        assert artefact("c").manifest in bench.named_at_origin(), "asking changes nothing there"
        await bench.roots.publish_all()
    assert artefact("c").manifest not in bench.named_at_origin()


async def test_after_a_restart_everything_is_said_at_the_origin_again(bench: Bench) -> None:
    await bench.put(1, "a")
    bench.origin.delete(ROOTS + "platform-a")
    again = OriginRoots(bench.origin, bench.keys, bench.state, bench.loop.world, "platform-a")
    async with again.changing:
        await again.publish_roots([artefact("b")])
    assert bench.named_at_origin() == {artefact("a").manifest, artefact("b").manifest}


def test_a_platform_keeps_its_name(tmp_path: Path) -> None:
    made = platform_id(tmp_path / "keys" / "platform")
    assert platform_id(tmp_path / "keys" / "platform") == made


def test_a_name_that_was_lost_is_made_anew_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "platform"
    path.write_text("\n")
    made = platform_id(path)
    assert made
    assert platform_id(path) == made
    assert [entry.name for entry in tmp_path.iterdir()] == ["platform"]
