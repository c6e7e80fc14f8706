"""Cold files: parallel reads past the page cache into memory that the tensors then own.

The bytes of a plan are cut into windows, each with memory of its own that lasts as long as a tensor in it. Threads
read them in order, in blocks, with O_DIRECT where the file system has it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from snowdrop.domain.errors import CorruptContentError, SnowdropError, StorageFullError, TimedOutError
from snowdrop.weights.diskfile import DiskFile
from snowdrop.weights.feeds import Loan, Piece, cut_pieces, run_of
from snowdrop.weights.plan import LoadPlan, PlannedTensor

THREADS = 8
BLOCK_BYTES = 4 << 20
WINDOW_BYTES = 64 << 20
"""Neighbouring tensors share a window up to this size; a larger tensor has one to itself."""
AHEAD_BYTES_MAX = 512 << 20
"""Windows that were begun and not yet taken hold at most so much (one window apart)."""
ALIGNMENT = 4096
_HUGE_PAGE_BYTES = 2 << 20
_MAP_NORESERVE = 0x4000
READ_S_MAX = 600.0
"""How long the next window may take."""


class Window(NamedTuple):
    """A stretch of a file that has one piece of memory; only `spans` of it are read, the rest is never touched."""

    file: int
    start: int
    end: int
    spans: tuple[tuple[int, int], ...]

    @property
    def read_bytes(self) -> int:
        return sum(length for _, length in self.spans)


class _Block(NamedTuple):
    window: int
    offset: int
    length: int


def plan_windows(plan: LoadPlan) -> tuple[list[Window], list[int]]:
    """The windows in order, and for each tensor of the plan the number of its own (-1 if it has no bytes).

    A window covers its tensors whole, also if only parts of them are read.
    """
    windows: list[Window] = []
    numbers: list[int] = []
    for tensor in plan.tensors:
        spans = tuple(tensor.spans())
        if not spans:
            numbers.append(-1)
            continue
        begin, end = tensor.entry.offset, tensor.entry.offset + tensor.entry.length
        last = windows[-1] if windows else None
        if (
            last is not None
            and last.file == tensor.file
            and last.end == begin
            and end - last.start <= WINDOW_BYTES
        ):
            windows[-1] = last._replace(end=end, spans=(*last.spans, *spans))
        else:
            windows.append(Window(tensor.file, begin, end, spans))
        numbers.append(len(windows) - 1)
    return [_aligned(window) for window in windows], numbers


def _aligned(window: Window) -> Window:
    """Everything widened to whole pages, which O_DIRECT needs; spans that meet become one."""
    spans: list[tuple[int, int]] = []
    for offset, length in window.spans:
        start, end = _floor(offset), _floor(offset + length + ALIGNMENT - 1)
        if spans and spans[-1][0] + spans[-1][1] >= start:
            spans[-1] = (spans[-1][0], end - spans[-1][0])
        else:
            spans.append((start, end - start))
    return Window(window.file, _floor(window.start), _floor(window.end + ALIGNMENT - 1), tuple(spans))


def _floor(offset: int) -> int:
    return offset & ~(ALIGNMENT - 1)


class DirectReader:
    """Reads the windows of a plan with `threads` threads; `take` gives them in order."""

    def __init__(
        self,
        files: Sequence[DiskFile],
        windows: Sequence[Window],
        *,
        threads: int = THREADS,
        ahead_bytes_max: int = AHEAD_BYTES_MAX,
    ) -> None:
        self._windows = windows
        self._ahead_bytes_max = ahead_bytes_max
        self._changed = threading.Condition()
        self._memory: dict[int, memoryview] = {}
        self._left: dict[int, int] = {}
        self._open_bytes = 0
        self._blocks = _blocks(windows)
        self._next: _Block | None = next(self._blocks, None)
        self._error: Exception | None = None
        self._is_closed = False
        self._files = _Files(files)
        self._threads = [
            threading.Thread(target=self._read, name=f"weights {i}", daemon=True) for i in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # no more threads in this process: those that run read all of it
            if not self._threads[0].ident:
                self._files.close()
                raise StorageFullError(
                    f"no thread can be started: {error}", where="threads", next_step="raise the limit of processes"
                ) from error

    def take(self, window: int) -> memoryview:
        """Blocks until the window is read and gives its memory away. Raises OSError or a SnowdropError."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._left.get(window) == 0, READ_S_MAX)
            if self._left.get(window) != 0:
                raise self._error or TimedOutError(
                    "the disk does not give the weights", where=f"READ_S_MAX={READ_S_MAX:g}"
                )
            self._open_bytes -= self._windows[window].read_bytes
            del self._left[window]
            self._changed.notify_all()
            return self._memory.pop(window)

    def close(self) -> None:
        """Ends reading ahead, within the time of one block, and closes the files."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._memory.clear()
        self._files.close()

    def _read(self) -> None:
        while (block := self._claim()) is not None:
            try:
                self._read_block(block)
            except (OSError, SnowdropError) as error:
                self._fail(error)
                return
            with self._changed:
                self._left[block.window] -= 1
                if self._left[block.window] == 0:
                    self._changed.notify_all()

    def _read_block(self, block: _Block) -> None:
        """In a call of its own, so that a thread that waits for its next block keeps no window alive."""
        window = self._windows[block.window]
        target = self._memory[block.window][block.offset - window.start :][: block.length]
        self._files.read(window.file, target, block.offset)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _claim(self) -> _Block | None:
        with self._changed:
            # Bounded by `close`, which the feed's owner always calls.
            self._changed.wait_for(self._may_claim)
            block = self._next
            if self._is_closed or self._error is not None or block is None:
                return None
            if block.window not in self._left:
                try:
                    self._begin(block.window)
                except StorageFullError as error:
                    self._error = error
                    self._changed.notify_all()
                    return None
            self._next = next(self._blocks, None)
            return block

    def _may_claim(self) -> bool:
        if self._is_closed or self._error is not None or self._next is None:
            return True
        return self._next.window in self._left or self._open_bytes < self._ahead_bytes_max

    def _begin(self, number: int) -> None:
        window = self._windows[number]
        self._memory[number] = _memory(window.end - window.start, is_dense=len(window.spans) == 1)
        self._left[number] = sum(-(-length // BLOCK_BYTES) for _, length in window.spans)
        self._open_bytes += window.read_bytes


def _blocks(windows: Sequence[Window]) -> Iterator[_Block]:
    for number, window in enumerate(windows):
        for offset, length in window.spans:
            for at in range(offset, offset + length, BLOCK_BYTES):
                yield _Block(number, at, min(BLOCK_BYTES, offset + length - at))


def _memory(size: int, *, is_dense: bool) -> memoryview:
    try:
        owner = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise StorageFullError(
            f"no memory for {size} bytes of weights",
            where="memory",
            next_step="free memory, or load fewer tensors at a time",
        ) from error
    if is_dense and size >= _HUGE_PAGE_BYTES:
        with suppress(OSError):  # a kernel without huge pages
            owner.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(owner)


class _Files:
    """Descriptors by file number, opened past the page cache where that works."""

    def __init__(self, files: Sequence[DiskFile]) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._fds: dict[int, int] = {}
        self._buffered: set[int] = set()

    def read(self, number: int, target: memoryview, offset: int) -> None:
        """Fills `target` as far as the file goes: its last page may reach beyond the end."""
        file = self._files[number]
        wanted = min(len(target), file.size - offset)
        done = 0
        while done < wanted:
            fd = self._fd(number)
            try:
                count = os.preadv(fd, [target[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or number in self._buffered:
                    raise
                self._buffer(number)
                continue
            if count == 0:
                raise CorruptContentError(
                    f"the file ends at byte {offset + done} of {file.size}: it was cut while it was read",
                    where=file.name,
                    next_step="load it again when nobody writes to it",
                )
            done += count

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, number: int) -> int:
        with self._lock:
            fd = self._fds.get(number)
            if fd is None:
                fd = self._fds[number] = _open_direct(self._files[number])
            return fd

    def _buffer(self, number: int) -> None:
        """This file system refuses direct reads only when they are made: reads go through its cache."""
        with self._lock:
            if number not in self._buffered:
                self._buffered.add(number)
                fd = self._files[number].open()
                os.dup2(fd, self._fds[number], inheritable=False)
                os.close(fd)


def _open_direct(file: DiskFile) -> int:
    try:
        return file.open(os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return file.open()


class DirectFeed:
    """A feed over a DirectReader, and what a mixed feed needs to know of it."""

    def __init__(self, files: Sequence[DiskFile], plan: LoadPlan, *, threads: int = THREADS) -> None:
        self._windows, numbers = plan_windows(plan)
        self._numbers = deque(zip(plan.tensors, numbers, strict=True))
        self._reader = DirectReader(files, self._windows, threads=threads)
        self._current = -1
        self._memory = memoryview(b"")

    def whole(self, tensor: PlannedTensor) -> Loan:
        planned, number = self._numbers.popleft()
        assert planned is tensor, "tensors are asked for in the order of the plan"
        if number < 0:
            return Loan(memoryview(b""))
        if number != self._current:
            self._memory = memoryview(b"")  # the one before may go before the next is waited for
            self._memory = self._reader.take(number)
            self._current = number
        begin = tensor.entry.offset - self._windows[number].start
        return Loan(self._memory[begin : begin + tensor.entry.length])

    def pieces(self, tensor: PlannedTensor) -> Iterator[Piece]:
        yield from cut_pieces(run_of(self.whole(tensor).view, tensor))

    def close(self) -> None:
        self._memory = memoryview(b"")
        self._reader.close()
