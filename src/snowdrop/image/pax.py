"""Records of pax headers. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable

Corrupt = Callable[[str], Exception]
_SECONDS = re.compile(rb"(-?)([0-9]{1,12})(?:\.([0-9]*))?")
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def parse_pax(body: bytes, corrupt: Corrupt) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n`, values in any bytes. The pairs of sparse format 0.0 are joined under
    `GNU.sparse.map`, as format 0.1 has them.
    """
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    cursor = 0
    while cursor < len(body):
        space = body.find(b" ", cursor, cursor + 20)
        digits = body[cursor:space] if space > 0 else b""
        if not digits.isdigit():
            raise corrupt("a pax record without its length")
        end = cursor + int(digits)
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= space + 1 or body[end - 1 : end] != b"\n" or not equals or not key:
            raise corrupt("a pax record with a wrong length")
        if key in {b"path", b"linkpath", b"GNU.sparse.name"} and b"\0" in value:
            raise corrupt("a pax path with a NUL")
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(pairs) % 2]:
                raise corrupt("a sparse map out of order")
            pairs.append(value)
        elif value or key.startswith(b"SCHILY.xattr."):
            records[key] = value
        else:
            records.pop(key, None)  # an empty value takes back what an earlier record said
        cursor = end
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def parse_seconds(text: bytes) -> int | None:
    """Seconds with a fraction as nanoseconds, exactly; what is beyond nanoseconds is cut off."""
    match = _SECONDS.fullmatch(text)
    if match is None:
        return None
    sign, whole, fraction = match.groups()
    value = int(whole) * 1_000_000_000 + int(((fraction or b"") + b"0" * 9)[:9])
    return -value if sign else value
