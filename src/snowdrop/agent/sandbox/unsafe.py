"""The launcher for `--unsafe-no-sandbox`: a plain process with limits and no isolation at all."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread

from snowdrop.agent.sandbox import plain_entry
from snowdrop.agent.sandbox.launcher import ExitStatus, LaunchSpec, Mount, check_spec, resolve_entry
from snowdrop.agent.sandbox.limits import LimitBackend, LimitGroup
from snowdrop.agent.sandbox.process import Child, spawn
from snowdrop.domain.errors import SandboxError


class PlainProcess:
    """A replica without a sandbox. `kill` reaches its process group, and what its cgroup holds if it has one."""

    def __init__(self, *, child: Child, group: LimitGroup, undo: ExitStack, describe: str) -> None:
        self._child = child
        self._group = group
        self._undo = undo
        self._describe = describe
        self._status: ExitStatus | None = None

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def describe(self) -> str:
        return self._describe

    async def wait(self) -> ExitStatus:
        code = await self._child.wait()
        if self._status is None:
            oom = self._group.oom_killed() and code == -signal.SIGKILL
            self._status = (
                ExitStatus(code=None, signal=-code, oom_killed=oom) if code < 0 else ExitStatus(code=code)
            )
            # There is no namespace whose end would take them along.
            self._kill_rest()
        return self._status

    def kill(self) -> None:
        self._kill_rest()
        self._child.kill()

    async def close(self) -> None:
        self.kill()
        await self._child.close()
        self._undo.close()

    def _kill_rest(self) -> None:
        if not self._child.ended:  # else the group's number may already be another's
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        for pid in self._group.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class PlainLauncher:
    """Starts replicas as ordinary processes of the agent's user. Mounts appear at their source."""

    def __init__(self, limits: LimitBackend) -> None:
        self._limits = limits

    @property
    def describe(self) -> str:
        return f"NO SANDBOX (--unsafe-no-sandbox): a process of the agent's user; limits: {self._limits.describe}"

    def visible_path(self, mount: Mount) -> str:
        if isinstance(mount.source, int):
            return str(Path(f"/proc/self/fd/{mount.source}").readlink())
        return str(mount.source)

    async def launch(self, spec: LaunchSpec) -> PlainProcess:
        check_spec(spec)
        with ExitStack() as undo:
            group = self._limits.create(spec.replica, spec.resources)
            undo.callback(group.close)
            child, gate_fd = _spawn_held(spec)
            try:
                with os.fdopen(gate_fd, "wb", buffering=0) as gate:
                    await anyio.to_thread.run_sync(group.attach, [child.pid])
                    await anyio.lowlevel.checkpoint_if_cancelled()
                    gate.write(b"x")
            except BaseException:
                await child.close()
                raise
            return PlainProcess(child=child, group=group, undo=undo.pop_all(), describe=self.describe)


def _spawn_held(spec: LaunchSpec) -> tuple[Child, int]:
    """Starts `plain_entry`, which waits at a gate until its limits are set. Returns it and the gate to open."""
    numbers = {given.role: given.fd for given in spec.descriptors}
    gate_read, gate_write = os.pipe()
    fixed = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR", "LANG") if name in os.environ}
    argv = [sys.executable, "-I", "-S", str(plain_entry.__file__), str(gate_read), str(os.getpid())]
    try:
        child = spawn(
            [*argv, *resolve_entry(spec, numbers)],
            stdout_fd=spec.output.stdout_fd,
            stderr_fd=spec.output.stderr_fd,
            pass_fds=[gate_read, *numbers.values()],
            env=fixed | spec.env,
            new_session=True,
        )
    except OSError as error:
        os.close(gate_write)
        raise SandboxError(f"the replica could not be started: {error}", where=spec.entry[0]) from error
    finally:
        os.close(gate_read)
    return child, gate_write
