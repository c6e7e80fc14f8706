"""Limits through cgroups, v1 and v2, one group per replica: `<base>/snowdrop-<instance>/<replica>`.

What a controller is told is a table; only finding, attaching and removing is code. Which hierarchies can be
used is found out by doing it, in `detect`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from snowdrop.agent.sandbox.limits import LimitGroup, Resource
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec

CPU_PERIOD_US = 100_000
CPU_QUOTA_US_MIN = 1_000
REMOVE_S_MAX = 2.0
REMOVE_RETRY_S = 0.01
CLOSE_TRIES = 20
CLOSE_RETRY_S = 0.001


class Setting(msgspec.Struct, frozen=True):
    """A file to write when a group is made. Those not `required` exist only on some kernels."""

    file: str
    value: str
    required: bool = True


class CgroupTree(msgspec.Struct, frozen=True, kw_only=True):
    """A directory in which groups can be made, and what it can bound. `base` is outside of Snowdrop's care."""

    version: int
    base: Path
    controllers: frozenset[Resource]


def cpu_quota_us(cpus: float) -> int:
    return max(CPU_QUOTA_US_MIN, round(cpus * CPU_PERIOD_US))


_SETTINGS: dict[tuple[int, Resource], Callable[[ResourceSpec], tuple[Setting, ...]]] = {
    (2, Resource.MEMORY): lambda r: (
        Setting("memory.max", str(r.memory_bytes_max)),
        Setting("memory.swap.max", "0", required=False),
        Setting("memory.oom.group", "1", required=False),
    ),
    (2, Resource.CPU): lambda r: (Setting("cpu.max", f"{cpu_quota_us(r.cpus)} {CPU_PERIOD_US}"),),
    (2, Resource.PIDS): lambda r: (Setting("pids.max", str(r.pids_max)),),
    (1, Resource.MEMORY): lambda r: (
        Setting("memory.limit_in_bytes", str(r.memory_bytes_max)),
        # Memory and swap together, so that nothing of a replica is swapped out beyond its limit.
        Setting("memory.memsw.limit_in_bytes", str(r.memory_bytes_max), required=False),
    ),
    (1, Resource.CPU): lambda r: (
        Setting("cpu.cfs_period_us", str(CPU_PERIOD_US)),
        Setting("cpu.cfs_quota_us", str(cpu_quota_us(r.cpus))),
    ),
    (1, Resource.PIDS): lambda r: (Setting("pids.max", str(r.pids_max)),),
}
_OOM_FILE = {1: "memory.oom_control", 2: "memory.events"}


def settings_for(tree: CgroupTree, resources: ResourceSpec) -> tuple[Setting, ...]:
    """What is written into a new group of `tree`, in order."""
    chosen = (_SETTINGS[tree.version, which] for which in Resource if which in tree.controllers)
    return tuple(setting for make in chosen for setting in make(resources))


class CgroupGroup:
    """One replica's group in one hierarchy."""

    def __init__(self, tree: CgroupTree, path: Path) -> None:
        self._tree = tree
        self.path = path

    def attach(self, pids: Sequence[int]) -> None:
        for pid in pids:
            try:
                _write(self.path / "cgroup.procs", str(pid))
            except OSError as error:
                raise SandboxError(f"process {pid} could not be limited: {error}", where=str(self.path)) from error

    def oom_killed(self) -> bool:
        if Resource.MEMORY not in self._tree.controllers:
            return False
        return read_oom_kills(self.path / _OOM_FILE[self._tree.version]) > 0

    def members(self) -> frozenset[int]:
        return read_pids(self.path / "cgroup.procs")

    def close(self) -> None:
        # The kernel lets go of a process a moment after its end was told. What stays is swept at the next start.
        for _ in range(CLOSE_TRIES):
            try:
                _rmdir(self.path)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    return
                time.sleep(CLOSE_RETRY_S)
            else:
                return


