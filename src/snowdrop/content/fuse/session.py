"""The server of one mount: requests from /dev/fuse, answers from the tree and from its content.

One thread reads requests and answers what needs no content, at once; a few more read files. A read of bytes that
are not on the node yet waits on the event loop, so that no thread is held and names can be looked up meanwhile;
it is bounded, and its end, whatever it is, is an answer. A read that fails fails alone: the next one tries again.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import select
import struct
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread

from snowdrop.content.fuse.answers import Answers
from snowdrop.content.fuse.handshake import READ_BYTES_MAX, agree
from snowdrop.content.fuse.inodes import Inodes
from snowdrop.content.fuse.journal import SLOT_BYTES, Journal
from snowdrop.content.fuse.opens import Opens
from snowdrop.content.fuse.source import FileSource
from snowdrop.content.fuse.structs import (
    FUSE_IN_HEADER,
    FUSE_INTERRUPT_IN,
    FUSE_MIN_READ_BUFFER,
    FUSE_OUT_HEADER,
    FUSE_READ_IN,
    UNANSWERED_OPS,
    Init,
    Op,
)
from snowdrop.domain.errors import ProtocolError, SnowdropError, TimedOutError

READ_S_MAX = 300.0
"""A read that could not be served in this time fails with EIO."""
READ_THREADS = 3
INLINE_BYTES_MAX = 128 << 10
"""A read up to this is answered by the thread that received it: handing it on would cost more than reading it."""
BRING_ATTEMPTS_MAX = 3
"""How often bytes that were brought may be gone again (dropped, or found wrong) before the read fails."""
KILLED_POLL_S = 0.2
_SLOT_S_MAX = 1.0
_SIGKILL_BIT = 1 << 8
_GONE = frozenset({errno.ENODEV, errno.ECONNABORTED})

log = logging.getLogger("snowdrop.fuse")


class _Read:
    """One READ from its arrival to its answer."""

    __slots__ = ("attempts", "data", "file", "length", "offset", "pid", "scope", "slot", "unique")

    def __init__(self, slot: int, unique: int, pid: int, *, file: int, offset: int, length: int) -> None:
        self.slot, self.unique, self.pid = slot, unique, pid
        self.file, self.offset, self.length = file, offset, length
        self.attempts = 0
        self.data: bytes | None = None
        self.scope: anyio.CancelScope | None = None


class Session:
    """Serves until the mount is gone, or until cancelled: then another session may take over device and journal.

    `device_fd` stays the caller's and must stay open while `run` does. `passthrough_allowed`: this process may
    give the kernel files to read by itself (CAP_SYS_ADMIN).
    """

    def __init__(
        self,
        device_fd: int,
        journal: Journal,
        tree: Inodes,
        source: FileSource,
        *,
        passthrough_allowed: bool,
        name: str = "",
        read_s_max: float = READ_S_MAX,
    ) -> None:
        self._device = device_fd
        self._journal = journal
        self._tree = tree
        self._source = source
        self._answers = Answers(tree)
        self._opens = Opens(device_fd, journal, source)
        self._passthrough_allowed = passthrough_allowed
        self._name = name
        self._read_s_max = read_s_max
        self._reads: dict[int, _Read] = {}
        self._queue: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        self._scratch = memoryview(bytearray(FUSE_MIN_READ_BUFFER))
        self._inline = memoryview(bytearray(INLINE_BYTES_MAX))
        self._ended = anyio.Event()
        self._error: SnowdropError | None = None

    async def run(self) -> None:
        """Returns when the mount is gone. Raises ProtocolError if the kernel's FUSE cannot be spoken with."""
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        limiter = anyio.CapacityLimiter(READ_THREADS + 1)
        try:
            async with anyio.from_thread.BlockingPortal() as portal:
                self._portal = portal
                async with anyio.create_task_group() as threads:
                    for work in (self._serve, *[self._read_files] * READ_THREADS):
                        threads.start_soon(partial(anyio.to_thread.run_sync, work, limiter=limiter))
                    try:
                        await self._ended.wait()
                    finally:
                        os.eventfd_write(self._stop_fd, 1)
                        for _ in range(READ_THREADS):
                            self._queue.put(None)
                await portal.stop(cancel_remaining=True)
        finally:
            os.close(self._stop_fd)
        if self._error is not None:
            raise self._error

    # --- the thread that receives -------------------------------------------------------------------------

    def _serve(self) -> None:
        os.set_blocking(self._device, False)
        poller = select.poll()
        poller.register(self._device, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        try:
            for slot in self._journal.left_over():
                self._dispatch(slot)
            while self._receive(poller):
                pass
        except ProtocolError as error:
            self._error = error
        finally:
            self._portal.start_task_soon(self._end)

    async def _end(self) -> None:
        self._ended.set()

    def _receive(self, poller: select.poll) -> bool:
        """Takes in and dispatches one request, or finds that there is none. False: the end."""
        if any(fd == self._stop_fd for fd, _ in poller.poll()):
            return False
        slot = self._journal.take(_SLOT_S_MAX)
        if slot is None:
            return True
        try:
            os.readv(self._device, [self._journal.slot(slot), self._scratch])
        except OSError as error:
            self._journal.free(slot)
            # EAGAIN, EINTR, ENOENT (its caller was faster to give up than we to read): the next one.
            return error.errno not in _GONE
        self._dispatch(slot)
        return True

    def _dispatch(self, slot: int) -> None:
        request = self._journal.slot(slot)
        length, op, unique, node, _, _, pid, _, _ = FUSE_IN_HEADER.unpack_from(request)
        body = request[FUSE_IN_HEADER.size : min(length, SLOT_BYTES)]
        if op == Op.READ:
            self._start_read(slot, unique, pid, node, body)
            return
        try:
            if op in UNANSWERED_OPS:
                if op == Op.INTERRUPT and len(body) >= FUSE_INTERRUPT_IN.size:
                    self._interrupt(*FUSE_INTERRUPT_IN.unpack_from(body))
                return
            try:
                answer = self._answer(op, node, body)
            except OSError as error:
                self._reply(unique, error.errno or errno.EIO)
            except struct.error:  # cut short
                self._reply(unique, errno.EINVAL)
            except SnowdropError as error:
                log.warning("%s: request %d of inode %d: %s", self._name, op, node, error)
                self._reply(unique, errno.EIO)
                if op == Op.INIT:
                    raise
            except Exception:  # a fault of ours must not stop the mount
                log.exception("%s: request %d of inode %d", self._name, op, node)
                self._reply(unique, errno.EIO)
            else:
                self._reply(unique, 0, answer)
        finally:
            self._journal.free(slot)

    def _answer(self, op: int, node: int, body: memoryview) -> bytes:
        if op == Op.OPEN:
            return self._opens.open(self._tree, node, body)
        if op == Op.RELEASE:
            return self._opens.release(self._tree, node, body)
        if op == Op.INIT:
            agreement = agree(bytes(body), passthrough_allowed=self._passthrough_allowed)
            if agreement is None:
                return (7).to_bytes(4, "little") + bytes(60)
            self._journal.agree(agreement.minor, agreement.flags)
            return agreement.reply
        if op == Op.OPENDIR and not self._journal.flags & Init.NO_OPENDIR_SUPPORT:
            return bytes(16)
        return self._answers.answer(op, node, body)

    def _interrupt(self, unique: int) -> None:
        read = self._reads.get(unique)
        if read is not None:
            self._portal.start_task_soon(self._let_go_if_killed, read)

    def _start_read(self, slot: int, unique: int, pid: int, node: int, body: memoryview) -> None:
        try:
            file = self._tree.file_index(node)
        except KeyError:
            file = -1
        if file < 0 or len(body) < FUSE_READ_IN.size:
            self._reply(unique, errno.EISDIR if file < 0 else errno.EINVAL)
            self._journal.free(slot)
            return
        _, offset, size, *_ = FUSE_READ_IN.unpack_from(body)
        length = max(0, min(size, self._tree.file_bytes(file) - offset, READ_BYTES_MAX))
        read = self._reads[unique] = _Read(slot, unique, pid, file=file, offset=offset, length=length)
        if length <= INLINE_BYTES_MAX:
            self._read_now(read, self._inline)
        else:
            self._queue.put(read)

    # --- threads that read files --------------------------------------------------------------------------

    def _read_files(self) -> None:
        buffer = memoryview(bytearray(READ_BYTES_MAX))
        while True:
            read = self._queue.get()
            if read is None:
                return
            self._read_now(read, buffer)

    def _read_now(self, read: _Read, buffer: memoryview) -> None:
        if read.data is not None:
            self._finish(read, 0, read.data)
            return
        try:
            is_here = self._source.read(read.file, read.offset, buffer[: read.length])
        except SnowdropError as error:
            self._fail(read, error)
            return
        except Exception:  # a fault of ours must not leave a reader waiting
            log.exception("%s", self._place(read))
            self._finish(read, errno.EIO)
            return
        if is_here:
            self._finish(read, 0, buffer[: read.length])
        else:
            self._portal.start_task_soon(self._bring, read)

    # --- the event loop: reads that wait ------------------------------------------------------------------

    async def _bring(self, read: _Read) -> None:
        """Gets the bytes to the node, then has a thread read them again."""
        read.attempts += 1
        try:
            if read.attempts > BRING_ATTEMPTS_MAX:
                raise TimedOutError("bytes that were brought are gone again", where=self._place(read))
            with anyio.fail_after(self._read_s_max), anyio.CancelScope() as read.scope:
                read.data = await self._source.bring(read.file, read.offset, read.length)
        except TimeoutError:
            self._fail(read, TimedOutError(f"not read within {self._read_s_max} s", where=self._place(read)))
            return
        except SnowdropError as error:
            self._fail(read, error)
            return
        except Exception:  # a fault of ours must not leave a reader waiting
            log.exception("%s", self._place(read))
            self._finish(read, errno.EIO)
            return
        if read.scope.cancelled_caught:
            self._finish(read, errno.EINTR)
        else:
            self._queue.put(read)

    async def _let_go_if_killed(self, read: _Read) -> None:
        """A killed reader does not end before its read is answered, so it is answered at once.

        Other signals do not break a read: programs do not expect that of a regular file.
        """
        while read.unique in self._reads:
            if read.scope is not None and await anyio.to_thread.run_sync(_is_being_killed, read.pid):
                read.scope.cancel()
            await anyio.sleep(KILLED_POLL_S)

    # --- answers --------------------------------------------------------------------------------------------

    def _fail(self, read: _Read, error: SnowdropError) -> None:
        log.warning("%s: read fails with EIO: %s", self._place(read), error)
        self._finish(read, errno.EIO)

    def _finish(self, read: _Read, error: int, data: bytes | memoryview = b"") -> None:
        self._reads.pop(read.unique, None)
        self._reply(read.unique, error, data)
        self._journal.free(read.slot)

    def _reply(self, unique: int, error: int, data: bytes | memoryview = b"") -> None:
        header = FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size + len(data), -error, unique)
        try:
            os.writev(self._device, [header, data])
        except OSError as failed:
            # ENOENT: answered before, or nobody waits any more. ENODEV: the mount is gone.
            if failed.errno not in {errno.ENOENT, *_GONE}:
                log.error("%s: the kernel refused an answer: %s", self._name, failed)

    def _place(self, read: _Read) -> str:
        return f"{self._name}: file {read.file}, {read.length} bytes at {read.offset}"


def _is_being_killed(pid: int) -> bool:
    """Whether thread `pid` has SIGKILL pending, or is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    pending = 0
    for line in status.splitlines():
        if line.startswith(("SigPnd:", "ShdPnd:")):
            pending |= int(line.split()[1], 16)
    return bool(pending & _SIGKILL_BIT)
