"""Tar streams as layers carry them: ustar, pax and GNU headers, read once from front to back.

The standard library's `tarfile` is not used: it keeps times as floats, reads a long name of any declared size into
memory, and takes what it does not know for a file. Here whatever is odd is refused, and every size has a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from snowdrop.domain.errors import CorruptContentError
from snowdrop.image.pax import parse_pax, parse_seconds
from snowdrop.image.sparse import Segments, is_sparse_pax, read_gnu_map, read_pax_map

BLOCK_BYTES = 512
EXTENSION_BYTES_MAX = 1 << 20
"""Most bytes of long names and pax records before one member."""
READ_BYTES = 1 << 20

MemberKind = Literal["dir", "file", "symlink", "hardlink", "fifo", "device"]
Read = Callable[[int], bytes]
"""Gives up to so many bytes; empty only at the end."""

_KINDS: dict[bytes, MemberKind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"S": "file",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "device",
    b"4": "device",
    b"5": "dir",
    b"6": "fifo",
}


class Member(NamedTuple):
    """What a header says. `path` and `link` are as they stand there, `size` is that of the unpacked content."""

    path: bytes
    kind: MemberKind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]


class TarReader:
    """Iterates over the members; `content` gives that of the member at hand. Raises CorruptContentError."""

    def __init__(self, read: Read, *, where: str, skip: Callable[[int], None] | None = None) -> None:
        """`skip` passes over so many bytes, where that is cheaper than reading them."""
        self._read = read
        self._skip_bytes = skip
        self._where = where
        self._offset = 0
        self._left = self._padding = 0
        self._segments: Segments | None = None
        self._size = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member
            self._skip()

    @property
    def data_offset(self) -> int:
        """Where in the stream the content of the member at hand begins, as long as none of it was read."""
        return self._offset

    def content(self) -> Iterator[bytes]:
        """The content of the member at hand, holes as zeros, in pieces of at most READ_BYTES."""
        if self._segments is None:
            while self._content_left() > 0:
                yield self._some()
            return
        cursor = 0
        for offset, length in self._segments:
            yield from _zeros(offset - cursor)
            left = length
            while left > 0:
                data = self._some(left)
                left -= len(data)
                yield data
            cursor = offset + length
        yield from _zeros(self._size - cursor)

    def _content_left(self) -> int:
        return self._left - self._padding

    def _some(self, most: int = READ_BYTES) -> bytes:
        data = self._exactly(min(most, READ_BYTES, self._content_left()))
        self._left -= len(data)
        return data

    def _skip(self) -> None:
        if self._skip_bytes is not None:
            self._skip_bytes(self._left)
            self._offset += self._left
            self._left = 0
        while self._left > 0:
            self._left -= len(self._exactly(min(self._left, READ_BYTES)))

    def _exactly(self, count: int) -> bytes:
        parts: list[bytes] = []
        left = count
        while left > 0:
            data = self._read(left)
            if not data:
                raise self.corrupt("ends in the middle of a member")
            parts.append(data)
            left -= len(data)
        self._offset += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def corrupt(self, message: str, member: bytes = b"") -> CorruptContentError:
        place = f": {ascii(member[:200])[2:-1]}" if member else f", byte {self._offset}"
        return CorruptContentError(message, where=self._where + place, next_step="make the image anew")

    def _next(self) -> Member | None:
        """The next member with all that stands before it; None at the end."""
        path = link = None
        pax: dict[bytes, bytes] = {}
        extension_bytes = 0
        while True:
            block = self._block()
            if block is None:
                if path is not None or link is not None or pax:
                    raise self.corrupt("ends after a header that belongs to a member")
                return None
            kind, size = block[156:157], self._number(block[124:136], "size")
            if kind not in {b"L", b"K", b"x", b"g"}:
                return self._member(block, size, path, link, pax)
            extension_bytes += size
            if extension_bytes > EXTENSION_BYTES_MAX:
                raise self.corrupt(f"long names and records above extension_bytes_max={EXTENSION_BYTES_MAX}")
            body = self._exactly(size)
            self._exactly(-size % BLOCK_BYTES)
            if kind == b"L":
                path = body.rstrip(b"\0")
            elif kind == b"K":
                link = body.rstrip(b"\0")
            elif kind == b"x":
                pax.update(parse_pax(body, self.corrupt))
            elif any(key != b"comment" for key in parse_pax(body, self.corrupt)):
                raise self.corrupt("a global header that changes the members after it")

    def _block(self) -> bytes | None:
        """The next header, checked; None at the end: two blocks of zeros, or the stream's end between members."""
        first = self._read(BLOCK_BYTES)
        if not first:
            return None
        self._offset += len(first)
        block = first + (self._exactly(BLOCK_BYTES - len(first)) if len(first) < BLOCK_BYTES else b"")
        if block == bytes(BLOCK_BYTES):
            while rest := self._read(READ_BYTES):
                if rest.strip(b"\0"):
                    raise self.corrupt("something follows the end of the archive")
                self._offset += len(rest)
            return None
        plain = block[:148] + b" " * 8 + block[156:]
        stated = self._number(block[148:156], "header sum")
        # Some old writers added signed bytes.
        signed = sum(plain) - 256 * sum(byte > 127 for byte in plain)
        if stated not in {sum(plain), signed}:
            raise self.corrupt("is no tar: a header's sum is wrong")
        return block

    def _number(self, field: bytes, what: str) -> int:
        if field[0] & 0x80:  # base 256, as GNU writes what octal digits cannot hold
            negative = field[0] & 0x40
            value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
            return value - (1 << (8 * len(field) - 1)) if negative else value
        text = field.strip(b"\0 ").split(b"\0")[0].strip()
        if text.strip(b"01234567"):
            raise self.corrupt(f"{what} is no number")
        return int(text or b"0", 8)

    def _member(
        self, block: bytes, stored: int, path: bytes | None, link: bytes | None, pax: dict[bytes, bytes]
    ) -> Member:
        name = block[:100].split(b"\0")[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0")[0] + b"/" + name
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or path or name
        target = pax.get(b"linkpath") or link or block[157:257].split(b"\0")[0]
        kind = _KINDS.get(block[156:157])
        if kind is None:
            raise self.corrupt(f"member of unknown type {block[156:157]!r}", name)
        if kind == "file" and name.endswith(b"/") and block[156:157] == b"\0":
            kind = "dir"  # before there was a type for directories
        if b"size" in pax:
            stored = self._decimal(pax[b"size"], name)
        if stored < 0:
            raise self.corrupt("size is negative", name)
        if kind != "file":
            # What links and directories state as a size is that of no content; some writers leave it there.
            stored = 0
        self._left, self._padding = stored + -stored % BLOCK_BYTES, -stored % BLOCK_BYTES
        self._find_segments(block, stored, name, pax)
        return Member(
            path=name,
            kind=kind,
            mode=self._number(block[100:108], "mode") & 0o7777,
            uid=self._id(block[108:116], pax.get(b"uid"), name),
            gid=self._id(block[116:124], pax.get(b"gid"), name),
            mtime_ns=self._mtime_ns(block, pax.get(b"mtime"), name),
            size=self._size,
            link=target if kind in {"symlink", "hardlink"} else b"",
            xattrs=tuple(
                sorted((key[13:], value) for key, value in pax.items() if key.startswith(b"SCHILY.xattr."))
            ),
        )

    def _find_segments(self, block: bytes, stored: int, name: bytes, pax: dict[bytes, bytes]) -> None:
        def block_of_map() -> bytes:
            return self._exactly(BLOCK_BYTES)

        self._segments, self._size = None, stored
        if block[156:157] == b"S":
            self._segments, self._size = read_gnu_map(
                block,
                block_of_map,
                lambda field: self._number(field, "map"),
                lambda text: self.corrupt(text, name),
            )
        elif is_sparse_pax(pax):
            taken = self._offset
            self._segments, self._size = read_pax_map(pax, block_of_map, lambda text: self.corrupt(text, name))
            self._left -= self._offset - taken
        if self._segments is None:
            return
        if sum(length for _, length in self._segments) != self._content_left():
            raise self.corrupt("a sparse map that does not fit its content", name)

    def _decimal(self, text: bytes, name: bytes) -> int:
        if not text.isdigit() or len(text) > 18:
            raise self.corrupt("a record is no number", name)
        return int(text)

    def _id(self, field: bytes, record: bytes | None, name: bytes) -> int:
        value = self._decimal(record, name) if record else self._number(field, "owner")
        if not 0 <= value < (1 << 32) - 1:
            raise self.corrupt(f"owner {value} is out of bounds", name)
        return value

    def _mtime_ns(self, block: bytes, record: bytes | None, name: bytes) -> int:
        value = parse_seconds(record) if record else self._number(block[136:148], "mtime") * 1_000_000_000
        if value is None or not -(1 << 63) < value < 1 << 63:
            raise self.corrupt("mtime is out of bounds", name)
        return value


def _zeros(count: int) -> Iterator[bytes]:
    whole = bytes(min(count, READ_BYTES))
    while count > 0:
        yield whole[: min(count, READ_BYTES)]
        count -= READ_BYTES
