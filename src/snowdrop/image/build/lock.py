"""The lock of an environment: every package with version and digests, and what it was resolved for.

It is a requirements file that pip and uv read as well; what we add are comments at its beginning.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from snowdrop.domain.errors import ConflictError, InvalidInputError

LOCK_BYTES_MAX = 8 << 20
_HEAD = re.compile(r"# snowdrop-lock 1\n# wants: ([0-9a-f]{64})\n# base: (sha256:[0-9a-f]{64})\n")


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """`wants` is the digest of what was asked for, `base` that of the base; `pins` are lines with digests."""

    wants: str
    base: str
    pins: str


def encode_lock(lock: Lock) -> str:
    return f"# snowdrop-lock 1\n# wants: {lock.wants}\n# base: {lock.base}\n{lock.pins}"


def read_lock(path: Path) -> Lock | None:
    """None if there is none. Raises InvalidInputError for what is no lock of ours."""
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(LOCK_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"the lock cannot be read: {error}", where=str(path)) from error
    head = _HEAD.match(text)
    if head is None or len(text) > LOCK_BYTES_MAX:
        raise InvalidInputError(
            "this is no lock of an image", where=str(path), next_step="remove it; the build writes a new one"
        )
    return Lock(wants=head[1], base=head[2], pins=text[head.end() :])


def usable(lock: Lock | None, *, wants: str, base: str, where: str, locked: bool, upgrade: bool) -> Lock | None:
    """The lock if the build has to keep to it, None if it is to be resolved anew.

    Raises ConflictError if `locked` and there is none for what is wanted, or if the base is another one: the image
    would be another one too, and only `upgrade` may do that.
    """
    if upgrade:
        return None
    if lock is None or lock.wants != wants:
        if locked:
            raise ConflictError(
                "there is no lock" if lock is None else "the lock was made for other requirements",
                where=where,
                next_step="build without --locked, and keep the lock with the code",
            )
        return None
    if lock.base != base:
        raise ConflictError(
            f"the base is {base[:19]}, the lock says {lock.base[:19]}",
            where=where,
            next_step="build with --upgrade to take this base, or name the one of the lock",
        )
    return lock
