"""The replica's part of a measurement, in a process of its own: gets a model from the node, makes its tensors.

`python -m benchmarks.reader FD`: FD is a packet socket to `benchmarks.node`. It says "ready", gets one message
(how the model is given to a replica, and when the clock began) with the descriptors, and answers with seconds
since then: `first_s` the first tensor is usable, `usable_s` all are, one byte of each page of each
having been read as it came, `views_s` the same without the time which that reading took. Then it reads every byte
and says what memory that took, and the checksum.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import msgspec
import torch
from blake3 import blake3

from benchmarks.checkpoint import checksum_of
from benchmarks.memory import PAGE_BYTES, private_bytes
from snowdrop.weights.loaded import LoadedModel
from snowdrop.wire.replica import ModelHandle

MESSAGE_BYTES_MAX = 1 << 20
FDS_MAX = 253
WAIT_S_MAX = 600.0


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """From the node: the handle, and CLOCK_MONOTONIC when the load began (one clock for all processes)."""

    handle: ModelHandle
    begun_ns: int


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """To the node."""

    first_s: float
    views_s: float
    usable_s: float
    private_bytes: int
    tensor_bytes: int
    checksum: str


def touch(tensor: torch.Tensor) -> None:
    """Reads one byte of each page."""
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8)[::PAGE_BYTES].max()


def read(given: Given, fds: tuple[int, ...]) -> Read:
    def since_s() -> float:
        return (time.monotonic_ns() - given.begun_ns) / 1e9

    before = private_bytes()
    model = LoadedModel.from_handle(
        given.handle, fds, wait_directory=lambda: None, renew=_renew, wait_s_max=WAIT_S_MAX
    )
    first_s = 0.0
    tensors: dict[str, torch.Tensor] = {}
    touching_s = 0.0
    for name, tensor in model.tensors():
        begun = time.monotonic()
        touch(tensor)
        touching_s += time.monotonic() - begun
        first_s = first_s or since_s()
        tensors[name] = tensor
    usable_s = since_s()
    views_s = usable_s - touching_s
    digests = {name: blake3(bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
    return Read(
        first_s=first_s,
        views_s=views_s,
        usable_s=usable_s,
        private_bytes=private_bytes() - before,
        tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        checksum=checksum_of(digests),
    )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _renew() -> tuple[ModelHandle, tuple[int, ...]]:
    raise RuntimeError("the data plane went away during a measurement")


def main() -> None:
    torch.set_grad_enabled(False)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        sock.send(b"ready")
        data, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES_MAX, FDS_MAX)
        if not data:
            return
        found = read(msgspec.json.decode(data, type=Given), tuple(fds))
        for fd in fds:
            os.close(fd)
        sock.send(msgspec.json.encode(found))
        # The mapping lives until the node has looked at the system's memory.
        sock.recv(1)


if __name__ == "__main__":
    main()
