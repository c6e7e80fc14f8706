"""The environment a replica runs in until images land: the host's /usr and one Python environment, read-only."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from snowdrop.agent.sandbox.launcher import Mount

ROOT_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_HOST_FILES = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl/certs", "ssl/openssl.cnf", "pki")
HOSTNAME = "replica"
PACKAGE = Path(__file__).resolve().parents[2]
"""Snowdrop's own source, which may lie outside of the environment (an editable install)."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """`python` is the interpreter's path inside; `folders` are host directories shown at their own place."""

    python: str
    folders: tuple[Path, ...]

    @classmethod
    def current(cls) -> Environment:
        """The environment that this process runs in, and Snowdrop's own source if it lies outside of it."""
        folders = [
            Path(sys.prefix),
            Path(sys.base_prefix),
            Path(sys.base_prefix).resolve(),
            *_link_targets(Path(sys.executable)),
            PACKAGE,
        ]
        return cls(python=sys.executable, folders=_outermost(folders))

    @property
    def describe(self) -> str:
        names = ", ".join(["/usr", *(str(folder) for folder in self.folders)])
        return f"the host's {names}, read-only"

    def mounts(self) -> tuple[Mount, ...]:
        return tuple(Mount(source=folder, target=str(folder)) for folder in self.folders)


def host_mounts() -> tuple[Mount, ...]:
    """/usr and the few files of /etc that programs need to find libraries and certificates."""
    wanted = [Path("/usr"), *(Path("/etc", name) for name in _HOST_FILES)]
    real = [
        Path("/", name) for name in ROOT_LINKS if Path("/", name).is_dir() and not Path("/", name).is_symlink()
    ]
    return tuple(Mount(source=path, target=str(path)) for path in [*wanted, *real] if path.exists())


def root_links() -> tuple[tuple[str, str], ...]:
    """Symbolic links at the host's root, as (target, path), where /usr is merged."""
    links = (Path("/", name) for name in ROOT_LINKS)
    return tuple((str(link.readlink()), str(link)) for link in links if link.is_symlink())


def etc_files(*, uid: int, gid: int) -> tuple[tuple[str, str], ...]:
    """Files of /etc made for the sandbox, as (path, text)."""
    return (
        (
            "/etc/passwd",
            f"root:x:0:0::/:/bin/false\nreplica:x:{uid}:{gid}::/tmp/home:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        ),
        ("/etc/group", f"root:x:0:\nreplica:x:{gid}:\nnogroup:x:65534:\n"),
        ("/etc/hosts", f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost\n"),
        ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
    )


def _link_targets(executable: Path) -> list[Path]:
    """Prefixes that the interpreter's chain of symbolic links leads through (bin/python -> another prefix)."""
    folders = []
    for _ in range(16):
        if not executable.is_symlink():
            break
        executable = executable.parent / executable.readlink()
        if executable.parent.name == "bin":
            folders.append(executable.parent.parent)
    return folders


def _outermost(folders: list[Path]) -> tuple[Path, ...]:
    """`folders` in order, without those inside /usr or inside another."""
    kept: list[Path] = []
    for folder in sorted(set(folders), key=lambda each: len(each.parts)):
        if folder == Path("/") or folder.is_relative_to("/usr"):
            continue
        if not any(folder.is_relative_to(outer) for outer in kept):
            kept.append(folder)
    return tuple(kept)
