"""Replicas as forks of a warm parent: the parent's sandbox, and the handle of one fork.

Needs a root agent: only it can clone the mounts that a fork is handed. Forks of one parent share its host uid.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import anyio.to_thread

from snowdrop.agent.sandbox.bubblewrap import (
    STOP_S_MAX,
    BubblewrapLauncher,
    BubblewrapSandbox,
    UidPool,
    give_output,
)
from snowdrop.agent.sandbox.bwrap_arguments import SETPRIV, SHM_BYTES_MAX
from snowdrop.agent.sandbox.detached import detached
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.launcher import (
    CODE_TARGET,
    LIFECYCLE,
    MODELS_TARGET,
    Descriptor,
    ExitStatus,
    LaunchSpec,
    Mount,
    Output,
    fd_argument,
)
from snowdrop.agent.sandbox.limits import LimitBackend, LimitGroup
from snowdrop.agent.sandbox.seccomp import compile_profile
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec
from snowdrop.wire.codec import PROTOCOL_VERSION
from snowdrop.wire.packet import PacketChannel, packet_pair
from snowdrop.wire.warm import (
    FORK_STATUS,
    FROM_WARM,
    OWN_FOLDERS,
    Fork,
    Forked,
    ForkEnded,
    ForkFailed,
    ForkMount,
    ForkStatus,
    FromWarm,
    Warm,
    Warmed,
)

FORKED = "forked"
"""How the description of a fork begins, and the note of its start in a receipt."""
FORK_S_MAX = 5.0
WARM_S_MAX = 300.0
_STAGE = (
    *("/usr/bin/unshare", "--mount", "--propagation", "private", "/bin/sh", "-ec"),
    'while [ "$1" != -- ]; do mount --rbind "$1" "$2"; shift 2; done; shift; exec "$@"',
    "sh",
)
"""Shows folders where the parent's user can reach them, in a mount namespace that ends with it, then becomes it:
the environment's own folders are readable by all, those above them perhaps not."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class ForkedSandbox:
    """A forked replica. `init` is the first process of its pid namespace, with which all others end."""

    def __init__(
        self,
        *,
        status: PacketChannel[ForkStatus],
        pid: int,
        init_pidfd: int,
        group: LimitGroup,
        describe: str,
    ) -> None:
        self._channel = status
        self._pid = pid
        self._init_pidfd = init_pidfd
        self._group = group
        self._describe = describe
        self._status: ExitStatus | None = None
        self._turn = anyio.Lock()

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def describe(self) -> str:
        return self._describe

    async def wait(self) -> ExitStatus:
        async with self._turn:
            if self._status is None:
                code = -signal.SIGKILL  # of the namespace's first process, which then tells nothing
                with suppress(EOFError, OSError):
                    message, _ = await self._channel.receive()
                    if isinstance(message, ForkEnded):
                        code = message.code
                await anyio.wait_readable(self._init_pidfd)
                oom = self._group.oom_killed() and code == -signal.SIGKILL
                self._status = (
                    ExitStatus(code=None, signal=-code, oom_killed=oom) if code < 0 else ExitStatus(code=code)
                )
            return self._status

    def kill(self) -> None:
        if self._init_pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)

    async def close(self) -> None:
        if self._init_pidfd < 0:
            return
        self.kill()
        with anyio.fail_after(STOP_S_MAX, shield=True):
            await self.wait()
        os.close(self._init_pidfd)
        self._init_pidfd = -1
        self._channel.close()
        self._group.close()


