"""The launcher port: WHAT a replica needs from its sandbox, not how the sandbox is made.

A launcher that executes a program and one that forks a pre-imported parent both implement it: everything
besides the lifecycle channel travels later, over that channel, in `wire.replica.Boot`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec

LIFECYCLE = "lifecycle"
"""The one descriptor a replica starts with: its end of the packet channel to the agent."""

CODE_TARGET = "/app"
MODELS_TARGET = "/models"
SANDBOX_HOME = "/tmp/home"  # noqa: S108 (a path inside the sandbox's own tmpfs)

_LOADER_VARIABLES = ("LD_", "GLIBC_TUNABLES", "GCONV_PATH", "MALLOC_", "LOCPATH", "NLSPATH")


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A host file or directory and where it appears. `source` is a path or an open O_PATH descriptor.

    What a replica is to read must be readable by every user at `source` itself; its parents need not be.
    """

    source: Path | int
    target: str
    read_only: bool = True


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """An open descriptor to hand over. The caller keeps its own copy and closes it after `launch`."""

    role: str
    fd: int


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """Writable descriptors for stdout and stderr. The caller keeps its copies and closes them after `launch`."""

    stdout_fd: int
    stderr_fd: int


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a launcher is told. In `entry`, `fd_argument(role)` stands for a descriptor's number inside.

    `env` is the platform's; a tenant's variables go into `Boot.env`, since these here are seen by the dynamic
    loader before privileges are gone. `uid` is the host user to run as where the launcher gives each replica one
    of its own; None: any that is free.
    """

    replica: ReplicaId
    entry: tuple[str, ...]
    output: Output
    mounts: tuple[Mount, ...] = ()
    descriptors: tuple[Descriptor, ...] = ()
    resources: ResourceSpec = ResourceSpec()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    uid: int | None = None


class ExitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a replica ended: `code`, or the `signal` that ended it. A code above 128 is taken for a signal."""

    code: int | None
    signal: int | None = None
    oom_killed: bool = False

    def __str__(self) -> str:
        if self.oom_killed:
            return "killed for exceeding its memory limit (resources.memory_bytes_max)"
        return f"killed by signal {self.signal}" if self.signal is not None else f"exited with code {self.code}"


class SandboxHandle(Protocol):
    """One launched replica."""

    @property
    def pid(self) -> int:
        """Host pid of the sandbox's first process."""

    @property
    def describe(self) -> str:
        """A sentence that says what isolates and limits this replica."""

    async def wait(self) -> ExitStatus:
        """How it ended. May be awaited by several tasks; a process that is gone stays known."""

    def kill(self) -> None:
        """SIGKILL for every process of the sandbox. Nothing happens if it has ended."""

    async def close(self) -> None:
        """Kills what still runs and removes what was made for it. Idempotent."""


class Launcher(Protocol):
    """Makes sandboxes. `launch` raises SandboxError, and then nothing of the attempt is left."""

    @property
    def describe(self) -> str:
        """A sentence for `snowdrop describe` and `doctor`."""

    def visible_path(self, mount: Mount) -> str:
        """Where the replica finds `mount`: its target, or its source if the launcher cannot mount."""

    async def launch(self, spec: LaunchSpec) -> SandboxHandle:
        """Starts `spec.entry` under its limits. Must be called in the thread that outlives the sandbox."""


def fd_argument(role: str) -> str:
    """What to write in `entry` where the number of the descriptor `role` belongs."""
    return f"{{fd:{role}}}"


def replica_entry(python: str) -> tuple[str, ...]:
    """The runtime's argv, told its lifecycle channel by number."""
    return (python, "-m", "snowdrop.replica", "--fd", fd_argument(LIFECYCLE))


def resolve_entry(spec: LaunchSpec, numbers: dict[str, int]) -> tuple[str, ...]:
    """`spec.entry` with descriptor numbers filled in."""
    entry = list(spec.entry)
    for role, number in numbers.items():
        entry = [word.replace(fd_argument(role), str(number)) for word in entry]
    return tuple(entry)


def check_spec(spec: LaunchSpec) -> None:
    """Raises SandboxError for a spec that no launcher may carry out."""
    if not spec.entry:
        raise SandboxError("nothing to run", where="LaunchSpec.entry")
    for name in spec.env:
        if name.startswith(_LOADER_VARIABLES):
            raise SandboxError(
                f"environment variable {name} may not be set for the sandbox itself",
                where="LaunchSpec.env",
                next_step="hand it over in Boot.env",
            )
    targets = [mount.target for mount in spec.mounts]
    if len(set(targets)) != len(targets):
        raise SandboxError("two mounts have one target", where=", ".join(sorted(targets)))
    for mount in spec.mounts:
        if not mount.target.startswith("/") or ".." in Path(mount.target).parts:
            raise SandboxError("a mount's target must be an absolute path without '..'", where=mount.target)
        if isinstance(mount.source, Path) and not mount.source.exists():
            raise SandboxError(
                f"nothing to mount at {mount.target}",
                where=str(mount.source),
                next_step="was the content released while the replica was starting?",
            )
