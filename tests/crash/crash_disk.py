"""A recorder of what the disk tier does to the disk, and a model of what a power cut leaves of it.

The recorder does every call for real and notes it. The model replays a prefix of the notes and keeps apart what a
sync has made durable. A crash then takes, of what was not synced, whatever the rules allow, chosen by a seed:

- a write may be dropped, kept, or torn: any subset of its sectors of 512 or 4096 bytes; writes may have happened
in any
  order, also over one another;
- a new length of a file counts, or not, apart from its data; bytes beyond the length are gone; - making, renaming
and removing a name counts, or not, unless the directory of the new name was synced; of the names
  that one file had in turn any may be the one that is found. Whether the data of a file was synced does not
  matter to its name, nor its name to its data. A rename is there or is not.

That is less than what ext4 or XFS promise: what survives it survives them.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

from snowdrop.content.diskio import DiskIo

ROOT = 0


@dataclass(frozen=True)
class Placed:
    """A file or directory got the name `name` in the directory `parent`, or lost its name (`parent` -1)."""

    node: int
    parent: int
    name: str
    is_new: bool = False
    is_directory: bool = False


@dataclass(frozen=True)
class Sized:
    node: int
    size: int


@dataclass(frozen=True)
class Wrote:
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class SyncedData:
    node: int


@dataclass(frozen=True)
class Lost:
    """A sync failed: the kernel drops what it could not write, and the next sync succeeds."""

    node: int


@dataclass(frozen=True)
class SyncedDirectory:
    node: int


Op = Placed | Sized | Wrote | SyncedData | Lost | SyncedDirectory


class RecordingIo(DiskIo):
    """Does what DiskIo does below `root`, one call at a time, and notes it in `ops`.

    `fail` is asked before every call that can fail and may raise OSError; then nothing is done.
    """

    def __init__(self, root: Path) -> None:
        self.ops: list[Op] = []
        self.root = root
        self._paths: dict[Path, int] = {root: ROOT}
        self._inodes: dict[int, int] = {}
        self._nodes = 1
        self._lock = threading.RLock()

    def fail(self, call: str, path: Path, size: int) -> None:
        """For subclasses."""

    def make_directory(self, path: Path) -> None:
        with self._lock:
            self.fail("make_directory", path, 0)
            super().make_directory(path)
            if path not in self._paths:
                self._new(path, is_directory=True)

    def create(self, path: Path, size: int, mode: int) -> None:
        with self._lock:
            self.fail("create", path, 0)
            super().create(path, size, mode)
            if path not in self._paths:
                self._new(path, is_directory=False)
            self._inodes[path.stat().st_ino] = self._paths[path]
            self.ops.append(Sized(self._paths[path], size))

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        with self._lock:
            node, path = self._of(fd)
            self.fail("write", path, len(view))
            super().write(fd, view, offset)
            self.ops.append(Wrote(node, offset, bytes(view)))

    def sync_data(self, fd: int) -> None:
        with self._lock:
            node, path = self._of(fd)
            try:
                self.fail("sync_data", path, 0)
            except OSError:
                self.ops.append(Lost(node))
                raise
            # Not done for real: the recording is the disk here.
            self.ops.append(SyncedData(node))

    def sync_directory(self, path: Path) -> None:
        with self._lock:
            self.fail("sync_directory", path, 0)
            self.ops.append(SyncedDirectory(self._paths[path]))

    def replace(self, source: Path, target: Path) -> None:
        with self._lock:
            self.fail("replace", source, 0)
            super().replace(source, target)
            node = self._paths[source]
            for path in [path for path in self._paths if path == source or source in path.parents]:
                self._paths[target / path.relative_to(source)] = self._paths.pop(path)
            self.ops.append(Placed(node, self._paths[target.parent], target.name))

    def unlink(self, path: Path) -> None:
        with self._lock:
            self.fail("unlink", path, 0)
            super().unlink(path)
            self._gone(path)

    def touch(self, path: Path) -> None:
        self.fail("touch", path, 0)
        super().touch(path)

    def remove_tree(self, path: Path) -> None:
        with self._lock:
            super().remove_tree(path)
            inside = [found for found in self._paths if found == path or path in found.parents]
            for found in sorted(inside, key=lambda found: len(found.parts), reverse=True):
                self._gone(found)

    def _new(self, path: Path, *, is_directory: bool) -> None:
        self._paths[path] = node = self._nodes
        self._nodes += 1
        self.ops.append(Placed(node, self._paths[path.parent], path.name, True, is_directory))

    def _gone(self, path: Path) -> None:
        node = self._paths.pop(path, None)
        if node is not None:
            self.ops.append(Placed(node, -1, ""))

    def _of(self, fd: int) -> tuple[int, Path]:
        node = self._inodes[os.fstat(fd).st_ino]
        return node, next(path for path, found in self._paths.items() if found == node)


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Sized | Wrote] = field(default_factory=list)


@dataclass
class _Names:
    """What a node was called, in turn; the first `durable` of the list are sure."""

    placed: list[tuple[int, Placed]] = field(default_factory=list)
    durable: int = 0


class DiskModel:
    """The disk after a prefix of the recording, durable and not."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._names: dict[int, _Names] = {}
        self._directories: set[int] = {ROOT}
        self._step = 0

    def apply(self, op: Op) -> None:
        self._step += 1
        match op:
            case Placed(node=node):
                self._names.setdefault(node, _Names()).placed.append((self._step, op))
                if op.is_new and op.is_directory:
                    self._directories.add(node)
                elif op.is_new:
                    self._files[node] = _File()
            case Sized() | Wrote():
                self._files[op.node].pending.append(op)
            case SyncedData(node=node):
                file = self._files[node]
                for pending in file.pending:
                    _land(file.durable, pending)
                file.pending.clear()
            case Lost(node=node):
                self._files[node].pending.clear()
            case SyncedDirectory(node=node):
                for names in self._names.values():
                    for index, (_, placed) in enumerate(names.placed):
                        before = names.placed[index - 1][1].parent if index else -1
                        if placed.parent == node or (placed.parent == -1 and before == node):
                            names.durable = max(names.durable, index + 1)

    def crash(self, rng: random.Random, faults: int = 0) -> dict[Path, bytes | None]:
        """One state that a power cut here may leave: contents by path, None for a directory.

        It has `faults` of its own: a bit that flipped, a sector that is another place's, or one never written.
        """
        mood = rng.choice(["drop", "keep", "any", "any", "any"])
        places: dict[tuple[int, str], tuple[int, int]] = {}
        for node, names in self._names.items():
            keep = {"drop": names.durable, "keep": len(names.placed)}.get(mood)
            count = rng.randint(names.durable, len(names.placed)) if keep is None else keep
            if count and names.placed[count - 1][1].parent != -1:
                step, placed = names.placed[count - 1]
                key = (placed.parent, placed.name)
                places[key] = max(places.get(key, (0, 0)), (step, node))
        found = {node: key for key, (_, node) in places.items()}
        image: dict[Path, bytes | None] = {}
        for node in found:
            path = self._path(node, found)
            if path is not None:
                image[path] = None if node in self._directories else bytes(self._content(node, mood, rng))
        _damage(image, faults, rng)
        return image

    def durable(self, path: Path) -> bytes | None:
        """The synced content of the file that is called `path` now."""
        found = {
            node: (names.placed[-1][1].parent, names.placed[-1][1].name)
            for node, names in self._names.items()
            if names.placed[-1][1].parent != -1
        }
        nodes = [node for node in found if self._path(node, found) == path]
        return bytes(self._files[nodes[0]].durable) if nodes else None

    def _path(self, node: int, found: dict[int, tuple[int, str]]) -> Path | None:
        parts: list[str] = []
        while node != ROOT:
            if node not in found:
                return None
            node, name = found[node]
            parts.insert(0, name)
        return Path(*parts)

    def _content(self, node: int, mood: str, rng: random.Random) -> bytearray:
        file = self._files[node]
        content = bytearray(file.durable)
        if mood == "drop":
            return content
        sizes = [op for op in file.pending if isinstance(op, Sized)]
        writes = [op for op in file.pending if isinstance(op, Wrote)]
        if mood == "keep":
            for op in file.pending:
                _land(content, op)
            return content
        sizes = sizes[: rng.randint(0, len(sizes))]
        size = sizes[-1].size if sizes else len(content)
        lowest = min([size, *(op.size for op in sizes)])
        rng.shuffle(writes)
        for op in writes:
            fate = rng.choice(["dropped", "kept", "torn"])
            if fate == "kept":
                _land(content, op)
            elif fate == "torn":
                _tear(content, op, rng)
        if sizes:
            # Cut and lengthened: what lay beyond the shortest length reads as zeros unless it was written since.
            kept = max((op.offset + len(op.data) for op in writes), default=0)
            del content[max(lowest, min(size, kept)) :]
            content.extend(bytes(max(0, size - len(content))))
            del content[size:]
        return content


