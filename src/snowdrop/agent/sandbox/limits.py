"""The limits port, and the backend that every system has: rlimits.

A backend bounds some of memory, cpu and pids. What no cgroup bounds falls to rlimits, and `describe` names it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec

NOFILE_MAX = 65_536
NICE_WITHOUT_CPU_LIMIT = 10
OOM_SCORE_ADJ = 500
"""When the machine as a whole runs out of memory, replicas go before the agent."""


_HYGIENE = frozenset({resource.RLIMIT_NOFILE, resource.RLIMIT_CORE})
"""Bounds nothing that others share, so a replica may start without."""


class Resource(StrEnum):
    MEMORY = "memory"
    CPU = "cpu"
    PIDS = "pids"


ALL_RESOURCES = frozenset(Resource)


class LimitGroup(Protocol):
    """The limits of one replica. Calls are a few short system calls on kernel file systems; attach may take
    some 10 ms (a grace period of the kernel), so call it from a thread."""

    def attach(self, pids: Sequence[int]) -> None:
        """Puts processes, which run nothing of the tenant yet, under the limits. Raises SandboxError."""

    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of the group for its memory limit."""

    def members(self) -> frozenset[int]:
        """The pids in the group, as far as the backend can know them."""

    def close(self) -> None:
        """Removes the group; its processes must be gone. Idempotent."""


class LimitBackend(Protocol):
    """Makes limit groups. `bounds` says which resources it truly holds."""

    @property
    def bounds(self) -> frozenset[Resource]: ...

    @property
    def describe(self) -> str: ...

    def create(self, replica: ReplicaId, resources: ResourceSpec) -> LimitGroup:
        """Raises SandboxError if a limit cannot be set; nothing is left then."""

    def sweep(self) -> int:
        """Kills and removes what a killed agent of this instance left. Returns the number of groups removed."""


def rlimits_for(
    resources: ResourceSpec, falls_here: frozenset[Resource], *, own_uid: bool
) -> dict[int, tuple[int, int]]:
    """Soft and hard rlimits of a replica.

    `falls_here` are resources that no cgroup bounds. RLIMIT_NPROC counts per user, so it makes sense only
    where the replica has a uid (or a user namespace) of its own.
    """
    _, files_hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = NOFILE_MAX if files_hard == resource.RLIM_INFINITY else min(NOFILE_MAX, files_hard)
    limits = {
        resource.RLIMIT_NOFILE: (files, files),
        resource.RLIMIT_CORE: (0, 0),
    }
    if Resource.MEMORY in falls_here:
        limits[resource.RLIMIT_DATA] = (resources.memory_bytes_max, resources.memory_bytes_max)
    if Resource.PIDS in falls_here and own_uid:
        limits[resource.RLIMIT_NPROC] = (resources.pids_max, resources.pids_max)
    return limits


class _RlimitGroup:
    def __init__(self, limits: dict[int, tuple[int, int]], *, nice: int) -> None:
        self._limits = limits
        self._nice = nice

    def attach(self, pids: Sequence[int]) -> None:
        for pid in pids:
            for which, pair in self._limits.items():
                try:
                    resource.prlimit(pid, which, pair)
                except ProcessLookupError as error:
                    raise SandboxError("the sandbox died while it was limited", where=f"pid {pid}") from error
                except (PermissionError, ValueError) as error:
                    if which in _HYGIENE:
                        continue
                    raise SandboxError(
                        f"rlimit {which} could not be set: {error}", where=f"pid {pid}, {pair[0]}"
                    ) from error
            with suppress(OSError):  # a preference, not a bound
                Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
            if self._nice:
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, pid, self._nice)

    def oom_killed(self) -> bool:
        return False

    def members(self) -> frozenset[int]:
        return frozenset()

    def close(self) -> None:
        pass


class RlimitBackend:
    """Rlimits through prlimit(2). Per process, hence weaker than a cgroup: a replica with many processes may
    use the memory limit many times over."""

    def __init__(self, *, falls_here: frozenset[Resource] = ALL_RESOURCES, own_uid: bool = True) -> None:
        self._falls_here = falls_here
        self._own_uid = own_uid

    @property
    def bounds(self) -> frozenset[Resource]:
        held = {Resource.MEMORY} | ({Resource.PIDS} if self._own_uid else set())
        return self._falls_here & held

    @property
    def describe(self) -> str:
        names = {
            Resource.MEMORY: "memory per process only (RLIMIT_DATA)",
            Resource.CPU: f"cpu not bounded (nice {NICE_WITHOUT_CPU_LIMIT})",
            Resource.PIDS: "pids (RLIMIT_NPROC)" if self._own_uid else "pids not bounded",
        }
        return ", ".join(names[which] for which in Resource if which in self._falls_here)

    def create(self, replica: ReplicaId, resources: ResourceSpec) -> LimitGroup:
        nice = NICE_WITHOUT_CPU_LIMIT if Resource.CPU in self._falls_here else 0
        return _RlimitGroup(rlimits_for(resources, self._falls_here, own_uid=self._own_uid), nice=nice)

    def sweep(self) -> int:
        return 0


class _CombinedGroup:
    def __init__(self, groups: Sequence[LimitGroup]) -> None:
        self._groups = groups

    def attach(self, pids: Sequence[int]) -> None:
        for group in self._groups:
            group.attach(pids)

    def oom_killed(self) -> bool:
        return any(group.oom_killed() for group in self._groups)

    def members(self) -> frozenset[int]:
        return frozenset().union(*(group.members() for group in self._groups))

    def close(self) -> None:
        for group in self._groups:
            group.close()


class CombinedLimits:
    """Several backends as one: each resource bounded by the first that can."""

    def __init__(self, backends: Sequence[LimitBackend]) -> None:
        self._backends = tuple(backends)

    @property
    def bounds(self) -> frozenset[Resource]:
        return frozenset().union(*(backend.bounds for backend in self._backends))

    @property
    def describe(self) -> str:
        return "; ".join(text for text in (backend.describe for backend in self._backends) if text)

    def create(self, replica: ReplicaId, resources: ResourceSpec) -> LimitGroup:
        made: list[LimitGroup] = []
        try:
            for backend in self._backends:
                made.append(backend.create(replica, resources))  # noqa: PERF401 (what was made must be undone)
        except SandboxError:
            for group in made:
                group.close()
            raise
        return _CombinedGroup(made)

    def sweep(self) -> int:
        return sum(backend.sweep() for backend in self._backends)
