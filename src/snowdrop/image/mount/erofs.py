"""An image's tree as an EROFS file system without data: names, attributes, and where in `data` contents lie.

mkfs.erofs makes one of files that are there; ours are not. The layout is that of the kernel's
Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h: blocks of 4 KiB, extended inodes, one extra device.

    0       nothing; at 1024 the super block, behind it the slot of the extra device
    4096    inodes, each with its xattrs, then the tail of a directory, a link's target, or the place of a content
    then    blocks of directories and of what did not fit behind its inode

A content is one chunk of the extra device, whatever its size: in `data` it lies as a whole, at a block.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.image import ImageTree
from snowdrop.image.mount.inodes import ImageInodes

BLOCK_BYTES = 4096
_BLOCK_BITS = 12
_NS = 1_000_000_000
_MAGIC = 0xE0F5E1E2
_COMPAT_MTIME = 2
_INCOMPAT_CHUNKED_FILE, _INCOMPAT_DEVICE_TABLE = 4, 8
_SUPER_OFFSET = 1024
SUPER_BLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
"""magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time, build_time_nsec, blocks,
meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, available_compr_algs, extra_devices,
devt_slotoff, dirblkbits, xattr_prefix_count, xattr_prefix_start, packed_nid, xattr_filter_reserved."""
DEVICE_SLOT = struct.Struct("<64sII56x")
"""tag, blocks, mapped_blkaddr."""
INODE = struct.Struct("<HHHHQIIIIQII16x")
"""i_format, i_xattr_icount, i_mode, reserved, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink."""
DIRENT = struct.Struct("<QHBx")
"""nid, nameoff, file_type."""
CHUNK_INDEX = struct.Struct("<HHI")
"""advise, device_id, blkaddr."""
_XATTR_HEADER_BYTES = 12
_XATTR_ENTRY = struct.Struct("<BBH")
_XATTR_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
_NID_BYTES = 32
_EXTENDED = 1
_FLAT_PLAIN, _FLAT_INLINE, _CHUNK_BASED = 0 << 1, 2 << 1, 4 << 1
_CHUNK_INDEXES = 0x20
_CHUNK_BITS_MAX = 31
_DATA_DEVICE = 1
_FILE_TYPES = {"file": 1, "dir": 2, "fifo": 5, "symlink": 7}
_U64 = (1 << 64) - 1
DATA_BLOCKS_MAX = (1 << 32) - 1
_WRITE_BYTES = 1 << 20


class _Plan(NamedTuple):
    """Where an inode lies and what follows it: `inline` bytes behind its xattrs, `blocks` whole ones elsewhere."""

    offset: int
    xattrs: bytes
    inline_bytes: int
    block: int
    blocks: int


def write_erofs(tree: ImageTree, path: Path) -> None:
    """Writes the file system of `tree` to `path`, which is replaced. Blocks.

    Raises CorruptContentError if `data` is larger than EROFS can address (16 TiB), OSError.
    """
    if tree.data_bytes // BLOCK_BYTES > DATA_BLOCKS_MAX:
        raise CorruptContentError("the image is larger than EROFS can address", where=f"{tree.data_bytes} bytes")
    with path.open("wb") as stream:
        stream.writelines(_pieces(tree))


def _pieces(tree: ImageTree) -> Iterator[bytes]:
    inodes = ImageInodes(tree)
    layouts = {node: _directory_blocks(inodes, node) for node in inodes.numbers() if inodes.is_directory(node)}
    plans, first_block, blocks = _planned(inodes, layouts)
    area = bytearray((first_block - 1) * BLOCK_BYTES)
    behind: list[bytes] = []
    for node, plan in plans.items():
        inline, whole = _body(inodes, node, plan, plans, layouts)
        at = plan.offset - BLOCK_BYTES
        head = _inode(inodes, node, plan) + plan.xattrs
        area[at : at + len(head)] = head
        begin = at + len(head)
        if inodes.file_index(node) >= 0:
            begin = _up(begin, CHUNK_INDEX.size)
        area[begin : begin + len(inline)] = inline
        if whole:
            behind.append(whole)
    yield _head(tree, len(plans), plans[1].offset // _NID_BYTES, blocks)
    yield bytes(area)
    yield from behind


def _head(tree: ImageTree, inode_count: int, root: int, blocks: int) -> bytes:
    block = bytearray(BLOCK_BYTES)
    slot_offset = _SUPER_OFFSET + SUPER_BLOCK.size
    SUPER_BLOCK.pack_into(
        block,
        _SUPER_OFFSET,
        *(_MAGIC, 0, _COMPAT_MTIME, _BLOCK_BITS, 0, root, inode_count, 0, 0, blocks, 0, 0),
        *(bytes(16), b"snowdrop"),
        *(_INCOMPAT_CHUNKED_FILE | _INCOMPAT_DEVICE_TABLE, 0, 1, slot_offset // DEVICE_SLOT.size),
        *(0, 0, 0, 0, 0),
    )
    DEVICE_SLOT.pack_into(block, slot_offset, b"data", tree.data_bytes // BLOCK_BYTES, 0)
    return bytes(block)


def _planned(
    inodes: ImageInodes, layouts: dict[int, list[list[tuple[bytes, int]]]]
) -> tuple[dict[int, _Plan], int, int]:
    """The inodes' places, the first block behind them, and the number of all blocks."""
    sized: list[tuple[int, bytes, int, int]] = []
    for node in inodes.numbers():
        xattrs = _xattrs(inodes, node)
        room = BLOCK_BYTES - INODE.size - len(xattrs)
        entry = inodes.entry(node)
        if entry.kind == "dir":
            tail = _used(layouts[node][-1])
            whole = len(layouts[node]) - 1
            sized.append((node, xattrs, tail, whole) if tail <= room else (node, xattrs, 0, whole + 1))
        elif entry.kind == "symlink":
            size = len(entry.target)
            sized.append((node, xattrs, size, 0) if size <= room else (node, xattrs, 0, 1))
        else:
            # Up to 4 bytes go to the alignment of the index.
            sized.append((node, xattrs, CHUNK_INDEX.size + 4 if entry.size else 0, 0))
    offset = BLOCK_BYTES
    offsets: list[int] = []
    for node, xattrs, inline, _ in sized:
        length = INODE.size + len(xattrs) + inline
        is_cut = inline and inodes.file_index(node) < 0 and offset % BLOCK_BYTES + length > BLOCK_BYTES
        if is_cut:
            offset = _up(offset, BLOCK_BYTES)  # what is behind an inode may not lie in two blocks
        offsets.append(offset)
        offset = _up(offset + length, _NID_BYTES)
    first = block = _up(offset, BLOCK_BYTES) // BLOCK_BYTES
    plans: dict[int, _Plan] = {}
    for (node, xattrs, inline, whole), at in zip(sized, offsets, strict=True):
        plans[node] = _Plan(at, xattrs, inline, block if whole else 0, whole)
        block += whole
    return plans, first, block


