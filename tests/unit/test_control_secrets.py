"""Secrets in control: who may see what, what is refused, and what a start gets."""

from pathlib import Path

import anyio
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
from snowdrop.domain.secret import SecretValue
from snowdrop.domain.service import Scale
from snowdrop.state.memory import MemoryState
from snowdrop.wire.api import Deploy
from snowdrop.wire.codec import Message
from snowdrop.wire.control import StartReplica

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


class _NoRoots:
    """Not reached: the refusal comes first."""

    def __init__(self) -> None:
        self.changing = anyio.Lock()
