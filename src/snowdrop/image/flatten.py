"""Layers, lowest first, become one tree. Pure: what unpacking them one over the other into a directory would give.

A name `.wh.NAME` takes NAME away, `.wh..wh..opq` all that lower layers have in its directory; neither touches
what the same layer brought before. A directory over a directory changes its attributes and keeps what it holds;
anything else replaces what was there. Symbolic links on the way to an entry are followed inside of the image, as
they are when a layer is unpacked; one that leads out of it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.image import ENTRIES_MAX, TreeEntry

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."
LINKS_FOLLOWED_MAX = 40
SET_ID_BITS = 0o6000
_CAPABILITY = b"security.capability"
_KEPT_XATTRS = (b"user.", b"system.posix_acl_")
_DROPPED_XATTRS = (b"security.", b"trusted.")
"""Labels and marks of the machine that made the layer; they mean nothing, or something else, on another one."""


class _Node:
    """What a name stands for. Hard links are names of one node; a directory's node has its names."""

    __slots__ = ("children", "entry")

    def __init__(self, entry: TreeEntry) -> None:
        self.entry = entry
        self.children: dict[bytes, _Node] = {}


_Way = list[tuple[_Node, bytes]]
"""Directories from the root down, each with its name in the one before."""


def flatten(layers: Iterable[Iterable[TreeEntry]], *, allow_setid: bool = False) -> tuple[TreeEntry, ...]:
    """The tree's entries in their order, with contents as the layers' entries have them.

    An entry of a layer is a TreeEntry whose path is that of its name in the layer, whiteouts included, and whose
    hard links may name what lower layers brought. Without `allow_setid` files lose their set-user-id and
    set-group-id bits and their file capabilities. Raises CorruptContentError naming the entry.
    """
    flattener = Flattener(allow_setid=allow_setid)
    for layer in layers:
        flattener.next_layer()
        for entry in layer:
            flattener.add(entry)
    return flattener.entries()


