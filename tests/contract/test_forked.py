"""Replicas forked off a warm parent: they live as others do, and see nothing of the parent or of each other."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from agent_helpers import order
from sandbox_helpers import alive, leftover_groups, limits, swept
from snowdrop.agent.sandbox.bubblewrap import UidPool, find_bwrap
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.forked import ForkedSandbox, WarmParent
from snowdrop.agent.sandbox.launcher import LIFECYCLE, Descriptor, LaunchSpec, Mount, Output
from snowdrop.agent.warm import WarmPool, key_of
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.secret import SecretValue
from snowdrop.wire.codec import PROTOCOL_VERSION
from snowdrop.wire.control import StartReplica
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.replica import FROM_REPLICA, Boot, StageFailed

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="only a root agent can hand mounts to a sandbox that runs"),
]
WAIT_S_MAX = 60.0
SPY = """
import ctypes, json, os, random, sys

def readable(path):
    try:
        with open(path, "rb") as file:
            return len(file.read(1)) >= 0
    except OSError:
        return False

pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
libc = ctypes.CDLL(None, use_errno=True)
seen = {
    "pids": pids,
    "pid": os.getpid(),
    "init_memory": readable("/proc/1/mem"),
    "init_environ": readable("/proc/1/environ"),
    "fds": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1]),
    "numpy": "numpy" in sys.modules,
    "unshare": libc.unshare(0x10000000),
    "unshare_all": libc.unshare(0x7E020000),
    "mount": libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 6, None),
    "caps": next(line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")),
    "tmp": sorted(os.listdir("/tmp")),
    "covered": [at for at, _, names in os.walk("/tmp") if "of-the-environment" in names],
    "model": open("/models/one/hello").read(),
    "unix": len(open("/proc/net/unix").read().splitlines()) - 1,
    "random": random.random(),
    "numpy_random": float(__import__("numpy").random.random()),
    "threads": os.environ.get("OMP_NUM_THREADS"),
    "secrets": sorted(name for name in os.environ if name.startswith("SECRET")),
}
try:
    open("/app/x", "w")
    seen["code_writable"] = True
except OSError:
    seen["code_writable"] = False
with open("/tmp/mine", "w") as file:
    file.write("x")
raise RuntimeError("SEEN" + json.dumps(seen))
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with swept():
        yield
    assert leftover_groups() == []


@asynccontextmanager
async def pool(*starts: StartReplica) -> AsyncIterator[WarmPool]:
    """A pool with a parent for each of `starts`."""
    made = WarmPool(limits(), UidPool(), find_bwrap(), memory_bytes_max=2 << 30)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        for start in starts:
            key = key_of(start)
            assert key is not None
            with spec_of("rep-0", Path("/")) as (spec, _):
                assert await made.launch(start, spec) is None, "nobody waits for a parent"
            with anyio.fail_after(WAIT_S_MAX):
                await made.until_warm(key)
        yield made
        tasks.cancel_scope.cancel()


class spec_of:  # noqa: N801 -- used as a function
    """A launch spec and the agent's end of its channel."""

    def __init__(self, replica: str, folder: Path) -> None:
        self._replica, self._folder = replica, folder
        self._stack = ExitStack()

    def __enter__(self) -> tuple[LaunchSpec, PacketChannel[object]]:
        ours, theirs = packet_pair()
        self._stack.callback(ours.close)
        self._stack.callback(theirs.close)
        null = os.open("/dev/null", os.O_WRONLY)
        self._stack.callback(os.close, null)
        spec = LaunchSpec(
            replica=ReplicaId(self._replica),
            entry=("unused",),
            output=Output(stdout_fd=null, stderr_fd=null),
            mounts=(
                Mount(source=self._folder, target="/app"),
                Mount(source=self._folder, target="/models/one"),
            ),
            descriptors=(Descriptor(role=LIFECYCLE, fd=theirs.fileno()),),
        )
        return spec, PacketChannel(ours, FROM_REPLICA)

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def warm_order(replica: str = "rep-1", **spec: object) -> StartReplica:
    return order(replica, model=False, warm_imports=("numpy",), **spec)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    (tmp_path / "hello").write_text("hello")
    (tmp_path / "spy.py").write_text(SPY)
    return tmp_path


