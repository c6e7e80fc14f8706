"""What outlives the server of a mount: requests read and not yet answered, open handles, what INIT agreed on.

It is memory (a memfd) that the agent holds beside the mount's /dev/fuse descriptor and gives to each server of it
in turn. Requests are read from the device straight into a slot here, so there is no moment in which a request is
known to a dying server alone: the next server answers whatever the slots still hold. The kernel refuses a second
answer to the same request (ENOENT), so answering too often is harmless. (FUSE_NOTIFY_RESEND would do the first
part of this, on kernels from 6.9 only.)

    0      magic, files, slots, agreed minor (0: INIT has not been answered), agreed flags
    4096   slots of SLOT_BYTES: a request as it was read; length 0 means free
    then   per file: cached opens, passthrough opens, backing id
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections import deque

from snowdrop.content.fuse.structs import FUSE_IN_HEADER
from snowdrop.domain.errors import ProtocolError

SLOTS = 2048
"""Requests that can be under way. The kernel has at most MAX_BACKGROUND in the background and one per waiting
thread above that; when all slots are taken the next request waits in the kernel."""
SLOT_BYTES = 512
"""Header, and the longest name that can be looked up. What does not fit belongs to requests that are refused
anyway."""
_MAGIC = b"SDFUSE\0\1"
_HEADER = struct.Struct("=8sIIIIQ")
_FILE = struct.Struct("=IIi4x")
_HEADER_BYTES = 4096


def create_journal(file_count: int) -> int:
    """A descriptor of a new journal, for the mount of a tree of so many files. Raises OSError."""
    fd = os.memfd_create("snowdrop-fuse-journal", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _journal_bytes(file_count))
        os.pwrite(fd, _HEADER.pack(_MAGIC, file_count, SLOTS, 0, 0, 0), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


class Journal:
    """One server's view. Slots may be taken and freed by any thread; handles are counted under one lock."""

    def __init__(self, fd: int, file_count: int) -> None:
        """Keeps no descriptor. Raises ProtocolError if it is the journal of something else."""
        size = os.fstat(fd).st_size
        if size != _journal_bytes(file_count):
            raise ProtocolError("a mount's journal has the wrong size", where=f"{size} bytes, {file_count} files")
        self._map = mmap.mmap(fd, size)
        magic, files, slots, self.minor, _, self.flags = _HEADER.unpack_from(self._map)
        if (magic, files, slots) != (_MAGIC, file_count, SLOTS):
            self._map.close()
            raise ProtocolError("not the journal of this mount", where="fuse journal")
        self._view = memoryview(self._map)
        self._lock = threading.Lock()
        self._slots = [
            self._view[_HEADER_BYTES + n * SLOT_BYTES : _HEADER_BYTES + (n + 1) * SLOT_BYTES] for n in range(SLOTS)
        ]
        self._left_over = [n for n in range(SLOTS) if self._length(n)]
        self._free = deque(n for n in range(SLOTS) if not self._length(n))
        self._available = threading.Semaphore(len(self._free))
        for slot in self._free:
            # Touched now: a fault while the kernel copies a request into it must not be the first.
            self._slots[slot][:] = bytes(SLOT_BYTES)

    def close(self) -> None:
        for slot in self._slots:
            slot.release()
        self._view.release()
        self._map.close()

    def agree(self, minor: int, flags: int) -> None:
        """Remembers what INIT settled, for the servers after this one."""
        self.minor, self.flags = minor, flags
        _HEADER.pack_into(self._map, 0, _MAGIC, self._files, SLOTS, minor, 0, flags)

    def left_over(self) -> list[int]:
        """Slots that an earlier server left unanswered; given out once."""
        left, self._left_over = self._left_over, []
        return left

    def take(self, wait_s_max: float) -> int | None:
        """A free slot; None if none became free in time."""
        if not self._available.acquire(timeout=wait_s_max):
            return None
        return self._free.popleft()

    def slot(self, number: int) -> memoryview:
        return self._slots[number]

    def free(self, number: int) -> None:
        """The request in it has been answered, or none came."""
        self._slots[number][:4] = b"\0\0\0\0"
        self._free.append(number)
        self._available.release()

    def opened(self, file: int, *, backing_id: int) -> None:
        """Counts a handle before the kernel hears of it. `backing_id` 0 is an open through the page cache."""
        with self._lock:
            cached, passed, known = _FILE.unpack_from(self._map, self._at(file))
            if backing_id:
                passed, known = passed + 1, backing_id
            else:
                cached += 1
            _FILE.pack_into(self._map, self._at(file), cached, passed, known)

    def closed(self, file: int, *, is_passthrough: bool) -> None:
        with self._lock:
            cached, passed, known = _FILE.unpack_from(self._map, self._at(file))
            if is_passthrough:
                passed = max(0, passed - 1)
            else:
                cached = max(0, cached - 1)
            _FILE.pack_into(self._map, self._at(file), cached, passed, known)

    def handles(self, file: int) -> tuple[int, int, int]:
        """Cached opens, passthrough opens, and the id of the backing file (0: none yet)."""
        with self._lock:
            cached, passed, known = _FILE.unpack_from(self._map, self._at(file))
        return cached, passed, known

    def set_backing(self, file: int, backing_id: int) -> None:
        """Remembers a backing file that the kernel has been given."""
        with self._lock:
            cached, passed, _ = _FILE.unpack_from(self._map, self._at(file))
            _FILE.pack_into(self._map, self._at(file), cached, passed, backing_id)

    @property
    def _files(self) -> int:
        return (len(self._map) - _HEADER_BYTES - SLOTS * SLOT_BYTES) // _FILE.size

    def _length(self, slot: int) -> int:
        length: int = FUSE_IN_HEADER.unpack_from(self._slots[slot])[0]
        return length

    @staticmethod
    def _at(file: int) -> int:
        return _HEADER_BYTES + SLOTS * SLOT_BYTES + file * _FILE.size


def _journal_bytes(file_count: int) -> int:
    return _HEADER_BYTES + SLOTS * SLOT_BYTES + file_count * _FILE.size