@dataclass
class Flattener:
    """`flatten` one entry at a time."""

    allow_setid: bool = False
    _root: _Node = field(default_factory=lambda: _Node(TreeEntry(b"", "dir", 0o755)))
    _brought: set[tuple[int, bytes]] = field(default_factory=set)
    """What this layer brought, or what lies on the way to it: the directory's node by its id, and the name."""
    _seen: set[bytes] = field(default_factory=set)
    _count: int = 1

    def next_layer(self) -> None:
        self._brought, self._seen = set(), set()

    def add(self, entry: TreeEntry) -> None:
        path = entry.path
        if path in self._seen:
            raise _refused("occurs twice in a layer", path)
        self._seen.add(path)
        if not path:
            self._set_root(entry)
            return
        parent_path, _, name = path.rpartition(b"/")
        if name.startswith(WHITEOUT):
            self._white_out(path, parent_path, name)
            return
        parent = self._parent(parent_path, path)
        entry = kept_attributes(entry, allow_setid=self.allow_setid)
        if entry.kind == "hardlink":
            self._bring(parent, name, self._link_target(entry))
        elif entry.kind != "dir" or not self._change_directory(entry):
            self._bring(parent, name, _Node(entry))

    def entries(self) -> tuple[TreeEntry, ...]:
        """The tree as it is now. Of the names of a node, the first in the order of entries has its values."""
        found: list[TreeEntry] = []
        first: dict[int, bytes] = {}
        pending: list[tuple[bytes, _Node]] = [(b"", self._root)]
        while pending:
            path, node = pending.pop()
            if id(node) in first:
                found.append(TreeEntry(path, "hardlink", target=first[id(node)]))
                continue
            first[id(node)] = path
            found.append(_renamed(node.entry, path))
            names = sorted(node.children, reverse=True)
            pending += ((path + b"/" + name if path else name, node.children[name]) for name in names)
        return tuple(found)

    def _set_root(self, entry: TreeEntry) -> None:
        if entry.kind != "dir":
            raise _refused("the root is no directory", b".")
        self._root.entry = kept_attributes(entry, allow_setid=self.allow_setid)

    def _bring(self, parent: _Node, name: bytes, node: _Node) -> None:
        if name not in parent.children:
            self._count += 1
            if self._count > ENTRIES_MAX:
                raise _refused(f"more than entries_max={ENTRIES_MAX} entries", name)
        else:
            self._count -= _names_below(parent.children[name])
        parent.children[name] = node
        self._brought.add((id(parent), name))

    def _walk(self, path: bytes, wanted_by: bytes, *, make: bool) -> _Way | None:
        """The way to the directory at `path`, links followed. With `make` what is missing is made, as unpacking
        would, and what stands in the way is refused; otherwise None says that there is no such directory.
        """
        way: _Way = [(self._root, b"")]
        parts = path.split(b"/")[::-1] if path else []
        followed = 0
        while parts:
            name = parts.pop()
            if name == b"..":
                if len(way) == 1:
                    raise _refused("a symbolic link on the way to it leads out of the image", wanted_by)
                way.pop()
                continue
            if name in {b"", b"."}:
                continue
            node = way[-1][0]
            child = node.children.get(name)
            if child is None and make:
                child = _Node(TreeEntry(name, "dir", 0o755))
                self._bring(node, name, child)
            if child is not None and child.entry.kind == "symlink":
                followed += 1
                if followed > LINKS_FOLLOWED_MAX:
                    raise _refused(f"more than {LINKS_FOLLOWED_MAX} symbolic links on the way to it", wanted_by)
                if child.entry.target.startswith(b"/"):
                    way = way[:1]
                parts += child.entry.target.split(b"/")[::-1]
                continue
            if child is None or child.entry.kind != "dir":
                if make and child is not None:
                    raise _refused(f"{_shown(name)} on the way to it is a {child.entry.kind}", wanted_by)
                return None
            way.append((child, name))
        return way

    def _mark(self, way: _Way) -> None:
        """This layer brought what lies on the way, as far as whiteouts are concerned."""
        self._brought.update((id(above), name) for (above, _), (_, name) in pairwise(way))

    def _parent(self, path: bytes, wanted_by: bytes) -> _Node:
        way = self._walk(path, wanted_by, make=True)
        assert way is not None
        self._mark(way)
        return way[-1][0]

    def _found(self, path: bytes, wanted_by: bytes) -> _Node | None:
        way = self._walk(path, wanted_by, make=False)
        return way[-1][0] if way is not None else None

    def _change_directory(self, entry: TreeEntry) -> bool:
        """Other attributes for the directory there, or the one that a link there leads to; False without one."""
        way = self._walk(entry.path, entry.path, make=False)
        if way is None:
            return False
        way[-1][0].entry = entry
        self._mark(way)
        return True

    def _link_target(self, entry: TreeEntry) -> _Node:
        parent_path, _, name = entry.target.rpartition(b"/")
        parent = self._found(parent_path, entry.path)
        node = parent.children.get(name) if parent is not None else None
        if node is None or node.entry.kind == "dir":
            raise _refused(f"is a hard link to {_shown(entry.target)}, which is no file here", entry.path)
        return node

    def _white_out(self, path: bytes, parent_path: bytes, name: bytes) -> None:
        if name != OPAQUE and name.startswith(_RESERVED):
            return  # marks of a union file system that is no more
        parent = self._found(parent_path, path)
        if name == OPAQUE:
            if parent is not None:
                self._remove_lower(parent)
            return
        gone = name[len(WHITEOUT) :]
        if gone in {b"", b".", b".."}:
            raise _refused("is a whiteout of nothing", path)
        if parent is None or gone not in parent.children:
            return
        if (id(parent), gone) not in self._brought:
            self._count -= 1 + _names_below(parent.children.pop(gone))
        else:
            self._remove_lower(parent.children[gone])

    def _remove_lower(self, directory: _Node) -> None:
        """What lower layers have below it, down to where this layer brought something."""
        pending = [directory]
        while pending:
            node = pending.pop()
            for name, child in list(node.children.items()):
                if (id(node), name) in self._brought:
                    pending.append(child)
                else:
                    self._count -= 1 + _names_below(node.children.pop(name))


def kept_attributes(entry: TreeEntry, *, allow_setid: bool) -> TreeEntry:
    """Without what would give rights that nobody asked for, or that belongs to the machine of the maker."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in entry.xattrs:
        if (name == _CAPABILITY and allow_setid) or name.startswith(_KEPT_XATTRS):
            kept.append((name, value))
        elif not name.startswith(_DROPPED_XATTRS):
            raise _refused(f"extended attribute {_shown(name)} of no known kind", entry.path)
    mode = entry.mode
    if not allow_setid and entry.kind != "dir":
        mode &= ~SET_ID_BITS
    if len(kept) == len(entry.xattrs) and mode == entry.mode:
        return entry
    return msgspec.structs.replace(entry, mode=mode, xattrs=tuple(kept))


def layer_path(raw: bytes) -> bytes:
    """A member's path as that of an entry; raises CorruptContentError if it leads anywhere else than down."""
    if raw.startswith(b"/"):
        raise _refused("path is absolute", raw)
    parts = [part for part in raw.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise _refused("path has a '..'", raw)
    if b"\0" in raw or any(len(part) > 255 + len(WHITEOUT) for part in parts):
        raise _refused("path has a component that no file can have", raw)
    return b"/".join(parts)


def _names_below(node: _Node) -> int:
    count, pending = 0, [node]
    while pending:
        children = pending.pop().children
        count += len(children)
        pending += children.values()
    return count


def _renamed(entry: TreeEntry, path: bytes) -> TreeEntry:
    if entry.path == path:
        return entry
    return msgspec.structs.replace(entry, path=path)


def _shown(path: bytes) -> str:
    return ascii(path[:200])[2:-1]


def _refused(message: str, path: bytes) -> CorruptContentError:
    return CorruptContentError(
        message, where=f"layer: {_shown(path)}", next_step="make the image anew, or leave the entry out of it"
    )
