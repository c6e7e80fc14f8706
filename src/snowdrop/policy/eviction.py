"""Which artefacts a tier drops to make room: the least recently used that nobody holds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One artefact in a tier. `used` orders by last use, in any unit; `is_pinned` says that somebody holds it."""

    name: str
    size_bytes: int
    used: int
    is_pinned: bool


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    """`victims` are to go, in this order, before the wanted bytes are taken; none go if those do not fit."""

    victims: tuple[str, ...]
    fits: bool
    reason: str


def choose(kept: Sequence[Kept], wanted_bytes: int, bytes_max: int) -> Eviction:
    """Room for `wanted_bytes` beside `kept` below `bytes_max`: as few victims as the order of last use allows."""
    pinned = sum(artefact.size_bytes for artefact in kept if artefact.is_pinned)
    taken = sum(artefact.size_bytes for artefact in kept)
    if pinned + wanted_bytes > bytes_max:
        return Eviction(
            victims=(),
            fits=False,
            reason=f"{wanted_bytes} bytes do not fit: {pinned} of {bytes_max} are held",
        )
    victims: list[str] = []
    for artefact in sorted(kept, key=lambda artefact: (artefact.used, artefact.name)):
        if taken + wanted_bytes <= bytes_max:
            break
        if not artefact.is_pinned and artefact.size_bytes:
            victims.append(artefact.name)
            taken -= artefact.size_bytes
    return Eviction(
        victims=tuple(victims),
        fits=True,
        reason=f"{len(victims)} dropped for {wanted_bytes} bytes" if victims else "there is room",
    )
