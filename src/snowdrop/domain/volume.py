"""Volumes: directories that outlive replicas, or that the operator shares from the host."""

from pathlib import PurePosixPath

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import parse_name
from snowdrop.domain.require import require

VOLUMES_PER_SERVICE_MAX = 16
_TAKEN = frozenset(
    {
        *("app", "models", "proc", "dev", "sys", "usr", "etc", "bin", "sbin", "lib", "lib32", "lib64", "libx32"),
        *("run", "tmp", "root", "boot"),
    }
)
"""Top folders of the sandbox that a volume may neither be nor lie in."""


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A directory at `target` in the replica: the persistent volume `name`, or the host's directory `host`."""

    target: str
    name: str = ""
    host: str = ""
    read_only: bool = False

    def __post_init__(self) -> None:
        path = PurePosixPath(self.target)
        plain = path.root == "/" and str(path) == self.target and ".." not in path.parts and len(path.parts) > 1
        require(plain, "volumes.target", f"an absolute path without '..', as /data, got {self.target!r}")
        require(path.parts[1] not in _TAKEN, "volumes.target", f"outside of /{path.parts[1]}")
        require(bool(self.name) != bool(self.host), "volumes", "either name or host")
        if self.name:
            parse_name(self.name, what="volume name")
        else:
            require(PurePosixPath(self.host).is_absolute(), "volumes.host", f"an absolute path, got {self.host!r}")


class VolumeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A persistent volume. `size_bytes_max` 0: no bound; above it no replica is started that may write it."""

    name: str
    created_unix_ns: int
    size_bytes_max: int = 0


def check_volumes(volumes: tuple[Volume, ...]) -> None:
    """Raises InvalidInputError for volumes that lie in one another."""
    require(len(volumes) <= VOLUMES_PER_SERVICE_MAX, "volumes", f"at most {VOLUMES_PER_SERVICE_MAX}")
    targets = [PurePosixPath(volume.target) for volume in volumes]
    for number, target in enumerate(targets):
        for other in targets[number + 1 :]:
            apart = not target.is_relative_to(other) and not other.is_relative_to(target)
            require(apart, "volumes.target", f"no two that lie in one another, as {target} and {other}")


def variable_of(volume: Volume) -> str:
    """The environment variable that says where a volume is: `/data/a` is SNOWDROP_VOLUME_DATA_A."""
    letters = "".join(letter if letter.isalnum() else "_" for letter in volume.target.strip("/"))
    return f"SNOWDROP_VOLUME_{letters.upper()}"


def is_shared(host: str, allowed: str) -> bool:
    """Whether a host's path (without links in it) is, or lies in, one of the `allowed`, joined by colons."""
    path = PurePosixPath(host)
    folders = [PurePosixPath(folder) for folder in allowed.split(":") if folder]
    return ".." not in path.parts and any(path.is_relative_to(folder) for folder in folders)


def not_shared(volume: Volume) -> InvalidInputError:
    """The refusal of a host's directory that the operator has not named."""
    setting = "agent.volumes_read_only" if volume.read_only else "agent.volumes_writable"
    return InvalidInputError(
        f"the operator does not share {volume.host}{' for writing' if not volume.read_only else ''}",
        where=f"volume {volume.target}",
        next_step=f"ask for it to be in {setting}, or use a named volume: `snowdrop volume create NAME`",
    )