async def spied(made: WarmPool, start: StartReplica, code: Path, secret: str = "") -> dict[str, object]:
    """What a service sees of the world while it is imported."""
    with spec_of(start.key.replica, code) as (spec, channel):
        handle = await made.launch(start, spec)
        assert isinstance(handle, ForkedSandbox)
        boot = Boot(
            version=PROTOCOL_VERSION,
            key=start.key,
            spec=msgspec.structs.replace(start.revision.spec, entry="spy:Spy"),
            code_directory="/app",
            secrets={"SECRET_" + secret: SecretValue(secret)} if secret else {},
        )
        try:
            with anyio.fail_after(WAIT_S_MAX):
                await channel.send(boot)
                while not isinstance(message := (await channel.receive())[0], StageFailed):
                    pass
                await handle.wait()
        finally:
            await handle.close()
    _, _, text = message.error.message.partition("SEEN")
    assert text, message.error
    return msgspec.json.decode(text)


class TestForked:
    async def test_user_code_sees_its_own_world_only(self, code: Path) -> None:
        start = warm_order()
        async with pool(start) as made:
            seen = await spied(made, start, code, secret="first")
            again = await spied(made, warm_order("rep-2"), code, secret="second")
        assert seen["numpy"] is True, "the imports are done"
        assert seen["pid"] == 2
        assert seen["pids"] == [1, 2]
        assert (seen["init_memory"], seen["init_environ"]) == (False, False)
        assert seen["unix"] == 0, "no socket of others, abstract names included"
        assert (seen["unshare"], seen["unshare_all"], seen["mount"]) == (-1, -1, -1)
        assert seen["caps"] == "0" * 16
        assert (seen["model"], seen["code_writable"]) == ("hello", False)
        assert seen["threads"] is None
        assert seen["secrets"] == ["SECRET_first"]
        # Of the replica before there is no secret, no file, no random number.
        assert again["secrets"] == ["SECRET_second"]
        assert "mine" not in again["tmp"]
        assert seen["random"] != again["random"]
        assert seen["numpy_random"] != again["numpy_random"]
        # Its own channel alone, and no descriptor of the parent's.
        assert [name.partition(":")[0] for name in seen["fds"]] == ["/dev/null"] * 3 + ["socket"]

    async def test_an_environment_below_its_own_tmp_is_still_there(
        self, code: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            Path(folder).chmod(0o755)
            (Path(folder) / "of-the-environment").touch()
            real = Environment.current()
            shown = msgspec.structs.replace(real, folders=(*real.folders, Path(folder)))
            monkeypatch.setattr(Environment, "current", lambda: shown)
            start = warm_order()
            async with pool(start) as made:
                seen = await spied(made, start, code)
        assert seen["covered"] == [folder]

    async def test_replicas_live_on_when_the_parent_dies_and_the_next_starts_the_ordinary_way(
        self, code: Path
    ) -> None:
        start = warm_order()
        async with pool(start) as made:
            key = key_of(start)
            with spec_of("rep-1", code) as (spec, _), spec_of("rep-2", code) as (other, _):
                handle = await made.launch(start, spec)
                assert handle is not None
                os.kill(parent_pid(made, key), signal.SIGKILL)
                while made._kept[key].parent is not None:  # it has been noticed
                    await anyio.sleep(0.01)
                assert await made.launch(warm_order("rep-2"), other) is None
                assert alive(handle.pid)
                handle.kill()
                assert (await handle.wait()).signal == signal.SIGKILL
                await handle.close()

    async def test_a_parent_is_of_one_tenant(self, code: Path) -> None:
        start = warm_order()
        other = msgspec.structs.replace(start, key=msgspec.structs.replace(start.key, tenant="other"))
        assert isinstance(other.key, ReplicaKey)
        async with pool(start) as made:
            with spec_of("rep-1", code) as (spec, _):
                assert await made.launch(other, spec) is None

    async def test_one_that_cannot_be_mounted_starts_the_ordinary_way_and_leaves_nothing(self, code: Path) -> None:
        start = warm_order()
        async with pool(start) as made:
            with spec_of("rep-1", code / "gone") as (spec, _):
                assert await made.launch(start, spec) is None
            assert not any(group.name == "rep-1" for group in leftover_groups())

    @pytest.mark.parametrize("spec", [{"warm": False}, {"warm_imports": ("os", "mycode")}])
    def test_who_may_not_has_no_parent(self, spec: dict[str, object]) -> None:
        assert key_of(order(model=False, **({"warm_imports": ("numpy",)} | spec))) is None


def parent_pid(made: WarmPool, key: object) -> int:
    """The process that forks: the keeper's first child."""
    parent = made._kept[key].parent
    assert isinstance(parent, WarmParent)
    keeper = children(parent.pid)[0]
    return min(children(keeper))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
