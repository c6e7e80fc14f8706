"""An origin in memory, for tests and for running without a disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from snowdrop.content.origin.port import ObjectInfo, cut_short, missing
from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import InvalidInputError


class MemoryOrigin:
    """Objects in a dictionary."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._put_unix_ns: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | memoryview) -> None:
        key = parse_tree_path(key, error=InvalidInputError)
        with self._lock:
            self.objects[key] = bytes(data)
            self._put_unix_ns[key] = max(time.time_ns(), self._put_unix_ns.get(key, 0) + 1)

    def exists(self, key: str) -> bool:
        return key in self.objects

    def size(self, key: str) -> int:
        return len(self._get(key))

    def read_start(self, key: str, into: memoryview) -> int:
        size = self.size(key)
        self.read_range(key, 0, into[:size])
        return size

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        piece = self._get(key)[offset : offset + len(into)]
        if len(piece) != len(into):
            raise cut_short(key, len(into), len(piece))
        into[:] = piece

    def list(self, prefix: str) -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._lock:
            found = [
                ObjectInfo(key, len(data), self._put_unix_ns.get(key, 0))
                for key, data in self.objects.items()
                if key.startswith(prefix)
            ]
        return iter(found)

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(key, None)

    def sweep(self, before_unix_ns: int, *, dry_run: bool = False) -> tuple[int, int]:
        del before_unix_ns, dry_run
        return 0, 0

    def close(self) -> None:
        pass

    def _get(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise missing(key) from None
