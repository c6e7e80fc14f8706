"""Image: the values of a file system tree with everything that a root directory needs.

An image is an artefact like any other: a manifest of the kind `image` over chunks and packs. Its manifest has two
files. `tree` is the encoded `ImageTree`; `data` holds the contents of all regular files one after the other, each
from a multiple of ALIGN_BYTES on, so that a block file system can address them in it. Files with the same content
share one place. `snowdrop.content.imagetree` encodes, decodes and validates; here are only the values.
"""

from typing import Literal

import msgspec

IMAGE_FORMAT_VERSION = 1
TREE_FILE = "tree"
DATA_FILE = "data"
ALIGN_BYTES = 4096
"""Each file's content begins at a multiple of this in `data`; the gap before the next one is zeros."""
IMAGE_CHUNK_BYTES_MAX = 1 << 20
ENTRIES_MAX = 1_000_000
TREE_FILE_BYTES_MAX = 256 << 20
LINK_BYTES_MAX = 4095
"""Longest target of a symbolic link: PATH_MAX of Linux without its NUL."""
XATTRS_MAX = 64
XATTR_NAME_BYTES_MAX = 255
XATTR_BYTES_MAX = 65_536
"""Names and values of one entry together."""
CONFIG_STRINGS_MAX = 4096
CONFIG_BYTES_MAX = 1 << 20

EntryKind = Literal["dir", "file", "symlink", "hardlink", "fifo"]


class TreeEntry(msgspec.Struct, frozen=True, array_like=True):
    """One name in the tree.

    `path` is relative, in any bytes but NUL; empty for the root. `mode` are permission bits up to 0o7777. `size`
    and `offset` (into `data`) say where a file's content lies; `sha256` is that of the content. `target` is what a
    symbolic link holds, or, for a `hardlink`, the path of the entry that it is another name of: a `file`,
    `symlink` or `fifo`, never a `hardlink`, whose values it shares: its own others are zero or empty.
    `xattrs` are sorted by name.
    """

    path: bytes
    kind: EntryKind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    offset: int = 0
    sha256: bytes = b""
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What runs in the image, as its maker said. `env` holds `NAME=value`; `user` is `name|uid[:group|gid]`."""

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    stop_signal: str = ""
    os: str = "linux"
    architecture: str = ""
    variant: str = ""


class ImageTree(msgspec.Struct, frozen=True, kw_only=True):
    """A whole image. `entries` are sorted by the components of their paths, compared as bytes, the root first:
    a directory stands before what it holds, and all of it follows at once. `data_bytes` is the size of `data`.
    """

    version: int
    config: ImageConfig
    data_bytes: int
    entries: tuple[TreeEntry, ...]
