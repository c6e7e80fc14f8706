"""What tenant code attempts from inside a real sandbox, as root's and as the rootless one, and does not get."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from sandbox_helpers import (
    INSTANCE,
    RUN_S_MAX,
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
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.launcher import Mount
from snowdrop.domain.service import ResourceSpec

pytestmark = pytest.mark.anyio

ATTEMPT = """
import ctypes, errno, os, socket, sys, fcntl
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    ctypes.set_errno(0)
    result = getattr(libc, name)(*args)
    print(errno.errorcode.get(ctypes.get_errno(), 'none') if result == -1 else 'DONE')
def attempt(do, *args):
    try:
        do(*args)
    except OSError as error:
        print(errno.errorcode[error.errno])
    else:
        print('DONE')
"""


@pytest.fixture(scope="module", params=["root", "rootless"])
def setup(request: pytest.FixtureRequest) -> Iterator[Setup]:
    with swept():
        yield make_setup(request.param)


FORBIDDEN = {
    "mount": "call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
    "umount": "call('umount2', b'/tmp', 2)",
    "pivot_root": "call('syscall', 155, b'/tmp', b'/tmp')",
    "chroot": "attempt(os.chroot, '/tmp')",
    "ptrace of itself": "call('ptrace', 0, 0, 0, 0)",
    "ptrace of the first process": "call('ptrace', 16, 1, 0, 0)",
    "process_vm_readv": "call('process_vm_readv', 1, None, 0, None, 0, 0)",
    "unshare user": "call('unshare', 0x10000000)",
    "unshare mount": "call('unshare', 0x20000)",
    "setns": "call('setns', 0, 0)",
    "clone into a user namespace": "call('syscall', 56, 0x10000000 | 17, 0, 0, 0, 0)",
    "bpf": "call('syscall', 321, 0, None, 0)",
    "perf_event_open": "call('syscall', 298, None, 0, 0, 0, 0)",
    "userfaultfd": "call('syscall', 323, 0)",
    "keyctl": "call('syscall', 250, 0, 0, 0, 0, 0)",
    "add_key": "call('syscall', 248, b'user', b'x', b'y', 1, -2)",
    "init_module": "call('syscall', 175, None, 0, b'')",
    "kexec_load": "call('syscall', 246, 0, 0, None, 0)",
    "open_by_handle_at": "call('open_by_handle_at', 3, None, 0)",
    "name_to_handle_at": "call('name_to_handle_at', -100, b'/', None, None, 0)",
    "reboot": "call('reboot', 0)",
    "settimeofday": "call('syscall', 164, None, None)",
    "swapon": "call('swapon', b'/tmp/x', 0)",
    "sethostname": "attempt(socket.sethostname, 'x')",
    "personality without address randomisation": "call('personality', 0x0040000)",
    "TIOCSTI": "attempt(fcntl.ioctl, 0, 0x5412, b'x')",
    "TIOCSTI with high bits": "call('syscall', 16, 0, ctypes.c_ulong(0x100005412), b'x')",
    "raw socket": "attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet socket": "attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)",
    "vsock": "attempt(socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM)",
    "netlink": "attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)",
    "alg socket": "attempt(socket.socket, 38, 5)",
    "becoming root": "attempt(os.setuid, 0)",
    "a device node": "attempt(os.mknod, '/tmp/d', 0o60600, os.makedev(8, 0))",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="call numbers are those of x86_64")
async def test_forbidden_calls_are_refused(setup: Setup) -> None:
    code = ATTEMPT + "\n".join(FORBIDDEN.values())
    _, output = await run(setup, code)
    assert len(output.split()) == len(FORBIDDEN), output
    answers = dict(zip(FORBIDDEN, output.split(), strict=True))
    allowed = {"EPERM"}
    # In a user namespace these fail on their own ground: uid 0 is not mapped, and so on.
    assert {what: answer for what, answer in answers.items() if answer not in allowed | {"EINVAL"}} == {}
    assert [what for what, answer in answers.items() if answer == "EINVAL"] in ([], ["becoming root"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="call numbers are those of x86_64")
async def test_calls_that_libraries_probe_for_do_not_exist(setup: Setup) -> None:
    calls = [435, 425, 426, 427, 449, 462]  # clone3, io_uring_*, futex_waitv, mseal
    code = ATTEMPT + "\n".join(f"call('syscall', {number}, 0, 0, 0, 0, 0, 0)" for number in calls)
    _, output = await run(setup, code)
    assert output.split() == ["ENOSYS"] * len(calls)


async def test_has_no_capabilities_and_a_filter(setup: Setup) -> None:
    code = (
        "import json; print(json.dumps(dict(l.split(':\\t',1) for l in open('/proc/self/status') if ':\\t' in l)))"
    )
    _, output = await run(setup, code)
    status = {name: value.strip() for name, value in json.loads(output).items()}
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "0" not in status["Uid"].split()
    # None, the overflow group of an unmapped one, or the sandbox's own where the agent is a plain user.
    assert status["Groups"].split() in ([], ["65534"], ["1000"])


async def test_each_replica_of_a_root_agent_has_a_host_uid_of_its_own() -> None:
    with swept():
        setup = make_setup("root")
        first = await start(setup, "import os,time; print(os.getuid()); time.sleep(600)")
        second = await start(setup, "import os,time; print(os.getuid()); time.sleep(600)")
        try:
            uids = {await first.read_line(), await second.read_line()}
        finally:
            await first.close()
            await second.close()
    assert len(uids) == 2
    assert all(int(uid) >= 700_000 for uid in uids)


async def test_sees_only_its_own_processes(setup: Setup) -> None:
    code = "import os; print(*[p for p in os.listdir('/proc') if p.isdigit()])"
    _, output = await run(setup, code)
    assert output.split() == ["1", "2"]


async def test_sees_nothing_of_the_host(setup: Setup, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    open_to_all(secret)
    paths = [str(secret), "/etc/shadow", "/etc/hostname", "/sys/fs/cgroup", "/sys/kernel", "/var", "/home", "/run"]
    # A folder above the environment exists inside, but holds nothing else.
    shown = [str(parent) for folder in Environment.current().folders for parent in folder.parents]
    paths = [path for path in paths if path not in shown]
    _, output = await run(setup, "import os,sys; print(*[p for p in sys.argv[1:] if os.path.exists(p)])", *paths)
    assert output.split() == []


async def test_host_paths_are_not_in_the_first_process_command_line(setup: Setup) -> None:
    folder = Mount(source=Path("/usr/share"), target="/app")
    code = "print(open('/proc/1/cmdline').read().replace(chr(0), ' '))"
    _, output = await run(setup, code, mounts=(folder,))
    assert "--args" in output
    assert "/usr/share" not in output


async def test_writes_nowhere_but_to_its_own_tmp(setup: Setup) -> None:
    places = [
        "/x",
        "/usr/x",
        "/etc/x",
        "/dev/x",
        "/app/x",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/vm/swappiness",
    ]
    code = ATTEMPT + "for p in sys.argv[1:]: attempt(open, p, 'w')"
    mount = Mount(source=Path("/usr/share"), target="/app")
    _, output = await run(setup, code, *places, "/tmp/x", "/tmp/home/x", "/dev/shm/x", mounts=(mount,))
    answers = output.split()
    assert set(answers[: len(places)]) <= {"EROFS", "EACCES", "EPERM"}
    assert answers[len(places) :] == ["DONE"] * 3


async def test_writable_mount_is_writable(setup: Setup, tmp_path: Path) -> None:
    if setup.name == "rootless" and os.geteuid() == 0:
        pytest.skip("the folder is root's")
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(0o777)
    mount = Mount(source=folder, target="/out", read_only=False)
    await run(setup, "open('/out/x','w').write('y')", mounts=(mount,))
    assert (folder / "x").read_text() == "y"


async def test_an_opened_folder_can_be_mounted(setup: Setup, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x").write_text("content")
    open_to_all(folder)
    fd = os.open(folder, os.O_PATH)
    try:
        mount = Mount(source=fd, target="/models/m")
        _, output = await run(setup, "print(open('/models/m/x').read())", mounts=(mount,))
    finally:
        os.close(fd)
    assert output == "content\n"


@pytest.mark.parametrize("place", ["/tmp/big", "/dev/shm/big"])
async def test_tmp_is_bounded(setup: Setup, place: str) -> None:
    resources = ResourceSpec(tmp_bytes_max=4 << 20, memory_bytes_max=64 << 20)
    code = (
        ATTEMPT
        + "import io\nf=io.FileIO(sys.argv[1],'w')\ndef fill():\n for _ in range(256): f.write(bytes(1<<20))"
    )
    if place.startswith("/dev"):
        # Bounded by the memory limit, whose cgroup counts these pages too: ENOSPC or the end of the replica.
        status, output = await run(setup, code + "\nattempt(fill)", place, resources=resources)
        assert output == "ENOSPC\n" or status.oom_killed
    else:
        _, output = await run(setup, code + "\nattempt(fill); print(f.tell())", place, resources=resources)
        word, size = output.split()
        assert word == errno.errorcode[errno.ENOSPC]
        assert int(size) <= 4 << 20


async def test_has_no_network_but_its_own_loopback(setup: Setup) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        name = f"snowdrop-test-{os.getpid()}"
        abstract.bind("\0" + name)
        abstract.listen()
        code = ATTEMPT + (
            "attempt(socket.create_connection, ('127.0.0.1', int(sys.argv[1])), 5)\n"
            "attempt(socket.create_connection, ('192.0.2.1', 80), 5)\n"
            "attempt(socket.socket(socket.AF_UNIX).connect, chr(0) + sys.argv[2])\n"
            "s=socket.create_server(('127.0.0.1', 0)); attempt(socket.create_connection, s.getsockname(), 5)\n"
            "print(*[l.split(':')[0].strip() for l in open('/proc/net/dev').readlines()[2:]])"
        )
        _, output = await run(setup, code, str(tcp.getsockname()[1]), name)
    assert output.split() == ["ECONNREFUSED", "ENETUNREACH", "ECONNREFUSED", "DONE", "lo"]


async def test_cannot_signal_or_trace_the_first_process(setup: Setup) -> None:
    code = (
        ATTEMPT
        + "attempt(os.kill, 1, 9); attempt(open, '/proc/1/mem', 'r+b'); attempt(os.listdir, '/proc/1/root')"
    )
    status, output = await run(setup, code)
    answers = output.split()
    # The kernel ignores SIGKILL for a namespace's first process from inside, whoever sends it.
    assert answers[0] in ("EPERM", "DONE")
    assert status.code == 0
    if setup.name == "root":
        assert answers[1:] == ["EACCES", "EACCES"]


async def test_can_open_its_own_stdout_by_name(setup: Setup) -> None:
    _, output = await run(setup, "open('/dev/stdout','w').write('by name')")
    assert output == "by name"


async def test_setpriv_drops_what_a_tenant_may_not_have_even_if_exec_fails(setup: Setup) -> None:
    code = "import os; os.execv('/usr/bin/setpriv', ['setpriv', '--reuid', '0', 'true'])"
    status, output = await run(setup, code)
    assert status.code not in (0, None), output


AGENT = """
import os, sys, anyio
sys.path[:0] = [{tests!r}]
import sandbox_helpers
from sandbox_helpers import make_setup, start
sandbox_helpers.INSTANCE = {instance!r}
async def main():
    running = await start(make_setup({name!r}), "import time; print('up'); time.sleep(600)")
    await running.read_line()
    print(running.handle.pid, flush=True)
    await anyio.sleep(600)
anyio.run(main)
"""


async def test_death_of_the_agent_ends_the_sandbox(setup: Setup) -> None:
    code = AGENT.format(tests=str(Path(__file__).parents[1]), name=setup.name, instance=INSTANCE)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        line = await anyio.to_thread.run_sync(agent.stdout.readline)
        pid = int(line)
        init = os.pidfd_open(pid)
        os.kill(agent.pid, signal.SIGKILL)
    with anyio.fail_after(RUN_S_MAX):
        await anyio.wait_readable(init)
    os.close(init)
    assert not alive(pid)
    limits().sweep()
    assert not leftover_groups()


@pytest.mark.slow
async def test_torch_runs_under_the_filter() -> None:
    with swept():
        setup = make_setup("root" if os.geteuid() == 0 else "rootless")
        code = (
            "import torch, numpy, threading\n"
            "torch.set_num_threads(2)\n"
            "x = torch.randn(512, 512) @ torch.randn(512, 512)\n"
            "try:\n import transformers, tokenizers\nexcept ImportError: pass\n"
            "print(tuple(x.shape))"
        )
        status, output = await run(setup, code, resources=ResourceSpec(cpus=2), bare=False)
    assert status.code == 0, output
    assert output == "(512, 512)\n"
