"""A session whose kernel is the test: requests that no kernel sends, and what they must not break."""

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import pytest

from fuse_helpers import DictSource, manifest_of
from snowdrop.content.fuse.journal import Journal, create_journal
from snowdrop.content.fuse.session import Session
from snowdrop.content.fuse.structs import FUSE_IN_HEADER, FUSE_OUT_HEADER, FUSE_READ_IN, Op
from snowdrop.content.fuse.tree import Tree

pytestmark = pytest.mark.anyio

FILES = {"a": b"x" * 100}
ANSWER_S_MAX = 30.0


@asynccontextmanager
async def kernel() -> AsyncIterator[socket.socket]:
    """The other end of a session's device."""
    device, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(ANSWER_S_MAX)
    journal_fd = create_journal(len(FILES))
    manifest = manifest_of(FILES)
    tree = Tree(manifest, uid=0, gid=0)
    with device, ours:
        journal = Journal(journal_fd, len(FILES))
        os.close(journal_fd)
        session = Session(device.fileno(), journal, tree, DictSource(FILES), passthrough_allowed=False)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(session.run)
                yield ours
                tasks.cancel_scope.cancel()
        finally:
            journal.close()


def request(op: int, node: int, body: bytes, unique: int = 2) -> bytes:
    return FUSE_IN_HEADER.pack(FUSE_IN_HEADER.size + len(body), op, unique, node, 0, 0, 0, 0, 0) + body


async def answer(ours: socket.socket) -> tuple[int, int, bytes]:
    """Its error, the request that it answers, and its body."""
    data = await anyio.to_thread.run_sync(ours.recv, 1 << 20)
    _, error, unique = FUSE_OUT_HEADER.unpack_from(data)
    return -error, unique, data[FUSE_OUT_HEADER.size :]


@pytest.mark.parametrize(
    "malformed",
    [
        request(Op.READ, 2, b"abc"),
        request(Op.READ, 99, b""),
        request(Op.INTERRUPT, 0, b"ab"),
        request(Op.OPEN, 2, b""),
        request(Op.READDIR, 1, b"x"),
        request(Op.BATCH_FORGET, 0, bytes(400)),
        request(4242, 1, b""),
        bytes(10),
    ],
)
async def test_a_request_that_is_cut_short_fails_alone(malformed: bytes) -> None:
    async with kernel() as ours:
        ours.send(malformed)
        ours.send(request(Op.GETATTR, 1, bytes(16), unique=3))
        error, unique, _ = await answer(ours)
        if unique != 3:
            assert error in {errno.EINVAL, errno.EISDIR, errno.ENOSYS}
            error, unique, _ = await answer(ours)
        assert (error, unique) == (0, 3)


async def test_a_read_ends_with_its_file_whatever_it_asks_for() -> None:
    async with kernel() as ours:
        for offset, size, found in ((50, 2**32 - 1, 50), (100, 10, 0), (2**64 - 1, 4096, 0), (2**63, 1, 0)):
            ours.send(request(Op.READ, 2, FUSE_READ_IN.pack(0, offset, size, 0, 0, 0, 0)))
            assert await answer(ours) == (0, 2, b"x" * found)
