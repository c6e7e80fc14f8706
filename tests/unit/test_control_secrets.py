"""Secrets in control: who may see what, what is refused, and what a start gets."""

import base64
import os
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec
import pytest

from platform_helpers import KEY, NODE, artefact, deployment, node_record, replica_key, revision, service
from snowdrop.control.deploying import Deploying
from snowdrop.control.loop import ControlLoop
from snowdrop.control.recorder import Recorder
from snowdrop.control.secrets import Secrets
from snowdrop.control.world import NodeEntry
from snowdrop.domain.deployment import DeploymentHealth
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.domain.secret import KEYS_VARIABLE, SecretRecord, SecretValue
from snowdrop.domain.service import Scale
from snowdrop.replica import runtime
from snowdrop.state.memory import MemoryState
from snowdrop.wire.api import Deploy
from snowdrop.wire.codec import Message
from snowdrop.wire.control import StartReplica
from snowdrop.wire.replica import Boot

pytestmark = pytest.mark.anyio
VALUE = "hf_s3cr3t-value"


class Bench:
    def __init__(self) -> None:
        self.state = MemoryState()
        self.loop = ControlLoop(self.state, Recorder(), tick_s=0.5)
        self.sent: list[Message] = []
        self.loop.send_agent = lambda _node, message: self.sent.append(message)
        self.loop.world.nodes[NODE] = NodeEntry(node_record(), "inc-1", "/agent.sock")

    async def start(self, folder: Path) -> None:
        self.secrets = self.loop.secrets = await Secrets.open(self.state, folder, self.loop.world)
        await self.state.put_revision(
            revision(scale=Scale(min=1), secrets={"HF_TOKEN": "hf-token", "file:tls.pem": "tls"})
        )
        await self.state.put_deployment(deployment(), expected_generation=0)
        await self.loop.load()


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    made = Bench()
    await made.start(tmp_path / "secret-keys")
    return made


async def test_a_start_gets_the_secrets_it_names_and_nothing_keeps_them(bench: Bench) -> None:
    await bench.secrets.set(DEFAULT_TENANT, "hf-token", VALUE)
    await bench.secrets.set(DEFAULT_TENANT, "tls", "pem pem")
    await bench.loop.look(KEY)
    (order,) = bench.sent
    assert isinstance(order, StartReplica)
    assert order.secrets == {"HF_TOKEN": SecretValue(VALUE), "file:tls.pem": SecretValue("pem pem")}
    assert VALUE not in repr(order)
    (entry,) = bench.loop.world.replicas.values()
    assert entry.order is not None
    assert entry.order.secrets == {}, "control's memory keeps it"
    assert VALUE.encode() not in msgspec.json.encode(await bench.secrets.listed(DEFAULT_TENANT))


async def test_a_start_without_its_secret_fails_and_says_which(bench: Bench) -> None:
    await bench.loop.look(KEY)
    assert bench.sent == []
    entry = bench.loop.world.deployments[KEY]
    assert entry.starts.reason.startswith("there is no secret 'hf-token'")
    await bench.loop.look(KEY)
    assert entry.health is DeploymentHealth.BACKING_OFF
    await bench.secrets.set(DEFAULT_TENANT, "hf-token", VALUE)
    await bench.secrets.set(DEFAULT_TENANT, "tls", "pem pem")
    await bench.loop.look(KEY)
    assert len(bench.sent) == 1, "setting it is another chance"


async def test_a_deploy_that_names_an_unknown_secret_is_refused(bench: Bench) -> None:
    deploying = Deploying(bench.loop, _NoRoots())  # type: ignore[arg-type]
    body = Deploy(spec=service(secrets={"A": "nobody-has-it"}), code=artefact())
    with pytest.raises(NotFoundError, match="snowdrop secret set nobody-has-it"):
        await deploying.deploy(DEFAULT_TENANT, "fresh", body)
    assert await bench.state.list_deployments(DEFAULT_TENANT) == [deployment()]


async def test_a_secret_in_use_stays_and_tenants_have_their_own(bench: Bench) -> None:
    other = TenantId("other")
    await bench.secrets.set(DEFAULT_TENANT, "hf-token", VALUE)
    with pytest.raises(ConflictError, match="used by embed"):
        await bench.secrets.delete(DEFAULT_TENANT, "hf-token")
    assert await bench.secrets.listed(other) == []
    with pytest.raises(NotFoundError):
        await bench.secrets.delete(other, "hf-token")
    await bench.secrets.set(DEFAULT_TENANT, "free", VALUE)
    await bench.secrets.delete(DEFAULT_TENANT, "free")


