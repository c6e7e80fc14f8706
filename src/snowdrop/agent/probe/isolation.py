"""Probes of what isolates and limits replicas."""

from __future__ import annotations

import os

import anyio
import msgspec

from snowdrop.agent.probe.base import PROBE_S_MAX, ProbeFailed, run_trial
from snowdrop.agent.sandbox.bubblewrap import BubblewrapLauncher, find_bwrap
from snowdrop.agent.sandbox.cgroups import CgroupBackend, settings_for
from snowdrop.agent.sandbox.detect import find_trees
from snowdrop.agent.sandbox.environment import Environment
from snowdrop.agent.sandbox.launcher import LaunchSpec, Output
from snowdrop.agent.sandbox.limits import Resource, RlimitBackend
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec

SANDBOX_ADVICE = (
    "as root, or with user namespaces on (sysctl -w user.max_user_namespaces=65536; Ubuntu: "
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0), bubblewrap works; else `up --unsafe-no-sandbox`"
)
_OUTPUT_BYTES_MAX = 64 << 10
_LIMITS = ResourceSpec(memory_bytes_max=256 << 20, cpus=0.5, pids_max=64)

_LOOK = """
import json, os, socket
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]
try:
    socket.create_connection(("192.0.2.1", 9), 1).close()
    reached = True
except OSError:
    reached = False
print(json.dumps({
    "capabilities": [int(status[n], 16) for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "filtered": int(status["Seccomp"]), "uid": os.getuid(), "interfaces": interfaces, "reached": reached,
}))
"""
_FORBIDDEN = """
import ctypes, errno, socket
libc = ctypes.CDLL(None, use_errno=True)
refused = []
if libc.unshare(0x10000000) == -1 and ctypes.get_errno() == errno.EPERM: refused.append("unshare")
if libc.ptrace(0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM: refused.append("ptrace")
try: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
except PermissionError: refused.append("netlink")
print(" ".join(refused))
"""
_FORBIDDEN_CALLS = "unshare ptrace netlink"


class _Seen(msgspec.Struct):
    capabilities: list[int]
    filtered: int
    uid: int
    interfaces: list[str]
    reached: bool


def sandbox(bwrap: str = "") -> str:
    """Starts one and looks around in it."""
    text, describe = anyio.run(_run_inside, _LOOK, bwrap)
    try:
        seen = msgspec.json.decode(text, type=_Seen)
    except msgspec.DecodeError as error:
        raise ProbeFailed(f"the sandbox did not start: {text.strip()[-300:]}", SANDBOX_ADVICE) from error
    if any(seen.capabilities) or seen.uid == 0:
        raise ProbeFailed(f"a sandboxed process keeps privileges: {seen}")
    if seen.reached or seen.interfaces != ["lo"]:
        raise ProbeFailed(f"a sandboxed process has a network: {seen.interfaces}")
    return f"started one: no capabilities, uid {seen.uid}, no network; {describe.partition(';')[0]}"


def seccomp(bwrap: str = "") -> str:
    """Attempts forbidden calls inside a sandbox."""
    text, _ = anyio.run(_run_inside, _FORBIDDEN, bwrap)
    refused = text.strip()
    if refused != _FORBIDDEN_CALLS:
        raise ProbeFailed(f"of {_FORBIDDEN_CALLS} refused: {refused[-300:] or 'none'}", SANDBOX_ADVICE)
    return f"{_FORBIDDEN_CALLS.replace(' ', ', ')} were refused inside"


def user_namespace() -> str:
    return run_trial("user-namespace")


def cgroup(which: Resource) -> str:
    """Sets a limit in a new group and reads it back."""
    instance = f"probe-{os.getpid()}-{which}"
    for tree in find_trees(instance):
        if which not in tree.controllers:
            continue
        chosen = msgspec.structs.replace(tree, controllers=frozenset({which}))
        backend = CgroupBackend(chosen, instance)
        group = backend.create(ReplicaId("probe"), _LIMITS)
        try:
            setting = settings_for(chosen, _LIMITS)[-1 if which is Resource.CPU else 0]
            back = (backend.root / "probe" / setting.file).read_text().strip()
        finally:
            group.close()
            backend.close()
        if back != setting.value:
            raise ProbeFailed(f"{setting.file} was set to {setting.value} and reads {back}")
        return f"cgroup v{chosen.version}: set {setting.file} to {setting.value} below {chosen.base}"
    raise ProbeFailed(
        f"no cgroup in which {which} can be limited; rlimits take its place: {_fallback(which)}",
        "run as root, or in a delegated cgroup: systemd-run --user --scope -p Delegate=yes snowdrop up",
    )


def _fallback(which: Resource) -> str:
    return RlimitBackend(falls_here=frozenset({which})).describe


async def _run_inside(code: str, bwrap: str) -> tuple[str, str]:
    """What `code` prints in a sandbox of the kind that replicas get, and the sandbox's description."""
    environment = Environment.current()
    limits = RlimitBackend(falls_here=frozenset())
    launcher = BubblewrapLauncher(limits, environment=environment, bwrap=find_bwrap(bwrap))
    reader, writer = os.pipe()
    spec = LaunchSpec(
        replica=ReplicaId("probe"),
        entry=(environment.python, "-I", "-S", "-c", code),
        output=Output(stdout_fd=writer, stderr_fd=writer),
        resources=_LIMITS,
    )
    try:
        with anyio.fail_after(PROBE_S_MAX):
            try:
                handle = await launcher.launch(spec)
            except SandboxError as error:
                os.close(writer)
                writer = -1
                said = await _read_all(reader)
                raise ProbeFailed(f"{error.message}: {said.strip()[-300:]}", SANDBOX_ADVICE) from error
            os.close(writer)
            writer = -1
            try:
                return await _read_all(reader), handle.describe
            finally:
                await handle.close()
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


async def _read_all(fd: int) -> str:
    text = b""
    while len(text) < _OUTPUT_BYTES_MAX:
        await anyio.wait_readable(fd)
        data = os.read(fd, _OUTPUT_BYTES_MAX)
        if not data:
            break
        text += data
    return text.decode(errors="replace")
