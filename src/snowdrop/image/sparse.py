"""Maps of sparse members: GNU's old header, and its pax formats 0.0, 0.1 and 1.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator

SEGMENTS_MAX = 100_000
Segments = tuple[tuple[int, int], ...]
"""(offset, length) of what is stored, in order; the rest of the file are zeros."""

Corrupt = Callable[[str], Exception]
_VERSIONS = {(b"0", b"0"), (b"0", b"1"), (b"1", b"0")}


def is_sparse_pax(pax: dict[bytes, bytes]) -> bool:
    return any(key.startswith(b"GNU.sparse.") for key in pax)


def read_gnu_map(
    block: bytes, next_block: Callable[[], bytes], number: Callable[[bytes], int], corrupt: Corrupt
) -> tuple[Segments, int]:
    """Of a header of type `S`, with the blocks that continue it, and the size of the unpacked file."""
    numbers: list[int] = []
    table, count, more = block[386:482], 4, block[482]
    while True:
        for index in range(count):
            entry = table[index * 24 : index * 24 + 24]
            if not entry.strip(b"\0"):
                break
            numbers += (number(entry[:12]), number(entry[12:24]))
        if len(numbers) > 2 * SEGMENTS_MAX:
            raise corrupt(f"a sparse map above segments_max={SEGMENTS_MAX}")
        if not more:
            return _checked(numbers, number(block[483:495]), corrupt)
        table, count = next_block(), 21
        more = table[504]


def read_pax_map(
    pax: dict[bytes, bytes], next_block: Callable[[], bytes], corrupt: Corrupt
) -> tuple[Segments, int]:
    """Of a member with `GNU.sparse.` records; format 1.0 has its map before the content."""
    version = (pax.get(b"GNU.sparse.major", b"0"), pax.get(b"GNU.sparse.minor", b"1"))
    if version not in _VERSIONS:
        raise corrupt("an unknown sparse format")
    size = _decimal(pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size") or b"", corrupt)
    if version == (b"1", b"0"):
        lines = _lines(next_block, corrupt)
        count = _decimal(next(lines), corrupt)
        if count > SEGMENTS_MAX:
            raise corrupt(f"a sparse map above segments_max={SEGMENTS_MAX}")
        return _checked([_decimal(next(lines), corrupt) for _ in range(2 * count)], size, corrupt)
    text = pax.get(b"GNU.sparse.map", b"")
    return _checked([_decimal(part, corrupt) for part in text.split(b",") if text], size, corrupt)


def _lines(next_block: Callable[[], bytes], corrupt: Corrupt) -> Iterator[bytes]:
    rest = b""
    while True:
        line, newline, after = rest.partition(b"\n")
        if newline:
            rest = after
            yield line
        elif len(rest) > 20:
            raise corrupt("a sparse map without its numbers")
        else:
            rest += next_block()


def _decimal(text: bytes, corrupt: Corrupt) -> int:
    if not text.isdigit() or len(text) > 18:
        raise corrupt("a sparse map with something that is no number")
    return int(text)


def _checked(numbers: list[int], size: int, corrupt: Corrupt) -> tuple[Segments, int]:
    """Pairs in order, without overlap, inside of the file."""
    if len(numbers) % 2 or len(numbers) > 2 * SEGMENTS_MAX:
        raise corrupt("a sparse map that is no list of pairs, or too long")
    segments = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    end = 0
    for offset, length in segments:
        if offset < end or length < 0 or offset + length > size:
            raise corrupt("a sparse map whose pieces overlap or lie outside of the file")
        end = offset + length
    return segments, size