async def test_rotation_turns_all_tenants_and_starts_go_on(bench: Bench, tmp_path: Path) -> None:
    await bench.secrets.set(DEFAULT_TENANT, "hf-token", VALUE)
    await bench.secrets.set(DEFAULT_TENANT, "tls", "pem pem")
    await bench.secrets.set(TenantId("other"), "hf-token", "of another")
    done = await bench.secrets.rotate()
    assert (done.rewrapped, done.removed) == (3, 1)
    assert len(list((tmp_path / "secret-keys").iterdir())) == 1
    assert {r.key_id for r in await bench.state.secrets.listed(None)} == {done.key_id}
    await bench.loop.look(KEY)
    assert len(bench.sent) == 1


async def test_too_much_for_one_service_is_said_at_the_start(bench: Bench) -> None:
    names = {f"V{number}": f"s{number}" for number in range(3)}
    for name in names.values():
        await bench.secrets.set(DEFAULT_TENANT, name, "x" * 30_000)
    order = StartReplica(key=replica_key(), revision=revision(secrets=names), ordered_unix_ns=1)
    with pytest.raises(InvalidInputError, match="too large together"):
        await bench.secrets.complete(order)


async def test_two_who_set_a_secret_at_once_make_two_versions(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = bench.state.secrets.get

    async def get(tenant: TenantId, name: str) -> SecretRecord | None:
        found = await read(tenant, name)
        await anyio.lowlevel.checkpoint()  # as a database does, which others use meanwhile
        return found

    monkeypatch.setattr(bench.state.secrets, "get", get)
    async with anyio.create_task_group() as tasks:
        for value in ("first", "second"):
            tasks.start_soon(bench.secrets.set, DEFAULT_TENANT, "hf-token", value)
    (view,) = await bench.secrets.listed(DEFAULT_TENANT)
    assert view.version == 2
    with pytest.raises(InvalidInputError):
        await bench.secrets.set(DEFAULT_TENANT, "../x", VALUE)


async def test_another_writers_version_is_not_written_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.secrets.set(DEFAULT_TENANT, "hf-token", VALUE)
    store, read = bench.state.secrets, bench.state.secrets.get
    (theirs,) = [msgspec.structs.replace(r, version=7) for r in await store.listed(DEFAULT_TENANT)]

    async def get(tenant: TenantId, name: str) -> SecretRecord | None:
        found = await read(tenant, name)
        if found is not None and found.version == 1:
            await store.put(theirs, expected=found)
        return found

    monkeypatch.setattr(store, "get", get)
    with pytest.raises(ConflictError):
        await bench.secrets.set(DEFAULT_TENANT, "hf-token", "mine")
    assert await read(DEFAULT_TENANT, "hf-token") == theirs


async def test_rotation_to_a_key_of_the_environment(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (base64.b64encode(os.urandom(32)).decode() for _ in range(2))
    monkeypatch.setenv(KEYS_VARIABLE, old)
    first = await Secrets.open(bench.state, tmp_path / "none", bench.loop.world)
    await first.set(DEFAULT_TENANT, "hf-token", VALUE)
    monkeypatch.setenv(KEYS_VARIABLE, f"{new},{old}")
    both = await Secrets.open(bench.state, tmp_path / "none", bench.loop.world)
    assert (await both.rotate()).rewrapped == 1
    assert (await both.rotate()).rewrapped == 0, "it is done"
    monkeypatch.setenv(KEYS_VARIABLE, old)
    wrong = await Secrets.open(bench.state, tmp_path / "none", bench.loop.world)
    order = StartReplica(key=replica_key(), revision=revision(secrets={"A": "hf-token"}), ordered_unix_ns=1)
    with pytest.raises(NotFoundError, match="bring the key back from its backup") as refused:
        await wrong.complete(order)
    assert refused.value.where == KEYS_VARIABLE


def test_a_replicas_secrets_are_private_files_that_go_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "SECRETS_FOLDER", str(tmp_path / "secrets"))
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "SAME": "of the spec's"})
    secrets = {"SAME": SecretValue("multi\nline"), "file:tls.pem": SecretValue("pem\npem")}
    boot = Boot(
        version=1,
        key=replica_key(),
        spec=service(),
        code_directory="/",
        env={"A": "b"},
        secrets=secrets,
        models=(),
    )
    runtime.apply_environment(boot)
    folder = tmp_path / "secrets-rep-1"
    assert os.environ == {"PATH": "/bin", "SAME": "multi\nline", "A": "b", "SNOWDROP_SECRETS": str(folder)}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "tls.pem").stat().st_mode & 0o777 == 0o600
    assert (folder / "tls.pem").read_bytes() == b"pem\npem"
    monkeypatch.setattr(runtime.Runtime, "run", lambda _self: 3)
    assert runtime.run(None, boot, (), 1) == 3  # type: ignore[arg-type]
    assert not folder.exists()


class _NoRoots:
    """Not reached: the refusal comes first."""

    def __init__(self) -> None:
        self.changing = anyio.Lock()
