"""Which copies on a node are of no use any more: nothing names them, nobody holds or has pinned them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """An artefact on a node. `used_unix_ns` is 0 if that is not known."""

    manifest: str
    used_unix_ns: int
    is_held: bool
    is_pinned: bool


class Cleanup(msgspec.Struct, frozen=True, kw_only=True):
    evict: tuple[str, ...]
    reason: str


def choose(copies: Iterable[Copy], named: frozenset[str], *, now_unix_ns: int, grace_ns: int) -> Cleanup:
    """Unnamed copies that have not been used for the grace period, the longest unused first."""
    unnamed = [copy for copy in copies if copy.manifest not in named]
    free = [copy for copy in unnamed if not copy.is_held and not copy.is_pinned]
    old = [copy for copy in free if max(0, now_unix_ns - copy.used_unix_ns) >= grace_ns]
    evict = tuple(copy.manifest for copy in sorted(old, key=lambda copy: (copy.used_unix_ns, copy.manifest)))
    kept = f"{len(unnamed) - len(free)} held or pinned, {len(free) - len(old)} used within the grace period"
    return Cleanup(evict=evict, reason=f"{len(evict)} of {len(unnamed)} unnamed copies can go; {kept}")
