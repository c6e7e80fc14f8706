"""INIT: what the kernel offers and what we take of it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from snowdrop.content.fuse.structs import (
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_MIN_READ_BUFFER,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR_MAX,
    PROTOCOL_MINOR_MIN,
    Init,
)
from snowdrop.domain.errors import ProtocolError

READ_BYTES_MAX = 4 << 20
"""Of one READ. The kernel cuts at 1 MiB unless fs.fuse.max_pages_limit says more."""
READ_AHEAD_BYTES = 4 << 20
"""One chunk: at the kernel's 128 KiB a program that maps a file would fault its way through it."""
MAX_BACKGROUND = 64
"""Reads ahead that the kernel may have under way for one mount."""
_PAGE_BYTES = 4096
_STACK_DEPTH = 1
"""A backing file lies on a plain file system, not on a stacked one."""
_WANTED = (
    Init.ASYNC_READ
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.NO_OPENDIR_SUPPORT
    | Init.NO_OPEN_SUPPORT
    | Init.EXPLICIT_INVAL_DATA
    | Init.INIT_EXT
)


class Agreement(NamedTuple):
    """`reply` is the answer to INIT. `flags` has PASSTHROUGH only if it may be used."""

    minor: int
    flags: int
    reply: bytes


def agree(body: bytes, *, passthrough_allowed: bool) -> Agreement | None:
    """What to answer. None: the kernel speaks a later major and will ask again. Raises ProtocolError if too
    old."""
    major, minor, _, low, high = FUSE_INIT_IN.unpack(body[: FUSE_INIT_IN.size].ljust(FUSE_INIT_IN.size, b"\0"))
    if major > PROTOCOL_MAJOR:
        return None
    if major < PROTOCOL_MAJOR or minor < PROTOCOL_MINOR_MIN:
        raise ProtocolError(
            f"the kernel's FUSE speaks {major}.{minor}, Snowdrop needs {PROTOCOL_MAJOR}.{PROTOCOL_MINOR_MIN}",
            where="FUSE_INIT",
            next_step="use a kernel of 5.4 or newer, or model directories without a mount",
        )
    offered = low | (high << 32 if low & Init.INIT_EXT else 0)
    wanted = _WANTED | (Init.PASSTHROUGH if passthrough_allowed else 0)
    flags = int(offered & wanted)
    passthrough = bool(flags & Init.PASSTHROUGH)
    if passthrough:
        flags &= ~Init.NO_OPEN_SUPPORT  # the answer to an open is what carries the backing file
    minor = min(minor, PROTOCOL_MINOR_MAX)
    reply = FUSE_INIT_OUT.pack(
        *(PROTOCOL_MAJOR, minor, READ_AHEAD_BYTES, flags & 0xFFFFFFFF),
        *(MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4, FUSE_MIN_READ_BUFFER // 2, 1),
        *(READ_BYTES_MAX // _PAGE_BYTES, 0, flags >> 32, _STACK_DEPTH if passthrough else 0, 0),
    )
    return Agreement(minor, flags, reply)