class WarmParent:
    """One parent in its sandbox. `start` it, `fork` as often as wanted, `retire` or `close` it."""

    def __init__(self, sandbox: BubblewrapSandbox, sock: socket.socket, limits: LimitBackend, uid: int) -> None:
        self._sandbox = sandbox
        self._uid = uid
        self._sock = sock
        self._channel: PacketChannel[FromWarm] = PacketChannel(sock, FROM_WARM)
        self._sending = anyio.Lock()
        self._limits = limits
        self.warmed: Warmed | None = None

    async def warm(self, imports: tuple[str, ...]) -> Warmed:
        """Has the imports done. Raises SandboxError if the parent ends instead."""
        order = Warm(version=PROTOCOL_VERSION, imports=imports, programs=compile_profile("replica"))
        try:
            with anyio.fail_after(WARM_S_MAX):
                await self._channel.send(order)
                self.warmed, _ = await self._channel.receive()
        except (EOFError, OSError) as error:
            raise SandboxError(
                "the warm parent ended before its imports were done",
                where=", ".join(imports),
                next_step="its reason is in the agent's log",
            ) from error
        if self.warmed.threads > 1:
            raise SandboxError(f"imports start threads ({self.warmed.threads})", where=", ".join(imports))
        return self.warmed

    async def ended(self) -> None:
        """Until the parent proper has ended; its replicas may live on."""
        with suppress(EOFError, OSError, anyio.ClosedResourceError):
            await self._channel.receive()  # it has nothing more to say

    async def fork(self, spec: LaunchSpec) -> ForkedSandbox:
        """A replica as `spec` says, held until it gets its Boot. Raises SandboxError; nothing is left then."""
        ours, theirs = packet_pair()
        with ExitStack() as undo, ExitStack() as sent:
            status: PacketChannel[ForkStatus] = PacketChannel(ours, FORK_STATUS)
            undo.callback(status.close)
            sent.callback(theirs.close)
            group = self._limits.create(spec.replica, spec.resources)
            undo.callback(group.close)
            give_output(spec.output, self._uid)
            (lifecycle,) = spec.descriptors
            fds = [lifecycle.fd, spec.output.stdout_fd, spec.output.stderr_fd, theirs.fileno()]
            mounts = []
            for mount in (*spec.mounts, *_covered_mounts()):
                fd = detached(mount)
                sent.callback(os.close, fd)
                mounts.append(ForkMount(mount.target, len(fds)))
                fds.append(fd)
            order = Fork(
                mounts=tuple(mounts),
                tmp_bytes_max=spec.resources.tmp_bytes_max,
                shm_bytes_max=min(SHM_BYTES_MAX, spec.resources.memory_bytes_max),
            )
            try:
                with anyio.fail_after(FORK_S_MAX):
                    async with self._sending:
                        await self._channel.send(order, tuple(fds))
                    sent.close()  # the parent's copies alone must keep the status socket open
                    message, pidfds = await status.receive()
            except (EOFError, OSError) as error:
                raise SandboxError("the warm parent did not fork", where=str(spec.replica)) from error
            if not isinstance(message, Forked) or len(pidfds) != 2:
                for fd in pidfds:
                    os.close(fd)
                reason = message.reason if isinstance(message, ForkFailed) else type(message).__name__
                raise SandboxError(f"the warm parent could not fork: {reason}", where=str(spec.replica))
            return await self._limited(status, pidfds, group, undo)

    async def _limited(
        self, status: PacketChannel[ForkStatus], pidfds: tuple[int, ...], group: LimitGroup, undo: ExitStack
    ) -> ForkedSandbox:
        init_pidfd, replica_pidfd = pidfds
        try:
            pids = [_pid_of(init_pidfd), _pid_of(replica_pidfd)]
        finally:
            os.close(replica_pidfd)
        handle = ForkedSandbox(
            status=status, pid=pids[1], init_pidfd=init_pidfd, group=group, describe=f"{FORKED}; {self.describe}"
        )
        undo.pop_all()
        try:
            await anyio.to_thread.run_sync(group.attach, pids)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await handle.close()
            raise
        return handle

    @property
    def pid(self) -> int:
        return self._sandbox.pid

    @property
    def describe(self) -> str:
        return self._sandbox.describe

    def retire(self) -> None:
        """The parent ends; its replicas live on, and its sandbox ends with the last of them."""
        with suppress(OSError):  # it ended already
            self._sock.shutdown(socket.SHUT_RDWR)  # not closed: a task may be waiting on it

    async def wait(self) -> ExitStatus:
        """Until the parent and all of its replicas have ended."""
        return await self._sandbox.wait()

    async def close(self) -> None:
        """Ends the parent and every replica that is left."""
        self._channel.close()
        await self._sandbox.close()


async def start_parent(
    limits: LimitBackend, uids: UidPool, bwrap: Path, *, name: ReplicaId, memory_bytes_max: int, output: Output
) -> WarmParent:
    """A parent in a sandbox of its own, without imports yet. Raises SandboxError."""
    if os.geteuid() != 0:
        raise SandboxError("a warm pool needs an agent that runs as root", where="agent")
    environment = Environment.current()
    ours, theirs = packet_pair()
    with ExitStack() as undo, ExitStack() as sent:
        undo.callback(ours.close)
        sent.callback(theirs.close)
        uid = uids.take()
        undo.callback(uids.give_back, uid)
        place = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="snowdrop-warm-")))
        place.chmod(0o755)
        folders = {place / str(number): folder for number, folder in enumerate(environment.folders)}
        empty = place / "empty"
        for folder in (*folders, empty):
            folder.mkdir(mode=0o755)
        inside = (at / bwrap.relative_to(source) for at, source in folders.items() if bwrap.is_relative_to(source))
        program = next(inside, bwrap)
        mounts = [Mount(source=at, target=str(folder)) for at, folder in folders.items()]
        mounts += [Mount(source=empty, target=target) for target in (CODE_TARGET, MODELS_TARGET)]
        shown = [word for at, source in folders.items() for word in (str(source), str(at))]
        ids = ("--reuid", str(uid), "--regid", str(uid))
        launcher = BubblewrapLauncher(
            limits,
            environment=Environment(python=environment.python, folders=()),
            bwrap=program,
            as_uid=uid,
            as_uid_prefix=(*_STAGE, *shown, "--", SETPRIV, *ids, "--clear-groups"),
            profile="warm",
        )
        spec = LaunchSpec(
            replica=name,
            entry=(environment.python, "-m", "snowdrop.replica.warm", "--fd", fd_argument(LIFECYCLE)),
            output=output,
            mounts=tuple(mounts),
            descriptors=(Descriptor(role=LIFECYCLE, fd=theirs.fileno()),),
            resources=ResourceSpec(memory_bytes_max=memory_bytes_max),
            env=dict.fromkeys(_THREADS, "1"),
        )
        sandbox = await launcher.launch(spec)
        sandbox.call_when_closed(undo.pop_all().close)
        return WarmParent(sandbox, ours, limits, uid)


def _covered_mounts() -> tuple[Mount, ...]:
    """The environment's folders that lie where a fork mounts an empty directory of its own."""
    mounts = Environment.current().mounts()
    return tuple(mount for mount in mounts if any(Path(mount.target).is_relative_to(own) for own in OWN_FOLDERS))


def _pid_of(pidfd: int) -> int:
    """The pid in our namespace of the process that a descriptor means, whatever it is called in its own."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pid" and int(value) > 0:
            return int(value)
    raise SandboxError("the forked process is gone already", where="pidfd")