def _land(content: bytearray, op: Sized | Wrote) -> None:
    if isinstance(op, Sized):
        content.extend(bytes(max(0, op.size - len(content))))
        del content[op.size :]
        return
    content.extend(bytes(max(0, op.offset + len(op.data) - len(content))))
    content[op.offset : op.offset + len(op.data)] = op.data


def _tear(content: bytearray, op: Wrote, rng: random.Random) -> None:
    sector = rng.choice([512, 4096])
    first = op.offset - op.offset % sector
    for start in range(first, op.offset + len(op.data), sector):
        if rng.random() < 0.5:
            begin, end = max(start, op.offset), min(start + sector, op.offset + len(op.data))
            _land(content, Wrote(op.node, begin, op.data[begin - op.offset : end - op.offset]))


def _damage(image: dict[Path, bytes | None], faults: int, rng: random.Random) -> None:
    targets = sorted(path for path, content in image.items() if content)
    for _ in range(faults if targets else 0):
        path = rng.choice(targets)
        content = bytearray(image[path] or b"")
        kind = rng.choice(["flipped", "misdirected", "stale"])
        if kind == "flipped":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            sector = rng.choice([512, 4096])
            at = rng.randrange(len(content)) // sector * sector
            there = content[at : at + sector]
            source = image[rng.choice(targets)] or b""
            begin = rng.randrange(len(source)) // sector * sector
            found = source[begin : begin + len(there)] if kind == "misdirected" else b""
            content[at : at + len(there)] = found.ljust(len(there), b"\0")
        image[path] = bytes(content)


def materialise(image: dict[Path, bytes | None], root: Path) -> None:
    """Makes the directory `root` with what `image` says."""
    root.mkdir()
    for path, content in sorted(image.items(), key=lambda item: len(item[0].parts)):
        if content is None:
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).write_bytes(content)
