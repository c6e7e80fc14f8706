"""Finds out which limits this machine grants by setting each once on a process, and builds the backend."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from snowdrop.agent.sandbox.cgroups import CgroupBackend, CgroupTree
from snowdrop.agent.sandbox.limits import ALL_RESOURCES, CombinedLimits, LimitBackend, Resource, RlimitBackend
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec

_TRIAL = ResourceSpec(memory_bytes_max=256 << 20, cpus=0.5, pids_max=64)


class CgroupMount(msgspec.Struct, frozen=True, kw_only=True):
    """A mounted hierarchy. `root` is the cgroup that the mount point shows; `controllers` is empty for v2."""

    version: int
    mount_point: Path
    root: str
    controllers: frozenset[str]


def parse_mountinfo(text: str) -> list[CgroupMount]:
    """The cgroup hierarchies in the text of /proc/self/mountinfo."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 5 or len(tail) < 3 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if tail[0] == "cgroup2" else 1
        options = frozenset(tail[2].split(",")) if version == 1 else frozenset[str]()
        mounts.append(
            CgroupMount(version=version, mount_point=Path(fields[4]), root=fields[3], controllers=options)
        )
    return mounts


def parse_own_cgroups(text: str) -> dict[str, str]:
    """Our own path by v1 controller, and under the empty name for v2, from the text of /proc/self/cgroup."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            paths[name] = path
    return paths


def candidate_bases(mount: CgroupMount, own_path: str) -> Iterator[Path]:
    """Where groups may be made, best first: below ourselves, so that limits set on us hold for replicas too;
    beside us; at the top."""
    inside = own_path.removeprefix(mount.root) if mount.root != "/" else own_path
    own = mount.mount_point / inside.strip("/")
    tried: list[Path] = []
    for base in (own, own.parent if own != mount.mount_point else own, mount.mount_point):
        if base not in tried and base.is_dir():
            tried.append(base)
            yield base


def find_trees(instance: str, parent: Path | None = None) -> tuple[CgroupTree, ...]:
    """The places that let us set limits, each resource at most once, v2 before v1.

    With `parent` only that directory is tried for the hierarchies it belongs to. Blocking: some 20 ms.
    """
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    own = parse_own_cgroups(Path("/proc/self/cgroup").read_text())
    found: list[CgroupTree] = []
    missing = set(ALL_RESOURCES)
    for mount in sorted(mounts, key=lambda each: -each.version):
        for which in [each for each in Resource if each in missing]:
            if mount.version == 1 and which not in mount.controllers:
                continue
            bases = _bases(mount, own.get(which if mount.version == 1 else "", "/"), parent)
            trials = (_trial(mount.version, base, which, instance) for base in bases)
            tree = next((tree for tree in trials if tree is not None), None)
            if tree is not None:
                found.append(tree)
                missing.discard(which)
    return _join(found)


def detect_limits(instance: str, *, parent: Path | None = None, own_uid: bool = True) -> CombinedLimits:
    """The strongest limits that this machine grants to this process. Blocking: some 20 ms.

    `own_uid` says whether each replica gets a uid or user namespace of its own, as RLIMIT_NPROC needs.
    """
    trees = find_trees(instance, parent)
    backends: list[LimitBackend] = [CgroupBackend(tree, instance) for tree in trees]
    held = frozenset[Resource]().union(*(tree.controllers for tree in trees))
    backends.append(RlimitBackend(falls_here=ALL_RESOURCES - held, own_uid=own_uid))
    return CombinedLimits(backends)


@contextmanager
def _helper() -> Iterator[int]:
    """A process of ours to put into a trial group: only the kernel knows whether it may be moved there."""
    process = subprocess.Popen(
        ["sleep", "30"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _bases(mount: CgroupMount, own_path: str, parent: Path | None) -> list[Path]:
    if parent is not None:
        return [parent] if parent.is_relative_to(mount.mount_point) else []
    return list(candidate_bases(mount, own_path))


def _trial(version: int, base: Path, which: Resource, instance: str) -> CgroupTree | None:
    tree = CgroupTree(version=version, base=base, controllers=frozenset({which}))
    backend = CgroupBackend(tree, instance)
    group = None
    try:
        if version == 2 and which not in (base / "cgroup.controllers").read_text().split():
            return None
        backend.prepare()
        group = backend.create(ReplicaId(f"trial-{os.getpid()}"), _TRIAL)
        with _helper() as pid:
            group.attach([pid])
    except (OSError, SandboxError):
        return None
    else:
        return tree
    finally:
        if group is not None:
            group.close()
        backend.close()


def _join(trees: list[CgroupTree]) -> tuple[CgroupTree, ...]:
    """Resources of one v2 place share one group. v1 places stay apart unless they are one mount (cpu,cpuacct)."""
    joined: dict[tuple[int, Path], CgroupTree] = {}
    for tree in trees:
        key = (tree.version, tree.base)
        before = joined.get(key)
        controllers = tree.controllers | (before.controllers if before else frozenset())
        joined[key] = CgroupTree(version=tree.version, base=tree.base, controllers=controllers)
    return tuple(joined.values())
