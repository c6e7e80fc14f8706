"""Makes `images.json`: trees of images, in bytes that a reader must take or refuse, each with the rule it breaks.

The bytes are put together here by MessagePack alone, without Snowdrop's encoder.
"""

import base64
import json
from pathlib import Path
from typing import Any

import msgspec

SHA = bytes(range(32))
ROOT = [b"", "dir", 0o755, 0, 0, 0, 0, 0, b"", b"", []]
CONFIG = {
    "env": ["PATH=/bin", "EMPTY="], "entrypoint": ["/bin/sh"], "cmd": [], "user": "1000:1000", "workdir": "/",
    "stop_signal": "", "os": "linux", "architecture": "amd64", "variant": "",
}  # fmt: skip


def entry(path: bytes, kind: str, **fields: Any) -> list[Any]:
    values = {"mode": 0, "uid": 0, "gid": 0, "mtime_ns": 0, "size": 0, "offset": 0, "sha256": b"", "target": b""}
    return [path, kind, *{**values, "xattrs": [], **fields}.values()]


def file(path: bytes, **fields: Any) -> list[Any]:
    return entry(path, "file", **{"sha256": SHA, **fields})


def tree(*entries: list[Any], **fields: Any) -> bytes:
    whole = {"version": 1, "config": CONFIG, "data_bytes": 0, "entries": [ROOT, *entries], **fields}
    return msgspec.msgpack.encode(whole)


ACCEPTED = {
    "the smallest": tree(),
    "every kind": tree(
        entry(b"a", "symlink", mode=0o777, target=b"\xff../x"),
        entry(b"b", "dir", mode=0o1777, uid=4294967294, gid=1, mtime_ns=-1_250_000_000),
        file(b"b/f", mode=0o4755, size=4097, mtime_ns=1_600_000_000_123_456_789, xattrs=[[b"user.k", b"\0v"]]),
        entry(b"b-", "fifo", mode=0o600),
        entry(b"c", "hardlink", target=b"b/f"),
        file(b"d", size=1, offset=8192),
        file(b"\xff\xfe"),
        data_bytes=12288,
    ),
}
REFUSED = {
    "another version": tree(version=2),
    "no root": msgspec.msgpack.encode({"version": 1, "config": CONFIG, "data_bytes": 0, "entries": []}),
    "out of order": tree(file(b"b"), file(b"a")),
    "a path twice": tree(file(b"a"), file(b"a")),
    "order of bytes and not of components": tree(entry(b"b", "dir"), entry(b"b-", "fifo"), file(b"b/f")),
    "no directory": tree(file(b"a/b")),
    "a file as directory": tree(file(b"a"), file(b"a/b")),
    "up": tree(entry(b"..", "dir")),
    "absolute": tree(file(b"/a")),
    "NUL in a path": tree(file(b"a\0")),
    "a long component": tree(file(b"x" * 256)),
    "a device": tree(entry(b"a", "device")),
    "mode": tree(file(b"a", mode=0o10000)),
    "owner": tree(file(b"a", uid=4294967295)),
    "content not aligned": tree(file(b"a", size=1, offset=512), data_bytes=4096),
    "content over the end": tree(file(b"a", size=5000), data_bytes=4096),
    "contents that overlap": tree(file(b"a", size=5000), file(b"b", size=5000, offset=4096), data_bytes=12288),
    "a gap": tree(file(b"a", size=1, offset=4096), data_bytes=8192),
    "data too long": tree(file(b"a", size=1), data_bytes=8192),
    "data not aligned": tree(data_bytes=1),
    "a short hash": tree(file(b"a", sha256=b"1")),
    "a directory with content": tree(entry(b"a", "dir", size=1), data_bytes=4096),
    "a link to nothing": tree(entry(b"a", "symlink")),
    "a hard link to a directory": tree(entry(b"a", "dir"), entry(b"b", "hardlink", target=b"a")),
    "a hard link to a hard link": tree(
        file(b"a"), entry(b"b", "hardlink", target=b"a"), entry(b"c", "hardlink", target=b"b")
    ),
    "a hard link with values": tree(file(b"a"), entry(b"b", "hardlink", mode=1, target=b"a")),
    "attributes out of order": tree(file(b"a", xattrs=[[b"user.b", b""], [b"user.a", b""]])),
    "an attribute without a name": tree(file(b"a", xattrs=[[b"", b""]])),
    "a variable without a name": tree(config={**CONFIG, "env": ["=x"]}),
    "NUL in the config": tree(config={**CONFIG, "user": "a\0"}),
    "a longer form of a number": tree().replace(b"data_bytes\x00", b"data_bytes\xcc\x00"),
    "keys in another order": msgspec.msgpack.encode(
        {"config": CONFIG, "version": 1, "data_bytes": 0, "entries": [ROOT]}
    ),
    "a key too many": tree(more=1),
    "something after it": tree() + b"\0",
    "cut short": tree()[:-1],
}


def render() -> str:
    def listed(cases: dict[str, bytes]) -> list[dict[str, str]]:
        return [{"name": name, "tree": base64.b64encode(data).decode()} for name, data in cases.items()]

    return json.dumps({"accepted": listed(ACCEPTED), "refused": listed(REFUSED)}, indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("images.json").write_text(render())
