"""A deployment that is deleted and made anew knows nothing of the one before."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from platform_helpers import KEY, NAME, artefact, deployment, replica_key, report, revision, service
from snowdrop.control.deploying import Deploying
from snowdrop.control.loop import ControlLoop
from snowdrop.control.receipts import receipt_of
from snowdrop.control.recorder import Recorder
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.replica import ReplicaState
from snowdrop.policy.autoscale.learned import Learned
from snowdrop.policy.restart import StartHistory
from snowdrop.state.memory import MemoryState
from snowdrop.wire.api import Deploy

pytestmark = pytest.mark.anyio
TAUGHT = Learned(starts_s=(90.0,), done=10.0, slot_s=100.0)


class NoRoots:
    """An origin that takes everything."""

    def __init__(self) -> None:
        self.changing = anyio.Lock()

    async def check_push(self, _lease: object) -> None: ...
    async def publish_roots(self, _artefacts: object) -> None: ...


class Bench:
    def __init__(self) -> None:
        self.state = MemoryState()
        self.recorder = Recorder()
        self.loop = ControlLoop(self.state, self.recorder, tick_s=0.5)
        self.deploying = Deploying(self.loop, NoRoots())  # type: ignore[arg-type]

    async def start(self) -> None:
        await self.state.put_revision(revision())
        await self.state.put_deployment(deployment(), expected_generation=0)
        ready = report(replica_key("rep-old"), ReplicaState.READY, started_unix_ns=5)
        await self.state.put_receipt(receipt_of(ready, ordered_unix_ns=5))
        await self.loop.load()
        entry = self.loop.world.deployments[KEY]
        entry.scaling.learned, entry.starts = TAUGHT, StartHistory(failures=9, reason="boom")

    async def deploy(self) -> None:
        await self.deploying.deploy(DEFAULT_TENANT, NAME, Deploy(spec=service(), code=artefact()))


@pytest.fixture
async def bench() -> Bench:
    made = Bench()
    await made.start()
    return made


async def test_made_anew_after_it_is_gone(bench: Bench) -> None:
    await bench.loop.look(KEY)
    await bench.deploying.delete(DEFAULT_TENANT, NAME)
    await bench.loop.look(KEY)
    assert KEY not in bench.loop.world.deployments
    await flushed(bench)
    assert await bench.state.scaling.get_learned(*KEY) is None, "a record that was on its way came after it"
    await bench.deploy()
    assert bench.loop.world.deployments[KEY].scaling.learned == Learned()


async def test_made_anew_while_it_is_being_deleted(bench: Bench) -> None:
    bench.loop.heard_replica(report(replica_key("rep-1"), ReplicaState.READY, version=9))
    await bench.deploying.delete(DEFAULT_TENANT, NAME)
    await bench.deploy()
    entry = bench.loop.world.deployments[KEY]
    assert not entry.deployment.deleting
    assert entry.scaling.learned == Learned()
    assert entry.starts == StartHistory()
    # What was decided before is told late: it changes nothing.
    stale = msgspec.structs.replace(deployment(), generation=99, deleting=True)
    await bench.loop.set_deployment(stale)
    assert not bench.loop.world.deployments[KEY].deployment.deleting
    # Nor does another life of control learn from receipts of the one before.
    again = ControlLoop(bench.state, Recorder(), tick_s=0.5)
    await again.load()
    assert again.world.deployments[KEY].scaling.learned.starts_s == ()


async def flushed(bench: Bench) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.recorder.run)
        await bench.recorder.flush(5.0)
        tasks.cancel_scope.cancel()
