"""Open files of the disk tier, kept open between reads: at most so many, the least recently used are closed."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

DESCRIPTORS_MAX = 256

Key = tuple[int, int, int]
"""(owner, file, flags)"""


class Borrowed:
    """An open descriptor with the number of those who use it now."""

    def __init__(self, key: Key, fd: int) -> None:
        self.key = key
        self.fd = fd
        self.users = 0


class Descriptors:
    """Descriptors by owner (a landing), file and flags. One in use is closed when its last user is done."""

    def __init__(self, count_max: int = DESCRIPTORS_MAX) -> None:
        self._count_max = count_max
        self._open: OrderedDict[Key, Borrowed] = OrderedDict()
        self._lock = threading.Lock()

    def borrow(self, key: Key, open_file: Callable[[], int]) -> Borrowed:
        """The descriptor of `key`, from `open_file` if there is none yet. To be given back."""
        with self._lock:
            kept = self._open.get(key)
            if kept is None:
                kept = self._open[key] = Borrowed(key, open_file())
            self._open.move_to_end(key)
            kept.users += 1
            self._trim()
        return kept

    def give_back(self, borrowed: Borrowed) -> None:
        with self._lock:
            borrowed.users -= 1
            if not borrowed.users and self._open.get(borrowed.key) is not borrowed:
                os.close(borrowed.fd)

    def forget(self, owner: int, file: int | None = None, flags: int | None = None) -> None:
        """Lets go of the descriptors of `owner`: all, or those of `file`, or those of `file` with `flags`."""
        with self._lock:
            for key in [key for key in self._open if key[0] == owner]:
                if (file is None or key[1] == file) and (flags is None or key[2] == flags):
                    self._drop(key)

    def close(self) -> None:
        with self._lock:
            for key in list(self._open):
                self._drop(key)

    def _trim(self) -> None:
        for key in list(self._open) if len(self._open) > self._count_max else ():
            if len(self._open) <= self._count_max:
                return
            if not self._open[key].users:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        kept = self._open.pop(key)
        if not kept.users:
            os.close(kept.fd)