def _inode(inodes: ImageInodes, node: int, plan: _Plan) -> bytes:
    entry = inodes.entry(node)
    layout, size, place = _FLAT_PLAIN, entry.size, plan.block
    if entry.kind == "file" and entry.size:
        layout, place = _CHUNK_BASED, _CHUNK_INDEXES | _chunk_bits(entry.size)
    elif entry.kind == "symlink":
        size = len(entry.target)
    if plan.inline_bytes and entry.kind != "file":
        layout = _FLAT_INLINE
    if entry.kind == "dir":
        size = plan.blocks * BLOCK_BYTES + plan.inline_bytes
    seconds, nanoseconds = divmod(entry.mtime_ns, _NS)
    xattr_count = 1 + (len(plan.xattrs) - _XATTR_HEADER_BYTES) // 4 if plan.xattrs else 0
    return INODE.pack(
        *(_EXTENDED | layout, xattr_count, inodes.mode(node), 0, size, place),
        *(node & 0xFFFFFFFF, entry.uid, entry.gid, seconds & _U64, nanoseconds, inodes.links(node)),
    )


def _body(
    inodes: ImageInodes,
    node: int,
    plan: _Plan,
    plans: dict[int, _Plan],
    layouts: dict[int, list[list[tuple[bytes, int]]]],
) -> tuple[bytes, bytes]:
    """What lies behind the inode, and what lies in blocks of its own."""
    entry = inodes.entry(node)
    if entry.kind == "file":
        return (CHUNK_INDEX.pack(0, _DATA_DEVICE, entry.offset // BLOCK_BYTES) if entry.size else b""), b""
    if entry.kind == "symlink":
        return (entry.target, b"") if plan.inline_bytes else (b"", entry.target.ljust(BLOCK_BYTES, b"\0"))
    if entry.kind != "dir":
        return b"", b""
    blocks = [_directory_block(inodes, block, plans) for block in layouts[node]]
    inline = blocks.pop() if plan.inline_bytes else b""
    return inline, b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in blocks)


def _directory_blocks(inodes: ImageInodes, node: int) -> list[list[tuple[bytes, int]]]:
    """The names of a directory in the order of their bytes, cut into blocks."""
    names = [*inodes.children(node).items(), (b".", node), (b"..", inodes.parent(node))]
    blocks: list[list[tuple[bytes, int]]] = [[]]
    used = 0
    for name, child in sorted(names):
        length = DIRENT.size + len(name)
        if used + length > BLOCK_BYTES:
            blocks.append([])
            used = 0
        blocks[-1].append((name, child))
        used += length
    return blocks


def _used(block: list[tuple[bytes, int]]) -> int:
    return sum(DIRENT.size + len(name) for name, _ in block)


def _directory_block(inodes: ImageInodes, block: list[tuple[bytes, int]], plans: dict[int, _Plan]) -> bytes:
    heads, names = bytearray(), bytearray()
    for name, child in block:
        place = len(block) * DIRENT.size + len(names)
        heads += DIRENT.pack(plans[child].offset // _NID_BYTES, place, _FILE_TYPES[inodes.entry(child).kind])
        names += name
    return bytes(heads + names)


def _xattrs(inodes: ImageInodes, node: int) -> bytes:
    """Header and entries as they lie behind the inode; empty if there are none."""
    found = bytearray()
    for name, value in inodes.xattrs(node).items():
        prefix, index = next((prefix, index) for prefix, index in _XATTR_PREFIXES if name.startswith(prefix))
        rest = name[len(prefix) :]
        found += _XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
        found += bytes(-len(found) % 4)
    return bytes(_XATTR_HEADER_BYTES) + bytes(found) if found else b""


def _chunk_bits(size: int) -> int:
    """The smallest chunk, as a power of two of blocks, that holds a content of `size` bytes."""
    bits = (-(-size // BLOCK_BYTES) - 1).bit_length()
    if bits > _CHUNK_BITS_MAX:
        raise CorruptContentError("a file is larger than EROFS can address", where=f"{size} bytes")
    return bits


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
