"""`python -m snowdrop.replica.warm --fd N`: a parent with imports done, and replicas as forks of it.

Four processes. The keeper, first and small, stays until the parent and every replica have ended, so that a parent
that dies or is evicted takes no replica along: it would if it were the one whose end ends the sandbox. The parent
imports and forks. Each fork makes its namespaces and is followed by their first process, which mounts, gives up
what made that possible, forks the replica proper, and ends with it. No user code has run in any of them but the
replica proper, and that under the filter of every replica.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import socket
import sys
from pathlib import Path

from snowdrop.replica import nesting
from snowdrop.wire.codec import check_version
from snowdrop.wire.packet import PacketChannel
from snowdrop.wire.replica import Boot
from snowdrop.wire.warm import FORK_STATUS, TO_WARM, Fork, Forked, ForkEnded, ForkFailed, ForkStatus, Warm, Warmed

MODELS_FOLDER = Path("/models")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""1 in a parent: a fork has only the thread that forked, and a pool of threads would be missing its others."""
EXIT_THREADS = 4
_LIFECYCLE, _STDOUT, _STDERR, _STATUS = range(4)


def main(argv: list[str]) -> int:
    """Runs one parent over the packet socket given by `--fd`. Returns the exit code of the keeper."""
    if len(argv) != 2 or argv[0] != "--fd" or not argv[1].isdecimal():
        print("usage: python -m snowdrop.replica.warm --fd N, the packet socket to the agent", file=sys.stderr)
        return 2
    sock = socket.socket(fileno=int(argv[1]))
    nesting.adopt_orphans()
    if os.fork() == 0:
        _leave(_run_parent(sock))
    sock.close()
    return _keep()


def _keep() -> int:
    """Until nothing of the sandbox runs any more."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return 0


def _run_parent(sock: socket.socket) -> int:
    nesting.set_dumpable(False)
    channel = PacketChannel(sock, TO_WARM)
    try:
        warm, _ = channel.receive_blocking()
        if not isinstance(warm, Warm):
            print(f"warm parent: {type(warm).__name__} came before Warm", file=sys.stderr)
            return 1
        check_version(warm.version, peer="the agent")
        warmed = import_all(warm.imports)
        gc.collect()
        gc.freeze()
        channel.send_blocking(warmed)
        if warmed.threads > 1:
            return EXIT_THREADS
        while True:  # the agent's end of the channel ends it
            order, fds = channel.receive_blocking()
            if isinstance(order, Fork):
                _fork(order, fds, warm.programs)
    except (EOFError, OSError):
        return 0


def import_all(names: tuple[str, ...]) -> Warmed:
    """Imports what can be; a module that fails costs its replicas time, nothing else."""
    gc.disable()
    failed: dict[str, str] = {}
    for name in ("snowdrop.replica.runtime", *names):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 -- whatever a module raises
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    gc.enable()
    return Warmed(
        imported=tuple(name for name in names if name not in failed),
        failed=failed,
        threads=len(list(Path("/proc/self/task").iterdir())),
        memory_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _fork(order: Fork, fds: tuple[int, ...], programs: tuple[bytes, ...]) -> None:
    middle = os.fork()
    if middle == 0:
        try:
            _become_namespaces(order, fds, programs)
        finally:
            os._exit(1)
    for fd in fds:
        os.close(fd)
    os.waitpid(middle, 0)  # soon: it ends as soon as it has forked


def _become_namespaces(order: Fork, fds: tuple[int, ...], programs: tuple[bytes, ...]) -> None:
    status: PacketChannel[ForkStatus] = PacketChannel(socket.socket(fileno=fds[_STATUS]), FORK_STATUS)
    try:
        nesting.unshare_all()
        if os.fork() != 0:
            os._exit(0)
        _prepare(order, fds, programs)
    except OSError as error:
        status.send_blocking(ForkFailed(reason=str(error)))
        os._exit(1)
    replica = os.fork()
    if replica == 0:
        os.setsid()
        nesting.set_dumpable(True)
        nesting.close_all_but({fds[_LIFECYCLE]})
        _leave(_run_replica(fds[_LIFECYCLE]))
    nesting.close_all_but({fds[_STATUS]})
    pidfds = (os.pidfd_open(os.getpid()), os.pidfd_open(replica))
    status.send_blocking(Forked(), pidfds)
    while True:
        pid, code = os.wait()  # orphans of the replica's come to us as well
        if pid == replica:
            status.send_blocking(ForkEnded(code=os.waitstatus_to_exitcode(code)))
            os._exit(0)  # and the kernel ends what is left of the namespace


def _prepare(order: Fork, fds: tuple[int, ...], programs: tuple[bytes, ...]) -> None:
    """In the namespaces' first process: everything that needs rights, then none of them any more."""
    os.dup2(fds[_STDOUT], 1)
    os.dup2(fds[_STDERR], 2)
    nesting.mount_own(tmp_bytes_max=order.tmp_bytes_max, shm_bytes_max=order.shm_bytes_max)
    nesting.mount_given([(mount.target, fds[mount.fd]) for mount in order.mounts], MODELS_FOLDER)
    nesting.raise_loopback()
    nesting.drop_capabilities()
    nesting.install_filter(programs)
    nesting.set_dumpable(False)


def _run_replica(lifecycle_fd: int) -> int:
    from snowdrop.replica.__main__ import serve  # noqa: PLC0415 -- the parent's is the module that runs

    return serve(socket.socket(fileno=lifecycle_fd), forked)


def forked(boot: Boot) -> None:
    """What makes a fork's state its own, once its variables are known: seeds and threads."""
    for name in THREAD_VARIABLES:
        if name not in boot.env:
            os.environ.pop(name, None)
    random.seed()
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        numpy.random.seed()
    if torch is not None:
        torch.seed()
        wanted = boot.env.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(wanted) if wanted.isdecimal() and int(wanted) else len(os.sched_getaffinity(0)))


def _leave(code: int) -> None:
    """As the ordinary replica ends: nothing of the parent's is unwound."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
