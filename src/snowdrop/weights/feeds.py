"""Where a model's bytes come from, as the stream sees it: sources and the feeds that they open.

The memory that a feed gives out belongs to whoever holds a view of it. Nothing here may call `release` on such a
view or `close` on its mapping: torch keeps the view alive, but does not export it a second time, so the call would
succeed and leave a tensor without memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from snowdrop.content.safetensors import Header
from snowdrop.weights.plan import LoadPlan, PlannedTensor

PIECE_BYTES_MAX = 16 << 20
"""Most that is copied to a device at a time."""


class Region(NamedTuple):
    """Memory that is worth registering with a device; it does not move or go while its feed is open."""

    address: int
    length: int


class Piece(NamedTuple):
    """The next bytes of a tensor, at most PIECE_BYTES_MAX, for reading; they lie within one region if any."""

    view: memoryview
    region: Region | None


class Loan(NamedTuple):
    """The bytes of a whole tensor in its file, writable; of a part, only its own bytes need to be there.

    `copies` says that whoever gets the tensor needs memory of its own, because a page at its edge is still to be
    filled: a page that is written to would not get those bytes.
    """

    view: memoryview
    copies: bool = False


class Feed(Protocol):
    """Brings the bytes of one plan. Tensors are asked for once, in the order of the plan."""

    def whole(self, tensor: PlannedTensor) -> Loan:
        """Blocks until all bytes that the tensor needs are there."""
        ...

    def pieces(self, tensor: PlannedTensor) -> Iterator[Piece]:
        """The bytes of a tensor that lies in one run, in order, each as soon as it is there."""
        ...

    def close(self) -> None:
        """Ends reading ahead. What was handed out stays."""
        ...


class Source(Protocol):
    """The tensor files of one model, in load order."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    def header(self, file: int) -> Header:
        """Blocks until it is there. Raises CorruptContentError naming file and tensor."""
        ...

    def open(self, plan: LoadPlan) -> Feed: ...


def cut_pieces(view: memoryview) -> Iterator[Piece]:
    """All of `view`, which is there already."""
    for at in range(0, len(view), PIECE_BYTES_MAX):
        yield Piece(view[at : at + PIECE_BYTES_MAX], None)


def run_of(view: memoryview, tensor: PlannedTensor) -> memoryview:
    """Of the bytes of a whole tensor, the one run that is handed out."""
    begin, length = next(tensor.spans(0), (tensor.entry.offset, 0))
    return view[begin - tensor.entry.offset :][:length]
