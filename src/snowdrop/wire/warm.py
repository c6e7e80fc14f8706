"""Agent <-> warm parent, over the packet channel that its sandbox inherits, and what one fork tells of itself.

A parent is told once what to import, then forks as often as it is asked. Each fork reports over a status socket of
its own, which the agent makes, so that nothing of one replica's life passes through another's process.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from snowdrop.wire.codec import Codec, Message

OWN_FOLDERS = (Path("/tmp"), Path("/dev/shm"))  # noqa: S108 (inside)
"""Where a fork covers what the parent has; it is given again what of the environment lies there."""


class Warm(Message, frozen=True, kw_only=True):
    """Agent -> parent, first and once: the modules to import, and the system call filter of its forks."""

    version: int
    imports: tuple[str, ...]
    programs: tuple[bytes, ...]


class Warmed(Message, frozen=True, kw_only=True):
    """Parent -> agent: imports are done, it forks from now on. `failed` says why by module, `threads` and
    `memory_bytes` (resident) what it has then. With more than one thread it ends: forks would lack the others."""

    imported: tuple[str, ...]
    failed: dict[str, str] = msgspec.field(default_factory=dict)
    threads: int = 1
    memory_bytes: int = 0


class ForkMount(msgspec.Struct, frozen=True, array_like=True):
    """A detached mount, `fd` being its place among the message's descriptors, and where it belongs."""

    target: str
    fd: int


class Fork(Message, frozen=True, kw_only=True):
    """Agent -> parent, with descriptors: lifecycle, stdout, stderr, status, then the mounts."""

    mounts: tuple[ForkMount, ...]
    tmp_bytes_max: int
    shm_bytes_max: int


class Forked(Message, frozen=True, kw_only=True):
    """Status: with the pidfds of the namespace's first process and of the replica, which waits for its Boot."""


class ForkFailed(Message, frozen=True, kw_only=True):
    """Status: the namespaces or mounts could not be made; nothing of the tenant has run."""

    reason: str


class ForkEnded(Message, frozen=True, kw_only=True):
    """Status: the replica's own process has ended, with this code (negative for a signal)."""

    code: int


ToWarm = Warm | Fork
FromWarm = Warmed
ForkStatus = Forked | ForkFailed | ForkEnded

TO_WARM: Codec[ToWarm] = Codec(ToWarm)
FROM_WARM: Codec[FromWarm] = Codec(FromWarm)
FORK_STATUS: Codec[ForkStatus] = Codec(ForkStatus)
