"""Runs snippets of Python through a launcher, as root and rootless, and returns what they printed."""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anyio
import pytest

from snowdrop.agent.sandbox.bubblewrap import BubblewrapLauncher
from snowdrop.agent.sandbox.cgroups import find_roots, group_name
from snowdrop.agent.sandbox.detect import detect_limits
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.launcher import (
    Descriptor,
    ExitStatus,
    Launcher,
    LaunchSpec,
    Mount,
    Output,
    SandboxHandle,
)
from snowdrop.agent.sandbox.limits import CombinedLimits
from snowdrop.agent.sandbox.unsafe import PlainLauncher
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId, fresh_id
from snowdrop.domain.service import ResourceSpec

INSTANCE = f"test-{os.getpid()}"
RUN_S_MAX = 30.0
# Tests that run beside others have a uid of their own: the kernel counts processes by uid.
NOBODY = 65534 - int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
SYSTEM_PYTHON = Path("/usr/bin/python3")


@dataclass
class Setup:
    """A launcher under test and the interpreter that its environment has."""

    name: str
    launcher: Launcher
    python: str


@cache
def limits() -> CombinedLimits:
    return detect_limits(INSTANCE)


def make_setup(name: str) -> Setup:
    """`root` or `rootless` bubblewrap, or `plain`; skips with the reason where the machine has not got it."""
    if name == "plain":
        return Setup(name, PlainLauncher(limits()), sys.executable)
    is_root = os.geteuid() == 0
    try:
        if name == "root":
            if not is_root:
                pytest.skip("needs root")
            return Setup(name, BubblewrapLauncher(limits()), sys.executable)
        if not is_root:
            return Setup(name, BubblewrapLauncher(limits()), sys.executable)
        # The interpreter may lie below a folder that only root may enter; the system's does not.
        if not SYSTEM_PYTHON.exists():
            pytest.skip(f"no {SYSTEM_PYTHON} for the unprivileged user")
        if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
            pytest.skip("user namespaces are off (user.max_user_namespaces=0)")
        environment = Environment(python=str(SYSTEM_PYTHON), folders=())
        return Setup(
            name, BubblewrapLauncher(limits(), environment=environment, as_uid=NOBODY), str(SYSTEM_PYTHON)
        )
    except SandboxError as error:
        pytest.skip(str(error))


class Running:
    """A launched snippet whose stdout and stderr are one pipe."""

    def __init__(self, handle: SandboxHandle, output_fd: int) -> None:
        self.handle = handle
        self._fd = output_fd
        self.output = ""

    async def read_line(self) -> str:
        while "\n" not in self.output:
            with anyio.fail_after(RUN_S_MAX):
                await anyio.wait_readable(self._fd)
            data = os.read(self._fd, 65536).decode()
            assert data, f"ended early: {self.output!r}"
            self.output += data
        line, _, self.output = self.output.partition("\n")
        return line

    async def finish(self) -> ExitStatus:
        """Waits for the end and collects the rest of the output."""
        with anyio.fail_after(RUN_S_MAX):
            while True:
                await anyio.wait_readable(self._fd)
                data = os.read(self._fd, 65536)
                if not data:
                    break
                self.output += data.decode(errors="replace")
            return await self.handle.wait()

    async def close(self) -> None:
        await self.handle.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def start(
    setup: Setup,
    code: str,
    *arguments: str,
    resources: ResourceSpec | None = None,
    mounts: tuple[Mount, ...] = (),
    descriptors: tuple[Descriptor, ...] = (),
    env: dict[str, str] | None = None,
    uid: int | None = None,
    bare: bool = True,
) -> Running:
    """Starts `code`. `bare` leaves out site-packages."""
    reader, writer = os.pipe()
    try:
        handle = await setup.launcher.launch(
            LaunchSpec(
                replica=ReplicaId(fresh_id("rep")),
                entry=(setup.python, *(("-I", "-S") if bare else ()), "-u", "-c", code, *arguments),
                output=Output(stdout_fd=writer, stderr_fd=writer),
                mounts=mounts,
                descriptors=descriptors,
                resources=resources or ResourceSpec(memory_bytes_max=512 << 20, pids_max=64),
                env=env or {},
                uid=uid,
            )
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return Running(handle, reader)


async def run(setup: Setup, code: str, *arguments: str, **more: object) -> tuple[ExitStatus, str]:
    """Starts `code`, waits for its end, cleans up. Returns how it ended and what it printed."""
    running = await start(setup, code, *arguments, **more)  # type: ignore[arg-type]
    try:
        return await running.finish(), running.output
    finally:
        await running.close()


def open_to_all(path: Path) -> None:
    """Lets every user reach `path`, which lies in a folder of pytest's that only its own user may enter."""
    for above in (path, *path.parents):
        if above.is_relative_to(Path(tempfile.gettempdir()) / f"pytest-of-{getpass.getuser()}"):
            above.chmod(0o755)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def swept() -> Iterator[None]:
    """Leaves no cgroup behind."""
    try:
        yield
    finally:
        limits().sweep()


def leftover_groups() -> list[Path]:
    """Groups of replicas that this process's tests made and did not remove."""
    roots = find_roots(Path("/sys/fs/cgroup"), group_name(INSTANCE))
    return [group for root in roots for group in root.glob("rep-*")]
