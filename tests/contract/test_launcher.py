"""What every launcher does, with a sandbox and without."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from descriptors import open_descriptors
from sandbox_helpers import (
    NOBODY,
    Setup,
    alive,
    leftover_groups,
    limits,
    make_setup,
    open_to_all,
    run,
    start,
    swept,
)
from snowdrop.agent.sandbox.bubblewrap import BubblewrapLauncher
from snowdrop.agent.sandbox.launcher import LIFECYCLE, Descriptor, LaunchSpec, Mount, Output, fd_argument
from snowdrop.agent.sandbox.limits import Resource
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec
from snowdrop.wire.packet import packet_pair

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=["root", "rootless", "plain"])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    with swept():
        yield make_setup(request.param)


class TestLauncher:
    async def test_runs_the_entry_and_tells_its_code(self, setup: Setup) -> None:
        status, output = await run(setup, "import sys; print('out'); sys.exit(7)")
        assert (status.code, status.signal, status.oom_killed, output) == (7, None, False, "out\n")

    async def test_tells_the_signal_that_ended_it(self, setup: Setup) -> None:
        status, _ = await run(setup, "import os; os.kill(os.getpid(), 15)")
        assert (status.code, status.signal) == (None, signal.SIGTERM)

    async def test_the_lifecycle_descriptor_works_in_both_directions_and_ends(self, setup: Setup) -> None:
        ours, theirs = packet_pair()
        code = (
            "import socket,sys,os,time; s=socket.socket(fileno=int(sys.argv[1])); m=s.recv(99);"
            "s.send(m+b' '+os.environ['WHO'].encode()); s.close(); time.sleep(600)"
        )
        with ours, theirs:
            running = await start(
                setup,
                code,
                fd_argument(LIFECYCLE),
                descriptors=(Descriptor(role=LIFECYCLE, fd=theirs.fileno()),),
                env={"WHO": "me"},
            )
            theirs.close()
            try:
                ours.send(b"hello")
                ours.settimeout(20)
                assert await anyio.to_thread.run_sync(ours.recv, 99) == b"hello me"
                # The channel ends with the replica's own copy: nothing else in the sandbox holds one.
                assert await anyio.to_thread.run_sync(ours.recv, 99) == b""
                assert alive(running.handle.pid)
            finally:
                await running.close()

    async def test_inherits_nothing_else(self, setup: Setup) -> None:
        leak = os.open("/etc/hostname", os.O_RDONLY)
        os.set_inheritable(leak, True)
        try:
            _, output = await run(setup, "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])")
            assert output == "[0, 1, 2]\n"
        finally:
            os.close(leak)

    async def test_inherits_no_variable_of_the_agent(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AGENT_SECRET", "x")
        _, output = await run(setup, "import os; print(os.environ.get('AGENT_SECRET'), 'HOME' in os.environ)")
        assert output == "None True\n"

    async def test_mounts_are_found_at_their_visible_path(self, setup: Setup, tmp_path: Path) -> None:
        folder = tmp_path / "code"
        folder.mkdir()
        (folder / "x").write_text("content")
        mount = Mount(source=folder, target="/app")
        open_to_all(folder)
        code = "import sys; print(open(sys.argv[1]+'/x').read())"
        _, output = await run(setup, code, setup.launcher.visible_path(mount), mounts=(mount,))
        assert output == "content\n"

    async def test_volumes_are_written_by_their_user_alone_and_read_only_ones_by_nobody(
        self, setup: Setup, tmp_path: Path
    ) -> None:
        """As the agent gives them: by open descriptors, below a folder that nobody else may enter."""
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        uid = 765_432 if setup.name == "root" else None
        owner = uid or (NOBODY if setup.name == "rootless" and os.geteuid() == 0 else os.geteuid())
        os.chown(closed, os.geteuid() if uid else owner, -1)
        open_to_all(tmp_path)
        mounts = []
        code = "import os, sys\nfor path in sys.argv[1:3]:\n try: open(path + '/new', 'w'); print('wrote')\n"
        code += " except OSError as error: print(type(error).__name__)\nprint(os.path.exists(sys.argv[3]))"
        with ExitStack() as undo:
            for name, read_only in (("mine", False), ("theirs", True)):
                folder = closed / name
                folder.mkdir(mode=0o700)
                os.chown(folder, owner, -1)
                fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
                undo.callback(os.close, fd)
                mounts.append(Mount(source=fd, target=f"/data/{name}", read_only=read_only))
            paths = [setup.launcher.visible_path(mount) for mount in mounts]
            arguments = (*paths, str(closed))
            status, output = await run(setup, code, *arguments, mounts=tuple(mounts), uid=uid)
        assert status.code == 0, output
        expected = ["wrote", "OSError", "False"] if setup.name != "plain" else ["wrote", "wrote", "True"]
        assert output.split() == expected
        assert (closed / "mine" / "new").stat().st_uid == owner

    async def test_kill_ends_all_descendants(self, setup: Setup) -> None:
        code = "import os,time\nif os.fork(): print('up')\ntime.sleep(600)"
        running = await start(setup, code)
        try:
            assert await running.read_line() == "up"
            running.handle.kill()
            # The pipe ends only once every process that holds it is gone.
            status = await running.finish()
            assert status.signal == signal.SIGKILL
            assert not status.oom_killed
            running.handle.kill()
        finally:
            await running.close()

    async def test_close_ends_a_running_replica_and_may_be_repeated(self, setup: Setup) -> None:
        running = await start(setup, "import time; print('up'); time.sleep(600)")
        await running.read_line()
        pid = running.handle.pid
        await running.close()
        await running.close()
        assert not alive(pid)

    async def test_several_tasks_may_wait(self, setup: Setup) -> None:
        running = await start(setup, "import time; print('up'); time.sleep(600)")
        codes: list[int | None] = []

        async def wait() -> None:
            codes.append((await running.handle.wait()).signal)

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                group.start_soon(wait)
                await running.read_line()
                running.handle.kill()
            assert codes == [signal.SIGKILL] * 2
        finally:
            await running.close()

    async def test_memory_over_its_limit_is_killed_and_told(self, setup: Setup) -> None:
        if "memory per process only" in limits().describe:
            pytest.skip("no memory cgroup")
        code = "b=bytearray(1<<20)\nkept=[]\nwhile True: kept.append(bytes(b'x'*(8<<20)))"
        status, output = await run(setup, code, resources=ResourceSpec(memory_bytes_max=96 << 20))
        assert (status.oom_killed, status.signal) == (True, signal.SIGKILL), output
        assert "memory" in str(status)

    async def test_a_fork_bomb_is_bounded(self, setup: Setup) -> None:
        if Resource.PIDS not in limits().bounds:
            pytest.skip("pids cannot be bounded here")
        code = (
            "import os,time\nn=0\ntry:\n while n<500:\n  if os.fork()==0: time.sleep(600)\n  n+=1\n"
            "except OSError as e: print('refused', n, e.errno)"
        )
        running = await start(setup, code, resources=ResourceSpec(pids_max=24))
        try:
            word, count, errno = (await running.read_line()).split()
            assert (word, errno) == ("refused", "11")
            assert int(count) < 24
        finally:
            await running.close()

    async def test_nothing_is_left_after_close(self, setup: Setup) -> None:
        before = open_descriptors()
        running = await start(setup, "print(1)")
        await running.finish()
        await running.close()
        assert not leftover_groups()
        assert open_descriptors() <= before

    @pytest.mark.parametrize(
        "broken",
        [
            {"entry": ()},
            {"env": {"LD_PRELOAD": "/app/x.so"}},
            {"mounts": (Mount(source=Path("/nonexistent"), target="/app"),)},
            {"mounts": (Mount(source=Path("/usr"), target="/app/../etc"),)},
            {"mounts": (Mount(source=Path("/usr"), target="/a"), Mount(source=Path("/usr"), target="/a"))},
        ],
    )
    async def test_a_spec_that_cannot_be_carried_out_is_refused(
        self, setup: Setup, broken: dict[str, object]
    ) -> None:
        before = open_descriptors()
        fields = {"entry": ("x",), **broken}
        spec = LaunchSpec(replica=ReplicaId("rep-bad"), output=Output(stdout_fd=1, stderr_fd=2), **fields)  # type: ignore[arg-type]
        with pytest.raises(SandboxError) as caught:
            await setup.launcher.launch(spec)
        assert caught.value.where
        assert open_descriptors() <= before

    async def test_cancelled_launch_leaves_nothing(self, setup: Setup) -> None:
        before = open_descriptors()
        reader, writer = socket.socketpair()
        with reader, writer:
            spec = LaunchSpec(
                replica=ReplicaId("rep-cancelled"),
                entry=(setup.python, "-c", "import time; time.sleep(600)"),
                output=Output(stdout_fd=writer.fileno(), stderr_fd=writer.fileno()),
            )
            with anyio.CancelScope() as scope:
                scope.cancel()
                await setup.launcher.launch(spec)
            writer.close()
            reader.settimeout(20)
            assert await anyio.to_thread.run_sync(reader.recv, 1) == b""
        assert open_descriptors() <= before
        assert not leftover_groups()


class _GoneLimits:
    """Limits for a process that has ended, as when bubblewrap could not make a mount."""

    bounds: frozenset[Resource] = frozenset()
    describe = "none"

    def create(self, replica: ReplicaId, resources: ResourceSpec) -> _GoneLimits:
        return self

    def attach(self, pids: Sequence[int]) -> None:
        raise SandboxError(f"process {pids[0]} could not be limited") from ProcessLookupError()

    def oom_killed(self) -> bool:
        return False

    def members(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None: ...

    def sweep(self) -> int:
        return 0


async def test_a_sandbox_that_ends_before_it_is_limited_says_where_the_reason_is() -> None:
    make_setup("root" if os.geteuid() == 0 else "rootless")  # skips where there is no bubblewrap
    with pytest.raises(SandboxError, match="reason is in the replica's log"):
        await start(Setup("gone", BubblewrapLauncher(_GoneLimits()), sys.executable), "print()")
