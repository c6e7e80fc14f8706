"""A launch spec as bwrap options. Pure, but for the open descriptors that carry file contents.

All options travel by --args: the first process of the sandbox keeps bwrap's command line, where a tenant
could read host paths.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import PurePosixPath

import msgspec

from snowdrop.agent.sandbox.environment import HOSTNAME, Environment, etc_files, host_mounts, root_links
from snowdrop.agent.sandbox.launcher import SANDBOX_HOME, LaunchSpec, Mount

ROOTLESS_UID = 1000
SETPRIV = "/usr/bin/setpriv"
SHM_BYTES_MAX = 1 << 30
_CPU_TOPOLOGY = "/sys/devices/system/cpu"

DataFd = Callable[[str, bytes], int]
"""Makes a descriptor that yields the given bytes; (name, bytes) -> descriptor."""


class Privileges(msgspec.Struct, frozen=True):
    """Who the replica is: with `drop_to` a host uid taken on inside (root agent), else a user namespace.

    With `nests` it may make further user namespaces, which its filter must bound."""

    drop_to: int | None
    nests: bool = False

    @property
    def uid(self) -> int:
        return ROOTLESS_UID if self.drop_to is None else self.drop_to


def bwrap_options(
    spec: LaunchSpec,
    environment: Environment,
    privileges: Privileges,
    programs: tuple[bytes, ...],
    data_fd: DataFd,
) -> list[str]:
    """Options before `--`: namespaces, privileges, the root file system, variables, filters."""
    return [
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--hostname", HOSTNAME),
        *_privilege_options(privileges),
        *_root_options(spec, environment, privileges, data_fd),
        *_variable_options(spec),
        *(word for program in programs for word in ("--add-seccomp-fd", str(data_fd("seccomp", program)))),
    ]


def drop_prefix(privileges: Privileges) -> tuple[str, ...]:
    """What runs before the entry inside the sandbox: takes on the replica's uid and loses all capabilities."""
    if privileges.drop_to is None:
        return ()
    uid = str(privileges.drop_to)
    return (
        *(SETPRIV, "--reuid", uid, "--regid", uid, "--clear-groups"),
        *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"),
    )


def memory_file(name: str, content: bytes) -> int:
    """A descriptor that yields `content` from its start. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _privilege_options(privileges: Privileges) -> list[str]:
    if privileges.drop_to is None:
        uid = str(ROOTLESS_UID)
        further = [] if privileges.nests else ["--disable-userns"]
        return ["--unshare-user", *further, "--uid", uid, "--gid", uid, "--cap-drop", "ALL"]
    kept = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
    return ["--cap-drop", "ALL", *(word for name in kept for word in ("--cap-add", name))]


def _root_options(
    spec: LaunchSpec, environment: Environment, privileges: Privileges, data_fd: DataFd
) -> list[str]:
    outer, inner = host_mounts(), (*environment.mounts(), *spec.mounts)
    options = _directories({"/etc/x", _CPU_TOPOLOGY, *(mount.target for mount in outer)})
    for mount in outer:
        options += _bind(mount)
    for target, link in root_links():
        options += ["--symlink", target, link]
    for path, text in etc_files(uid=privileges.uid, gid=privileges.uid):
        options += ["--perms", "0644", "--file", str(data_fd(path, text.encode())), path]
    tmp_bytes, shm_bytes = spec.resources.tmp_bytes_max, min(SHM_BYTES_MAX, spec.resources.memory_bytes_max)
    options += ["--proc", "/proc", "--dev", "/dev"]
    options += ["--perms", "1777", "--size", str(shm_bytes), "--tmpfs", "/dev/shm"]  # noqa: S108 (inside)
    options += ["--remount-ro", "/dev"]
    # OpenMP and math libraries size their pools by it; /proc/cpuinfo shows the same facts.
    options += ["--ro-bind-try", _CPU_TOPOLOGY, _CPU_TOPOLOGY]
    options += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", "/tmp"]  # noqa: S108 (inside)
    options += ["--perms", "1777", "--dir", SANDBOX_HOME]
    options += _directories({mount.target for mount in inner})
    for mount in inner:
        options += _bind(mount)
    return [*options, "--remount-ro", "/", "--chdir", "/"]


def _directories(targets: set[str]) -> list[str]:
    """The targets' parents, made here because bwrap would give them the modes of the host's, 0700 perhaps."""
    parents = {str(parent) for target in targets for parent in PurePosixPath(target).parents}
    made = sorted(parents - {"/", "/tmp", "/usr"})  # noqa: S108 (inside)
    return [word for path in made for word in ("--perms", "0755", "--dir", path)]


def _bind(mount: Mount) -> list[str]:
    kind = "--ro-bind" if mount.read_only else "--bind"
    if isinstance(mount.source, int):
        return [f"{kind}-fd", str(mount.source), mount.target]
    return [kind, str(mount.source), mount.target]


def _variable_options(spec: LaunchSpec) -> list[str]:
    fixed = {"HOME": SANDBOX_HOME, "TMPDIR": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}  # noqa: S108
    options = ["--clearenv"]
    for name, value in (fixed | spec.env).items():
        options += ["--setenv", name, value]
    return options