class CgroupBackend:
    """Groups of one agent (`instance`) in one hierarchy."""

    def __init__(self, tree: CgroupTree, instance: str) -> None:
        self._tree = tree
        self._instance = instance
        self.root = tree.base / group_name(instance)

    @property
    def bounds(self) -> frozenset[Resource]:
        return self._tree.controllers

    @property
    def describe(self) -> str:
        names = ", ".join(which for which in Resource if which in self.bounds)
        return f"{names} (cgroup v{self._tree.version})"

    def prepare(self) -> None:
        """Makes the instance's own directory and passes controllers on to it. Raises OSError."""
        if self._tree.version == 2:
            _enable_controllers(self._tree.base, self.bounds)
        self.root.mkdir(exist_ok=True)
        if self._tree.version == 2:
            _enable_controllers(self.root, self.bounds)

    def create(self, replica: ReplicaId, resources: ResourceSpec) -> LimitGroup:
        group = CgroupGroup(self._tree, self.root / replica)
        try:
            if not self.root.is_dir():
                self.prepare()
            group.path.mkdir()
            for setting in settings_for(self._tree, resources):
                _apply(group.path, setting)
        except OSError as error:
            group.close()
            raise SandboxError(
                f"limits of {replica} could not be set: {error}",
                where=str(group.path),
                next_step="`snowdrop doctor` tries each limit and says what is off",
            ) from error
        return group

    def sweep(self) -> int:
        """Kills and removes leftovers of this instance anywhere in the hierarchy, since an earlier agent may
        have had another place in it. Blocks for at most REMOVE_S_MAX for each."""
        removed = 0
        for root in find_roots(hierarchy_root(self._tree.base), group_name(self._instance)):
            for group in sorted(child for child in root.iterdir() if child.is_dir()):
                removed += int(remove_group(group))
            with suppress(OSError):
                _rmdir(root)
        return removed

    def close(self) -> None:
        """Removes the instance's directory, if no replica is left in it."""
        with suppress(OSError):
            _rmdir(self.root)


def group_name(instance: str) -> str:
    return f"snowdrop-{instance}"


def hierarchy_root(base: Path) -> Path:
    """The mount point of the hierarchy that `base` is in."""
    for path in (base, *base.parents):
        if path.is_mount():
            return path
    return base


def find_roots(top: Path, name: str) -> list[Path]:
    """Directories called `name` below `top`."""
    found = []
    for folder, children, _ in os.walk(top):
        if name in children:
            found.append(Path(folder, name))
            children.remove(name)
    return found


def remove_group(path: Path) -> bool:
    """Kills the group's processes and removes it; False if it is still there after REMOVE_S_MAX. Blocking."""
    give_up = time.monotonic() + REMOVE_S_MAX
    while time.monotonic() < give_up:
        with suppress(OSError):
            _write(path / "cgroup.kill", "1")
        for pid in read_pids(path / "cgroup.procs"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            _rmdir(path)
        if not path.exists():
            return True
        time.sleep(REMOVE_RETRY_S)
    return False


def read_pids(file: Path) -> frozenset[int]:
    """Pids listed in a cgroup.procs file; those of other pid namespaces (0) are left out."""
    try:
        return frozenset(int(word) for word in file.read_text().split()) - {0}
    except OSError:
        return frozenset()


def read_oom_kills(file: Path) -> int:
    """The `oom_kill` counter of memory.events or memory.oom_control; 0 if there is none."""
    try:
        text = file.read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def _rmdir(path: Path) -> None:
    """A cgroup goes with the files that the kernel shows in it."""
    path.rmdir()


def _enable_controllers(directory: Path, controllers: frozenset[Resource]) -> None:
    file = directory / "cgroup.subtree_control"
    enabled = set(file.read_text().split())
    for which in sorted(controllers - enabled):
        _write(file, f"+{which}")


def _apply(directory: Path, setting: Setting) -> None:
    try:
        _write(directory / setting.file, setting.value)
    except OSError:
        if setting.required:
            raise


def _write(file: Path, text: str) -> None:
    """One write(2) to a file that must exist: kernel file systems take a value whole."""
    fd = os.open(file, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
