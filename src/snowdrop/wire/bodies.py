"""Bodies that are wanted whole, within a bound."""

from __future__ import annotations

from collections.abc import AsyncIterator

from snowdrop.domain.errors import TooLargeError


async def gathered(
    chunks: AsyncIterator[bytes], bytes_max: int, *, what: str, bound: str, next_step: str
) -> bytes:
    """All of `chunks`. Raises TooLargeError of `what`, naming `bound` and its value, above `bytes_max`."""
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > bytes_max:
            raise TooLargeError(f"{what} is too large", where=f"{bound}={bytes_max}", next_step=next_step)
        parts.append(chunk)
    return b"".join(parts)
