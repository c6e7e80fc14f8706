"""The file `tree` of an image: its bytes, and a decoder that believes nothing.

The encoding is MessagePack with the shortest form of every value; a tree has exactly one.
`docs/reference/format.md` is the specification.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.image import (
    ALIGN_BYTES,
    CONFIG_BYTES_MAX,
    CONFIG_STRINGS_MAX,
    DATA_FILE,
    ENTRIES_MAX,
    IMAGE_FORMAT_VERSION,
    LINK_BYTES_MAX,
    TREE_FILE,
    TREE_FILE_BYTES_MAX,
    XATTR_BYTES_MAX,
    XATTR_NAME_BYTES_MAX,
    XATTRS_MAX,
    ImageConfig,
    ImageTree,
    TreeEntry,
)
from snowdrop.domain.manifest import PATH_BYTES_MAX, Manifest

COMPONENT_BYTES_MAX = 255
ID_MAX = (1 << 32) - 2
"""Largest user or group id; the next number means "leave it as it is" to the kernel."""
MTIME_NS_MAX = (1 << 63) - 1
DATA_BYTES_MAX = 1 << 53
SHA256_BYTES = 32

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(ImageTree)
_DIRECTORY = ("dir",)
_SIZELESS = ("dir", "symlink", "fifo")


def encode_tree(tree: ImageTree) -> bytes:
    """The canonical bytes; raises CorruptContentError if the tree breaks the format or is too large."""
    validate_tree(tree)
    data = _ENCODER.encode(tree)
    if len(data) > TREE_FILE_BYTES_MAX:
        raise _corrupt(f"tree has {len(data)} bytes (tree_file_bytes_max={TREE_FILE_BYTES_MAX})", "size")
    return data


def decode_tree(data: bytes) -> ImageTree:
    """The tree in `data`, fully validated; raises CorruptContentError naming the place."""
    if len(data) > TREE_FILE_BYTES_MAX:
        raise _corrupt(f"tree has {len(data)} bytes (tree_file_bytes_max={TREE_FILE_BYTES_MAX})", "size")
    try:
        tree = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _corrupt(f"undecodable: {error}", "encoding") from error
    validate_tree(tree)
    if _ENCODER.encode(tree) != data:
        raise _corrupt("the encoding is not the canonical one", "encoding")
    return tree


def check_image_manifest(manifest: Manifest, tree: ImageTree | None = None) -> None:
    """Raises CorruptContentError if the manifest is not that of an image, or not that of `tree`."""
    if manifest.kind != "image" or [entry.path for entry in manifest.files] != [TREE_FILE, DATA_FILE]:
        raise _corrupt(f"a manifest of kind {manifest.kind!r} with other files than tree and data", "files")
    if manifest.files[0].size > TREE_FILE_BYTES_MAX:
        raise _corrupt(f"the tree has {manifest.files[0].size} bytes", "size")
    if tree is not None and manifest.files[1].size != tree.data_bytes:
        raise _corrupt(f"data has {manifest.files[1].size} bytes, the tree says {tree.data_bytes}", DATA_FILE)


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of ALIGN_BYTES."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def tree_order(path: bytes) -> tuple[bytes, ...]:
    """Sorts paths as entries are: the root first, then by components."""
    return tuple(path.split(b"/")) if path else ()


def validate_tree(tree: ImageTree) -> None:
    """Raises CorruptContentError naming the place if a rule of the format is broken."""
    if tree.version != IMAGE_FORMAT_VERSION:
        raise CorruptContentError(
            f"image format version {tree.version} is not {IMAGE_FORMAT_VERSION}",
            where="image: version",
            next_step="update Snowdrop here, or push the image again with this version",
        )
    if len(tree.entries) > ENTRIES_MAX:
        raise _corrupt(f"{len(tree.entries)} entries (entries_max={ENTRIES_MAX})", "entries")
    if not 0 <= tree.data_bytes <= DATA_BYTES_MAX or tree.data_bytes % ALIGN_BYTES:
        raise _corrupt(f"data_bytes {tree.data_bytes} is out of bounds or not aligned", "data_bytes")
    check_config(tree.config)
    _check_names(tree.entries)
    by_path = {entry.path: entry for entry in tree.entries}
    for entry in tree.entries:
        _check_entry(entry, tree.data_bytes)
        if entry.kind == "hardlink":
            first = by_path.get(entry.target)
            if first is None or first.kind in {"dir", "hardlink"}:
                raise _corrupt("is a hard link to nothing that can have one", _shown(entry.path))
    _check_places(tree)


def check_config(config: ImageConfig) -> None:
    """Raises CorruptContentError if the config is not bounded or could not be passed to a program."""
    strings = (
        *(*config.env, *config.entrypoint, *config.cmd, config.user, config.workdir, config.stop_signal),
        *(config.os, config.architecture, config.variant),
    )
    if len(strings) > CONFIG_STRINGS_MAX or sum(len(text) for text in strings) > CONFIG_BYTES_MAX:
        raise _corrupt(f"config is above config_bytes_max={CONFIG_BYTES_MAX}", "config")
    if any("\0" in text for text in strings):
        raise _corrupt("a string holds a NUL", "config")
    for variable in config.env:
        if variable.find("=") <= 0:
            raise _corrupt(f"{variable[:80]!r} is not NAME=value", "config: env")


def _corrupt(message: str, place: str) -> CorruptContentError:
    return CorruptContentError(message, where=f"image: {place}", next_step="push the image again")


def _shown(path: bytes) -> str:
    return ascii(path[:200])[2:-1]


def _check_names(entries: tuple[TreeEntry, ...]) -> None:
    if not entries or entries[0].path != b"" or entries[0].kind != "dir":
        raise _corrupt("the first entry is not the root directory", "entries")
    # Of what lies on the way to the entry before: in this order a parent can be nowhere else.
    open_directories: list[bytes] = [b""]
    before: tuple[bytes, ...] = ()
    for entry in entries[1:]:
        path = entry.path
        if len(path) > PATH_BYTES_MAX:
            raise _corrupt(f"path has {len(path)} bytes (path_bytes_max={PATH_BYTES_MAX})", _shown(path))
        parts = tree_order(path)
        if any(part in {b"", b".", b".."} or len(part) > COMPONENT_BYTES_MAX or b"\0" in part for part in parts):
            raise _corrupt("has a component that no file can have", _shown(path))
        if parts <= before:
            raise _corrupt("is out of order, or occurs twice", _shown(path))
        del open_directories[len(parts) :]
        if len(open_directories) < len(parts) or path.rpartition(b"/")[0] != open_directories[-1]:
            raise _corrupt("its directory is not there", _shown(path))
        if entry.kind == "dir":
            open_directories.append(path)
        before = parts


def _check_entry(entry: TreeEntry, data_bytes: int) -> None:
    place = _shown(entry.path) or "the root"
    if not 0 <= entry.mode <= 0o7777:
        raise _corrupt(f"mode {entry.mode:#o} is out of bounds", place)
    if not (0 <= entry.uid <= ID_MAX and 0 <= entry.gid <= ID_MAX):
        raise _corrupt(f"owner {entry.uid}:{entry.gid} is out of bounds", place)
    if not -MTIME_NS_MAX <= entry.mtime_ns <= MTIME_NS_MAX:
        raise _corrupt("mtime_ns is out of bounds", place)
    if entry.kind == "hardlink" and entry != TreeEntry(entry.path, "hardlink", target=entry.target):
        raise _corrupt("a hard link carries values of its own", place)
    if entry.kind == "file":
        _check_content(entry, data_bytes, place)
    elif entry.size or entry.offset or entry.sha256:
        raise _corrupt(f"a {entry.kind} has content", place)
    if entry.kind == "symlink":
        if not 0 < len(entry.target) <= LINK_BYTES_MAX or b"\0" in entry.target:
            raise _corrupt("its target is not one", place)
    elif entry.kind != "hardlink" and entry.target:
        raise _corrupt(f"a {entry.kind} has a target", place)
    _check_xattrs(entry, place)


def _check_content(entry: TreeEntry, data_bytes: int, place: str) -> None:
    if len(entry.sha256) != SHA256_BYTES:
        raise _corrupt("sha256 does not have 32 bytes", place)
    if entry.size == 0 and entry.offset == 0:
        return
    if entry.size <= 0 or entry.offset < 0 or entry.offset % ALIGN_BYTES:
        raise _corrupt(f"content at {entry.offset} with {entry.size} bytes", place)
    if entry.offset + entry.size > data_bytes:
        raise _corrupt("content runs over the end of data", place)


def _check_xattrs(entry: TreeEntry, place: str) -> None:
    if len(entry.xattrs) > XATTRS_MAX:
        raise _corrupt(f"{len(entry.xattrs)} xattrs (xattrs_max={XATTRS_MAX})", place)
    names = [name for name, _ in entry.xattrs]
    if sorted(set(names)) != names:
        raise _corrupt("xattrs are out of order, or one occurs twice", place)
    if any(not 0 < len(name) <= XATTR_NAME_BYTES_MAX or b"\0" in name for name in names):
        raise _corrupt("an xattr's name is not one", place)
    if sum(len(name) + len(value) for name, value in entry.xattrs) > XATTR_BYTES_MAX:
        raise _corrupt(f"xattrs are above xattr_bytes_max={XATTR_BYTES_MAX}", place)


def _places(tree: ImageTree) -> Iterator[tuple[int, int, bytes]]:
    for entry in tree.entries:
        if entry.kind == "file" and entry.size:
            yield entry.offset, entry.size, entry.sha256


def _check_places(tree: ImageTree) -> None:
    """Contents fill `data` without overlap; one place has one content."""
    end = 0
    for offset, size, _ in sorted(set(_places(tree))):
        if offset != end:
            raise _corrupt("contents overlap or leave a gap", f"data, byte {offset}")
        end = offset + aligned(size)
    if end != tree.data_bytes:
        raise _corrupt(f"contents end at {end} of {tree.data_bytes} bytes", "data")
